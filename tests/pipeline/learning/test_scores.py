from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.errors import UsageError
from pipeline.learning.bootstrap import interval_of, resampled
from pipeline.learning.scores import confusion_matrix, image_scores, score
from pipeline.learning.tallies import tally

sys.path.insert(0, str(Path(__file__).parent))
from drawn_evaluations import NAMES, instance_rows, semantic_rows, table_of


@pytest.fixture(scope="module")
def semantic() -> pa.Table:
    return table_of(semantic_rows(0.2))


@pytest.fixture(scope="module")
def instance() -> pa.Table:
    return table_of(instance_rows(0.7))


def test_pixel_scores_are_sums_over_rows(semantic: pa.Table) -> None:
    scores = score(semantic, resamples=0)
    matrix = confusion_matrix(semantic)
    assert matrix.sum() == 12 * (24 * 32 - 5)
    right, actual, predicted = np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0)
    for index, name in enumerate(NAMES[:3]):
        assert scores.iou_per_class[name] == right[index] / (actual + predicted - right)[index]
        assert scores.dice_per_class[name] == 2 * right[index] / (actual + predicted)[index]
        assert scores.precision_per_class[name] == right[index] / predicted[index]
        assert scores.recall_per_class[name] == right[index] / actual[index]
    assert scores.miou == pytest.approx(np.mean([scores.iou_per_class[name] for name in NAMES[:3]]))
    assert scores.pixel_accuracy == right.sum() / matrix.sum()
    iou = right[:3] / (actual + predicted - right)[:3]
    assert scores.frequency_weighted_iou == pytest.approx((iou * actual[:3]).sum() / actual.sum())
    assert 0 < scores.boundary_f1 < 1  # type: ignore[operator]
    assert scores.left_out == ("nowhere",)
    assert scores.iou_per_class["nowhere"] is None
    assert scores.ap is scores.pq is scores.ap_per_class is scores.instance_f1 is None


def test_instance_scores(instance: pa.Table) -> None:
    scores = score(instance, resamples=0)
    rows = instance.to_pylist()
    totals = np.array(
        [
            [one["matched"], one["predicted"], one["actual"], one["matched_iou"]]
            for row in rows
            for one in row["panoptic"]
        ]
    ).sum(axis=0)
    assert totals[2] == 12 * 6
    assert scores.instance_precision == totals[0] / totals[1]
    assert scores.instance_recall == totals[0] / totals[2]
    assert scores.instance_f1 == pytest.approx(2 * totals[0] / (totals[1] + totals[2]))
    assert scores.pq_per_class is not None
    assert scores.pq == pytest.approx((scores.pq_per_class["cat"] + scores.pq_per_class["dog"]) / 2)  # type: ignore[operator]
    assert 0 < scores.ap < scores.ap50 < 1  # type: ignore[operator]
    assert scores.ap_small == scores.ap
    assert scores.ap_large is None
    assert scores.ar1 < scores.ar10 == scores.ar100  # type: ignore[operator]


def test_perfect_and_worthless() -> None:
    perfect, worthless = (score(table_of(semantic_rows(error)), resamples=0) for error in (0.0, 1.0))
    assert perfect.miou == perfect.pixel_accuracy == perfect.boundary_f1 == perfect.frequency_weighted_iou == 1.0
    assert worthless.miou == worthless.pixel_accuracy == worthless.mean_dice == 0.0


def test_order_of_rows_and_tables_does_not_matter(instance: pa.Table) -> None:
    order = np.random.default_rng(0).permutation(instance.num_rows)
    shuffled = pa.concat_tables([instance.take(pa.array(half)) for half in np.split(order, 2)])
    assert score(shuffled, resamples=20) == score(instance, resamples=20)


def test_any_column_selects(semantic: pa.Table) -> None:
    night = score(semantic, where="image_uri LIKE '%/night/%'", resamples=0)
    dark = score(semantic, where="brightness < 0.035 AND width = 32", resamples=0)
    assert (night.images, dark.images) == (4, 4)
    assert night.miou != dark.miou
    by_hand = semantic.filter(pa.compute.less(semantic["brightness"], 0.035))
    assert dark == score(by_hand, resamples=0)
    for where, message in (("no_column = 1", "cannot be evaluated"), ("width > 100", "no image was measured")):
        with pytest.raises(UsageError, match=message):
            score(semantic, where=where)


