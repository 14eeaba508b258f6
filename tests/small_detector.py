"""A Mask R-CNN so small that it learns to find discs in seconds: torchvision's own parts on three convolutions."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import MultiScaleRoIAlign

from models.architectures import card_for
from models.card import Card

#: Short side to which it brings each image: at this size it sees an image as it is.
SIDE_PX = 96
_CHANNELS = 32


def detector_card(name: str = "maskrcnn_mobilenet_v3_large_fpn", args: Mapping[str, Any] | None = None) -> Card:
    """Of a network that looks for discs. For `disc_detector` it stands for what that is none of."""
    return card_for(
        "discs",
        name,
        {"min_size_px": SIDE_PX, "max_size_px": 4096} | dict(args or {}),
        class_names=("background", "disc"),
        canvas_multiple=1,
        preprocessing={"normalization": "imagenet"},
        postprocessing={"kind": "detections", "score_threshold": 0.5},
    )


def draw_discs(
    height: int, width: int, count: int, *, seed: int, radius_px: tuple[float, float] = (6, 13), outside_px: int = 0
) -> tuple[np.ndarray, list[np.ndarray]]:
    """uint8 [height, width, 3], and the mask bool [height, width] of each disc, of which no two touch. They end up to
    `outside_px` beyond the edge, cut off there.
    """
    random = np.random.default_rng(seed)
    pixels = random.normal(70, 8, (height, width, 3))
    rows, columns = np.mgrid[0:height, 0:width]
    taken = np.zeros((height, width), bool)
    masks: list[np.ndarray] = []
    for _ in range(20 * count):
        if len(masks) == count:
            break
        radius = random.uniform(*radius_px)
        y, x = (random.uniform(radius - outside_px, side - radius + outside_px) for side in (height, width))
        distance = np.hypot(rows - y, columns - x)
        if (taken & (distance < radius + 4)).any():
            continue
        masks.append(distance < radius)
        taken |= masks[-1]
        pixels[masks[-1]] += random.uniform(90, 140)
    return np.clip(pixels, 0, 255).astype(np.uint8), masks


class _Backbone(nn.Module):
    """Stride 4, one level."""

    out_channels = _CHANNELS

    def __init__(self) -> None:
        super().__init__()
        widths = [(3, 16, 2), (16, _CHANNELS, 2), (_CHANNELS, _CHANNELS, 1), (_CHANNELS, _CHANNELS, 1)]
        self.layers = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(before, after, 3, step, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU())
                for before, after, step in widths
            )
        )

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"0": self.layers(images)}


def _small_detector() -> Any:
    box_pool = MultiScaleRoIAlign(["0"], output_size=7, sampling_ratio=2)
    mask_pool = MultiScaleRoIAlign(["0"], output_size=14, sampling_ratio=2)
    return MaskRCNN(
        _Backbone(),
        min_size=SIDE_PX,
        max_size=4096,
        rpn_anchor_generator=AnchorGenerator(((12, 24),), ((1.0,),)),
        rpn_head=RPNHead(_CHANNELS, 2),
        rpn_pre_nms_top_n_train=200,
        rpn_post_nms_top_n_train=60,
        rpn_batch_size_per_image=64,
        box_batch_size_per_image=24,
        box_roi_pool=box_pool,
        box_head=TwoMLPHead(_CHANNELS * 49, 64),
        box_predictor=FastRCNNPredictor(64, 2),
        mask_roi_pool=mask_pool,
        mask_head=MaskRCNNHeads(_CHANNELS, (_CHANNELS, _CHANNELS), 1),
        mask_predictor=MaskRCNNPredictor(_CHANNELS, _CHANNELS, 2),
    )


def target_of(masks: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
    """What torchvision's detectors learn from."""
    boxes = []
    for mask in masks:
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        boxes.append([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32),
        "labels": torch.ones(len(boxes), dtype=torch.int64),
        "masks": torch.from_numpy(np.stack(masks).astype(np.uint8)),
    }


def fit_detector(network: Any, *, steps: int, batch: int, learning_rate: float, pictures: int | None = None) -> Any:
    """The same, in eval mode, after so many steps of AdamW on pictures of discs: new ones, or the first `pictures`
    over and over.
    """
    network.train()
    for part in network.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            # Its first statistics are to be forgotten in tens of steps.
            part.momentum = 0.1
    optimizer = torch.optim.AdamW(network.parameters(), learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    for step in range(steps):
        numbers = [step * batch + index for index in range(batch)]
        drawn = [training_picture(number % pictures if pictures else number) for number in numbers]
        images = [torch.from_numpy(pixels).permute(2, 0, 1).float() / 255 for pixels, _ in drawn]
        losses = network(images, [target_of(masks) for _, masks in drawn])
        optimizer.zero_grad()
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
        schedule.step()
    return network.eval()


def training_picture(number: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """One of those that `fit_detector` shows: discs, some cut off by the edge."""
    return draw_discs(SIDE_PX, SIDE_PX, 5, seed=1000 + number, outside_px=8)


@functools.cache
def disc_detector() -> Any:
    """It finds discs of 6 to 13 pixels, of which it has seen some cut off by the edge. About ten seconds, once."""
    torch.manual_seed(0)
    return fit_detector(_small_detector(), steps=120, batch=4, learning_rate=0.005)
