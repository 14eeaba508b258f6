"""How good a mask is: counts first, scores after. Owns: the counts per image, their addition and the scores.
Must not know: torch, networks, files, data sets.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class PixelCounts(NamedTuple):
    """Pixels of one class (or of the foreground), of one image or summed over many."""

    intersection: int = 0
    predicted: int = 0
    actual: int = 0

    def plus(self, other: PixelCounts) -> PixelCounts:
        return PixelCounts(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

    @property
    def iou(self) -> float:
        """Intersection over union; 1.0 where both masks are empty."""
        union = self.predicted + self.actual - self.intersection
        return self.intersection / union if union else 1.0


class InstanceCounts(NamedTuple):
    """Matched and unmatched instances, of one image or summed over many."""

    matched: int = 0
    predicted: int = 0
    actual: int = 0
    #: Sum of the IoU of the matched pairs.
    matched_iou: float = 0.0

    def plus(self, other: InstanceCounts) -> InstanceCounts:
        return InstanceCounts(
            self.matched + other.matched,
            self.predicted + other.predicted,
            self.actual + other.actual,
            self.matched_iou + other.matched_iou,
        )

    @property
    def f1(self) -> float:
        """2 TP / (2 TP + FP + FN); 1.0 where there is nothing to find and nothing was found."""
        total = self.predicted + self.actual
        return 2 * self.matched / total if total else 1.0

    @property
    def panoptic_quality(self) -> float:
        """Kirillov et al., Panoptic Segmentation, 2019: matched IoU / (TP + FP/2 + FN/2)."""
        total = self.predicted + self.actual
        return 2 * self.matched_iou / total if total else 1.0


def pixel_counts(predicted: NDArray[np.bool_], actual: NDArray[np.bool_]) -> PixelCounts:
    """Counts of two bool masks of one shape. Raises ValueError when the shapes differ."""
    _check_shapes(predicted, actual)
    return PixelCounts(
        intersection=int(np.count_nonzero(predicted & actual)),
        predicted=int(np.count_nonzero(predicted)),
        actual=int(np.count_nonzero(actual)),
    )


def confusion_matrix(
    predicted: NDArray[np.uint8], actual: NDArray[np.uint8], classes: int, *, ignore_id: int | None = None
) -> NDArray[np.int64]:
    """Pixels int64 [classes, classes], row = actual id, column = predicted id. Pixels whose actual id is
    `ignore_id` are left out. Raises ValueError when the shapes differ or an id is not below `classes`.
    """
    _check_shapes(predicted, actual)
    rows, columns = actual.ravel().astype(np.int64), predicted.ravel().astype(np.int64)
    if ignore_id is not None:
        counted = rows != ignore_id
        rows, columns = rows[counted], columns[counted]
    highest = max(int(rows.max(initial=0)), int(columns.max(initial=0)))
    if highest >= classes:
        raise ValueError(f"class id {highest} found where ids are below {classes}")
    return np.bincount(rows * classes + columns, minlength=classes * classes).reshape(classes, classes)


def sparse_confusion(
    predicted: NDArray[np.uint8], actual: NDArray[np.uint8], *, ignore_id: int | None = None
) -> NDArray[np.int64]:
    """int64 [n, 3] of one image: actual id, predicted id, pixels; in this order, only pairs that occur. Pixels whose
    actual id is `ignore_id` are left out. Raises ValueError when the shapes differ.
    """
    _check_shapes(predicted, actual)
    counts = np.bincount(actual.ravel().astype(np.int64) * 256 + predicted.ravel(), minlength=1 << 16)
    if ignore_id is not None:
        counts[ignore_id * 256 : ignore_id * 256 + 256] = 0
    pairs = np.flatnonzero(counts)
    return np.stack([pairs // 256, pairs % 256, counts[pairs]], axis=1)


class ClassCounts(NamedTuple):
    """Pixels by class, [..., classes], of one sample of images or of many: what pixel scores are made of."""

    intersection: NDArray[np.generic]
    predicted: NDArray[np.generic]
    actual: NDArray[np.generic]

    @property
    def iou(self) -> NDArray[np.float64]:
        """Intersection over union; NaN for a class that is in neither."""
        return ratio(self.intersection, self.predicted + self.actual - self.intersection)  # type: ignore[operator]

    @property
    def dice(self) -> NDArray[np.float64]:
        """2 |p t| / (|p| + |t|), which is also F1; NaN for a class that is in neither."""
        return ratio(2 * self.intersection, self.predicted + self.actual)  # type: ignore[operator]

    @property
    def precision(self) -> NDArray[np.float64]:
        """Share of what was predicted that is right; NaN for a class that was never predicted."""
        return ratio(self.intersection, self.predicted)

    @property
    def recall(self) -> NDArray[np.float64]:
        """Share of what is there that was predicted; NaN for a class that is nowhere."""
        return ratio(self.intersection, self.actual)

    @property
    def pixel_accuracy(self) -> NDArray[np.float64]:
        """[...]: share of all pixels that are right."""
        return ratio(self.intersection.sum(axis=-1), self.actual.sum(axis=-1))

    @property
    def frequency_weighted_iou(self) -> NDArray[np.float64]:
        """[...]: IoU weighted by the pixels that each class really has (Long et al., FCN, 2015)."""
        actual = np.asarray(self.actual, dtype=np.float64)
        return ratio((np.nan_to_num(self.iou) * actual).sum(axis=-1), actual.sum(axis=-1))


def ratio(numerator: NDArray[np.generic], denominator: NDArray[np.generic]) -> NDArray[np.float64]:
    """float64 quotient; NaN where the denominator is 0."""
    over, under = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    return np.divide(over, under, out=np.full(np.broadcast(over, under).shape, np.nan), where=under != 0)


def mean_of_present(values: NDArray[np.float64], axis: int | tuple[int, ...] = -1) -> NDArray[np.float64]:
    """Mean over the values that are not NaN; NaN where all are."""
    there = ~np.isnan(values)
    return ratio(np.where(there, values, 0.0).sum(axis=axis), there.sum(axis=axis))


def mean_iou(confusion: NDArray[np.int64]) -> float:
    """Mean IoU over the classes that occur in the actual or predicted masks; NaN for an empty matrix."""
    intersection = np.diag(confusion)
    union = confusion.sum(axis=0) + confusion.sum(axis=1) - intersection
    occurs = union > 0
    return float(np.mean(intersection[occurs] / union[occurs])) if occurs.any() else float("nan")


def instance_counts(
    predicted: NDArray[np.int32], actual: NDArray[np.int32], *, iou_threshold: float = 0.5
) -> InstanceCounts:
    """Counts of two label maps int32 [h, w] (0 is background). A pair matches when its IoU is above the
    threshold.

    Above 0.5 an instance can match at most one other, so no assignment is needed. Raises ValueError below
    0.5, or when the shapes differ.
    """
    if not 0.5 <= iou_threshold < 1:
        raise ValueError(f"iou_threshold must be in 0.5 .. 1, got {iou_threshold}: below 0.5 matches are ambiguous")
    _check_shapes(predicted, actual)
    _, columns = np.unique(predicted, return_inverse=True)
    _, rows = np.unique(actual, return_inverse=True)
    columns, rows = _from_zero(predicted, columns), _from_zero(actual, rows)
    width = int(columns.max(initial=0)) + 1
    height = int(rows.max(initial=0)) + 1
    overlap = np.bincount(rows * width + columns, minlength=height * width).reshape(height, width)
    union = overlap.sum(axis=0, keepdims=True) + overlap.sum(axis=1, keepdims=True) - overlap
    iou = (overlap / np.maximum(union, 1))[1:, 1:]
    matches = iou > iou_threshold
    return InstanceCounts(
        matched=int(np.count_nonzero(matches)),
        predicted=width - 1,
        actual=height - 1,
        matched_iou=float(iou[matches].sum()),
    )


def _from_zero(labels: NDArray[np.int32], inverse: NDArray[np.intp]) -> NDArray[np.intp]:
    """Flat indices in which 0 is background even where no pixel is background."""
    return inverse.ravel() + int(labels.size > 0 and labels.min() > 0)


def _check_shapes(predicted: NDArray[np.generic], actual: NDArray[np.generic]) -> None:
    if predicted.shape != actual.shape:
        raise ValueError(f"masks differ in shape: predicted {predicted.shape}, actual {actual.shape}")
