"""Mask R-CNN on a batch of images of one size: boxes, classes, scores and small masks of each. Owns: the forward pass
around torchvision's parts, and which detections are kept. Must not know: cards' classes, uploads, full-size masks.

What has one shape for every image runs on the batch; what depends on how much was found, on each image alone or in a
frame that is large enough for any: an image's detections do not depend on its neighbours, and are those of
torchvision's own forward on that single image. torchvision's parts are used as they are, but for the padding to the
largest neighbour and, on a CPU, the pooling of regions.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import maskrcnn_inference
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.ops import boxes as box_ops

from models.card import DetectionsPostprocessing
from models.pooling import RegionMaps

#: Images whose regions go through the head of boxes together: a GPU would be idle between those of one.
_IMAGES_AT_ONCE = {"cpu": 1, "cuda": 8}


def detect(
    network: Any,
    images_NCHW: torch.Tensor,
    settings: DetectionsPostprocessing,
    *,
    wanted: list[bool],
    dtype: torch.dtype = torch.float32,
    images_at_once: int | None = None,
) -> list[dict[str, torch.Tensor] | None]:
    """For each image that is wanted: `boxes`, `scores`, `labels`, `masks` as in `pasting.Detections`; `entropy` float32
    [K], of the class probabilities over its maximum, 0..1; `broken` bool: something was NaN or infinite. On the device.

    `images_NCHW` float32, normalised, all of one size and without padding. `dtype` is what the network's backbone
    computes in (as `models.precision` has left it); the rest is float32. `images_at_once` go through the head of boxes
    together; None: as suits the device. Synchronises with the device.
    """
    count, _, height, width = images_NCHW.shape
    resized_NCHW = _resized(images_NCHW, network.transform.min_size[-1], network.transform.max_size)
    size = (resized_NCHW.shape[2], resized_NCHW.shape[3])
    step = network.transform.size_divisible
    padded_NCHW = torch.nn.functional.pad(resized_NCHW, (0, -size[1] % step, 0, -size[0] % step))
    inputs = padded_NCHW.to(dtype).contiguous(memory_format=torch.channels_last)
    features = network.backbone(inputs)
    regions = _proposed(network, padded_NCHW, features, size, wanted)
    found: list[dict[str, torch.Tensor] | None] = []
    group = images_at_once or _IMAGES_AT_ONCE["cpu" if images_NCHW.is_cpu else "cuda"]
    for first in range(0, count, group):
        some = {name: level[first : first + group] for name, level in features.items()}
        found += _detect_some(network, some, regions[first : first + group], size, settings, padded=group > 1)
    for result in found:
        if result is not None:
            # As torchvision's resize_boxes, which waits for the device four times.
            result["boxes"][:, 0::2] *= float(np.float32(width) / np.float32(size[1]))
            result["boxes"][:, 1::2] *= float(np.float32(height) / np.float32(size[0]))
    return found


def _resized(images_NCHW: torch.Tensor, min_size_px: int, max_size_px: int) -> torch.Tensor:
    """As torchvision's GeneralizedRCNNTransform."""
    height, width = images_NCHW.shape[2:]
    scale = min(min_size_px / min(height, width), max_size_px / max(height, width))
    return torch.nn.functional.interpolate(
        images_NCHW, scale_factor=scale, mode="bilinear", recompute_scale_factor=True, align_corners=False
    )


class _Regions(NamedTuple):
    """Where objects may be in one image: boxes [R, 4], and whether all numbers on the way were finite."""

    boxes: torch.Tensor
    finite: torch.Tensor


def _proposed(
    network: Any,
    images_NCHW: torch.Tensor,
    features: dict[str, torch.Tensor],
    size: tuple[int, int],
    wanted: list[bool],
) -> list[_Regions | None]:
    """The steps of torchvision's RegionProposalNetwork.forward, in evaluation."""
    rpn = network.rpn
    levels = list(features.values())
    objectness, deltas = rpn.head(levels)
    # Those of one image: all have one size. Of the maps, only their sizes and type count, which must be float32.
    anchors = rpn.anchor_generator(ImageList(images_NCHW[:1], [size]), objectness)
    counts = [int(level[0].numel()) for level in objectness]
    objectness, deltas = concat_box_prediction_layers(objectness, deltas)
    proposals_NA4 = rpn.box_coder.decode(deltas, anchors * len(wanted)).view(len(wanted), -1, 4)
    objectness_NA = objectness.view(len(wanted), -1)
    chosen = [index for index, one in enumerate(wanted) if one]
    if not chosen:
        return [None] * len(wanted)
    if len(chosen) < len(wanted):
        proposals_NA4, objectness_NA = (
            torch.cat([rows[index : index + 1] for index in chosen]) for rows in (proposals_NA4, objectness_NA)
        )
    boxes_of_images, _ = rpn.filter_proposals(proposals_NA4, objectness_NA, [size] * len(chosen), counts)
    finite_N = objectness_NA.isfinite().all(dim=1) & proposals_NA4.isfinite().all(dim=2).all(dim=1)
    regions: list[_Regions | None] = [None] * len(wanted)
    for index, boxes, finite in zip(chosen, boxes_of_images, finite_N, strict=True):
        regions[index] = _Regions(boxes, finite)
    return regions


