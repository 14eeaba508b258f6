"""Loops over pixels as machine code. Owns: how they are compiled. Must not know: what they count.

Compiled by Numba when first asked for in a process, and never kept: what was kept could come from another processor, or
be damaged (docs/decisions/0019). The code holds no interpreter lock, so threads run side by side.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np


@functools.cache
def machine_code(loop: Callable[..., None], *arrays: tuple[type[np.generic], int]) -> Callable[..., None]:
    """`loop` compiled for C-contiguous arrays of these types and numbers of dimensions, of which it may not write the
    first; TypeError for others. Whoever calls it makes all arrays: to make one is code to be compiled, too."""
    import numba  # 0.1 s: only who counts pays for it

    kinds = [
        numba.types.Array(numba.from_dtype(np.dtype(dtype)), dimensions, "C", readonly=not index)
        for index, (dtype, dimensions) in enumerate(arrays)
    ]
    return numba.njit(numba.void(*kinds), nogil=True)(loop)
