"""Sums over the pixels of an 8-bit RGB image, and over their luma. Owns: the one pass that adds them up.
Must not know: what is made of them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.machine_code import machine_code

# So many pixels lie in the nearest cache, and their squares, three each, in 32 bits.
_BLOCK_PX = 512
# ITU-R BT.601: 0.299, 0.587 and 0.114 of 2**15, as OpenCV rounds them for 8 bits.
_RED, _GREEN, _BLUE, _SHIFT = np.int32(9798), np.int32(19235), np.int32(3735), np.int32(15)
_HALF = np.int32(1 << 14)


class Moments(NamedTuple):
    """Sums of all samples, of their squares, and the same of the luma, rounded to 8 bits, of all pixels."""

    samples: int
    squares: int
    luma: int
    luma_squares: int


def moments(pixels: NDArray[np.uint8]) -> Moments:
    """Of uint8 RGB [h, w, 3]. Exact below 2**45 pixels. Thread safe; holds no interpreter lock but in the first call.

    The luma is `cv2.cvtColor`'s (COLOR_RGB2GRAY), value for value.
    """
    sums = np.zeros(4, np.int64)
    add = machine_code(_add, (np.uint8, 1), (np.int64, 1), (np.uint8, 2))
    add(np.ascontiguousarray(pixels).reshape(-1), sums, np.empty((4, _BLOCK_PX), np.uint8))
    return Moments(*sums.tolist())


def _add(samples: NDArray[np.uint8], sums: NDArray[np.int64], block_4N: NDArray[np.uint8]) -> None:
    """Adds to `sums` [4] what the samples [3 n] of n pixels come to. Each loop is one that the compiler makes wide."""
    red, green, blue, luma = block_4N[0], block_4N[1], block_4N[2], block_4N[3]
    for start in range(0, samples.size, 3 * _BLOCK_PX):
        block = samples[start : start + 3 * _BLOCK_PX]
        count = block.size // 3
        for i in range(count):
            red[i], green[i], blue[i] = block[3 * i], block[3 * i + 1], block[3 * i + 2]
        for i in range(count):
            luma[i] = (
                np.int32(red[i]) * _RED + np.int32(green[i]) * _GREEN + np.int32(blue[i]) * _BLUE + _HALF
            ) >> _SHIFT
        total = squares = luma_total = luma_squares = np.int32(0)
        for i in range(3 * count):
            sample = np.int32(block[i])
            total, squares = np.int32(total + sample), np.int32(squares + sample * sample)
        for i in range(count):
            sample = np.int32(luma[i])
            luma_total, luma_squares = np.int32(luma_total + sample), np.int32(luma_squares + sample * sample)
        sums[0] += total
        sums[1] += squares
        sums[2] += luma_total
        sums[3] += luma_squares
