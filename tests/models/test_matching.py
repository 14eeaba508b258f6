from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest

from models.masks import Instance, encode_rle
from models.matching import AREA_RANGES, IOU_THRESHOLDS, match_instances, panoptic_counts
from models.metrics import instance_counts

SIZE = (60, 60)


class Truth(NamedTuple):
    class_id: int
    rle: dict[str, Any]
    area: float
    is_crowd: bool = False


def mask(top: int, bottom: int, left: int, right: int) -> np.ndarray:
    found = np.zeros(SIZE, dtype=bool)
    found[top:bottom, left:right] = True
    return found


def true(*box: int, class_id: int = 1, crowd: bool = False) -> Truth:
    return Truth(class_id, encode_rle(mask(*box)), float(mask(*box).sum()), crowd)


def said(*box: int, score: float = 0.5, class_id: int = 1) -> Instance:
    return Instance(class_id, score, (0, 0, 0, 0), 0, encode_rle(mask(*box)))


def thresholds(flags: int, area: str) -> list[float]:
    """The IoU thresholds whose bit is set for this area range."""
    first = list(AREA_RANGES).index(area) * 10
    return [round(float(one), 2) for bit, one in enumerate(IOU_THRESHOLDS) if flags >> (first + bit) & 1]


def test_flags_say_where_a_match_holds() -> None:
    (found,) = match_instances([said(0, 10, 0, 8)], [true(0, 10, 0, 10)])
    assert found.objects == (1, 1, 0, 0)
    flags = int(found.matched[0])
    assert thresholds(flags, "all") == thresholds(flags, "small") == [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8]
    assert thresholds(flags, "medium") == []
    # For medium objects the one that it finds does not count, nor, where it finds none, does a small prediction.
    assert len(thresholds(int(found.ignored[0]), "medium")) == 10
    assert thresholds(int(found.ignored[0]), "small") == []


def test_the_higher_score_takes_the_object() -> None:
    pair = [said(0, 10, 0, 10, score=0.3), said(0, 10, 0, 9, score=0.9)]
    (found,) = match_instances(pair, [true(0, 10, 0, 10)])
    assert found.scores.tolist() == [0.9, 0.3]
    assert thresholds(int(found.matched[0]), "all")[-1] == 0.9
    # What the first left over at 0.95.
    assert thresholds(int(found.matched[1]), "all") == [0.95]


def test_crowds_are_found_by_any_number_and_count_for_none() -> None:
    inside = [said(0, 10, 0, 10, score=0.9), said(20, 30, 20, 30, score=0.8)]
    (found,) = match_instances(inside, [true(0, 40, 0, 40, crowd=True)])
    assert found.objects == (0, 0, 0, 0)
    assert found.matched.tolist() == [0, 0]
    assert all(len(thresholds(int(flags), area)) == 10 for flags in found.ignored for area in AREA_RANGES)


def test_an_object_that_counts_comes_before_a_crowd() -> None:
    (found,) = match_instances([said(0, 10, 0, 10)], [true(0, 40, 0, 40, crowd=True), true(0, 10, 0, 8)])
    assert thresholds(int(found.matched[0]), "all")[-1] == 0.8
    assert thresholds(int(found.ignored[0]), "all") == [0.85, 0.9, 0.95]


def test_classes_never_match_each_other() -> None:
    found = match_instances([said(0, 10, 0, 10, class_id=2)], [true(0, 10, 0, 10)])
    assert [(one.class_id, one.matched.tolist(), one.objects[0]) for one in found] == [(1, [], 1), (2, [0], 0)]


@pytest.mark.parametrize("seed", range(5))
def test_panoptic_counts_are_those_of_label_maps(seed: int) -> None:
    random = np.random.default_rng(seed)
    actual, predicted = (np.zeros(SIZE, dtype=np.int32) for _ in range(2))
    for number in range(1, 16):
        top, left = random.integers(0, 50, 2)
        actual[top : top + 9, left : left + 9] = number
        shift = random.integers(0, 4)
        predicted[top : top + 9, left + shift : left + shift + 9] = number
    objects = [Truth(1, encode_rle(actual == one), 1.0) for one in range(1, 16) if (actual == one).any()]
    instances = [
        Instance(1, 0.5, (0, 0, 0, 0), 0, encode_rle(predicted == one))
        for one in range(1, 16)
        if (predicted == one).any()
    ]
    (counts,) = panoptic_counts(instances, objects, np.zeros(SIZE, dtype=bool))
    expected = instance_counts(predicted, actual)
    assert (counts.matched, counts.predicted, counts.actual) == expected[:3]
    assert counts.matched_iou == pytest.approx(expected.matched_iou)
    assert 0 < counts.matched < counts.predicted


def test_ignored_pixels_belong_to_no_union() -> None:
    ignored = mask(0, 60, 30, 60)
    # Half beyond: the rest is the object exactly.
    (counts,) = panoptic_counts([said(0, 10, 20, 40)], [true(0, 10, 20, 30)], ignored)
    assert counts == (1, 1, 1, 1, 1.0)
    mostly_beyond = [said(40, 50, 27, 40)]
    assert panoptic_counts(mostly_beyond, [], ignored) == []
    assert panoptic_counts(mostly_beyond, [], ~ignored)[0].predicted == 1


def test_the_highest_score_has_a_pixel_and_low_scores_may_be_left_out() -> None:
    both = [said(0, 10, 0, 10, score=0.9), said(0, 10, 0, 20, score=0.4)]
    truth = [true(0, 10, 0, 10), true(0, 10, 10, 20)]
    nothing = np.zeros(SIZE, dtype=bool)
    assert panoptic_counts(both, truth, nothing) == [(1, 2, 2, 2, 2.0)]
    assert panoptic_counts(both, truth, nothing, min_score=0.5) == [(1, 1, 1, 2, 1.0)]
    covered = [said(0, 10, 0, 20, score=0.9), said(0, 10, 0, 10, score=0.4)]
    assert panoptic_counts(covered, truth, nothing)[0][:4] == (1, 0, 2, 2)


def test_crowds_are_no_objects_to_be_found() -> None:
    crowd = true(0, 20, 0, 20, crowd=True)
    assert panoptic_counts([], [crowd], mask(0, 20, 0, 20)) == []
