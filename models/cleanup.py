"""Morphology on finished masks: opening, closing, holes and small regions, of class ids, instance labels and single
masks. Owns: what these four mean where several classes or objects meet. Must not know: torch, networks, tables.
Thread safe, deterministic; inputs are not written to, but may be handed back as they are. OpenCV releases the GIL, cc3d
does not (docs/decisions/0008).

The disk of radius r is {(x, y): x² + y² ≤ r²}. What lies outside the image is unknown, so it neither eats into a mask
nor adds to it: in SciPy's terms, erosion has `border_value=1` and dilation `border_value=0`. Regions are 8-connected,
holes 4-connected, as in `scipy.ndimage.binary_fill_holes`.
"""

from __future__ import annotations

from typing import Any, TypeVar

import cc3d
import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from models.refinement import CleanupSettings

_Ids = TypeVar("_Ids", np.uint8, np.int32)


def clean_mask(mask: NDArray[np.bool_], settings: CleanupSettings) -> NDArray[np.bool_]:
    """A binary mask bool [h, w] after opening, closing, filling and removal, each as SciPy defines it."""
    return _cleaned_objects(mask.astype(np.uint8), settings).astype(bool)


def clean_labels(labels: NDArray[np.int32], settings: CleanupSettings) -> NDArray[np.int32]:
    """Instances int32 [h, w] (0 is background), each cleaned by itself: what it loses becomes background, and it grows
    over background only, so that no instance takes from another. Where two would grow over a pixel, the lower label
    does.

    Instances that vanish are gone: labels are 1 .. n again, in order of their first pixel's row, then column. An
    instance may come apart into several regions; `min_region_area_px` then judges each region.
    """
    return _renumbered(_cleaned_objects(labels, settings))


def clean_class_ids(
    class_ids: NDArray[np.uint8], settings: CleanupSettings, *, background_id: int | None
) -> NDArray[np.uint8]:
    """Class ids uint8 [h, w] after cleaning. The background is what the others lose to and take from: it has no
    opening, closing, holes or small regions of its own. Without one all classes are equal.

    - Opening, of all classes at once. What is left of each class is its binary opening; the rest is given away, and
      never to the class that it comes from.
    - Closing, class by class in ascending order of ids. With a background only background is taken, so that no class
      takes from another; without one, whatever lies in the gap is, but for pixels given in this step.
    - Holes, class by class in ascending order of ids. With a background only holes in which nothing else lies are
      holes: a car on the road stays a car. Without one, any enclosed area up to the limit is filled, whatever it is.
    - Small regions, of all classes at once, are given away. Afterwards no region (but of background) is smaller than
      the limit, unless all were.

    Pixels are given away from the edge inwards. In each round, those beside (4-neighbours) a pixel that stays, or that
    was given in an earlier round, take its class; of several the lowest id. What no round reaches becomes background,
    and without a background stays what it was.
    """
    cleaned = class_ids
    if settings.opening_radius_px:
        removed = ~_opened(cleaned, settings.opening_radius_px, background_id)
        cleaned = _given_away(cleaned, removed, background_id, may_return=False)
    if settings.closing_radius_px:
        cleaned = _closed(cleaned, settings.closing_radius_px, background_id)
    if settings.max_hole_area_px:
        if background_id is None:
            cleaned = _holes_of_each_filled(cleaned, settings.max_hole_area_px)
        else:
            cleaned = _background_holes_filled(cleaned, settings.max_hole_area_px, background_id)
    if settings.min_region_area_px > 1:
        small = _small_regions(cleaned, settings.min_region_area_px, background_id)
        cleaned = _given_away(cleaned, small, background_id, may_return=True)
    return cleaned


def _cleaned_objects(ids: NDArray[_Ids], settings: CleanupSettings) -> NDArray[_Ids]:
    """Objects on background 0: what is removed becomes background."""
    if settings.opening_radius_px:
        ids = np.where(_opened(ids, settings.opening_radius_px, 0), ids, ids.dtype.type(0))
    if settings.closing_radius_px:
        ids = _closed(ids, settings.closing_radius_px, 0)
    if settings.max_hole_area_px:
        ids = _background_holes_filled(ids, settings.max_hole_area_px, 0)
    if settings.min_region_area_px > 1:
        ids = np.where(_small_regions(ids, settings.min_region_area_px, 0), ids.dtype.type(0), ids)
    return ids


