"""What a network says about one image. Owns: its fields, and how they are made of what comes back from a device or of
tiles. Must not know: devices, networks, post-processing. Thread safe.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.card import Card
from models.masks import Instance
from models.mosaic import DetectionMosaic, Mosaic
from models.pasting import Detections
from models.reduction import QUANTUM
from models.runs import paint
from models.seams import InstanceEvidence


class Prediction(NamedTuple):
    """What the network says about one image of h × w pixels. Arrays are on the CPU and own their memory."""

    #: uint8 [h, w], before post-processing. Empty for detections, of which post-processing makes them.
    class_ids: NDArray[np.uint8]
    #: int64 [C], in the order of `card.classes`: of how many pixels `confidence` is the mean. Zeros for detections.
    pixels: NDArray[np.int64]
    #: float64 [C]: mean, over the pixels of the class, of the probability of the class; NaN where it is
    #: absent. Detections: mean score of those of the class.
    confidence: NDArray[np.float64]
    #: Mean over all pixels of the probability of the pixel's class, 0..1; detections: mean score, 0 where there are
    #: none. NaN if the network put out NaN or infinity anywhere: then nothing in this prediction means anything.
    mean_confidence: float
    #: Mean over all pixels (or detections; 0 where there are none) of the entropy of the network's channels divided by
    #: its maximum, 0..1.
    mean_entropy: float
    #: Watershed models: `interior` and `foreground` probabilities as uint8 [h, w] (p * 255, rounded). Else
    #: None.
    instance_evidence: dict[str, NDArray[np.uint8]] | None
    #: Models of detections only.
    detections: Detections | None = None
    #: Images in tiles only: for watershed models in place of `instance_evidence`, for detections the objects found.
    whole: InstanceEvidence | list[Instance] | None = None


def pixels_prediction(arrays: Mapping[str, NDArray[Any]], height: int, width: int) -> Prediction:
    """Of a network of pixels: `arrays` as `models.reduction` gives them, for one image of height × width."""
    pixels = np.array(arrays["pixels"], dtype=np.int64)
    sums = np.asarray(arrays["confidence"], dtype=np.int64)
    with np.errstate(invalid="ignore"):
        confidence = sums / (pixels * float(QUANTUM))
    scale = float("nan") if arrays["broken"] else 1 / (height * width * QUANTUM)
    evidence = None
    if "interior" in arrays:
        evidence = {name: _cropped(arrays[name], height, width) for name in ("interior", "foreground")}
    return Prediction(
        class_ids=_cropped(arrays["class_ids"], height, width),
        pixels=pixels,
        confidence=confidence,
        mean_confidence=float(sums.sum()) * scale,
        mean_entropy=float(arrays["entropy"]) * scale,
        instance_evidence=evidence,
    )


def detections_prediction(arrays: Mapping[str, NDArray[Any]], height: int, width: int, *, classes: int) -> Prediction:
    """Of a network that detects: `arrays` as `models.detection` gives them; `classes`, the background among them."""
    boxes, scores, labels, masks = (arrays[name].copy() for name in ("boxes", "scores", "labels", "masks"))
    counts = np.bincount(labels, minlength=classes)
    with np.errstate(invalid="ignore"):
        confidence = np.bincount(labels, weights=scores, minlength=classes) / counts
    nothing = float("nan") if arrays["broken"] else 0.0
    figures = (scores, arrays["entropy"]) if len(labels) else (np.zeros(1), np.zeros(1))
    means = [float(figure.mean(dtype=np.float64)) for figure in figures]
    return Prediction(
        class_ids=np.empty((0, 0), np.uint8),
        pixels=np.zeros(classes, np.int64),
        confidence=confidence,
        mean_confidence=means[0] + nothing,
        mean_entropy=means[1] + nothing,
        instance_evidence=None,
        detections=Detections(boxes, scores, labels, masks, height, width),
    )


def mosaic_prediction(mosaic: Mosaic | DetectionMosaic, card: Card) -> Prediction:
    """The prediction of an image all of whose tiles have been added. Raises ValueError while some are missing."""
    grid = mosaic.grid
    if isinstance(mosaic, Mosaic):
        figures = mosaic.summary()
        return Prediction(mosaic.class_ids, *figures, instance_evidence=None, whole=mosaic.evidence)
    found = mosaic.found()
    scores = np.array([one.score for one in found.instances])
    ids = np.array([one.class_id for one in found.instances], np.int64)
    confidence = [scores[ids == info.id].mean() if (ids == info.id).any() else np.nan for info in card.classes]
    return Prediction(
        class_ids=paint(found.instances, height=grid.height, width=grid.width, background_id=card.background_id or 0),
        pixels=np.zeros(len(card.classes), np.int64),
        confidence=np.array(confidence),
        mean_confidence=found.mean_confidence,
        mean_entropy=found.mean_entropy,
        instance_evidence=None,
        whole=found.instances,
    )


def _cropped(map_HW: NDArray[Any], height: int, width: int) -> NDArray[np.uint8]:
    return np.array(map_HW[:height, :width], dtype=np.uint8)
