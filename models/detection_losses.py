"""What Mask R-CNN is taught by. Owns: its losses on a batch, and that nothing is learnt from what is not known. Must
not know: cards, data sets, optimisers.

The steps are those of torchvision's GeneralizedRCNN, RegionProposalNetwork and RoIHeads in training, with its own
parts and formulas (Ren et al., Faster R-CNN, 2015; He et al., Mask R-CNN, 2017). Two things differ: images come
normalised by the card, and a box that lies mostly on ignored pixels is no example of the background.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import fastrcnn_loss, maskrcnn_loss
from torchvision.models.detection.rpn import concat_box_prediction_layers

#: Of its area, on ignored pixels: above this a box is not counted as background. (Detectron's threshold for crowds.)
IGNORED_SHARE = 0.7

Targets = list[dict[str, torch.Tensor]]


class DetectionTraining(torch.nn.Module):
    """A Mask R-CNN as something that maps images and targets to losses, which is what distributed training wraps."""

    def __init__(
        self, network: Any, *, anchors_per_image: int = 256, regions_per_image: int = 512, positive_share: float = 0.25
    ) -> None:
        """`network`: torchvision's MaskRCNN, whose numbers of examples become these; `positive_share` of the regions at
        most are objects.
        """
        super().__init__()
        self.network = network
        network.rpn.fg_bg_sampler.batch_size_per_image = anchors_per_image
        network.roi_heads.fg_bg_sampler.batch_size_per_image = regions_per_image
        network.roi_heads.fg_bg_sampler.positive_fraction = positive_share

    def forward(self, images: list[torch.Tensor], targets: Targets) -> dict[str, torch.Tensor]:
        """`objectness`, `proposal_boxes`, `classes`, `boxes` and `masks`: scalars in float32.

        `images` float [3, h, w], normalised, of any sizes; targets of each: `boxes` float32 [K, 4], `labels` int64 [K],
        `masks` uint8 [K, h, w], `ignored` bool [h, w]. K may be 0. Draws from torch's global random numbers. The mode
        must be training.
        """
        network: Any = self.network
        resized = [network.transform.resize(*pair) for pair in zip(images, map(_boxed, targets), strict=True)]
        batch = network.transform.batch_images([image for image, _ in resized])
        sizes = [(int(image.shape[-2]), int(image.shape[-1])) for image, _ in resized]
        truth: Targets = [target for _, target in resized]
        covered = [_Covered(one["ignored"], size) for one, size in zip(targets, sizes, strict=True)]
        features = network.backbone(batch.contiguous(memory_format=torch.channels_last))
        features = {name: level.float() for name, level in features.items()}
        proposals, losses = _propose(network.rpn, ImageList(batch, sizes), features, truth, covered)
        return losses | _judge(network.roi_heads, features, proposals, truth, covered)


class _Covered:
    """How much of a box is ignored, by sums over the image."""

    def __init__(self, ignored_HW: torch.Tensor, size: tuple[int, int]) -> None:
        """`size` (height, width) of the image as the network sees it, in which boxes are given."""
        self.size = size
        self._any = bool(ignored_HW.any())
        self._scale_y, self._scale_x = ignored_HW.shape[0] / size[0], ignored_HW.shape[1] / size[1]
        self._sums = functional.pad(ignored_HW.float().cumsum(0).cumsum(1), (1, 0, 1, 0))

    def share(self, boxes_B4: torch.Tensor) -> torch.Tensor:
        """float32 [B], 0..1, of the boxes' area, to the nearest pixel; what lies outside the image is not ignored."""
        if not self._any:
            return boxes_B4.new_zeros(len(boxes_B4))
        height, width = self._sums.shape[0] - 1, self._sums.shape[1] - 1
        x0, x1 = ((boxes_B4[:, side] * self._scale_x).round().long() for side in (0, 2))
        y0, y1 = ((boxes_B4[:, side] * self._scale_y).round().long() for side in (1, 3))
        areas = ((x1 - x0) * (y1 - y0)).clamp_min(1)
        x0, x1 = x0.clamp(0, width), x1.clamp(0, width)
        y0, y1 = y0.clamp(0, height), y1.clamp(0, height)
        sums = self._sums
        inside: torch.Tensor = sums[y1, x1] - sums[y0, x1] - sums[y1, x0] + sums[y0, x0]
        return inside / areas