def _disk(radius_px: int) -> NDArray[np.uint8]:
    y, x = np.ogrid[-radius_px : radius_px + 1, -radius_px : radius_px + 1]
    return (x * x + y * y <= radius_px * radius_px).astype(np.uint8)


def _opened(ids: NDArray[_Ids], radius_px: int, background_id: int | None) -> NDArray[np.bool_]:
    """Where a pixel is in the opening of its own id, or background.

    A pixel is in the erosion of its id when the disk around it holds no other. Disks that lie within different ids do
    not meet, so one dilation gives all openings.
    """
    disk = _disk(radius_px)
    # Greatest and smallest id under the disk, in a type that OpenCV takes and that holds every id.
    kind = np.uint8 if ids.dtype == np.uint8 else np.uint16 if ids.max(initial=0) < 1 << 16 else np.float64
    values: NDArray[Any] = ids.astype(kind, copy=False)
    eroded = (cv2.dilate(values, disk) == cv2.erode(values, disk)).astype(np.uint8)
    stays = cv2.dilate(eroded, disk).astype(bool)
    if background_id is not None:
        stays |= ids == background_id
    return stays


def _closed(ids: NDArray[_Ids], radius_px: int, background_id: int | None) -> NDArray[_Ids]:
    closed = ids.copy()
    disk = _disk(radius_px)
    free = np.ones(ids.shape, bool) if background_id is None else ids == background_id
    for own_id, (rows, columns) in _boxes(ids, background_id):
        # Two radii more: how far dilation reaches, and how far erosion then looks.
        box = _widened(rows, 2 * radius_px), _widened(columns, 2 * radius_px)
        own = (closed[box] == own_id).astype(np.uint8)
        gained = cv2.morphologyEx(own, cv2.MORPH_CLOSE, disk).astype(bool) & (own == 0) & free[box]
        closed[box][gained] = own_id
        free[box][gained] = False
    return closed


def _holes_of_each_filled(class_ids: NDArray[np.uint8], max_area_px: int) -> NDArray[np.uint8]:
    filled = class_ids.copy()
    for own_id, box in _boxes(class_ids, None):
        # What touches the side of the class's own box reaches the image's: it is no hole. Earlier classes can only
        # have made this class smaller, so the box still holds it.
        other = (filled[box] != own_id).astype(np.uint8)
        holes, regions = _enclosed(other, max_area_px)
        filled[box][holes[regions]] = own_id
    return filled


def _background_holes_filled(ids: NDArray[_Ids], max_area_px: int, background_id: int) -> NDArray[_Ids]:
    """Background that one id encloses becomes that id. Which is filled first makes no difference."""
    holes, regions = _enclosed((ids == background_id).astype(np.uint8), max_area_px)
    where = np.flatnonzero(holes[regions])
    if not where.size:
        return ids
    flat, region_of = ids.ravel(), regions.ravel()[where]
    lowest = np.full(holes.size, np.iinfo(ids.dtype).max, ids.dtype)
    highest = np.full(holes.size, np.iinfo(ids.dtype).min, ids.dtype)
    for step in (1, -1, ids.shape[1], -ids.shape[1]):
        # No hole is at the image's side, so the neighbour is there.
        neighbour = flat[where + step]
        outside = neighbour != background_id
        np.minimum.at(lowest, region_of[outside], neighbour[outside])
        np.maximum.at(highest, region_of[outside], neighbour[outside])
    filled = ids.copy()
    of_one = (lowest == highest)[region_of]
    filled.ravel()[where[of_one]] = lowest[region_of[of_one]]
    return filled


