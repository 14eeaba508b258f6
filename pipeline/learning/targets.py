"""What a network is to say about a view. Owns: the targets of networks that tell objects apart, by boundaries or by
boxes. Must not know: images, geometry, losses.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from models.losses import IGNORED

#: Pixels. Less of an object than this in a view is neither to be found nor wrong to find.
LEAST_OBJECT_PX = 4


def boundary_targets(labels: NDArray[np.int32]) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Channels, and where it matters, both [h, w], of object labels: 0 background, -1 not known.

    Channels: 0 background, 1 interior, 2 boundary, IGNORED. A boundary is the outermost pixel of an object
    (8-neighbourhood), two pixels deep where another object is within two pixels. What matters: 1 around the border of
    an object, 2 where two of them meet, else 0.
    """
    unknown = labels < 0
    # OpenCV compares float32, and label numbers are exact in it.
    numbers = np.where(unknown, 0, labels).astype(np.float32)
    small, large = np.ones((3, 3), dtype=np.uint8), np.ones((5, 5), dtype=np.uint8)
    inside = numbers > 0
    edge = cv2.dilate(numbers, small) != cv2.erode(numbers, small)
    nothing = np.float32(2**24)
    lowest = cv2.erode(np.where(inside, numbers, nothing), large)
    highest = cv2.dilate(numbers, large)
    touching = (highest > 0) & (lowest != highest)
    channels = inside.astype(np.int64) + (inside & (edge | touching))
    channels[unknown] = IGNORED
    return channels, np.where(touching, 2, edge).astype(np.uint8)


def object_layers(masks: Sequence[NDArray[np.bool_]], size: tuple[int, int]) -> NDArray[np.int32]:
    """int32 [L, h, w] of masks bool [h, w], L at least 1: numbers of objects, from 1, and 0 where none is. Objects that
    share a pixel lie in different layers, so that none hides another.
    """
    layers = [np.zeros(size, dtype=np.int32)]
    for number, mask in enumerate(masks, start=1):
        layer = next((one for one in layers if not one[mask].any()), None)
        if layer is None:
            layer = np.zeros(size, dtype=np.int32)
            layers.append(layer)
        layer[mask] = number
    return np.stack(layers)


def detection_targets(
    layers_LHW: torch.Tensor, channels: Sequence[int], ignored_HW: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Targets as torchvision's Mask R-CNN takes them, and what to leave out: `boxes` float32 [K, 4] (x0, y0, x1, y1, in
    pixels), `labels` int64 [K], `masks` uint8 [K, h, w], `ignored` bool [h, w].

    `layers_LHW`: as of `object_layers`, or a view of them; `channels`: of each object, in the order of their numbers.
    Boxes are those of the masks as they are in the view, tighter than turned boxes would be. Objects with less than
    LEAST_OBJECT_PX pixels in it become ignored.
    """
    masks, labels = [], []
    for layer_HW in layers_LHW:
        numbers, pixels = layer_HW[layer_HW > 0].unique(return_counts=True)
        for number, count in zip(numbers.tolist(), pixels.tolist(), strict=True):
            if count < LEAST_OBJECT_PX:
                ignored_HW = ignored_HW | (layer_HW == number)
            else:
                masks.append(layer_HW == number)
                labels.append(channels[number - 1])
    masks_KHW = torch.stack(masks) if masks else ignored_HW.new_zeros((0, *ignored_HW.shape))
    return {
        "boxes": _boxes(masks_KHW),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "masks": masks_KHW.to(torch.uint8),
        "ignored": ignored_HW,
    }


def _boxes(masks_KHW: torch.Tensor) -> torch.Tensor:
    """float32 [K, 4] around whole pixels: a single pixel has a box of size 1, as COCO's. (torchvision's masks_to_boxes
    would make it one of size 0.)
    """
    rows, columns = masks_KHW.any(dim=2).int(), masks_KHW.any(dim=1).int()
    if not len(masks_KHW):
        return torch.zeros(0, 4)
    height, width = rows.shape[1], columns.shape[1]
    edges = (
        columns.argmax(dim=1), rows.argmax(dim=1),
        width - columns.flip(1).argmax(dim=1), height - rows.flip(1).argmax(dim=1),
    )  # fmt: skip
    return torch.stack(edges, dim=1).float()
