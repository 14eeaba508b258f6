"""From uint8 pixels to the network's input, on whatever device the pixels are.
Owns: the arithmetic of `Preprocessing`. Must not know: decoding, batching, networks.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from models.card import Preprocessing

# The constants of torchvision's ImageNet weights, in 0..1 units.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalize(
    images_NHWC: torch.Tensor,
    statistics_N2: torch.Tensor,
    preprocessing: Preprocessing,
    *,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Normalised network input [N, 3, H, W] in channels_last memory, of type `dtype`.

    `images_NHWC` uint8 [N, H, W, 3]; `statistics_N2` float32 [N, 2]: mean and standard deviation of each
    image's valid pixels over all channels, in 0..255 units (used by `per_image` only). Computed in float32,
    then rounded once. Each image depends on its own pixels and statistics only. Does not synchronise.
    """
    images_NCHW = images_NHWC.permute(0, 3, 1, 2).float()
    if preprocessing.normalization == "per_image":
        mean = statistics_N2[:, 0].view(-1, 1, 1, 1)
        std = statistics_N2[:, 1].clamp_min(preprocessing.std_floor).view(-1, 1, 1, 1)
        images_NCHW.sub_(mean).div_(std)
    else:
        # Plain numbers, channel by channel: a tensor of constants would have to be copied, and waited for.
        for channel, (center, spread) in enumerate(zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)):
            images_NCHW[:, channel].sub_(255 * center).div_(255 * spread)
    return images_NCHW.to(dtype).contiguous(memory_format=torch.channels_last)


def image_statistics(pixels: NDArray[np.uint8]) -> tuple[float, float]:
    """Mean and population standard deviation over all pixels and channels of a uint8 image, 0..255. Exact to
    float64.
    """
    counts = np.bincount(pixels.ravel(), minlength=256)
    return histogram_statistics(counts, np.arange(256, dtype=np.float64))


def histogram_statistics(counts: NDArray[np.integer], values: NDArray[np.float64]) -> tuple[float, float]:
    """Mean and population standard deviation of `values`, each taken `counts` times. (0, 0) where all counts
    are 0.
    """
    total = counts.sum()
    if not total:
        return 0.0, 0.0
    mean = float((counts * values).sum() / total)
    return mean, float(np.sqrt((counts * (values - mean) ** 2).sum() / total))
