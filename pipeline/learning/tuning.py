"""Chooses the post-processing of an instance model on the data that it was trained on.
Owns: what is tried and by which figure it is chosen. Must not know: training, files.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.card import WatershedPostprocessing
from models.metrics import InstanceCounts, instance_counts
from models.postprocessing import split_instances
from models.segmenter import Segmenter
from pipeline.learning.dataset import Dataset
from pipeline.learning.evaluation import predict

#: Field by field, in this order; the best value of each is kept while the next is tried.
CANDIDATES: dict[str, tuple[float, ...]] = {
    "interior_threshold": (0.3, 0.4, 0.5, 0.6, 0.7),
    "foreground_threshold": (0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7),
    "score_threshold": (0.7, 0.75, 0.8, 0.85, 0.9),
    "min_marker_px": (1, 4, 8, 12),
    "min_area_px": (8, 12, 16, 20, 25, 30),
}


class Evidence(NamedTuple):
    """What the network says about one image, and the truth. All [h, w]."""

    interior: NDArray[np.uint8]
    foreground: NDArray[np.uint8]
    actual: NDArray[np.int32]


def tune_watershed(segmenter: Segmenter, dataset: Dataset, *, max_images: int = 200) -> WatershedPostprocessing:
    """The settings with the best panoptic quality on the first `max_images` images, by a search along each
    field.

    Give it the training split: figures on another split then stay untouched by the choice. Deterministic.
    Raises ValueError when the model is not an instance model.
    """
    if not isinstance(segmenter.postprocessing, WatershedPostprocessing):
        raise ValueError(f"model {segmenter.card.name!r} has no watershed to tune")
    evidence = []
    for item in dataset.items[:max_images]:
        maps = predict(segmenter, dataset.image(item)).instance_evidence or {}
        evidence.append(Evidence(maps["interior"], maps["foreground"], dataset.instance_labels(item)))
    best = segmenter.postprocessing
    best_quality = panoptic_quality(evidence, best)
    for field, values in CANDIDATES.items():
        for settings in [best.model_copy(update={field: value}) for value in values]:
            quality = panoptic_quality(evidence, settings)
            if quality > best_quality:
                best, best_quality = settings, quality
    return best


def panoptic_quality(evidence: list[Evidence], settings: WatershedPostprocessing) -> float:
    """Pooled over the images, at an IoU above 0.5."""
    total = InstanceCounts()
    for interior, foreground, actual in evidence:
        total = total.plus(instance_counts(split_instances(interior, foreground, settings), actual))
    return total.panoptic_quality
