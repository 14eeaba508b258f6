"""Two models on the same images. Owns: the paired bootstrap, and what a promotion may ask of it. Must not know: where
models are kept, how counts are made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from pipeline.errors import UsageError
from pipeline.learning.bootstrap import Interval, interval_of, resampled
from pipeline.learning.tallies import MAX_DETECTIONS, Tally, Values, tally

Metric = Literal["miou", "mean_dice", "boundary_f1", "pq", "ap"]
_PER_CLASS: dict[Metric, str] = {
    "miou": "iou_per_class",
    "mean_dice": "dice_per_class",
    "boundary_f1": "boundary_f1_per_class",
    "pq": "pq_per_class",
    "ap": "ap_per_class",
}


class Comparison(BaseModel):
    """A candidate against a baseline on the same images."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    metric: Metric
    images: int
    baseline: float
    candidate: float
    #: candidate - baseline.
    difference: float
    interval: Interval
    #: Share of the resamples in which the candidate is better; equal ones count half.
    confidence: float
    resamples: int
    #: candidate - baseline, for classes that both have a score for.
    class_differences: dict[str, float]
    #: The class that falls most, None where none falls.
    worst_class: str | None
    #: By how much it falls, at least 0.
    worst_drop: float

    def passes(self, *, min_confidence: float, max_class_drop: float) -> bool:
        """Whether the candidate is better with this confidence, and no class falls by more than that."""
        return self.confidence >= min_confidence and self.worst_drop <= max_class_drop


def compare(
    baseline: pa.Table,
    candidate: pa.Table,
    *,
    metric: Metric = "miou",
    where: str | None = None,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    max_detections: int = MAX_DETECTIONS,
) -> Comparison:
    """A paired bootstrap over images: both models are scored on the same samples, so that what is hard in an image is
    hard for both. Equal arguments give equal results.

    Raises UsageError unless both tables have measured the same images against the same labels and classes, with no
    failures; where the metric does not apply; and for less than one resample.
    """
    if resamples < 1:
        raise UsageError(f"a comparison needs resamples: give at least 1, not {resamples}")
    if metric not in _PER_CLASS:
        raise UsageError(f"no metric {metric!r} to compare by: give one of {', '.join(_PER_CLASS)}")
    pair = tuple(tally(table, where=where, max_detections=max_detections) for table in (baseline, candidate))
    _check_pair(*pair)
    images, names = len(pair[0].uris), pair[0].class_names
    once = np.ones((1, images), dtype=np.int64)
    before, after = (_scores_for(counts, metric)(once) for counts in pair)
    if any(metric not in point or np.isnan(point[metric][0]) for point in (before, after)):
        raise UsageError(f"{metric!r} does not apply to these tables: choose another of {', '.join(_PER_CLASS)}")
    changes = after[_PER_CLASS[metric]][0] - before[_PER_CLASS[metric]][0]
    differences = {name: float(change) for name, change in zip(names, changes, strict=True) if not np.isnan(change)}
    worst = min(differences, key=lambda name: differences[name], default=None)
    drop = 0.0 if worst is None else max(0.0, -differences[worst])
    drawn = [
        resampled(_scores_for(counts, metric), images, samples=resamples, seed=seed, widest=counts.longest_ranking)[
            metric
        ]
        for counts in pair
    ]
    gains = drawn[1] - drawn[0]
    # A small sample may hold nothing to score.
    gains = gains[~np.isnan(gains)]
    interval = interval_of(gains, confidence)
    if interval is None:
        raise UsageError(f"{metric!r} could be scored in none of {resamples} resamples: give more images")
    return Comparison(
        metric=metric,
        images=images,
        baseline=float(before[metric][0]),
        candidate=float(after[metric][0]),
        difference=float(after[metric][0] - before[metric][0]),
        interval=interval,
        confidence=float(np.mean(gains > 0) + np.mean(gains == 0) / 2),
        resamples=resamples,
        class_differences=differences,
        worst_class=worst if drop else None,
        worst_drop=drop,
    )


def _check_pair(ours: Tally, theirs: Tally) -> None:
    if ours.class_names != theirs.class_names:
        raise UsageError(f"the tables have different classes: {ours.class_names} and {theirs.class_names}")
    if ours.failed or theirs.failed:
        raise UsageError(
            f"{ours.failed} images of the baseline and {theirs.failed} of the candidate failed: a comparison needs all"
        )
    if ours.uris != theirs.uris:
        lone = sorted(set(ours.uris) ^ set(theirs.uris))
        raise UsageError(f"the tables are not of the same images: {len(lone)} are in one alone, such as {lone[0]}")
    changed = np.flatnonzero(ours.truth_crc32 != theirs.truth_crc32)
    if changed.size:
        raise UsageError(f"the labels of {ours.uris[changed[0]]} changed between the evaluations: evaluate both again")


def _scores_for(counts: Tally, metric: Metric) -> Callable[[NDArray[np.int64]], Values]:
    if metric == "ap":
        return counts.precision_scores
    return counts.instance_scores if metric == "pq" else counts.pixel_scores
