from __future__ import annotations

import numpy as np
import pytest

from models.masks import Instance, encode_rle
from models.refinement import SuppressionSettings
from models.suppression import kept_instances


def masked(rows: slice, columns: slice, *, score: float, class_id: int = 1, side_px: int = 40) -> Instance:
    mask = np.zeros((side_px, side_px), dtype=bool)
    mask[rows, columns] = True
    box = (float(columns.start), float(rows.start), float(columns.stop - columns.start), float(rows.stop - rows.start))
    return Instance(class_id, score, box, int(mask.sum()), encode_rle(mask))


def test_masks_are_compared_not_boxes() -> None:
    mask = np.zeros((40, 40), dtype=bool)
    mask[:30, 5] = mask[29, 5:30] = True
    ell = Instance(1, 0.8, (5.0, 0.0, 25.0, 30.0), int(mask.sum()), encode_rle(mask))
    square = masked(slice(0, 28), slice(7, 30), score=0.9)
    # Their boxes have an IoU of 0.86; their masks do not meet.
    assert kept_instances([ell, square], SuppressionSettings(iou_threshold=0.1)) == [1, 0]


def test_masks_of_one_class_or_of_all() -> None:
    instances = [
        masked(slice(0, 10), slice(0, 10), score=0.5),
        masked(slice(0, 10), slice(0, 9), score=0.7, class_id=2),
        masked(slice(0, 10), slice(1, 10), score=0.6),
        masked(slice(20, 30), slice(1, 10), score=0.6),
    ]
    assert kept_instances(instances, SuppressionSettings()) == [1, 2, 3]
    assert kept_instances(instances, SuppressionSettings(across_classes=True)) == [1, 3]
    assert kept_instances(instances, SuppressionSettings(iou_threshold=0.9)) == [1, 2, 3, 0]
    assert kept_instances(instances, SuppressionSettings(score_threshold=0.65)) == [1]
    assert kept_instances(instances, SuppressionSettings(max_count=2)) == [1, 2]
    assert kept_instances([], SuppressionSettings()) == []


def test_what_is_suppressed_does_not_suppress() -> None:
    chain = [masked(slice(0, 10), slice(at, at + 10), score=score) for at, score in ((0, 0.9), (4, 0.8), (8, 0.7))]
    assert kept_instances(chain, SuppressionSettings(iou_threshold=0.4)) == [0, 2]


def test_masks_of_different_images_are_refused() -> None:
    instances = [masked(slice(0, 4), slice(0, 4), score=0.5, side_px=side_px) for side_px in (40, 50)]
    with pytest.raises(ValueError, match="masks of one size"):
        kept_instances(instances, SuppressionSettings())


@pytest.mark.parametrize("across_classes", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_many_masks_are_kept_as_the_greedy_rule_says(seed: int, across_classes: bool) -> None:
    random = np.random.default_rng(seed)
    masks, instances = [], []
    for _ in range(60):
        top, left = random.integers(0, 28, 2)
        mask = np.zeros((40, 40), bool)
        mask[top : top + random.integers(4, 12), left : left + random.integers(4, 12)] = True
        masks.append(mask)
        # Few different scores, so that there are ties.
        score, class_id = random.integers(1, 12) / 12, int(random.integers(0, 3))
        instances.append(Instance(class_id, float(score), (0.0, 0.0, 1.0, 1.0), int(mask.sum()), encode_rle(mask)))
    expected: list[int] = []
    for index in sorted(range(60), key=lambda i: (-instances[i].score, i)):
        rivals = [k for k in expected if across_classes or instances[k].class_id == instances[index].class_id]
        if all((masks[index] & masks[k]).sum() <= 0.3 * (masks[index] | masks[k]).sum() for k in rivals):
            expected.append(index)
    settings = SuppressionSettings(iou_threshold=0.3, across_classes=across_classes, max_count=50)
    assert kept_instances(instances, settings) == expected[:50]
    assert len(expected) < 60
