"""Mask R-CNN as torchvision builds it. Owns: its arguments and how it is made. Must not know: cards, weights' origin,
files, devices, what is done with its parts (`models.detection`).

Source: https://docs.pytorch.org/vision/stable/models/mask_rcnn.html. Names of parameters are torchvision's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field

NAMES = ("maskrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn_v2", "maskrcnn_mobilenet_v3_large_fpn")


class MaskRcnnArgs(BaseModel):
    """Arguments of Mask R-CNN. The network resizes each image: the shorter side to `min_size_px`, unless the longer
    would then pass `max_size_px`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: Classes, the background (channel 0) among them.
    output_channels: int = Field(ge=2)
    min_size_px: int = Field(default=800, ge=1)
    max_size_px: int = Field(default=1333, ge=1)
    #: Of the frozen BatchNorm of the first and the mobile network; torchvision's COCO_V1 weights were made with 0.
    batchnorm_eps: float = Field(default=1e-5, ge=0)


def maker(name: str) -> Callable[..., torch.nn.Module]:
    """`make(args, input_channels=...)` of the network called `name`."""
    return functools.partial(_make, name)


def _make(name: str, args: MaskRcnnArgs, *, input_channels: int) -> torch.nn.Module:
    from torchvision.models import detection
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.backbone_utils import mobilenet_backbone, resnet_fpn_backbone
    from torchvision.ops.misc import FrozenBatchNorm2d

    if input_channels != 3:
        raise ValueError(f"{name} takes 3 bands, the card's preprocessing has {input_channels}")
    sizes: dict[str, Any] = {
        "num_classes": args.output_channels,
        "min_size": args.min_size_px,
        "max_size": args.max_size_px,
    }
    if name == "maskrcnn_resnet50_fpn_v2":
        return detection.maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None, **sizes)
    # With weights torchvision freezes the norm of these; a frozen one has fewer buffers, and the same arithmetic.
    norm: Any = functools.partial(FrozenBatchNorm2d, eps=args.batchnorm_eps)
    if name == "maskrcnn_resnet50_fpn":
        backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None, norm_layer=norm, trainable_layers=5)
        return detection.MaskRCNN(backbone, **sizes)
    backbone = mobilenet_backbone(
        backbone_name="mobilenet_v3_large", weights=None, fpn=True, norm_layer=norm, trainable_layers=6
    )
    # As torchvision's fasterrcnn_mobilenet_v3_large_fpn: three levels, each with all sizes.
    anchors = AnchorGenerator(((32, 64, 128, 256, 512),) * 3, ((0.5, 1.0, 2.0),) * 3)
    return detection.MaskRCNN(backbone, rpn_anchor_generator=anchors, **sizes)


def stride(network: torch.nn.Module) -> int:
    """Pixels: any size will do, the network pads by itself."""
    return 1


def hidden_layers(network: Any) -> list[tuple[torch.nn.Module, tuple[int, int, int, int]]]:
    """What lies in the heads before the last layers, which put out boxes, scores and masks; and a shape that it takes.

    Float in, float out.
    """
    heads, channels = network.roi_heads, network.backbone.out_channels
    box_size, mask_size = heads.box_roi_pool.output_size, heads.mask_roi_pool.output_size
    return [
        (network.rpn.head.conv, (1, channels, 8, 8)),
        (heads.box_head, (1, channels, *box_size)),
        (heads.mask_head, (1, channels, *mask_size)),
        (heads.mask_predictor.conv5_mask, (1, heads.mask_predictor.conv5_mask.in_channels, *mask_size)),
    ]