def _detect_some(
    network: Any,
    features: dict[str, torch.Tensor],
    regions: list[_Regions | None],
    size: tuple[int, int],
    settings: DetectionsPostprocessing,
    *,
    padded: bool,
) -> list[dict[str, torch.Tensor] | None]:
    """The steps of torchvision's RoIHeads.forward, in evaluation. `padded`: the head of boxes takes as many regions for
    each image as there can be, so that what it computes for one does not depend on how many its neighbours have.
    """
    heads = network.roi_heads
    nothing = next(iter(features.values())).new_zeros((0, 4), dtype=torch.float32)
    boxes = [nothing if one is None else one.boxes for one in regions]
    maps = RegionMaps(features, [size] * len(regions))
    pooled = maps.pool(heads.box_roi_pool, boxes)
    counts = [len(one) for one in boxes]
    if padded:
        most = network.rpn.post_nms_top_n()
        pooled = torch.cat(
            [torch.nn.functional.pad(one, (0, 0) * 3 + (0, most - len(one))) for one in pooled.split(counts)]
        )
        counts = [most] * len(regions)
    class_logits, box_deltas = heads.box_predictor(heads.box_head(pooled))
    kept: list[dict[str, torch.Tensor] | None] = []
    finite: list[torch.Tensor] = []
    answers = zip(class_logits.split(counts), box_deltas.split(counts), strict=True)
    for one, answer in zip(regions, answers, strict=True):
        if one is None:
            kept.append(None)
            continue
        logits_RC, deltas = (rows[: len(one.boxes)] for rows in answer)
        boxes_RC4 = heads.box_coder.decode(deltas, [one.boxes])
        kept.append(_best(boxes_RC4, logits_RC, size, settings))
        finite.append(one.finite & logits_RC.isfinite().all() & deltas.isfinite().all())

    kept_boxes = [nothing if one is None else one["boxes"] for one in kept]
    pooled_masks = maps.pool(heads.mask_roi_pool, kept_boxes).split([len(one) for one in kept_boxes])
    flags = iter(finite)
    for result, pooled in zip(kept, pooled_masks, strict=True):
        if result is None:
            continue
        mask_logits = heads.mask_predictor(heads.mask_head(pooled))
        result["masks"] = maskrcnn_inference(mask_logits, [result["labels"]])[0][:, 0]
        result["broken"] = ~(next(flags) & mask_logits.isfinite().all())
    return kept


def _best(
    boxes_RC4: torch.Tensor, logits_RC: torch.Tensor, size: tuple[int, int], settings: DetectionsPostprocessing
) -> dict[str, torch.Tensor]:
    """As RoIHeads.postprocess_detections, with suppression over classes as well where the settings say so."""
    regions, classes = logits_RC.shape
    log_probabilities = logits_RC.log_softmax(dim=1)
    entropy = -(log_probabilities.exp() * log_probabilities).sum(dim=1) / math.log(classes)
    scores = logits_RC.softmax(dim=1)[:, 1:].reshape(-1)
    boxes = box_ops.clip_boxes_to_image(boxes_RC4, size)[:, 1:].reshape(-1, 4)
    labels = torch.arange(1, classes, device=boxes.device).repeat(regions)
    region = torch.arange(regions, device=boxes.device).repeat_interleave(classes - 1)
    keep = torch.where(scores > settings.score_threshold)[0]
    keep = keep[box_ops.remove_small_boxes(boxes[keep], min_size=1e-2)]
    groups = labels[keep] if settings.nms_per_class else torch.zeros_like(labels[keep])
    keep = keep[box_ops.batched_nms(boxes[keep], scores[keep], groups, settings.nms_iou)[: settings.top_k]]
    return {
        "boxes": boxes[keep],
        "scores": scores[keep],
        "labels": labels[keep],
        "entropy": entropy[region[keep]].clamp(0, 1),
    }
