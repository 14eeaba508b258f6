"""Masks over pixels, for the eye. Owns: colours of instances, tints and outlines, the brightening of dark images.
Must not know: tables, files, tiles.
"""

from __future__ import annotations

import colorsys
import io
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from models.masks import decode_mask_png, decode_rle

_FILL = 0.38
#: Below this mean luma (0..255) an image counts as dark.
_DARK = 80


def instance_labels(
    instances: Sequence[Mapping[str, Any]], size: tuple[int, int]
) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """Labels int32 [h, w] (0: none) and their colours uint8 [n + 1, 3]: hues a golden ratio apart, so that
    neighbours differ.
    """
    labels = np.zeros(size, np.int32)
    colors = np.zeros((len(instances) + 1, 3), np.uint8)
    for label, instance in enumerate(instances, start=1):
        labels[decode_rle(instance["rle"])] = label
        color = colorsys.hsv_to_rgb(label * 0.618034 % 1, 0.80, 1.0)
        colors[label] = [round(255 * channel) for channel in color]
    return labels, colors


def class_labels(mask: bytes) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """Labels int32 [h, w] (0: left clear) and colours of a mask PNG. Classes that are black in its palette are left
    clear.
    """
    with Image.open(io.BytesIO(mask), formats=("PNG",)) as png:
        palette = np.array(png.getpalette() or [], np.uint8).reshape(-1, 3)
    ids = decode_mask_png(mask).astype(np.int32)
    colors = np.concatenate([np.zeros((1, 3), np.uint8), palette])
    clear = np.flatnonzero(~palette.any(axis=1))
    return np.where(np.isin(ids, clear), 0, ids + 1).astype(np.int32), colors


def painted(pixels: NDArray[np.uint8], labels: NDArray[np.int32], colors: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """`pixels` uint8 [h, w, 3] under the tint of each label, with its outline in full colour.

    `labels` int32 [h, w], 0 is clear; `colors` uint8 [n, 3] by label.
    """
    paint = colors[labels].astype(np.float32)
    inside = labels > 0
    # A label's edge pixels are those with another label above, below, left or right of them.
    padded = np.pad(labels, 1, mode="edge")
    middle = padded[1:-1, 1:-1]
    edge = (
        (middle != padded[:-2, 1:-1])
        | (middle != padded[2:, 1:-1])
        | (middle != padded[1:-1, :-2])
        | (middle != padded[1:-1, 2:])
    ) & inside
    weight = np.where(edge, 1.0, np.where(inside, _FILL, 0.0)).astype(np.float32)[:, :, None]
    return np.rint(pixels * (1 - weight) + paint * weight).astype(np.uint8)


def brightened(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A dark uint8 [h, w, 3] image with its range stretched (1st to 99.8th percentile of luma) and lifted (square
    root). Others come back as they are. For display only.
    """
    luma = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    if luma.mean() >= _DARK:
        return pixels
    low, high = np.percentile(luma, (1, 99.8))
    levels = np.clip((np.arange(256) - low) / max(high - low, 1.0), 0, 1)
    return np.rint(255 * levels**0.5).astype(np.uint8)[pixels]
