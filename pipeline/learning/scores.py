"""Scores of a table of evaluations, with what chance leaves open. Owns: their names and when they apply. Must not
know: how counts are made, which store a table is in.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from scipy import sparse

from pipeline.learning.bootstrap import Interval, interval_of, resampled
from pipeline.learning.tallies import MAX_DETECTIONS, tally

_IMAGES_AT_ONCE = 4096


class Scores(BaseModel):
    """What a model is worth on a selection of images; 0..1 where not said otherwise, None where it does not apply.

    Counts are pooled over the images, then divided. A mean over classes is over those that occur in the truth or in the
    prediction; the others are named in `left_out`. AP and AR are COCO's, whose means are over the classes of the truth.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    images: int
    #: Rows that are errors: images that no score speaks of.
    failed: int
    class_names: tuple[str, ...]
    #: Classes in neither truth nor prediction, which no mean contains.
    left_out: tuple[str, ...]
    miou: float | None = None
    mean_dice: float | None = None
    pixel_accuracy: float | None = None
    frequency_weighted_iou: float | None = None
    boundary_f1: float | None = None
    ap: float | None = None
    ap50: float | None = None
    ap75: float | None = None
    ap_small: float | None = None
    ap_medium: float | None = None
    ap_large: float | None = None
    ar1: float | None = None
    ar10: float | None = None
    ar100: float | None = None
    ar_small: float | None = None
    ar_medium: float | None = None
    ar_large: float | None = None
    pq: float | None = None
    #: Instances with an IoU above 0.5, pooled over the classes.
    instance_f1: float | None = None
    instance_precision: float | None = None
    instance_recall: float | None = None
    iou_per_class: dict[str, float | None]
    dice_per_class: dict[str, float | None]
    precision_per_class: dict[str, float | None]
    recall_per_class: dict[str, float | None]
    boundary_f1_per_class: dict[str, float | None]
    ap_per_class: dict[str, float | None] | None = None
    pq_per_class: dict[str, float | None] | None = None
    #: Share of the resamples within an interval.
    confidence: float
    resamples: int
    #: Of one class in one image, which AP, and AR by size, take.
    max_detections: int
    #: By the score's name; scores that are None, or were not resampled, have none.
    intervals: dict[str, Interval]
    iou_intervals_per_class: dict[str, Interval]


def score(
    table: pa.Table,
    *,
    where: str | None = None,
    class_names: Sequence[str] | None = None,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    max_detections: int = MAX_DETECTIONS,
) -> Scores:
    """Scores of the rows for which the SQL condition `where` holds. Equal arguments give equal scores, in whatever
    order the rows are. `resamples` 0: no intervals. `max_detections`: how many detections of one class in one image AP
    takes (COCO: 100; images with more objects need more). Raises UsageError as `tally` does.
    """
    counts = tally(table, where=where, class_names=class_names, max_detections=max_detections)
    names = counts.class_names
    once = np.ones((1, len(counts.uris)), dtype=np.int64)
    point = counts.main_scores(once) | counts.other_precision_scores(once)
    values = {name: array[0] for name, array in point.items()}
    drawn = resampled(counts.main_scores, len(counts.uris), samples=resamples, seed=seed, widest=counts.longest_ranking)
    intervals = {name: interval_of(array, confidence) for name, array in drawn.items() if array.ndim == 1}
    by_class = drawn["iou_per_class"].T if drawn else ()
    by_name = {name: interval_of(array, confidence) for name, array in zip(names, by_class, strict=False)}
    return Scores(
        images=len(counts.uris),
        failed=counts.failed,
        class_names=names,
        left_out=tuple(name for name, dice in zip(names, values["dice_per_class"], strict=True) if np.isnan(dice)),
        confidence=confidence,
        resamples=resamples,
        max_detections=max_detections,
        intervals={name: found for name, found in intervals.items() if found},
        iou_intervals_per_class={name: found for name, found in by_name.items() if found},
        **{name: _plain(value, names) for name, value in values.items()},  # type: ignore[arg-type]
    )


def confusion_matrix(
    table: pa.Table, *, where: str | None = None, class_names: Sequence[str] | None = None
) -> NDArray[np.int64]:
    """Pixels int64 [classes, classes], row = actual, column = predicted."""
    return tally(table, where=where, class_names=class_names).confusion()


def image_scores(
    table: pa.Table, *, where: str | None = None, class_names: Sequence[str] | None = None
) -> dict[str, float]:
    """One score an image, by URI, the worst first: PQ where objects are told apart, else mIoU. Images in which there
    is nothing to find and nothing was found are left out.
    """
    counts = tally(table, where=where, class_names=class_names)
    alone = sparse.eye_array(len(counts.uris), dtype=np.int64, format="csr")
    found: dict[str, float] = {}
    for start in range(0, len(counts.uris), _IMAGES_AT_ONCE):
        weights = alone[start : start + _IMAGES_AT_ONCE]
        name = "miou" if counts.detections is None else "pq"
        scores = (counts.pixel_scores if counts.detections is None else counts.instance_scores)(weights)[name]
        found |= zip(counts.uris[start : start + _IMAGES_AT_ONCE], scores.tolist(), strict=True)
    kept = {uri: value for uri, value in found.items() if not np.isnan(value)}
    return dict(sorted(kept.items(), key=lambda pair: (pair[1], pair[0])))


def _plain(value: NDArray[np.float64], class_names: tuple[str, ...]) -> float | dict[str, float | None] | None:
    if value.ndim == 0:
        return None if np.isnan(value) else float(value)
    return {name: None if np.isnan(one) else float(one) for name, one in zip(class_names, value, strict=True)}
