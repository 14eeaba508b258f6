"""What is counted on a finished mask: pixels and regions of every class. Owns: the counting.
Must not know: torch, networks, encodings, tables.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.machine_code import machine_code


class Tally(NamedTuple):
    """Of every class that a mask holds, by class id in ascending order."""

    #: Number of pixels.
    pixels: dict[int, int]
    #: Number of 8-connected regions.
    regions: dict[int, int]


def tally(class_ids: NDArray[np.uint8]) -> Tally:
    """Pixels and 8-connected regions of every class of a uint8 [h, w] mask. Exact, in one pass over the rows.

    Memory beyond the mask: 40 bytes for each column. Thread safe; holds no interpreter lock but in the first call.
    """
    pixels, regions = counts = np.zeros((2, 256), np.int64)
    if class_ids.size:
        width = class_ids.shape[1]
        room = np.zeros((5, 2 * width + 1), np.int32)
        room[1] = -1
        machine_code(_count, (np.uint8, 2), (np.int64, 2), (np.int32, 2))(np.ascontiguousarray(class_ids), counts, room)
    present = np.flatnonzero(pixels)
    ids = present.tolist()
    return Tally(
        dict(zip(ids, pixels[present].tolist(), strict=True)), dict(zip(ids, regions[present].tolist(), strict=True))
    )


def _count(mask: NDArray[np.uint8], counts: NDArray[np.int64], room: NDArray[np.int32]) -> None:
    """Adds to `counts` [2, 256], pixels and regions, what a mask [h, w] holds, h and w above 0. `room`: zeros
    [5, 2 w + 1], but -1 in the second row.

    Runs of equal pixels along the rows are joined where they touch, corners too, by union and find (He, Chao and
    Suzuki, "A Run-Based Two-Scan Labeling Algorithm", IEEE TIP 17(5), 2008). No label is written: a class has as many
    regions as runs, less the joins of two that were not one yet.
    """
    height, width = mask.shape
    pixels, regions = counts[0], counts[1]
    # Nodes 0 .. width - 1: runs of the row above, by their region. From width on: those of this row.
    parents, renamed, roots, above_starts, starts = room[0], room[1], room[2], room[3], room[4]
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
