"""From the matches of many images to average precision. Owns: COCO's accumulation, for any weights of the images.
Must not know: torch, tables, how matches are made.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

#: COCO's: 0, .01 ... 1.
RECALL_THRESHOLDS: NDArray[np.float64] = np.linspace(0.0, 1.0, 101)


class RankedDetections(NamedTuple):
    """Detections of one class in many images, by descending score (equal scores by image, then by rank)."""

    #: intp [detections]: index of the image.
    image: NDArray[np.intp]
    #: int64 [detections]: place among the detections of its class in its image, from 0.
    rank: NDArray[np.int64]
    #: int64 [detections], as in `models.matching.ClassMatches`.
    matched: NDArray[np.int64]
    ignored: NDArray[np.int64]


def average_precision(
    detections: RankedDetections,
    bit: int,
    weights: NDArray[np.int64],
    objects: NDArray[np.int64],
    *,
    max_detections: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(average precision, recall), each float64 [samples], of one class for one area range and threshold, whose flags
    are `bit`. NaN in samples without an object that counts.

    `weights` int64 [samples, images]: how often an image is in a sample; all 1 is the corpus itself. `objects` int64
    [samples]: objects that count. Precision at a recall is the highest at that recall or above, and its mean is over
    RECALL_THRESHOLDS (COCOeval.accumulate of pycocotools 2).
    """
    samples = weights.shape[0]
    flag = np.int64(1) << bit
    counted = (detections.rank < max_detections) & (detections.ignored & flag == 0)
    hit = detections.matched[counted] & flag != 0
    if not hit.any():
        zero = np.where(objects > 0, 0.0, np.nan)
        return zero, zero.copy()
    drawn = weights[:, detections.image[counted]]
    right = np.cumsum(drawn * hit, axis=1)
    # Precision has its maxima, and recall its steps, at detections that are right: no others are looked at.
    seen = np.cumsum(drawn, axis=1)[:, hit]
    right = right[:, hit]
    precision = right / (seen + np.spacing(1))
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    # One sorted array of all samples: each sample's counts are raised above those of the sample before.
    step = int(right[:, -1].max()) + 1
    raised = right + step * np.arange(samples)[:, None]
    needed = np.minimum(_needed(objects), step) + step * np.arange(samples)[:, None]
    steps = right.shape[1]
    first = np.searchsorted(raised.ravel(), needed.ravel()).reshape(needed.shape) - steps * np.arange(samples)[:, None]
    padded = np.concatenate([precision, np.zeros((samples, 1))], axis=1)
    at_recall = np.take_along_axis(padded, first, axis=1)
    recall = np.divide(right[:, -1], objects, out=np.full(samples, np.nan), where=objects > 0)
    return np.where(objects > 0, at_recall.mean(axis=1), np.nan), recall


def _needed(objects: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64 [samples, 101]: the fewest objects n for which n / objects, in float64, is at least the recall."""
    total = np.maximum(objects, 1)[:, None]
    fewest = np.ceil(RECALL_THRESHOLDS * total).astype(np.int64)
    fewest -= ((fewest - 1) / total >= RECALL_THRESHOLDS) & (fewest > 0)
    fewest += fewest / total < RECALL_THRESHOLDS
    return fewest
