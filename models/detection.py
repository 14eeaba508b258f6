"""Mask R-CNN on a batch of images of one size: boxes, classes, scores and small masks of each. Owns: the forward pass
around torchvision's parts, and which detections are kept. Must not know: cards' classes, uploads, full-size masks.

The backbone runs on the batch, everything that depends on what was found on each image alone: an image's detections do
not depend on its neighbours, and are those of torchvision's own forward on that single image. torchvision's parts are
used as they are; only the padding to the largest neighbour is not.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import maskrcnn_inference
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.ops import boxes as box_ops

from models.card import DetectionsPostprocessing


def detect(
    network: Any,
    images_NCHW: torch.Tensor,
    settings: DetectionsPostprocessing,
    *,
    wanted: list[bool],
    dtype: torch.dtype = torch.float32,
) -> list[dict[str, torch.Tensor] | None]:
    """For each image that is wanted: `boxes`, `scores`, `labels`, `masks` as in `pasting.Detections`; `entropy` float32
    [K], of the class probabilities over its maximum, 0..1; `broken` bool: something was NaN or infinite. On the device.

    `images_NCHW` float32, normalised, all of one size and without padding. `dtype` is what the network's backbone
    computes in (as `models.precision` has left it); the rest is float32. Synchronises with the device.
    """
    height, width = images_NCHW.shape[2:]
    resized_NCHW = _resized(images_NCHW, network.transform.min_size[-1], network.transform.max_size)
    size = (resized_NCHW.shape[2], resized_NCHW.shape[3])
    step = network.transform.size_divisible
    padded_NCHW = torch.nn.functional.pad(resized_NCHW, (0, -size[1] % step, 0, -size[0] % step))
    inputs = padded_NCHW.to(dtype).contiguous(memory_format=torch.channels_last)
    features = {name: level.float() for name, level in network.backbone(inputs).items()}
    # The poolers keep what they derive from the first sizes that they see.
    for pooler in (network.roi_heads.box_roi_pool, network.roi_heads.mask_roi_pool):
        pooler.scales = pooler.map_levels = None
    found: list[dict[str, torch.Tensor] | None] = []
    for index in range(len(wanted)):
        if not wanted[index]:
            found.append(None)
            continue
        one = {name: level[index : index + 1] for name, level in features.items()}
        result = _detect_one(network, padded_NCHW[index : index + 1], one, size, settings)
        # As torchvision's resize_boxes, which waits for the device four times.
        result["boxes"][:, 0::2] *= float(np.float32(width) / np.float32(size[1]))
        result["boxes"][:, 1::2] *= float(np.float32(height) / np.float32(size[0]))
        found.append(result)
    return found


def _resized(images_NCHW: torch.Tensor, min_size_px: int, max_size_px: int) -> torch.Tensor:
    """As torchvision's GeneralizedRCNNTransform."""
    height, width = images_NCHW.shape[2:]
    scale = min(min_size_px / min(height, width), max_size_px / max(height, width))
    return torch.nn.functional.interpolate(
        images_NCHW, scale_factor=scale, mode="bilinear", recompute_scale_factor=True, align_corners=False
    )


def _detect_one(
    network: Any,
    image_1CHW: torch.Tensor,
    features: dict[str, torch.Tensor],
    size: tuple[int, int],
    settings: DetectionsPostprocessing,
) -> dict[str, torch.Tensor]:
    """The steps of torchvision's RegionProposalNetwork.forward and RoIHeads.forward, in evaluation, for one image."""
    rpn, heads = network.rpn, network.roi_heads
    levels = list(features.values())
    objectness, deltas = rpn.head(levels)
    anchors = rpn.anchor_generator(ImageList(image_1CHW, [size]), levels)
    counts = [int(level[0].numel()) for level in objectness]
    objectness, deltas = concat_box_prediction_layers(objectness, deltas)
    proposals = rpn.box_coder.decode(deltas, anchors).view(1, -1, 4)
    boxes_of_images, _ = rpn.filter_proposals(proposals, objectness, [size], counts)

    pooled = heads.box_roi_pool(features, boxes_of_images, [size])
    class_logits, box_deltas = heads.box_predictor(heads.box_head(pooled))
    boxes = heads.box_coder.decode(box_deltas, boxes_of_images)
    kept = _best(boxes, class_logits, size, settings)

    mask_features = heads.mask_head(heads.mask_roi_pool(features, [kept["boxes"]], [size]))
    mask_logits = heads.mask_predictor(mask_features)
    kept["masks"] = maskrcnn_inference(mask_logits, [kept["labels"]])[0][:, 0]
    watched = (objectness, proposals, class_logits, box_deltas, mask_logits)
    kept["broken"] = ~torch.stack([tensor.isfinite().all() for tensor in watched]).all()
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