def _enclosed(mask: NDArray[np.uint8], max_area_px: int) -> tuple[NDArray[np.bool_], NDArray[np.int32]]:
    """By 4-connected region of a mask of 0 and 1, whether it is off the sides and within the area; and the regions."""
    # Without OpenCV's statistics, which take longer than the regions and a count of them.
    count, found = cv2.connectedComponents(mask, connectivity=4, ltype=cv2.CV_32S)
    regions = np.asarray(found, dtype=np.int32)
    enclosed = np.bincount(regions.ravel(), minlength=count) <= max_area_px
    for side in (regions[0], regions[-1], regions[:, 0], regions[:, -1]):
        enclosed[side] = False
    enclosed[0] = False
    return enclosed, regions


def _small_regions(ids: NDArray[_Ids], min_area_px: int, background_id: int | None) -> NDArray[np.bool_]:
    """Where the pixel's 8-connected region of one id is below the area; never on background."""
    # cc3d takes 0 for nothing.
    above_zero = ids.astype(np.uint16 if ids.dtype == np.uint8 else np.int64) + 1
    if background_id is not None:
        above_zero[ids == background_id] = 0
    regions = cc3d.connected_components(above_zero, connectivity=8)
    small = np.bincount(regions.ravel()) < min_area_px
    if background_id is not None:
        small[0] = False
    return small.take(regions)


def _given_away(
    class_ids: NDArray[np.uint8], given: NDArray[np.bool_], background_id: int | None, *, may_return: bool
) -> NDArray[np.uint8]:
    """Class ids with the pixels `given` away, as `clean_class_ids` says. Linear in their number.

    `may_return`: to the class that they come from, where another region of it is nearest.
    """
    unsettled = np.uint16(256)
    framed = np.pad(class_ids, 1).ravel()
    waiting = np.pad(given, 1).ravel()
    settled = np.pad(np.where(given, unsettled, class_ids), 1, constant_values=unsettled).ravel()
    place = np.empty(settled.size, np.int32)
    row_px = class_ids.shape[1] + 2
    steps = (1, -1, row_px, -row_px)
    front = np.flatnonzero(waiting)
    while front.size:
        come_from = framed[front]
        lowest = np.full(front.size, unsettled)
        for step in steps:
            neighbour = settled[front + step]
            if not may_return:
                neighbour[neighbour == come_from] = unsettled
            np.minimum(lowest, neighbour, out=lowest)
        reached = lowest < unsettled
        newly = front[reached]
        settled[newly] = lowest[reached]
        waiting[newly] = False
        beside = np.concatenate([newly + step for step in steps])
        beside = beside[waiting[beside]]
        # Each once: of equal ones only the last finds its own place again.
        places = np.arange(beside.size, dtype=np.int32)
        place[beside] = places
        front = beside[place[beside] == places]
    answer = settled.reshape(-1, row_px)[1:-1, 1:-1]
    return np.where(answer == unsettled, class_ids if background_id is None else background_id, answer).astype(np.uint8)


def _boxes(ids: NDArray[_Ids], background_id: int | None) -> list[tuple[int, tuple[slice, slice]]]:
    """Ids that occur, but for the background, in ascending order, with their bounding boxes."""
    found = ndimage.find_objects(ids.astype(np.int32) + 1)
    return [(own_id, box) for own_id, box in enumerate(found) if box is not None and own_id != background_id]


def _widened(side: slice, by_px: int) -> slice:
    return slice(max(0, side.start - by_px), side.stop + by_px)


def _renumbered(labels: NDArray[np.int32]) -> NDArray[np.int32]:
    where = np.flatnonzero(labels)
    owners = labels.ravel()[where]
    first = np.full(int(owners.max(initial=0)) + 1, labels.size, dtype=np.int64)
    # Backwards, so that the first pixel is what remains.
    first[owners[::-1]] = where[::-1]
    order = np.argsort(first, kind="stable")[: np.count_nonzero(first < labels.size)]
    table = np.zeros(first.size, np.int32)
    table[order] = np.arange(1, order.size + 1, dtype=np.int32)
    return np.asarray(table[labels], dtype=np.int32)
