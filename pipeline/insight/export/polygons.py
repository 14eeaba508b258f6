"""Masks as polygons. Owns: outlines, and joining an outline with its holes and with other parts into one polygon.
Must not know: formats, tables.

Formats of one polygon an object have no holes and no second parts. Both are joined to the outline by a bridge there and
back between the nearest points, as `merge_multi_segment` of Ultralytics joins parts: under the even-odd rule, by which
polygons are filled everywhere here, a bridge has no area and a hole stays a hole.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.spatial import KDTree

Points = NDArray[np.float64]


def region_polygons(mask: NDArray[np.bool_], *, finer: int = 1, tolerance_px: float = 0.0) -> list[Points]:
    """One polygon, float64 [n, 2] of x, y in pixels, for each 8-connected region of a bool [h, w] mask; its holes are
    joined to it. Row by row from the top.

    Points are centres of the region's own edge pixels (x + 0.5, y + 0.5): drawn with its outline, the polygon gives
    the mask back. `finer` 2 traces the mask at twice its size: points then lie a quarter of a pixel within the border,
    and the pixels whose centres are inside give the mask back. `tolerance_px`: outlines are simplified (Douglas and
    Peucker) by at most so much. A polygon has at least 3 points.
    """
    inside = np.ascontiguousarray(mask, dtype=np.uint8)
    box = cv2.boundingRect(inside)
    left, top, width, height = box
    if not width:
        return []
    inside = inside[top : top + height, left : left + width]
    if finer > 1:
        inside = np.repeat(np.repeat(inside, finer, axis=0), finer, axis=1)
    contours, hierarchy = cv2.findContours(np.ascontiguousarray(inside), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    rings: list[Points] = []
    for contour in contours:
        simple = cv2.approxPolyDP(contour, tolerance_px * finer, True) if tolerance_px else contour
        # Of a ring that is simplified to a line only its first form has an area.
        kept = simple if len(simple) >= 3 else contour
        rings.append((kept.reshape(-1, 2) + 0.5) / finer + (left, top))
    parents = hierarchy.reshape(-1, 4)[:, 3]
    polygons = []
    for index, ring in enumerate(rings):
        if parents[index] < 0:
            holes = [rings[hole] for hole in np.flatnonzero(parents == index)]
            polygons.append(_closed(join(ring, holes)))
    return sorted(polygons, key=lambda points: (points[:, 1].min(), points[:, 0].min()))


def object_polygon(mask: NDArray[np.bool_], *, finer: int = 1, tolerance_px: float = 0.0) -> Points | None:
    """One polygon for all of a mask, its regions joined to the one with the longest outline; None of an empty mask. The
    rest as `region_polygons`."""
    polygons = region_polygons(mask, finer=finer, tolerance_px=tolerance_px)
    if not polygons:
        return None
    longest = max(range(len(polygons)), key=lambda index: len(polygons[index]))
    return join(polygons[longest], [one for index, one in enumerate(polygons) if index != longest])


def join(base: Points, rings: Sequence[Points]) -> Points:
    """`base` with a way from its nearest point to each ring, around it, and back. Float64 [n, 2]."""
    if not rings:
        return base
    tree = KDTree(base)
    detours: dict[int, list[Points]] = {}
    for ring in rings:
        distances, nearest = tree.query(ring)
        begin = int(np.argmin(distances))
        around = np.concatenate([ring[begin:], ring[: begin + 1]])
        detours.setdefault(int(nearest[begin]), []).append(around)
    pieces: list[Points] = []
    after = 0
    for at in sorted(detours):
        pieces.append(base[after : at + 1])
        for around in detours[at]:
            pieces += [around, base[at : at + 1]]
        after = at + 1
    pieces.append(base[after:])
    return np.concatenate(pieces)


def _closed(points: Points) -> Points:
    """Of a region of one pixel or two as many points as a polygon must have."""
    missing = 3 - len(points)
    return np.concatenate([points, np.repeat(points[-1:], missing, axis=0)]) if missing > 0 else points
