"""What chance leaves open: resampling of images. Owns: how samples are drawn and what an interval is. Must not know:
what is scored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

#: Numbers that a chunk of samples may hold.
_CHUNK = 1 << 22


class Interval(BaseModel):
    """Where a score lies in most of the samples (percentile bootstrap; Efron and Tibshirani 1993, chapter 13)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    low: float
    high: float


def resampled(
    values: Callable[[NDArray[np.int64]], dict[str, NDArray[np.float64]]],
    images: int,
    *,
    samples: int,
    seed: int,
    widest: int = 0,
) -> dict[str, NDArray[np.float64]]:
    """`values` of samples of the images drawn with replacement, each [samples, ...]; {} for no samples.

    `values` takes weights int64 [chunk, images]: how often an image is in a sample. Sample i depends on the seed, on i
    and on the number of images alone: equal seeds draw the same images for any two models. `widest`: the longest row
    that `values` makes of a sample, which keeps memory in bounds.
    """
    chunks = [values(weights) for weights in _weights(images, samples, seed, max(images, widest))]
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]} if chunks else {}


def interval_of(values: NDArray[np.float64], confidence: float) -> Interval | None:
    """What lies in the middle of `values` [samples]; NaN left out, None where nothing is left."""
    values = values[~np.isnan(values)]
    if not values.size:
        return None
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(low=float(low), high=float(high))


def _weights(images: int, samples: int, seed: int, widest: int) -> Iterator[NDArray[np.int64]]:
    chunk = max(1, _CHUNK // widest)
    for start in range(0, samples, chunk):
        yield np.stack(
            [
                np.bincount(np.random.default_rng([seed, index]).integers(0, images, images), minlength=images)
                for index in range(start, min(start + chunk, samples))
            ]
        )
