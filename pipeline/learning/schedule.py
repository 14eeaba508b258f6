"""How the learning rate goes over a run. Owns: its shape. Must not know: optimisers, clocks, data."""

from __future__ import annotations

import math
from typing import Literal


def rate_factor(
    progress: float, *, shape: Literal["poly", "cosine"] = "cosine", warmup: float = 0.05, power: float = 0.9
) -> float:
    """0..1, what the learning rate is multiplied by when the share `progress` (0..1) of the run is done.

    A linear rise over the share `warmup`, then down to 0: half a cosine (Loshchilov and Hutter, SGDR, 2017), or
    (1 - p) ** power (Chen et al., DeepLab, 2018). Never 0 during the rise.
    """
    if progress < warmup:
        return max(progress / warmup, 0.01)
    rest = min((progress - warmup) / (1 - warmup), 1.0)
    return 0.5 * (1 + math.cos(math.pi * rest)) if shape == "cosine" else float((1 - rest) ** power)
