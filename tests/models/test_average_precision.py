from __future__ import annotations

import numpy as np
import pytest

from models.average_precision import RECALL_THRESHOLDS, RankedDetections, average_precision


def ranked(right: list[int], *, image: list[int] | None = None, ignored: list[int] | None = None) -> RankedDetections:
    count = len(right)
    columns = [np.array(column, dtype=np.int64) for column in (image or [0] * count, right, ignored or [0] * count)]
    return RankedDetections(columns[0], np.arange(count), columns[1], columns[2])


def by_hand(right: list[int], objects: int) -> float:
    """COCO's definition, one threshold after the other."""
    hits = np.cumsum(right)
    precision, recall = hits / np.arange(1, len(right) + 1), hits / objects
    return float(np.mean([max(precision[recall >= one], default=0.0) for one in RECALL_THRESHOLDS]))


def one(detections: RankedDetections, objects: int, *, most: int = 100) -> tuple[float, float]:
    images = int(detections.image.max(initial=0)) + 1
    ap, recall = average_precision(
        detections, 0, np.ones((1, images), dtype=np.int64), np.array([objects]), max_detections=most
    )
    return float(ap[0]), float(recall[0])


@pytest.mark.parametrize("seed", range(8))
def test_agrees_with_the_definition(seed: int) -> None:
    random = np.random.default_rng(seed)
    right = random.integers(0, 2, 40).tolist()
    objects = sum(right) + int(random.integers(0, 30))
    ap, recall = one(ranked(right), objects)
    assert ap == pytest.approx(by_hand(right, objects), abs=1e-12)
    assert recall == pytest.approx(sum(right) / objects)


def test_ends() -> None:
    assert one(ranked([1, 1]), 2) == (pytest.approx(1.0), 1.0)
    assert one(ranked([]), 3) == (0.0, 0.0)
    assert one(ranked([0, 0]), 3) == (0.0, 0.0)
    assert np.isnan(one(ranked([0]), 0)).all()
    assert one(ranked([0, 1]), 1, most=1) == (0.0, 0.0)


def test_what_is_ignored_is_not_there() -> None:
    assert one(ranked([1, 0, 1], ignored=[0, 1, 0]), 2) == one(ranked([1, 1]), 2)


def test_a_weight_is_so_many_copies() -> None:
    random = np.random.default_rng(3)
    right, image = random.integers(0, 2, 60), random.integers(0, 7, 60)
    weights = random.integers(0, 4, (5, 7))
    objects = weights @ np.array([9, 9, 9, 9, 9, 9, 9])
    together = average_precision(ranked(right.tolist(), image=image.tolist()), 0, weights, objects, max_detections=100)
    for sample in range(5):
        copies = np.repeat(right, weights[sample, image]).tolist()
        assert together[0][sample] == pytest.approx(by_hand(copies, int(objects[sample])), abs=1e-12)
        assert together[1][sample] == pytest.approx(sum(copies) / objects[sample])


def test_other_bits_are_other_thresholds() -> None:
    detections = ranked([1 << 7, 0])
    weights, objects = np.ones((1, 1), dtype=np.int64), np.array([1])
    assert average_precision(detections, 7, weights, objects, max_detections=9)[0][0] == pytest.approx(1.0)
    assert average_precision(detections, 6, weights, objects, max_detections=9)[0][0] == 0.0