def _propose(
    rpn: Any,
    images: ImageList,
    features: dict[str, torch.Tensor],
    truth: Targets,
    covered: list[_Covered],
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """As RegionProposalNetwork.forward."""
    levels = list(features.values())
    objectness, deltas = rpn.head(levels)
    objectness, deltas = [one.float() for one in objectness], [one.float() for one in deltas]
    anchors = rpn.anchor_generator(images, levels)
    counts = [int(level[0].numel()) for level in objectness]
    objectness, deltas = concat_box_prediction_layers(objectness, deltas)
    proposals = rpn.box_coder.decode(deltas.detach(), anchors).view(len(anchors), -1, 4)
    boxes, _ = rpn.filter_proposals(proposals, objectness, images.image_sizes, counts)
    labels, matched = rpn.assign_targets_to_anchors(anchors, truth)
    labels = [
        torch.where((one == 0) & (cover.share(boxes_of_one) > IGNORED_SHARE), one.new_tensor(-1.0), one)
        for one, cover, boxes_of_one in zip(labels, covered, anchors, strict=True)
    ]
    wanted = rpn.box_coder.encode(matched, anchors)
    loss_objectness, loss_boxes = rpn.compute_loss(objectness, deltas, labels, wanted)
    return boxes, {"objectness": loss_objectness, "proposal_boxes": loss_boxes}


def _judge(
    heads: Any,
    features: dict[str, torch.Tensor],
    proposals: list[torch.Tensor],
    truth: Targets,
    covered: list[_Covered],
) -> dict[str, torch.Tensor]:
    """As RoIHeads.forward with select_training_samples."""
    boxes_of = [one["boxes"] for one in truth]
    proposals = heads.add_gt_proposals([one.detach() for one in proposals], boxes_of)
    matches, labels = heads.assign_targets_to_proposals(proposals, boxes_of, [one["labels"] for one in truth])
    labels = [
        torch.where((one == 0) & (cover.share(boxes) > IGNORED_SHARE), one.new_tensor(-1), one)
        for one, cover, boxes in zip(labels, covered, proposals, strict=True)
    ]
    chosen = heads.subsample(labels)
    proposals = [boxes[index] for boxes, index in zip(proposals, chosen, strict=True)]
    labels = [one[index] for one, index in zip(labels, chosen, strict=True)]
    matches = [one[index] for one, index in zip(matches, chosen, strict=True)]
    nowhere = proposals[0].new_zeros((1, 4))
    matched = [(boxes if len(boxes) else nowhere)[index] for boxes, index in zip(boxes_of, matches, strict=True)]
    wanted = heads.box_coder.encode(matched, proposals)
    sizes = [cover.size for cover in covered]
    pooled = heads.box_roi_pool(features, proposals, sizes)
    class_logits, box_deltas = heads.box_predictor(heads.box_head(pooled))
    loss_classes, loss_boxes = fastrcnn_loss(class_logits.float(), box_deltas.float(), labels, wanted)
    # Masks are learnt from objects only.
    found = [torch.where(one > 0)[0] for one in labels]
    object_boxes = [boxes[index] for boxes, index in zip(proposals, found, strict=True)]
    mask_features = heads.mask_head(heads.mask_roi_pool(features, object_boxes, sizes))
    loss_masks = maskrcnn_loss(
        heads.mask_predictor(mask_features).float(),
        object_boxes,
        [one["masks"] for one in truth],
        [one["labels"] for one in truth],
        [one[index] for one, index in zip(matches, found, strict=True)],
    )
    return {"classes": loss_classes, "boxes": loss_boxes, "masks": loss_masks}


def _boxed(target: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What torchvision resizes together with the image."""
    return {name: target[name] for name in ("boxes", "labels", "masks")}
