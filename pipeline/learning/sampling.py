"""Which images a step sees, and how often each class is there. Owns: chances, the order of an epoch, class frequencies
and the weights that follow. Must not know: pixels of images, networks, losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.learning.recipe import SamplingConfig


def image_chances(
    strata: Sequence[str], pixels_of_classes: NDArray[np.int64] | None, config: SamplingConfig
) -> NDArray[np.float64]:
    """float64 [images], summing to 1. `pixels_of_classes` int64 [images, classes]: needed where the settings ask for
    rare classes.
    """
    sizes = {stratum: strata.count(stratum) for stratum in set(strata)}
    chances = np.array([sizes[stratum] ** (config.stratum_power - 1.0) for stratum in strata])
    if config.rare_image_share and pixels_of_classes is not None:
        shown = pixels_of_classes > 0
        share = shown.mean(axis=0)
        repeats = np.sqrt(config.rare_image_share / np.where(share > 0, share, 1.0)).clip(1.0)
        chances *= np.where(shown, repeats, 1.0).max(axis=1)
    return chances / chances.sum()


def epoch_order(chances: NDArray[np.float64], seed: int, epoch: int) -> NDArray[np.int64]:
    """int64 [images]: the images of one epoch. An image with chance p comes floor(p n) or ceil(p n) times, p n in the
    mean (systematic sampling): with equal chances each comes once. Depends on the arguments alone.
    """
    random = np.random.default_rng([seed, 0, epoch])
    count = len(chances)
    positions = random.permutation(count)
    edges = np.cumsum(chances[positions]) * count
    ticks = np.arange(count) + random.uniform()
    # The last edge may lie a rounding error below n.
    picked = np.searchsorted(edges, ticks, side="right").clip(max=count - 1)
    order: NDArray[np.int64] = random.permutation(positions[picked])
    return order


def class_weights(
    pixels_of_classes: NDArray[np.int64], kind: Literal["none", "inverse", "median"], power: float = 1.0
) -> tuple[float, ...] | None:
    """A weight for each class, from its pixels in each image, int64 [images, classes]; None for `none`.

    `inverse`: 1 / f, scaled to a mean of 1, f being the class's share of all pixels. `median`: median of f / f, with f
    its share in the images that show it (Eigen and Fergus, 2015, section 6.3.2). Then to the power of `power`. Classes
    that are nowhere get 1: nothing is known of them.
    """
    if kind == "none":
        return None
    pixels = pixels_of_classes.sum(axis=0).astype(np.float64)
    known = pixels > 0
    if not known.any():
        return (1.0,) * len(pixels)
    if kind == "inverse":
        weights = pixels.sum() / np.where(known, pixels, 1.0)
        weights /= weights[known].mean()
    else:
        shown = ((pixels_of_classes > 0) * pixels_of_classes.sum(axis=1, keepdims=True)).sum(axis=0)
        shares = pixels / np.where(known, shown, 1)
        weights = np.median(shares[known]) / np.where(known, shares, 1.0)
    return tuple(np.where(known, weights**power, 1.0).tolist())
