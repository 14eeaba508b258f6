"""Which of an image's objects are kept, once its tiles have been merged: non-maximum suppression by mask, the best k.
Owns: the order of these, and ties. Must not know: networks (whose own boxes `models.detection` suppresses), tables.

Objects are taken from the highest score to the lowest, those of equal score in their given order. One is kept unless
its IoU with one that was kept before is above the threshold (greedy non-maximum suppression).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pycocotools import mask as coco_mask

from models.masks import Instance
from models.refinement import SuppressionSettings


def kept_instances(instances: Sequence[Instance], settings: SuppressionSettings) -> list[int]:
    """Indices of the instances that are kept, from the highest score to the lowest, equal ones in given order.

    Masks are compared as run lengths and never decoded, and only where their boxes meet: memory grows with the number
    of instances, not with its square. Raises ValueError for masks of images of different sizes.
    """
    sizes = {tuple(instance.rle["size"]) for instance in instances}
    if len(sizes) > 1:
        raise ValueError(f"instances of one image have masks of one size, got {sorted(sizes)}")
    scores = np.array([instance.score for instance in instances], dtype=np.float64)
    order = [int(i) for i in np.argsort(-scores, kind="stable") if scores[i] >= settings.score_threshold]
    if settings.iou_threshold is not None and len(order) > 1:
        order = _greedy([instances[index] for index in order], order, settings.iou_threshold, settings.across_classes)
    return order[: settings.max_count]


def _greedy(ranked: Sequence[Instance], indices: Sequence[int], threshold: float, across_classes: bool) -> list[int]:
    """Of `ranked` instances, the `indices` of those that none before them suppresses."""
    rles = [one.rle for one in ranked]
    # Of the masks, not the network's: these need not hold all pixels.
    boxes_N4 = np.asarray(coco_mask.toBbox(rles), np.float64).reshape(-1, 4)
    starts_N2, ends_N2 = boxes_N4[:, :2], boxes_N4[:, :2] + boxes_N4[:, 2:]
    classes = np.array([one.class_id for one in ranked])
    kept = np.zeros(len(ranked), np.bool_)
    for rank in range(len(ranked)):
        rivals = kept[:rank] & (starts_N2[:rank] < ends_N2[rank]).all(axis=1)
        rivals &= (ends_N2[:rank] > starts_N2[rank]).all(axis=1)
        if not across_classes:
            rivals &= classes[:rank] == classes[rank]
        before = [rles[rival] for rival in np.flatnonzero(rivals)]
        kept[rank] = not before or bool(coco_mask.iou([rles[rank]], before, [0] * len(before)).max() <= threshold)
    return [index for index, keep in zip(indices, kept, strict=True) if keep]