def test_what_cannot_be_scored(semantic: pa.Table) -> None:
    with pytest.raises(UsageError, match=r"s3://bucket/day/001\.png was measured more than once"):
        score(pa.concat_tables([semantic, semantic.slice(1, 1)]))
    with pytest.raises(UsageError, match="does not name its classes"):
        score(semantic.replace_schema_metadata(None))
    with pytest.raises(UsageError, match="class id 2, and 2 classes are named"):
        score(semantic, class_names=("a", "b"))
    with pytest.raises(UsageError, match="max_detections must be 1 to 1000"):
        score(semantic, max_detections=2000)


def test_a_resample_is_the_table_with_its_rows_repeated(instance: pa.Table) -> None:
    counts = tally(instance)
    weights = np.random.default_rng(5).integers(0, 4, (3, len(counts.uris)))
    together = counts.main_scores(weights)
    for sample in range(3):
        rows = [
            row | {"image_uri": f"{row['image_uri']}#{copy}"}
            for row, times in zip(instance.sort_by("image_uri").to_pylist(), weights[sample], strict=True)
            for copy in range(times)
        ]
        alone = score(table_of(rows), resamples=0)
        for name in ("miou", "boundary_f1", "pixel_accuracy", "pq", "instance_f1", "ap", "ap50", "ap75"):
            assert together[name][sample] == pytest.approx(getattr(alone, name), abs=1e-12), name


def test_intervals(semantic: pa.Table, instance: pa.Table) -> None:
    few, many = (score(table_of(semantic_rows(0.2, images=count)), resamples=300) for count in (10, 160))
    widths = [scores.intervals["miou"].high - scores.intervals["miou"].low for scores in (few, many)]
    # The standard error falls with the root of the number of images.
    assert 2.5 < widths[0] / widths[1] < 6.5
    interval = many.intervals["miou"]
    assert interval.low < many.miou < interval.high  # type: ignore[operator]
    assert set(many.iou_intervals_per_class) == set(NAMES[:3])
    assert score(semantic, resamples=50, seed=1) == score(semantic, resamples=50, seed=1)
    assert score(semantic, resamples=50, seed=1).intervals != score(semantic, resamples=50, seed=2).intervals
    assert {"ap", "ap50", "ap75", "pq", "instance_f1", "miou"} <= score(instance, resamples=50).intervals.keys()
    assert score(instance, resamples=0).intervals == {}


def test_intervals_hold_the_mean_as_often_as_they_say() -> None:
    """Of normal numbers, whose mean is 0; the percentile interval is a little narrow for 40 of them."""
    random = np.random.default_rng(11)
    holds = 0
    for trial in range(200):
        numbers = random.normal(size=40)
        drawn = resampled(
            lambda weights, numbers=numbers: {"mean": weights @ numbers / 40}, 40, samples=300, seed=trial
        )
        interval = interval_of(drawn["mean"], 0.9)
        holds += interval is not None and interval.low <= 0 <= interval.high
    assert 160 <= holds <= 196


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, instance: pa.Table) -> None:
    whole = score(instance, resamples=40)
    monkeypatch.setattr("pipeline.learning.bootstrap._CHUNK", 100)
    assert score(instance, resamples=40) == whole


def test_nothing_to_measure_has_no_interval() -> None:
    assert interval_of(np.array([math.nan]), 0.9) is None


def test_the_worst_images_come_first(semantic: pa.Table, instance: pa.Table) -> None:
    for table, name in ((semantic, "miou"), (instance, "pq")):
        ranked = image_scores(table)
        assert list(ranked.values()) == sorted(ranked.values())
        assert len(ranked) == 12
        uri, value = next(iter(ranked.items()))
        assert getattr(score(table, where=f"image_uri = '{uri}'", resamples=0), name) == pytest.approx(value)
