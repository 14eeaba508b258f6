from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pipeline.errors import UsageError
from pipeline.learning.comparison import compare
from pipeline.learning.scores import score

sys.path.insert(0, str(Path(__file__).parent))
from drawn_evaluations import instance_rows, semantic_rows, table_of


def test_a_better_model_wins() -> None:
    worse, better = table_of(semantic_rows(0.3)), table_of(semantic_rows(0.2))
    found = compare(worse, better, resamples=200)
    assert found.baseline == score(worse, resamples=0).miou
    assert found.candidate == score(better, resamples=0).miou
    assert found.difference == found.candidate - found.baseline > 0
    assert found.interval.low > 0
    assert found.confidence == 1.0
    assert found.worst_class is None
    assert found.worst_drop == 0.0
    assert found.passes(min_confidence=0.95, max_class_drop=0.0)
    back = compare(better, worse, resamples=200)
    assert back.confidence == 0.0
    assert back.difference == -found.difference
    assert not back.passes(min_confidence=0.5, max_class_drop=1.0)


def test_a_model_against_itself_is_a_toss_up() -> None:
    table = table_of(semantic_rows(0.2))
    found = compare(table, table, resamples=100)
    assert (found.difference, found.confidence, found.worst_drop) == (0.0, 0.5, 0.0)
    assert (found.interval.low, found.interval.high) == (0.0, 0.0)


def test_a_class_that_falls_is_named_and_stops_a_promotion() -> None:
    baseline = table_of(semantic_rows({0: 0.3, 1: 0.3}))
    candidate = table_of(semantic_rows({2: 0.45}))
    found = compare(baseline, candidate, metric="mean_dice", resamples=200)
    assert found.confidence > 0.95
    assert found.worst_class == "dog"
    assert found.worst_drop == -found.class_differences["dog"] > 0
    assert set(found.class_differences) == {"ground", "cat", "dog"}
    assert found.passes(min_confidence=0.95, max_class_drop=0.5)
    assert not found.passes(min_confidence=0.95, max_class_drop=found.worst_drop / 2)


@pytest.mark.parametrize("metric", ["ap", "pq", "miou", "boundary_f1"])
def test_every_metric_of_instances(metric: str) -> None:
    found = compare(
        table_of(instance_rows(0.4)),
        table_of(instance_rows(0.9)),
        metric=metric,
        resamples=100,  # type: ignore[arg-type]
    )
    assert found.difference > 0
    assert found.confidence > 0.9


def test_pairing_sees_what_separate_intervals_do_not() -> None:
    """Images differ more than the models do; on the same resamples the difference is clear all the same."""
    rows = [semantic_rows(rate, images=20, seed=3) for rate in (0.20, 0.23)]
    better, worse = (table_of(one) for one in rows)
    found = compare(worse, better, resamples=300)
    apart = [score(table, resamples=300).intervals["miou"] for table in (worse, better)]
    paired = found.interval.high - found.interval.low
    assert found.interval.low > 0
    assert paired < sum(one.high - one.low for one in apart)


def test_only_the_same_images_and_labels_are_compared() -> None:
    rows = semantic_rows(0.2)
    table = table_of(rows)
    with pytest.raises(UsageError, match="not of the same images: 1 are in one alone"):
        compare(table, table_of(rows[1:]))
    assert (
        compare(table, table_of(rows[1:]), where="image_uri <> 's3://bucket/night/000.png'", resamples=9).images == 11
    )
    with pytest.raises(UsageError, match="0 images of the baseline and 1 of the candidate failed"):
        compare(table, table_of([*rows[1:], rows[0] | {"status": "error"}]))
    with pytest.raises(UsageError, match=r"labels of s3://bucket/.* changed between"):
        compare(table, table_of([*rows[1:], rows[0] | {"truth_crc32": 1}]))
    with pytest.raises(UsageError, match="'ap' does not apply"):
        compare(table, table, metric="ap")
    with pytest.raises(UsageError, match="no metric 'f2'"):
        compare(table, table, metric="f2")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="at least 1, not 0"):
        compare(table, table, resamples=0)
