"""Which predicted instance is which true one, in one image. Owns: COCO's matching and panoptic matching.
Must not know: torch, files, data sets, how matches of many images become a score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from models.masks import Instance, decode_rle

#: COCO's: .50, .55 ... .95.
IOU_THRESHOLDS: NDArray[np.float64] = np.linspace(0.5, 0.95, 10)
#: COCO's, in pixels, both ends belong to it.
AREA_RANGES: Mapping[str, tuple[float, float]] = {
    "all": (0.0, 1e10),
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, 1e10),
}
#: Detections of one class in one image that are matched and kept, the highest scores first. Scores that allow fewer
#: (COCO: 1, 10, 100) take the first of these: what is matched depends on higher scores only.
KEPT_DETECTIONS = 1000


class TrueObject(Protocol):
    """One object of the truth, or a crowd."""

    @property
    def class_id(self) -> int: ...
    @property
    def rle(self) -> dict[str, Any]: ...
    @property
    def area(self) -> float: ...
    @property
    def is_crowd(self) -> bool: ...


class ClassMatches(NamedTuple):
    """COCO's matches of one class in one image, by descending score.

    Bit `area * 10 + threshold` of a flag is for the area range and the IoU threshold at these places.
    """

    class_id: int
    #: float64 [detections].
    scores: NDArray[np.float64]
    #: int64 [detections]: found an object that counts.
    matched: NDArray[np.int64]
    #: int64 [detections]: neither right nor wrong: found a crowd or an object outside of the area range, or found
    #: nothing and is outside of it itself.
    ignored: NDArray[np.int64]
    #: Objects that count, in each area range.
    objects: tuple[int, int, int, int]


class PanopticCounts(NamedTuple):
    """One class in one image: instances with an IoU above 0.5 are matched. Sums over images are counts, too."""

    class_id: int
    matched: int
    predicted: int
    actual: int
    #: Sum of the IoU of the matched pairs.
    matched_iou: float


def match_instances(predicted: Sequence[Instance], truth: Sequence[TrueObject]) -> list[ClassMatches]:
    """The matches of one image by class, ascending, for every class that is in either.

    As COCOeval of pycocotools 2 does it for masks: by descending score (equal scores in the order given) each takes the
    free object of its class with the highest IoU at or above the threshold, one that counts before one that does not.
    Crowds may be taken any number of times; their IoU is intersection over the prediction's area. A prediction's area
    is its mask's pixels, an object's is `area`.
    """
    matches = []
    for class_id in sorted({one.class_id for one in predicted} | {one.class_id for one in truth}):
        found = [one for one in predicted if one.class_id == class_id]
        order = np.argsort([-one.score for one in found], kind="stable")[:KEPT_DETECTIONS]
        found = [found[index] for index in order]
        objects = [one for one in truth if one.class_id == class_id]
        matches.append(_match_class(class_id, found, objects))
    return matches


def _match_class(class_id: int, found: list[Instance], objects: list[TrueObject]) -> ClassMatches:
    lows, highs = np.array(list(AREA_RANGES.values())).T
    areas = np.array([one.area for one in objects], dtype=np.float64)
    crowd = np.array([one.is_crowd for one in objects], dtype=bool)
    # [areas, objects]
    outside = crowd | (areas < lows[:, None]) | (areas > highs[:, None])
    rles = [one.rle for one in found]
    sizes = np.array([coco_mask.area(rle) for rle in rles], dtype=np.float64)
    small_or_large = (sizes < lows[:, None]) | (sizes > highs[:, None])
    hit = np.zeros((len(found), len(AREA_RANGES), len(IOU_THRESHOLDS)), dtype=bool)
    ignored = np.repeat(small_or_large.T[:, :, None], len(IOU_THRESHOLDS), axis=2)
    if found and objects:
        iou = coco_mask.iou(rles, [one.rle for one in objects], crowd.astype(np.uint8).tolist())
        _take(np.asarray(iou, dtype=np.float64), crowd, outside, hit, ignored)
    flags = np.int64(1) << np.arange(len(AREA_RANGES) * len(IOU_THRESHOLDS), dtype=np.int64).reshape(hit.shape[1:])
    return ClassMatches(
        class_id=class_id,
        scores=np.array([one.score for one in found], dtype=np.float64),
        matched=(hit * flags).sum(axis=(1, 2)),
        ignored=(ignored * flags).sum(axis=(1, 2)),
        objects=tuple((~outside).sum(axis=1).tolist()),
    )


def _take(
    iou: NDArray[np.float64],
    crowd: NDArray[np.bool_],
    outside: NDArray[np.bool_],
    hit: NDArray[np.bool_],
    ignored: NDArray[np.bool_],
) -> None:
    """Fills `hit` and `ignored` [detections, areas, thresholds]; `outside` is [areas, objects]."""
    thresholds = np.minimum(IOU_THRESHOLDS, 1 - 1e-10)
    taken = np.zeros((outside.shape[0], len(thresholds), outside.shape[1]), dtype=bool)
    area_index, threshold_index = np.indices(taken.shape[:2])
    for number, row in enumerate(iou):
        near = np.flatnonzero(row >= thresholds[0])
        if not near.size:
            continue
        # Backwards, since argmax gives the first of equals and COCO takes the last.
        near = near[::-1]
        free = (row[near] >= thresholds[:, None]) & (~taken[:, :, near] | crowd[near])
        counts = free & ~outside[:, None, near]
        # Objects that count come first, whatever their IoU.
        choice = np.where(
            counts.any(axis=2),
            np.where(counts, row[near], -1.0).argmax(axis=2),
            np.where(free, row[near], -1.0).argmax(axis=2),
        )
        found = free.any(axis=2)
        chosen = near[choice]
        beyond = outside[area_index, chosen]
        taken[area_index[found], threshold_index[found], chosen[found]] = True
        hit[number] = found & ~beyond
        ignored[number] = np.where(found, beyond, ignored[number])


def panoptic_counts(
    predicted: Sequence[Instance],
    truth: Sequence[TrueObject],
    ignored: NDArray[np.bool_],
    *,
    min_score: float = 0.0,
) -> list[PanopticCounts]:
    """The counts of one image by class, ascending, for every class that is in either. (Kirillov et al., Panoptic
    Segmentation, 2019.)

    Instances are made disjoint first: of predictions the highest score has a pixel, of objects the last. Predictions
    below `min_score` are left out; one that the others cover whole counts as wrong. Pixels of `ignored` bool [h, w]
    (unknown truth, crowds) belong to no union, and a prediction of which they are more than half, which matches
    nothing, is not counted.
    """
    kept = sorted((one for one in predicted if one.score >= min_score), key=lambda one: one.score)
    objects = [one for one in truth if not one.is_crowd]
    ours = _painted([one.rle for one in kept], ignored.shape)
    theirs = _painted([one.rle for one in objects], ignored.shape)
    theirs[ignored] = len(objects) + 1
    width = len(kept) + 1
    overlap = np.bincount(theirs.ravel() * width + ours.ravel(), minlength=(len(objects) + 2) * width)
    overlap = overlap.reshape(len(objects) + 2, width)
    void = overlap[-1, 1:]
    sizes, areas = overlap[:, 1:].sum(axis=0), overlap[1:-1].sum(axis=1)
    inner = overlap[1:-1, 1:]
    same = np.array([one.class_id for one in objects])[:, None] == np.array([one.class_id for one in kept])[None]
    union = areas[:, None] + (sizes - void)[None] - inner
    iou = np.where(same.reshape(inner.shape), inner / np.maximum(union, 1), 0.0)
    hit = iou > 0.5
    counted = hit.any(axis=0) | (void * 2 <= sizes)
    counts = []
    classes_predicted = np.array([one.class_id for one in kept], dtype=np.int64)
    classes_actual = np.array([one.class_id for one in objects], dtype=np.int64)
    for class_id in sorted({*classes_predicted[counted].tolist(), *classes_actual[areas > 0].tolist()}):
        own = hit[classes_actual == class_id]
        counts.append(
            PanopticCounts(
                class_id=class_id,
                matched=int(np.count_nonzero(own)),
                predicted=int(np.count_nonzero(counted & (classes_predicted == class_id))),
                actual=int(np.count_nonzero((areas > 0) & (classes_actual == class_id))),
                matched_iou=float(iou[classes_actual == class_id][own].sum()),
            )
        )
    return counts


def _painted(rles: Sequence[Mapping[str, Any]], shape: tuple[int, ...]) -> NDArray[np.int64]:
    """int64 [h, w]: 0, or 1 .. n; later ones win."""
    labels = np.zeros(shape, dtype=np.int64)
    for number, rle in enumerate(rles, start=1):
        labels[decode_rle(rle)] = number
    return labels
