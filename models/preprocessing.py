"""From pixels to the network's input, on whatever device the pixels are.
Owns: the arithmetic of `Preprocessing`, and what is measured on pixels. Must not know: decoding, batching, networks.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from models.card import VALUE_RANGES, Preprocessing
from models.moments import moments

if TYPE_CHECKING:
    import torch

# The constants of torchvision's ImageNet weights, in 0..1 units.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class WrongPixelsError(ValueError):
    """An image whose pixels the model was not made for: the type, or the number of bands. The image is at fault."""


def select_bands(pixels: NDArray[Any], preprocessing: Preprocessing) -> NDArray[Any]:
    """The bands that the model takes, in its order: [h, w, C] of [h, w, B]; the array itself where those are all.

    A gray image [h, w] has one band. Raises WrongPixelsError for a band that is not there and for another type.
    """
    pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
    bands = preprocessing.bands
    if pixels.ndim != 3 or pixels.shape[2] <= max(bands):
        count = pixels.shape[2] if pixels.ndim == 3 else 0
        raise WrongPixelsError(f"the model takes bands {list(bands)} (counted from 0), the image has {count} bands")
    if pixels.dtype != np.dtype(preprocessing.dtype):
        raise WrongPixelsError(f"the model takes {preprocessing.dtype} pixels, the image has {pixels.dtype}")
    if bands == tuple(range(pixels.shape[2])):
        return pixels
    first, last = bands[0], bands[-1]
    # A window where the bands follow each other, which costs nothing.
    if bands == tuple(range(first, last + 1)):
        return pixels[:, :, first : last + 1]
    return pixels[:, :, list(bands)]


def normalize(
    images_NHWC: torch.Tensor,
    statistics_N2: torch.Tensor,
    preprocessing: Preprocessing,
    *,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Normalised network input [N, C, H, W] in channels_last memory, of type `dtype`.

    `images_NHWC`: pixels [N, H, W, C] of the card's type; `statistics_N2` float32 [N, 2]: mean and standard deviation
    of each image's valid pixels over all channels, in the pixels' units (used by `per_image` only). Computed in
    float32, then rounded once. Each image depends on its own pixels and statistics only. Does not synchronise.
    """
    import torch  # decoding needs this module's statistics, and no torch

    images_NCHW = images_NHWC.permute(0, 3, 1, 2)
    # A copy always: what follows works in place, and float32 pixels are the caller's own.
    images_NCHW = images_NCHW.to(torch.float32, copy=True)
    if preprocessing.normalization == "per_image":
        mean = statistics_N2[:, 0].view(-1, 1, 1, 1)
        std = statistics_N2[:, 1].clamp_min(preprocessing.std_floor).view(-1, 1, 1, 1)
        images_NCHW.sub_(mean).div_(std)
    else:
        # Plain numbers, channel by channel: a tensor of constants would have to be copied, and waited for.
        for channel, (center, spread) in enumerate(zip(*mean_and_std(preprocessing), strict=True)):
            images_NCHW[:, channel].sub_(center).div_(spread)
    return images_NCHW.to(dtype).contiguous(memory_format=torch.channels_last)


def mean_and_std(preprocessing: Preprocessing) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """What is subtracted from, and then divides, the pixels of each channel, in the pixels' units. Not `per_image`."""
    low, high = preprocessing.low_high
    channels = len(preprocessing.bands)
    mean: tuple[float, ...] = (0.0,) * channels
    std: tuple[float, ...] = (1.0,) * channels
    if preprocessing.normalization == "imagenet":
        mean, std = IMAGENET_MEAN, IMAGENET_STD
    elif preprocessing.mean is not None and preprocessing.std is not None:
        mean, std = preprocessing.mean, preprocessing.std
    return tuple(low + (high - low) * value for value in mean), tuple((high - low) * value for value in std)


class ImageStatistics(NamedTuple):
    """Of the pixels of one image."""

    #: Mean and population standard deviation over all pixels and channels, in the pixels' units.
    mean: float
    std: float
    #: Mean and standard deviation of the luma of ITU-R BT.601 (three channels) or of all channels, in 0..1.
    brightness: float
    contrast: float


def picture_statistics(pixels: NDArray[Any], low_high: tuple[float, float] = VALUE_RANGES["uint8"]) -> ImageStatistics:
    """Figures of pixels [h, w, C] of type uint8, uint16 or float32, h and w at least 1; may be a window of an array.

    `low_high`: the values that count as 0 and 1 of brightness. Luma is rounded to the pixels' type. For integers the
    sums are exact to float64 rounding, so the result depends on the pixels alone.
    """
    low, high = low_high
    height, width, channels = pixels.shape
    if pixels.dtype == np.uint8 and channels == 3:
        sums = moments(pixels)
        mean, std = _mean_and_std(sums.samples, sums.squares, pixels.size)
        luma_mean, luma_std = _mean_and_std(sums.luma, sums.luma_squares, height * width)
    else:
        mean, std = image_statistics(pixels)
        luma_mean, luma_std = mean, std
        if channels == 3:
            luma_mean, luma_std = image_statistics(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)[:, :, None])
    return ImageStatistics(mean, std, (luma_mean - low) / (high - low), luma_std / (high - low))


def image_statistics(pixels: NDArray[Any]) -> tuple[float, float]:
    """Mean and standard deviation as in `picture_statistics`, which measures more, of any number of channels."""
    height, width, channels = pixels.shape
    mean, std = cv2.meanStdDev(pixels.reshape(height, width * channels))
    return float(mean[0, 0]), float(std[0, 0])


def _mean_and_std(total: int, squares: int, count: int) -> tuple[float, float]:
    """As OpenCV has them of these sums, bit for bit."""
    scale = 1.0 / count
    mean = total * scale
    return mean, math.sqrt(max(squares * scale - mean * mean, 0.0))


def histogram_statistics(counts: NDArray[np.integer], values: NDArray[np.float64]) -> tuple[float, float]:
    """Mean and population standard deviation of `values`, each taken `counts` times. (0, 0) where all counts
    are 0.
    """
    total = counts.sum()
    if not total:
        return 0.0, 0.0
    mean = float((counts * values).sum() / total)
    return mean, float(np.sqrt((counts * (values - mean) ** 2).sum() / total))
