"""The gate: who becomes champion, who does not, and what is remembered of it."""

from __future__ import annotations

import os
import re
import sys
import uuid
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from handmade import CREATED_AT
from harness import in_process, write_images, write_tiny_model

import pipeline
from models.file import model_version
from pipeline.errors import ChampionChangedError, ModelError, StoppedError, UsageError
from pipeline.learning import promotion
from pipeline.learning.comparison import compare
from pipeline.registry import resolve
from pipeline.registry.changes import change_champion
from pipeline.storage.bucket import BucketStorage
from pipeline.table.evaluations import evaluation_folder

sys.path.insert(0, str(Path(__file__).parent))
from drawn_evaluations import instance_rows, semantic_rows, table_of


@pytest.fixture(scope="session")
def rivals(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("rivals")
    return [write_tiny_model(folder / f"{seed}.safetensors", name="street", seed=seed) for seed in range(3)]


class Place:
    """A registry whose champion is the first rival, the others pushed; and evaluations of them."""

    def __init__(self, folder: Path, rivals: list[Path]) -> None:
        self.registry, self.dest = str(folder / "registry"), folder / "evaluated"
        self.versions = [model_version(path.read_bytes()) for path in rivals]
        for path in rivals:
            pipeline.push_model(path, self.registry, alias=None)
        change_champion(self.registry, "street", self.versions[0], "promote", instead_of=None)

    def measured(self, version: str, rows: list[dict[str, Any]], **changes: Any) -> None:
        """Evaluations of a version, as one more file of DEST."""
        marks = {"model_version": version, "evaluation_id": "abc", "evaluated_at": CREATED_AT} | changes
        folder = self.dest / evaluation_folder("street", version, marks["evaluation_id"])
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(table_of([row | marks for row in rows]), folder / f"{len(list(folder.iterdir()))}.parquet")

    def promote(self, reference: str, **settings: Any) -> promotion.Promotion:
        settings = {"evaluations": str(self.dest), "resamples": 200} | settings
        return pipeline.promote_model(reference, self.registry, **settings)  # type: ignore[no-any-return]

    def champion(self) -> str:
        return resolve("street", registry=self.registry).version

    def told(self) -> list[Any]:
        return pipeline.model_history("street", self.registry)


@pytest.fixture
def place(tmp_path: Path, rivals: list[Path]) -> Place:
    return Place(tmp_path, rivals)


def test_a_better_model_becomes_champion(place: Place) -> None:
    first, better, _ = place.versions
    place.measured(first, semantic_rows(0.3))
    place.measured(better, semantic_rows(0.2))
    done = place.promote(f"street@{better}")
    assert (done.state, done.champion_before, done.champion, done.forced) == ("promoted", first, better, False)
    assert place.champion() == better
    expected = compare(table_of(semantic_rows(0.3)), table_of(semantic_rows(0.2)), resamples=200)
    assert done.comparison == expected
    entry = place.told()[-1]
    assert (entry.number, entry.action, entry.champion_before) == (done.entry, "promote", first)
    assert entry.decision["comparison"] == expected.model_dump(mode="json")
    assert entry.decision["why"] == done.why and "better in 100.0% of the resamples" in done.why
    rule = {"confidence": 0.95, "max_class_drop": 0.02, "evaluations": ["abc", "abc"]}
    assert {name: entry.decision[name] for name in rule} == rule
    again = place.promote(f"street@{better}")
    assert again.state == "unchanged" and len(place.told()) == entry.number


@pytest.mark.parametrize(
    ("error", "settings", "words"),
    [
        (0.3, {}, "better in 50.0% of the resamples; 95.0% is asked for"),
        (0.4, {}, "95.0% is asked for and class"),
        ({2: 0.45}, {"metric": "mean_dice"}, r"resamples; class 'dog' falls by 0\.\d+, and 0.02 is allowed"),
    ],
)
def test_one_that_is_not_good_enough_is_kept_out_with_the_reason(
    place: Place, error: Any, settings: dict[str, Any], words: str
) -> None:
    first, other, _ = place.versions
    place.measured(first, semantic_rows({0: 0.3, 1: 0.3} if settings else 0.3))
    place.measured(other, semantic_rows(error))
    done = place.promote(f"street@{other}", **settings)
    assert (done.state, done.champion) == ("kept", first)
    assert re.search(words, done.why)
    assert place.champion() == first
    entry = place.told()[-1]
    assert (entry.action, entry.version, entry.aliases["champion"]) == ("keep", other, first)
    assert entry.decision["promoted"] is False and entry.decision["comparison"]["images"] == 12
    forced = place.promote(f"street@{other}", force=True, reason="the old one leaks", **settings)
    assert forced.state == "promoted" and forced.forced and "although" in forced.why
    assert place.told()[-1].reason == "the old one leaks" and place.champion() == other


def test_a_class_may_fall_by_what_is_allowed(place: Place) -> None:
    first, other, _ = place.versions
    place.measured(first, semantic_rows({0: 0.3, 1: 0.3}))
    place.measured(other, semantic_rows({2: 0.45}))
    assert place.promote(f"street@{other}", metric="mean_dice", max_class_drop=0.5).state == "promoted"


def test_instances_are_compared_by_panoptic_quality(tmp_path: Path) -> None:
    paths = [
        write_tiny_model(tmp_path / f"{seed}.safetensors", task="instance", name="street", seed=seed)
        for seed in range(2)
    ]
    place = Place(tmp_path, paths)
    place.measured(place.versions[0], instance_rows(0.4))
    place.measured(place.versions[1], instance_rows(0.9))
    done = place.promote(f"street@{place.versions[1]}", max_class_drop=0.1)
    assert done.state == "promoted" and done.comparison is not None and done.comparison.metric == "pq"


def test_the_challenger_is_what_a_bare_name_means(place: Place, rivals: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no 'challenger'"):
        place.promote("street")
    pipeline.push_model(rivals[2], place.registry)
    place.measured(place.versions[0], semantic_rows(0.3))
    place.measured(place.versions[2], semantic_rows(0.1))
    assert place.promote("street").champion == place.versions[2]
    empty = str(tmp_path / "empty")
    pipeline.push_model(rivals[1], empty)
    done = pipeline.promote_model("street", empty)
    assert (done.state, done.why, done.champion_before) == ("promoted", "street had no champion", None)


def test_what_cannot_be_decided_changes_nothing(place: Place) -> None:
    first, other, _ = place.versions
    before = place.told()
    with pytest.raises(UsageError, match=r"must be held against it: give --dataset"):
        place.promote(f"street@{other}", evaluations=None)
    with pytest.raises(UsageError, match="needs a reason"):
        place.promote(f"street@{other}", force=True, reason=" ")
    with pytest.raises(UsageError, match=rf"holds no evaluation of model version {first}"):
        place.promote(f"street@{other}")
    place.measured(first, semantic_rows(0.3))
    with pytest.raises(UsageError, match=rf"holds no evaluation of model version {other}"):
        place.promote(f"street@{other}")
    place.measured(other, semantic_rows(0.2)[1:])
    with pytest.raises(UsageError, match="not of the same images"):
        place.promote(f"street@{other}")
    with pytest.raises(ModelError, match="no model is called 'nobody'"):
        place.promote("nobody")
    with pytest.raises(ModelError, match="has no '012345678901'"):
        place.promote("street@012345678901")
    assert place.told() == before and place.champion() == first


def test_both_are_measured_where_a_data_set_is_given(place: Place, tmp_path: Path) -> None:
    """The truth is what one of them finds: that one has no fault."""
    first, perfect, _ = place.versions
    images, truth = write_images(tmp_path / "images", 6), str(tmp_path / "truth")
    quick = {"engine": "local", "threads": 1, "precision": "fp32"}
    told: list[Any] = []
    with in_process():
        pipeline.segment(source=str(images), dest=truth, model=f"street@{perfect}", registry=place.registry, **quick)
        asked: dict[str, Any] = {"dataset": truth, "split": "all", "evaluations": None, "evaluation": quick}
        with pytest.raises(StoppedError, match="same command continues"):
            place.promote(f"street@{perfect}", should_stop=lambda: True, **asked)
        assert place.champion() == first
        done = place.promote(f"street@{perfect}", listen=told.append, **asked)
    assert (done.state, done.champion) == ("promoted", perfect)
    assert done.comparison is not None
    assert (done.comparison.candidate, done.comparison.images) == (1.0, 6) and done.comparison.baseline < 1
    assert any(event.kind == "note" for event in told)
    assert place.told()[-1].decision["dataset"] == Path(truth).as_uri()
    kept = [
        path.parent.name for path in Path(place.registry, "_evaluations").glob("street/*/evaluations/*/*/*/*.parquet")
    ]
    assert set(kept) == {f"evaluation={one}" for one in place.told()[-1].decision["evaluations"]}
    assert {line.name for line in pipeline.models(place.registry)} == {"street", "nuclei-unet"}


@pytest.mark.parametrize("same", [True, False])
def test_a_promotion_that_comes_second_does_not_count(
    place: Place, monkeypatch: pytest.MonkeyPatch, same: bool
) -> None:
    """While it compares, somebody else promotes: the same version, or another."""
    first, other, third = place.versions
    place.measured(first, semantic_rows(0.3))
    place.measured(other, semantic_rows(0.2))
    faster = other if same else third

    def slow(*arguments: Any, **settings: Any) -> Any:
        change_champion(place.registry, "street", faster, "promote", instead_of=first)
        return compare(*arguments, **settings)

    monkeypatch.setattr(promotion, "compare", slow)
    if same:
        assert place.promote(f"street@{other}").state == "unchanged"
    else:
        with pytest.raises(ChampionChangedError, match=f"from {first} to {third}: nothing was changed"):
            place.promote(f"street@{other}")
    assert place.champion() == faster
    assert [one.action for one in place.told()].count("promote") == 2


@pytest.mark.s3
def test_each_place_is_reached_by_its_own_profile(
    s3_server: str, s3_client: Any, rivals: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels, registry and evaluations in three accounts; the environment knows none of them."""
    names = ("labels", "models", "counts")
    buckets = {name: f"s3://{name}-{uuid.uuid4().hex[:12]}" for name in names}
    for name in names:
        s3_client.create_bucket(Bucket=buckets[name].removeprefix("s3://"))
        with (tmp_path / "config").open("a") as config, (tmp_path / "keys").open("a") as keys:
            config.write(f"[profile {name}]\nregion = us-east-1\nendpoint_url = {s3_server}\n")
            keys.write(f"[{name}]\naws_access_key_id = {name}\naws_secret_access_key = secret\n")
    for variable in [variable for variable in os.environ if variable.startswith("AWS_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "keys"))
    opened: set[tuple[str, str | None]] = set()
    prepare = BucketStorage._prepare

    def recorded(storage: BucketStorage) -> None:
        opened.add((storage.root, storage._profile))
        prepare(storage)

    monkeypatch.setattr(BucketStorage, "_prepare", recorded)
    quick: dict[str, Any] = {"engine": "local", "threads": 1, "precision": "fp32"}
    truth, registry = f"{buckets['labels']}/truth", f"{buckets['models']}/registry"
    for path in rivals[:2]:
        pipeline.push_model(path, registry, profile="models")
    asked: dict[str, Any] = {
        "registry": registry, "dataset": truth, "split": "all", "resamples": 100, "evaluation": quick,
        "profile": "models", "dataset_profile": "labels",
    }  # fmt: skip
    with in_process():
        pipeline.segment(
            source=str(write_images(tmp_path / "images", 3)), dest=truth, model="street@challenger", registry=registry,
            dest_profile="labels", registry_profile="models", **quick,
        )  # fmt: skip
        first = model_version(rivals[0].read_bytes())
        pipeline.promote_model(f"street@{first}", **asked)
        by_default = pipeline.promote_model("street", **asked)
        elsewhere = pipeline.promote_model(
            f"street@{first}", **asked, evaluations=f"{buckets['counts']}/dest", evaluations_profile="counts"
        )
    assert (by_default.state, elsewhere.state) == ("promoted", "kept")
    seen = {(name, profile) for root, profile in opened for name in names if root.startswith(buckets[name])}
    assert seen == {(name, name) for name in names}
