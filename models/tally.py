"""What is counted on a finished mask: pixels and regions of every class. Owns: the counting, and its machine code.
Must not know: torch, networks, encodings, tables.

Compiled by Numba when it is first called in a process, which takes a second, and never kept: what was kept could come
from another processor, or be damaged. It holds no interpreter lock: threads count side by side (docs/decisions/0019).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Tally(NamedTuple):
    """Of every class that a mask holds, by class id in ascending order."""

    #: Number of pixels.
    pixels: dict[int, int]
    #: Number of 8-connected regions.
    regions: dict[int, int]


def tally(class_ids: NDArray[np.uint8]) -> Tally:
    """Pixels and 8-connected regions of every class of a uint8 [h, w] mask. Exact, in one pass over the rows.

    Memory beyond the mask: 28 bytes for each column. Thread safe; holds no interpreter lock but in the first call.
    """
    pixels, regions = np.zeros((2, 256), np.int64)
    if class_ids.size:
        _compiled()(np.ascontiguousarray(class_ids), pixels, regions)
    present = np.flatnonzero(pixels)
    ids = present.tolist()
    return Tally(
        dict(zip(ids, pixels[present].tolist(), strict=True)), dict(zip(ids, regions[present].tolist(), strict=True))
    )


@functools.cache
def _compiled() -> Callable[[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]], None]:
    """`_count` as machine code."""
    import numba  # 0.1 s: only who counts pays for it

    counts = numba.int64[::1]
    signature = numba.void(numba.types.Array(numba.uint8, 2, "C", readonly=True), counts, counts)
    return numba.njit(signature, nogil=True)(_count)


def _count(mask: NDArray[np.uint8], pixels: NDArray[np.int64], regions: NDArray[np.int64]) -> None:
    """Adds to `pixels` and `regions` [256] what a mask [h, w] holds, h and w above 0.

    Runs of equal pixels along the rows are joined where they touch, corners too, by union and find (He, Chao and
    Suzuki, "A Run-Based Two-Scan Labeling Algorithm", IEEE TIP 17(5), 2008). No label is written: a class has as many
    regions as runs, less the joins of two that were not one yet.
    """
    height, width = mask.shape
    # Nodes 0 .. width - 1: runs of the row above, by their region. From width on: those of this row.
    parents = np.empty(2 * width, np.int32)
    renamed = np.full(2 * width, -1, np.int32)
    roots = np.empty(width, np.int32)
    above_starts = np.zeros(width + 1, np.int32)
    starts = np.zeros(width + 1, np.int32)
    above_starts[1] = width
    above, above_runs = mask[0], 0
    for y in range(height):
        row = mask[y]
        runs = 1
        for x in range(1, width):
            starts[runs] = x
            runs += row[x] != row[x - 1]
        starts[runs] = width
        first = 0
        for run in range(runs):
            begin, end = starts[run], starts[run + 1]
            own = row[begin]
            pixels[own] += end - begin
            node = width + run
            parents[node] = node
            regions[own] += 1
            while above_starts[first + 1] < begin:
                first += 1
            other = first
            while other < above_runs and above_starts[other] <= end:
                if above[above_starts[other]] == own:
                    root = other
                    while parents[root] != root:
                        parents[root] = parents[parents[root]]
                        root = parents[root]
                    if root != node:
                        parents[root] = node
                        regions[own] -= 1
                other += 1
        # The runs of this row become nodes 0 .. runs - 1, each below the first of its region.
        for run in range(runs):
            root = width + run
            while parents[root] != root:
                parents[root] = parents[parents[root]]
                root = parents[root]
            roots[run] = root
            if renamed[root] < 0:
                renamed[root] = run
        for run in range(runs):
            parents[run] = renamed[roots[run]]
        for run in range(runs):
            renamed[roots[run]] = -1
        above, above_runs = row, runs
        above_starts, starts = starts, above_starts
