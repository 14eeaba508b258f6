"""From a network's pixel maps to instances, on the CPU. Owns: the watershed split and what an instance is.
Must not know: torch, devices, tables. Thread safe; OpenCV and NumPy release the GIL for most of the work.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.segmentation import watershed

from models.card import WatershedPostprocessing
from models.masks import Instance, encode_label_rles


def threshold_level(threshold: float) -> int:
    """The smallest quantised probability (0..255) that counts as at least `threshold`."""
    return int(np.ceil(threshold * 255 - 1e-9))


def split_instances(
    interior: NDArray[np.uint8], foreground: NDArray[np.uint8], settings: WatershedPostprocessing
) -> NDArray[np.int32]:
    """Labels int32 [h, w]: 0 is background, instances are 1 .. n in order of their first pixel's row, then
    column.

    `interior` and `foreground` are probabilities as uint8 [h, w] (p * 255, rounded). Markers are the
    4-connected components of the interior; they grow over the foreground, high probability first (watershed
    by flooding, Meyer 1994). Foreground without a marker becomes an instance of its own, so that no region
    is lost for lack of a distinct interior. What is too small or scores too low is dropped. Deterministic.
    """
    inside = foreground >= threshold_level(settings.foreground_threshold)
    cores = ((interior >= threshold_level(settings.interior_threshold)) & inside).astype(np.uint8)
    count, components, stats, _ = cv2.connectedComponentsWithStats(cores, connectivity=4, ltype=cv2.CV_32S)
    markers = np.asarray(components, dtype=np.int32)
    too_small = np.flatnonzero(stats[:, cv2.CC_STAT_AREA] < settings.min_marker_px)
    if too_small.size:
        kept = np.arange(count, dtype=np.int32)
        kept[too_small] = 0
        markers = kept[markers]
    _add_orphans(markers, inside, first_free=count)
    if not markers.any():
        return np.zeros(interior.shape, dtype=np.int32)
    labels = flood(foreground, markers, inside)
    return _kept(labels, foreground, settings)


def flood(foreground: NDArray[np.uint8], markers: NDArray[np.int32], inside: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Labels int32 [h, w] of markers (int32, 0 is none) that grow over `inside`, high `foreground` first.

    A watershed with its ties decided: skimage takes marker pixels of one level in whatever order its heap holds them,
    which depends on everything else in the image. Here they are taken row by row, after all higher levels and before
    whatever joined at their own. So an object's pixels depend on its own region alone.
    """
    level = 255.0 - foreground
    where = np.flatnonzero(markers)
    level.ravel()[where] += where * 2.0**-40 - 0.5
    labels: NDArray[np.int32] = watershed(level, markers, mask=inside)
    return labels


def describe_instances(labels: NDArray[np.int32], foreground: NDArray[np.uint8], class_id: int) -> list[Instance]:
    """Instances of a label map (int32 [h, w], labels 1 .. n), in the labels' order.

    Score is the mean of `foreground` / 255 over the instance; summed as integers, so exact.
    """
    count = int(labels.max(initial=0))
    where = np.flatnonzero(labels)
    owners = labels.ravel()[where]
    areas = np.bincount(owners, minlength=count + 1)
    sums = np.bincount(owners, weights=foreground.ravel()[where], minlength=count + 1)
    instances = []
    for index, (rle, box) in enumerate(
        zip(encode_label_rles(labels, count), ndimage.find_objects(labels), strict=True), start=1
    ):
        rows, columns = box
        instances.append(
            Instance(
                class_id=class_id,
                score=float(sums[index] / (255 * areas[index])),
                bbox=(
                    float(columns.start),
                    float(rows.start),
                    float(columns.stop - columns.start),
                    float(rows.stop - rows.start),
                ),
                area=int(areas[index]),
                rle=rle,
            )
        )
    return instances


def _add_orphans(markers: NDArray[np.int32], inside: NDArray[np.bool_], *, first_free: int) -> None:
    """Makes every 4-connected region of the foreground that has no marker a marker, in place."""
    count, regions = cv2.connectedComponents(inside.astype(np.uint8), connectivity=4, ltype=cv2.CV_32S)
    has_marker = np.zeros(count, dtype=bool)
    where = np.flatnonzero(inside)
    region_of = regions.ravel()[where]
    has_marker[region_of[markers.ravel()[where] > 0]] = True
    orphans = ~has_marker[region_of]
    markers.ravel()[where[orphans]] = region_of[orphans] + first_free


def counts(areas: NDArray[np.int64], sums: NDArray[np.int64], settings: WatershedPostprocessing) -> NDArray[np.bool_]:
    """Whether an instance counts, by its pixels and the sum of `foreground` over them: bool [n]."""
    counted: NDArray[np.bool_] = (areas >= settings.min_area_px) & (sums >= settings.score_threshold * 255 * areas)
    return counted


def _kept(
    labels: NDArray[np.int32], foreground: NDArray[np.uint8], settings: WatershedPostprocessing
) -> NDArray[np.int32]:
    """Labels of what does not count set to 0, the rest numbered 1 .. n by first pixel."""
    where = np.flatnonzero(labels)
    owners = labels.ravel()[where]
    present, first, areas = np.unique(owners, return_index=True, return_counts=True)
    # Sums of whole numbers below 2**53 are exact in float64.
    sums = np.bincount(owners, weights=foreground.ravel()[where])[present].astype(np.int64)
    counted = counts(areas, sums, settings)
    order = present[counted][np.argsort(first[counted])]
    table = np.zeros(int(labels.max(initial=0)) + 1, dtype=np.int32)
    table[order] = np.arange(1, order.size + 1, dtype=np.int32)
    renumbered = np.zeros_like(labels)
    renumbered.ravel()[where] = table[owners]
    return renumbered
