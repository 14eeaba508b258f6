"""Ways to count the 8-connected regions of every class of a mask: CPU time of one thread, and whether all agree.

    python benchmarks/regions.py [--masks FOLDER] [--count N] [--rounds K]

Masks are street-like ones made by code (480×360, 11 classes), and besides, with `--masks`, label maps from PNG files
(palette or gray). The figure is the mean over the masks of the best of K rounds, taken in turns; behind it, of how many
masks the counts are others than OpenCV's of each class. What is not installed is skipped: `pip install bioimage-cpp`.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import cc3d
import cv2
import numpy as np
from rich.console import Console
from rich.table import Table
from scipy import ndimage
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from side_by_side.stand_in import street
from skimage.measure import label

from models.masks import decode_mask_png
from models.tally import tally

Counts = dict[int, int]


def opencv_each_class(ids: np.ndarray) -> Counts:
    found = np.flatnonzero(np.bincount(ids.reshape(-1))).tolist()
    return {i: cv2.connectedComponents((ids == i).view(np.uint8), connectivity=8)[0] - 1 for i in found}


def opencv_in_boxes(ids: np.ndarray) -> Counts:
    counts = {}
    for i, box in enumerate(ndimage.find_objects(ids.astype(np.int32) + 1)):
        if box is not None:
            inside = np.ascontiguousarray(ids[box] == i).view(np.uint8)
            counts[i] = cv2.connectedComponents(inside, connectivity=8)[0] - 1
    return counts


def scipy_each_class(ids: np.ndarray) -> Counts:
    found = np.flatnonzero(np.bincount(ids.reshape(-1))).tolist()
    return {i: ndimage.label(ids == i, structure=np.ones((3, 3)))[1] for i in found}


def joined_runs(ids: np.ndarray) -> Counts:
    """Runs of one class along the rows are nodes; those that touch one of the row below, corners too, are edges."""
    # With a column between the rows, no run goes on in the next row, and corners need no special case.
    flat = np.pad(ids.astype(np.int16), ((0, 0), (0, 1)), constant_values=-1).reshape(-1)
    width = ids.shape[1] + 1
    starts = np.concatenate(([0], np.flatnonzero(flat[1:] != flat[:-1]) + 1))
    ends = np.append(starts[1:], flat.size)
    kinds = flat[starts]
    upper = np.flatnonzero((kinds >= 0) & (ends <= flat.size - width))
    first = np.searchsorted(starts, starts[upper] + width - 1, side="right") - 1
    last = np.searchsorted(starts, np.minimum(ends[upper] + width, flat.size - 1), side="right") - 1
    touching = last - first + 1
    above = np.repeat(upper, touching)
    below = np.arange(touching.sum()) - np.repeat(np.cumsum(touching) - touching, touching) + np.repeat(first, touching)
    same = kinds[above] == kinds[below]
    edges = (np.ones(np.count_nonzero(same), np.uint8), (above[same], below[same]))
    number, component = connected_components(coo_matrix(edges, shape=(starts.size,) * 2), directed=False)
    owners = np.empty(number, np.int16)
    owners[component] = kinds
    return {i: n for i, n in enumerate(np.bincount(owners[owners >= 0]).tolist()) if n}


def scikit_image(ids: np.ndarray) -> Counts:
    labels, number = label(ids.astype(np.int32) + 1, connectivity=2, return_num=True)
    owners = np.empty(number + 1, np.uint8)
    owners[labels] = ids
    return {i: n for i, n in enumerate(np.bincount(owners[1:]).tolist()) if n}


def contours_of_labels(ids: np.ndarray) -> Counts:
    """OpenCV follows the border of each region of equal labels, and looks up whose it is where it begins."""
    contours, _ = cv2.findContours(ids.astype(np.int32) + 1, cv2.RETR_FLOODFILL, cv2.CHAIN_APPROX_SIMPLE)
    x, y = np.array([contour[0, 0] for contour in contours]).T
    return {i: n for i, n in enumerate(np.bincount(ids[y, x]).tolist()) if n}


def linked_runs(ids: np.ndarray) -> Counts:
    counts = {}
    for i in np.flatnonzero(np.bincount(ids.reshape(-1))).tolist():
        _, hierarchy = cv2.findContoursLinkRuns((ids == i).view(np.uint8))
        counts[i] = int((hierarchy[0, :, 3] < 0).sum())
    return counts


def bioimage_cpp(ids: np.ndarray) -> Counts:
    from bioimage_cpp.segmentation import label as label_equal

    labels = label_equal(ids.astype(np.uint16) + 1, connectivity=2)
    owners = np.empty(int(labels.max()) + 1, np.uint8)
    owners[labels] = ids
    return {i: n for i, n in enumerate(np.bincount(owners[1:]).tolist()) if n}


def cc3d_labels(ids: np.ndarray) -> Counts:
    """All classes at once; whose each region is, is read where its label begins."""
    above_zero = ids + np.uint8(1) if ids.max() < 255 else ids.astype(np.uint16) + 1
    labels, number = cc3d.connected_components(above_zero, connectivity=8, return_N=True)
    pixels, width = ids.reshape(-1), ids.shape[1]
    begins = np.empty(pixels.size, np.bool_)
    np.not_equal(pixels[1:], pixels[:-1], out=begins[1:])
    begins[::width] = True
    begins[width:] &= pixels[width:] != pixels[:-width]
    starts = begins.nonzero()[0]
    owners = np.empty(number + 1, np.uint8)
    owners[labels.reshape(-1)[starts]] = pixels[starts]
    return {i: n for i, n in enumerate(np.bincount(owners[1:]).tolist()) if n}


def cc3d_labels_only(ids: np.ndarray) -> None:
    cc3d.connected_components(ids + np.uint8(1), connectivity=8, return_N=True)


def ours(ids: np.ndarray) -> Counts:
    return tally(ids).regions


OURS = "runs joined in machine code (Numba), and pixels of every class (what we do)"
WAYS: dict[str, Callable[[np.ndarray], Counts | None]] = {
    "OpenCV, one pass a class": opencv_each_class,
    "OpenCV, each class in its bounding box": opencv_in_boxes,
    "SciPy ndimage, one pass a class": scipy_each_class,
    "run lengths with NumPy, joined by SciPy": joined_runs,
    "scikit-image, all classes at once": scikit_image,
    "OpenCV, contours of labels": contours_of_labels,
    "OpenCV, linked runs, one pass a class": linked_runs,
    **({"bioimage-cpp, all classes at once": bioimage_cpp} if importlib.util.find_spec("bioimage_cpp") else {}),
    "cc3d, all classes at once: labels alone": cc3d_labels_only,
    "cc3d, and whose each region is": cc3d_labels,
    OURS: ours,
}


class Figure(NamedTuple):
    """`others`: masks in which a way counts otherwise than OpenCV does each class; None where it does not count."""

    mean_ms: float
    others: int | None


def figures_of(masks: list[np.ndarray], rounds: int) -> dict[str, Figure]:
    best_s = {name: np.full(len(masks), np.inf) for name in WAYS}
    answers: dict[str, list[Counts | None]] = {name: [way(mask) for mask in masks] for name, way in WAYS.items()}
    for n, mask in enumerate(masks):
        for _ in range(rounds):
            for name, way in WAYS.items():
                began_s = time.thread_time()
                way(mask)
                best_s[name][n] = min(best_s[name][n], time.thread_time() - began_s)
    truth = answers["OpenCV, one pass a class"]
    others = {
        name: None if None in given else sum(one != true for one, true in zip(given, truth, strict=True))
        for name, given in answers.items()
    }
    assert others[OURS] == 0, "ours counts otherwise than OpenCV"
    return {name: Figure(float(each.mean()) * 1e3, others[name]) for name, each in best_s.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--masks", type=Path, default=None)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    cv2.setNumThreads(1)
    sets = {"street-like": [street(seed) for seed in range(options.count)]}
    if options.masks:
        paths = sorted(options.masks.glob("*.png"))[: options.count]
        sets[f"{len(paths)} of {options.masks.parent.name}"] = [decode_mask_png(path.read_bytes()) for path in paths]
    figures = {name: figures_of(masks, options.rounds) for name, masks in sets.items()}
    table = Table(title=f"ms a mask, one thread, load {os.getloadavg()[0]:.1f}")
    table.add_column("way")
    for name in sets:
        table.add_column(name, justify="right")
        table.add_column("other counts", justify="right")
    for way in WAYS:
        given = [figures[name][way] for name in sets]
        cells = ((f"{one.mean_ms:.2f}", "" if one.others is None else str(one.others)) for one in given)
        table.add_row(way, *[cell for pair in cells for cell in pair])
    runs = {
        name: np.mean([np.count_nonzero(np.diff(mask.astype(int))) for mask in masks]) for name, masks in sets.items()
    }
    table.caption = "changes of class along the rows: " + ", ".join(f"{name} {n:,.0f}" for name, n in runs.items())
    Console().print(table)


if __name__ == "__main__":
    main()
