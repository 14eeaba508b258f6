"""Colours for classes. Owns: published palettes, and distinct colours for classes that come without any.
Must not know: cards, models, images.
"""

from __future__ import annotations

from typing import cast

Color = tuple[int, int, int]

#: Distinct colours (https://sashamaps.net/docs/resources/20-colors/), black first.
_DISTINCT: tuple[Color, ...] = (
    (0, 0, 0),
    (230, 25, 75),
    (60, 180, 75),
    (255, 225, 25),
    (0, 130, 200),
    (245, 130, 48),
    (145, 30, 180),
    (70, 240, 240),
    (240, 50, 230),
    (210, 245, 60),
    (250, 190, 212),
    (0, 128, 128),
)


def distinct_color(index: int) -> Color:
    """RGB, 0..255: easily told apart for the first dozen, and the VOC scheme's own beyond it."""
    return _DISTINCT[index] if index < len(_DISTINCT) else voc_color(index)


def voc_color(index: int) -> Color:
    """RGB, 0..255, of a class id 0..255 in the PASCAL VOC devkit's colour map.

    Bits 0, 3, 6 of the id become the high bits of red, downwards; bits 1, 4, 7 those of green; bits 2, 5 those of blue.
    COCO has no official colours; the same map serves for its ids, as in many tools. All 256 differ.
    """
    if not 0 <= index <= 255:
        raise ValueError(f"a class id is 0..255, got {index}")
    channels = [sum(((index >> (3 * step + channel)) & 1) << (7 - step) for step in range(3)) for channel in range(3)]
    return cast(Color, tuple(channels))
