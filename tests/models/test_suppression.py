from __future__ import annotations

import numpy as np
import pytest
import torch

from models.masks import Instance, encode_rle
from models.refinement import SuppressionSettings
from models.suppression import kept_boxes, kept_instances

ALL = SuppressionSettings(iou_threshold=None)


def box_iou(first: np.ndarray, second: np.ndarray) -> float:
    sides = np.minimum(first[2:], second[2:]) - np.maximum(first[:2], second[:2])
    shared = float(np.prod(sides.clip(0)))
    return shared / float(np.prod(first[2:] - first[:2]) + np.prod(second[2:] - second[:2]) - shared)


def greedy(boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, settings: SuppressionSettings) -> list[int]:
    kept: list[int] = []
    for index in sorted(range(len(boxes)), key=lambda i: (-scores[i], i)):
        rivals = (k for k in kept if settings.across_classes or labels[k] == labels[index])
        if scores[index] >= settings.score_threshold and (
            settings.iou_threshold is None
            or all(box_iou(boxes[index], boxes[k]) <= settings.iou_threshold for k in rivals)
        ):
            kept.append(index)
    return kept[: settings.max_count]


def detections(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = np.random.default_rng(seed)
    corners = random.uniform(-20, 80, (count, 2))
    boxes = np.concatenate([corners, corners + random.uniform(10, 40, (count, 2))], axis=1).astype(np.float32)
    # Few different scores, so that there are ties.
    scores = (random.integers(1, 12, count) / 12).astype(np.float32)
    return torch.tensor(boxes), torch.tensor(scores), torch.tensor(random.integers(0, 3, count))


@pytest.mark.parametrize(
    "settings",
    [
        SuppressionSettings(),
        SuppressionSettings(iou_threshold=0.2, across_classes=True),
        SuppressionSettings(iou_threshold=0.3, score_threshold=0.4, max_count=7),
        SuppressionSettings(iou_threshold=None, max_count=20),
    ],
)
@pytest.mark.parametrize("seed", range(5))
def test_boxes_are_kept_as_the_greedy_rule_says(settings: SuppressionSettings, seed: int) -> None:
    boxes, scores, labels = detections(60, seed)
    kept = kept_boxes(boxes, scores, labels, settings)
    assert kept.dtype == torch.int64
    expected = greedy(boxes.numpy().astype(np.float64), scores.numpy(), labels.numpy(), settings)
    assert kept.tolist() == expected
    assert 0 < len(expected) < 60


def test_many_boxes_take_the_other_way_through_torchvision() -> None:
    boxes, scores, labels = detections(1200, 9)
    settings = SuppressionSettings(iou_threshold=0.4)
    expected = greedy(boxes.numpy().astype(np.float64), scores.numpy(), labels.numpy(), settings)
    assert kept_boxes(boxes, scores, labels, settings).tolist() == expected


def test_classes_do_not_meet_on_large_images() -> None:
    """In float32, 20,000 px and 300 classes leave a quarter of a pixel: not enough for an IoU at the threshold."""
    box = torch.tensor([[19000.0, 19000.0, 19010.0, 19010.0], [19000.0, 19000.0, 19010.0, 19005.1]])
    boxes, labels = box.repeat(2, 1), torch.tensor([0, 0, 300, 300])
    kept = kept_boxes(boxes, torch.ones(4), labels, SuppressionSettings(iou_threshold=0.505))
    assert kept.tolist() == [0, 2]


def test_a_box_that_reaches_out_of_the_image_meets_no_other_class() -> None:
    boxes = torch.tensor([[90.0, 90.0, 100.0, 100.0], [-11.0, -11.0, -1.0, -1.0]])
    assert kept_boxes(boxes, torch.tensor([0.9, 0.8]), torch.tensor([0, 1]), SuppressionSettings()).tolist() == [0, 1]


@pytest.mark.parametrize("across_classes", [False, True])
def test_equal_scores_go_by_their_order(across_classes: bool) -> None:
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0]]).repeat(6, 1) + torch.arange(6).view(-1, 1) * 100
    settings = SuppressionSettings(max_count=3, across_classes=across_classes)
    assert kept_boxes(boxes, torch.full((6,), 0.5), torch.arange(6) % 2, settings).tolist() == [0, 1, 2]
    same = torch.zeros(6, 4) + torch.tensor([0.0, 0.0, 10.0, 10.0])
    assert kept_boxes(same, torch.full((6,), 0.5), torch.zeros(6).long(), settings).tolist() == [0]


def test_nothing_and_nan() -> None:
    none = kept_boxes(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0).long(), SuppressionSettings())
    assert none.tolist() == []
    boxes, scores, labels = detections(4, 0)
    scores[1] = torch.nan
    assert 1 not in kept_boxes(boxes, scores, labels, ALL).tolist()
    boxes[1] = torch.nan
    assert 1 not in kept_boxes(boxes, scores, labels, SuppressionSettings()).tolist()
    boxes[2] = torch.inf
    with pytest.raises(ValueError, match="NaN or infinity"):
        kept_boxes(boxes, scores, labels, SuppressionSettings())
    with pytest.raises(ValueError, match=r"\(N, 4\), \(N,\) and \(N,\)"):
        kept_boxes(boxes, scores[:3], labels, SuppressionSettings())


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
