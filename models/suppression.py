"""Which of several detections are kept: score threshold, non-maximum suppression, the best k. Owns: the order of these,
and ties. Must not know: networks, cards, tables.

Detections are taken from the highest score to the lowest, those of equal score in their given order. One is kept
unless its IoU with one that was kept before is above the threshold (greedy non-maximum suppression).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torchvision.ops import batched_nms, nms

from models.masks import Instance
from models.refinement import SuppressionSettings


def kept_boxes(
    boxes_N4: torch.Tensor, scores_N: torch.Tensor, labels_N: torch.Tensor, settings: SuppressionSettings
) -> torch.Tensor:
    """Indices int64 [K] of the boxes that are kept, from the highest score to the lowest, equal ones in given order.

    `boxes_N4` float x1, y1, x2, y2 in pixels; `scores_N` float, a NaN is below every threshold; `labels_N` integers.
    Deterministic, and unlike torchvision's `batched_nms` on float32 exact for large images with many classes: it moves
    each class to a place of its own, which costs digits, so here that is done in float64. Raises ValueError when
    shapes do not fit or a box that passes the threshold is not finite (which on a GPU waits for it).
    """
    count = len(boxes_N4)
    if boxes_N4.shape != (count, 4) or scores_N.shape != (count,) or labels_N.shape != (count,):
        raise ValueError(
            f"boxes, scores and labels must be (N, 4), (N,) and (N,), got {tuple(boxes_N4.shape)}, "
            f"{tuple(scores_N.shape)} and {tuple(labels_N.shape)}"
        )
    order = torch.argsort(scores_N, descending=True, stable=True)
    order = order[scores_N[order] >= settings.score_threshold]
    if settings.iou_threshold is not None and len(order):
        boxes = boxes_N4[order].double()
        if not bool(boxes.isfinite().all()):
            raise ValueError("a box above the score threshold holds NaN or infinity: the network's output is broken")
        # Ranks for scores: no two are equal, so nothing is left to the order in which a device sorts.
        ranks = torch.arange(len(order), 0, -1, device=boxes.device, dtype=torch.float64)
        if settings.across_classes:
            kept = nms(boxes, ranks, settings.iou_threshold)
        else:
            # Classes are moved apart by the greatest coordinate: a negative one could still reach its neighbour.
            kept = batched_nms(boxes - boxes.min(), ranks, labels_N[order].long(), settings.iou_threshold)
        order = order[kept.sort().values]
    return order[: settings.max_count]


def kept_instances(instances: Sequence[Instance], settings: SuppressionSettings) -> list[int]:
    """Indices of the instances that are kept, by the IoU of their masks; in the order of `kept_boxes`.

    Masks are compared as run lengths and never decoded. Watershed instances of one image do not overlap: for them
    only the threshold and `max_count` do anything. Raises ValueError for masks of images of different sizes.
    """
    sizes = {tuple(instance.rle["size"]) for instance in instances}
    if len(sizes) > 1:
        raise ValueError(f"instances of one image have masks of one size, got {sorted(sizes)}")
    scores = np.array([instance.score for instance in instances], dtype=np.float64)
    order = [int(i) for i in np.argsort(-scores, kind="stable") if scores[i] >= settings.score_threshold]
    if settings.iou_threshold is not None and len(order) > 1:
        rles = [instances[index].rle for index in order]
        overlaps = np.asarray(coco_mask.iou(rles, rles, [0] * len(rles))) > settings.iou_threshold
        if not settings.across_classes:
            classes = np.array([instances[index].class_id for index in order])
            overlaps &= classes[:, None] == classes[None, :]
        suppressed = np.zeros(len(order), dtype=bool)
        for rank, row in enumerate(overlaps):
            if not suppressed[rank]:
                suppressed[rank + 1 :] |= row[rank + 1 :]
        order = [index for index, gone in zip(order, suppressed, strict=True) if not gone]
    return order[: settings.max_count]
