"""Mask R-CNN as torchvision builds it. Owns: its arguments and how it is made. Must not know: cards, weights' origin,
files, devices, what is done with its parts (`models.detection`).

Source: https://docs.pytorch.org/vision/stable/models/mask_rcnn.html. Names of parameters are torchvision's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated, Any, Literal

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
    #: Of the backbone of the first and the mobile network. `frozen`: BatchNorm that keeps the statistics that it comes
    #: with, which only published weights have; from random weights `batch`, or `group`, which other images do not move.
    norm: Literal["frozen", "batch", "group"] = "frozen"
    #: Sides of the anchors, in pixels of the resized image; None: torchvision's. The mobile network has all of them on
    #: every level, the others one on each.
    anchor_sizes_px: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(default=None, min_length=1)
    #: The mobile network: which stages feed the pyramid, counted from 0, stage k halving the size k + 1 times up to the
    #: last two, which have stride 32. None: these two. Small objects need lower ones.
    backbone_stages: tuple[Annotated[int, Field(ge=0, le=5)], ...] | None = Field(
        default=None, min_length=1, max_length=4
    )


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
    if args.backbone_stages and name != "maskrcnn_mobilenet_v3_large_fpn":
        raise ValueError(f"backbone_stages are for maskrcnn_mobilenet_v3_large_fpn, not for {name}")
    ratios = (0.5, 1.0, 2.0)
    if args.anchor_sizes_px and name != "maskrcnn_mobilenet_v3_large_fpn":
        if len(args.anchor_sizes_px) != 5:
            raise ValueError(f"{name} has 5 levels, each with one of anchor_sizes_px: got {args.anchor_sizes_px}")
        each = tuple((side,) for side in args.anchor_sizes_px)
        sizes["rpn_anchor_generator"] = AnchorGenerator(each, (ratios,) * 5)
    if name == "maskrcnn_resnet50_fpn_v2":
        if args.norm != "frozen":
            raise ValueError(f"norm is not for {name}, which has BatchNorm of its own")
        # It takes no anchors but makes its own, as many at a place as these.
        anchors = sizes.pop("rpn_anchor_generator", None)
        network = detection.maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None, **sizes)
        network.rpn.anchor_generator = anchors or network.rpn.anchor_generator
        return network
    # With weights torchvision freezes the norm of these; a frozen one has fewer buffers, and the same arithmetic.
    norms: dict[str, Any] = {
        "frozen": functools.partial(FrozenBatchNorm2d, eps=args.batchnorm_eps),
        "batch": functools.partial(torch.nn.BatchNorm2d, eps=args.batchnorm_eps),
        "group": _group_norm,
    }
    norm = norms[args.norm]
    if name == "maskrcnn_resnet50_fpn":
        backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None, norm_layer=norm, trainable_layers=5)
        return detection.MaskRCNN(backbone, **sizes)
    backbone = mobilenet_backbone(
        backbone_name="mobilenet_v3_large", weights=None, fpn=True, norm_layer=norm, trainable_layers=6,
        returned_layers=None if args.backbone_stages is None else sorted(args.backbone_stages),
    )  # fmt: skip
    # As torchvision's fasterrcnn_mobilenet_v3_large_fpn: each level has all sizes. One lies above the stages.
    levels = 1 + len(args.backbone_stages or (4, 5))
    anchors = AnchorGenerator((args.anchor_sizes_px or (32, 64, 128, 256, 512),) * levels, (ratios,) * levels)
    return detection.MaskRCNN(backbone, rpn_anchor_generator=anchors, **sizes)


def _group_norm(channels: int) -> torch.nn.GroupNorm:
    """Groups of at least 8 channels where that divides them (Wu and He, Group Normalization, 2018)."""
    return torch.nn.GroupNorm(max(1, channels // 8) if channels % 8 == 0 else 1, channels)


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
