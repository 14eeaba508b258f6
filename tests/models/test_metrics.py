from __future__ import annotations

import math

import numpy as np
import pytest

from models.metrics import (
    InstanceCounts,
    PixelCounts,
    confusion_matrix,
    instance_counts,
    mean_iou,
    pixel_counts,
)


def labels_of(*boxes: tuple[int, int, int, int]) -> np.ndarray:
    labels = np.zeros((20, 20), dtype=np.int32)
    for index, (top, bottom, left, right) in enumerate(boxes, start=1):
        labels[top:bottom, left:right] = index * 5
    return labels


def test_pixel_counts() -> None:
    predicted = np.array([[True, True, False]])
    counts = pixel_counts(predicted, np.array([[True, False, True]]))
    assert counts == PixelCounts(intersection=1, predicted=2, actual=2)
    assert counts.iou == pytest.approx(1 / 3)
    assert counts.plus(counts).iou == counts.iou
    assert PixelCounts().iou == 1.0
    with pytest.raises(ValueError, match="differ in shape"):
        pixel_counts(predicted, predicted.T)


def test_identical_instances() -> None:
    labels = labels_of((0, 5, 0, 5), (10, 15, 10, 15))
    counts = instance_counts(labels, labels)
    assert counts == InstanceCounts(matched=2, predicted=2, actual=2, matched_iou=2.0)
    assert counts.f1 == counts.panoptic_quality == 1.0


def test_partial_matches() -> None:
    actual = labels_of((0, 10, 0, 10), (12, 16, 12, 16))
    predicted = labels_of((0, 10, 0, 8), (12, 16, 14, 18), (18, 20, 0, 2))
    counts = instance_counts(predicted, actual)
    assert counts[:3] == (1, 3, 2)
    assert counts.matched_iou == pytest.approx(0.8)
    assert counts.f1 == pytest.approx(2 / 5)
    assert counts.panoptic_quality == pytest.approx(2 * 0.8 / 5)
    assert instance_counts(predicted, actual, iou_threshold=0.85).matched == 0


def test_an_iou_of_exactly_the_threshold_is_no_match() -> None:
    assert instance_counts(labels_of((0, 1, 0, 2)), labels_of((0, 1, 0, 1))).matched == 0


def test_nothing_and_everything() -> None:
    nothing, full = labels_of(), np.full((20, 20), 3, dtype=np.int32)
    assert instance_counts(nothing, nothing) == InstanceCounts()
    assert InstanceCounts().f1 == 1.0
    assert instance_counts(full, full)[:3] == (1, 1, 1)
    assert instance_counts(full, nothing)[:3] == (0, 1, 0)
    assert instance_counts(nothing, full)[:3] == (0, 0, 1)


def test_counts_add_up() -> None:
    left, right = InstanceCounts(1, 2, 3, 0.75), InstanceCounts(2, 2, 2, 1.5)
    assert left.plus(right) == InstanceCounts(3, 4, 5, 2.25)


def test_ambiguous_threshold() -> None:
    with pytest.raises(ValueError, match=r"below 0\.5"):
        instance_counts(labels_of(), labels_of(), iou_threshold=0.4)


def test_confusion_matrix_and_mean_iou() -> None:
    actual = np.array([[0, 0, 1, 1, 255]], dtype=np.uint8)
    predicted = np.array([[0, 1, 1, 1, 2]], dtype=np.uint8)
    confusion = confusion_matrix(predicted, actual, 3, ignore_id=255)
    assert confusion.tolist() == [[1, 1, 0], [0, 2, 0], [0, 0, 0]]
    assert mean_iou(confusion) == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert math.isnan(mean_iou(np.zeros((2, 2), dtype=np.int64)))
    with pytest.raises(ValueError, match="class id 255"):
        confusion_matrix(predicted, actual, 3)
