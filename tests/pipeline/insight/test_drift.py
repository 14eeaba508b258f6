"""Drift: no alarm where there is none, an alarm where there is one, and only comparable runs are compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from handmade import make_row
from numpy.typing import NDArray
from pydantic import ValidationError
from tables import Table

from pipeline.config import DriftConfig
from pipeline.errors import UsageError
from pipeline.insight.drift import DriftReport, compare, drift, population_stability_index
from pipeline.storage import normalize_uri

CONFIG = DriftConfig()
#: Chance alone decides: whatever is significant is an alarm.
ANY_SIZE = DriftConfig(psi_threshold=1e-9, ks_threshold=1e-9)

CAR = {"class_id": 1, "area": 1, "rle": {"size": [1, 1], "counts": b"01"}}


def sample(random: np.random.Generator, images: int, **other: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """Measures of the kinds that there are: continuous, counted, and mostly zero."""
    return {
        "mean_confidence": random.beta(8, 2, images),
        "brightness": random.beta(3, 3, images),
        "objects": random.poisson(6, images).astype(float),
        "share of road": random.beta(2, 5, images),
        "share of car": np.where(random.random(images) < 0.3, random.beta(2, 5, images), 0),
        "share of bus": np.where(random.random(images) < 0.02, random.beta(2, 5, images), 0),
    } | other


@pytest.mark.parametrize(("images", "earlier"), [(60, 60), (150, 1000), (1000, 7000)])
def test_alarms_about_nothing_are_rare(images: int, earlier: int) -> None:
    random = np.random.default_rng(1)
    rounds = 150
    alarms = sum(
        any(one.drifted for one in compare(sample(random, images), sample(random, earlier), ANY_SIZE))
        for _ in range(rounds)
    )
    assert alarms <= 2  # alpha is 1 in 1,000


@pytest.mark.parametrize(
    ("measure", "values"),
    [
        ("mean_confidence", lambda random: random.beta(6, 3, 500)),
        ("brightness", lambda random: random.beta(3, 3, 500) * 0.7),
        ("objects", lambda random: random.poisson(9, 500).astype(float)),
        ("share of road", lambda random: random.beta(4, 5, 500)),
        ("share of car", lambda random: np.where(random.random(500) < 0.6, random.beta(2, 5, 500), 0)),
        ("share of bus", lambda random: np.where(random.random(500) < 0.25, random.beta(2, 5, 500), 0)),
        ("share of road", lambda random: np.zeros(500)),
    ],
)
def test_a_shift_is_found_and_named(measure: str, values: Any) -> None:
    random = np.random.default_rng(2)
    found = compare(sample(random, 500, **{measure: values(random)}), sample(random, 3500), CONFIG)
    assert [one.measure for one in found if one.drifted] == [measure]
    assert found[0].measure == measure and found[0].p_value < 1e-6


def test_a_difference_too_small_to_matter_is_no_drift_however_sure() -> None:
    random = np.random.default_rng(3)
    before = sample(random, 100_000)
    now = sample(random, 100_000, brightness=random.beta(3, 3, 100_000) + 0.01)
    found = {one.measure: one for one in compare(now, before, CONFIG)}
    assert found["brightness"].p_value < 1e-9 and not found["brightness"].drifted
    assert found["brightness"].psi_limit == CONFIG.psi_threshold


def test_psi_by_hand() -> None:
    before = np.repeat([0.0, 1.0], 500)
    assert population_stability_index(before, before, 2) == (0.0, 2)
    now = np.repeat([0.0, 1.0], [900, 100])
    p, q = np.array([900.5, 100.5]) / 1001, np.array([500.5, 500.5]) / 1001
    psi, bins = population_stability_index(now, before, 2)
    assert bins == 2 and psi == pytest.approx(((p - q) * np.log(p / q)).sum())


@pytest.fixture
def table(tmp_path: Path) -> Table:
    return Table(normalize_uri(str(tmp_path / "dest")))


def night(table: Table, seed: int, images: int = 120, *, cars: int = 4, light: float = 0.5, **changes: Any) -> str:
    """A run of that many images, with a car in most and about that many objects."""
    random = np.random.default_rng(seed)
    rows = []
    for index in range(images):
        share = float(random.beta(2, 5))
        classes = [("road", 1 - share), ("car", share)][: 1 + (random.random() < 0.8)]
        rows.append(
            make_row(
                f"s3://photos/{seed}/{index}.jpg", "e1", mean_confidence=float(random.beta(8, 2)),
                mean_entropy=float(random.beta(2, 8)), foreground_fraction=share, contrast=0.2,
                brightness=float(random.normal(light, 0.1)),
                classes=[{"class_id": id_, "name": name, "fraction": part} for id_, (name, part) in enumerate(classes)],
                instances=[CAR] * int(random.poisson(cars)),
            )
        )  # fmt: skip
    rows += [make_row(f"s3://photos/{seed}/broken.jpg", "e1", "corrupt")]
    return table.run(*rows, shard_size=1000, **changes).run_id


def drifted(report: DriftReport) -> list[str]:
    return sorted(one.measure for one in report.shifts if one.drifted)


def test_nights_that_are_alike_and_one_that_is_not(table: Table) -> None:
    for seed in range(4):
        last = night(table, seed)
    report = drift(table.dest)
    assert (report.state, report.run_id, report.drifted) == ("compared", last, False)
    assert (report.images, report.earlier_images, len(report.earlier_runs)) == (120, 360, 3)
    assert {one.measure for one in report.shifts} == {
        "mean_confidence", "mean_entropy", "foreground_fraction", "brightness", "contrast", "objects",
        "share of car", "share of road",
    }  # fmt: skip
    dark = night(table, 9, light=0.3, cars=9)
    report = drift(table.dest)
    assert report.run_id == dark and drifted(report) == ["brightness", "objects"]
    assert report.shifts[0].drifted and report.shifts[0].mean_now != pytest.approx(report.shifts[0].mean_before, 0.1)
    assert not drift(table.dest, last).drifted  # an older run still looks at what was before it
    assert DriftReport.model_validate_json(report.model_dump_json()) == report


def test_a_class_that_is_new_or_gone_counts_as_zero_elsewhere(table: Table) -> None:
    night(table, 0)
    bus = [{"class_id": 2, "name": "bus", "fraction": 0.5}]
    table.run(*(make_row(f"s3://photos/{index}", "e1", classes=bus, brightness=0.5) for index in range(80)))
    found = {one.measure: one for one in drift(table.dest).shifts}
    assert found["share of bus"].drifted and found["share of bus"].mean_before == 0
    assert found["share of car"].drifted and found["share of car"].mean_now == 0


def test_only_runs_of_the_same_version_and_settings_compare(table: Table) -> None:
    night(table, 0, light=0.1)
    night(table, 1, settings_digest="another", light=0.2)
    night(table, 2, model_version="f" * 12, light=0.3)
    night(table, 3, model_name="street", light=0.4)
    night(table, 4, state="open", light=0.5)
    night(table, 5, state="abandoned", light=0.6)
    report = drift(table.dest, night(table, 6, light=0.1))
    assert len(report.earlier_runs) == 1 and report.earlier_images == 120 and not report.drifted


def test_the_last_seven_at_most(table: Table) -> None:
    runs = [night(table, seed, 20) for seed in range(10)]
    report = drift(table.dest, config=DriftConfig(least_images=10))
    assert report.earlier_runs == runs[2:9][::-1] and report.earlier_images == 140
    assert drift(table.dest, config=DriftConfig(least_images=10, runs=2)).earlier_runs == runs[7:9][::-1]


def test_nothing_is_said_where_there_is_nothing_to_say(table: Table) -> None:
    night(table, 0, 60)
    assert drift(table.dest).state == "no_earlier_runs"
    few = night(table, 1, 49)
    report = drift(table.dest)
    assert (report.state, report.images, report.drifted) == ("too_few_images", 49, False)
    table.run()  # of no images: not the newest that is meant
    assert drift(table.dest).run_id == few
    with pytest.raises(UsageError, match="no finished run '20200101T000000Z-000000'"):
        drift(table.dest, "20200101T000000Z-000000")


def test_large_runs_are_looked_at_in_part(table: Table) -> None:
    night(table, 0, 3000)
    night(table, 1, 3000)
    report = drift(table.dest, config=DriftConfig(sample_images=1000))
    assert report.images == 3000 and not report.drifted
    whole = {one.measure: one.mean_now for one in drift(table.dest).shifts}
    part = {one.measure: one.mean_now for one in report.shifts}
    assert part["brightness"] == pytest.approx(whole["brightness"], abs=0.02) and part != whole


def test_thresholds_are_checked() -> None:
    with pytest.raises(ValidationError):
        DriftConfig(alpha=0)
    with pytest.raises(ValidationError):
        DriftConfig(threshold=1)  # type: ignore[call-arg]


@pytest.mark.s3
def test_on_s3(s3_bucket: str) -> None:
    table = Table(f"{s3_bucket}/out")
    night(table, 0)
    night(table, 1, light=0.9)
    assert drifted(drift(table.dest)) == ["brightness"]
