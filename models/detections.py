"""Objects that a detector (Mask R-CNN) found in overlapping tiles of one image, each of them once. Owns: moving a
tile's objects into the image, and what counts as the same object. Must not know: networks, how tiles were made.

A detector sees an object at a seam twice, as a rule once whole and once cut off. Two findings are compared where both
tiles looked: there they should agree whatever either tile sees beyond. (Comparing whole masks would keep the halves of
a large object apart, because neither contains much of the other.) Of a sliver at its edge a tile knows little, and its
box and mask may be anything: the tile that sees the place whole decides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from models.masks import Instance
from models.seams import encode_runs
from models.tiling import Window

#: A finding that comes so near to the edge of its tile may be cut off there: boxes are not exact. Pixels, or a share of
#: the tile where that is more.
_EDGE_PX = 2
_EDGE_SHARE = 1 / 64


class TileDetections(NamedTuple):
    """What was found in one tile. Boxes and masks are those of the whole image."""

    window: Window
    instances: Sequence[Instance]


def place_mask(mask: NDArray[np.bool_], *, y: int, x: int, height: int, width: int) -> dict[str, Any]:
    """COCO compressed run lengths, in an image of height × width, of a bool [h, w] mask whose top left is (y, x).

    Costs time and memory for the pixels of `mask` only. Raises ValueError for a mask that is empty or leaves the image.
    """
    if y < 0 or x < 0 or y + mask.shape[0] > height or x + mask.shape[1] > width or not mask.any():
        raise ValueError(f"a mask of {mask.shape} at y={y}, x={x} is empty, or not inside {width}x{height}")
    columns = np.zeros((mask.shape[1], mask.shape[0] + 2), np.int8)
    columns[:, 1:-1] = mask.T
    change = np.diff(columns, axis=1)
    at_x, at_y = np.nonzero(change == 1)
    _, end_y = np.nonzero(change == -1)
    first = (at_x.astype(np.int64) + x) * height + y
    return encode_runs(first + at_y, first + end_y, height, width)


def merge_detections(
    tiles: Sequence[TileDetections],
    *,
    height: int,
    width: int,
    min_iou: float = 0.5,
    min_containment: float = 0.8,
) -> list[Instance]:
    """All objects of an image of height × width, in order of their box's top, then left; each once. `tiles`: all of
    them, also where nothing was found.

    Two findings of one class in two tiles are the same object where, in the overlap of the tiles, their masks have an
    intersection over union of at least `min_iou`; or, if one of them ends where its tile does, at least
    `min_containment` of the smaller lies in the other. Each finding has at most one partner in another tile, the best;
    findings of one tile are never merged with each other directly. A merged object is the finding of the highest
    score where all have it inside their tile, else the union of the masks with the highest score. A finding that ends
    where its tile does counts for nothing where another tile has its place inside: that one has seen more of it, or
    has seen that there is none. The result does not depend on the order of `tiles`.
    """
    tiles = sorted(tiles, key=lambda tile: (tile.window.row, tile.window.column))
    first = np.cumsum([0, *(len(tile.instances) for tile in tiles)])
    parent = list(range(int(first[-1])))

    def root(node: int) -> int:
        while parent[node] != node:
            node = parent[node]
        return node

    for one, other in _overlapping(tiles):
        for a, b in _partners(
            tiles[one], tiles[other], size=(height, width), min_iou=min_iou, min_containment=min_containment
        ):
            low, high = sorted((root(int(first[one]) + a), root(int(first[other]) + b)))
            parent[high] = low
    groups: dict[int, list[tuple[Instance, bool]]] = {}
    places = _places(tiles)
    nodes = ((instance, tile.window) for tile in tiles for instance in tile.instances)
    for node, (instance, window) in enumerate(nodes):
        cut = _ends_with_tile(instance, window, height, width)
        if not (cut and _is_within(instance, places, height, width).any()):
            groups.setdefault(root(node), []).append((instance, cut))
    merged = [_merged(group) for group in groups.values()]
    return sorted(merged, key=lambda one: (one.bbox[1], one.bbox[0], one.class_id, -one.score))


def _places(tiles: Sequence[TileDetections]) -> NDArray[np.int64]:
    """Top, left, bottom, right of each tile, [n, 4]."""
    return np.array([(w.y, w.x, w.y + w.height, w.x + w.width) for w, _ in tiles], np.int64).reshape(-1, 4)


def _overlapping(tiles: Sequence[TileDetections]) -> Iterator[tuple[int, int]]:
    """Pairs of tiles that overlap and both found something, in order."""
    boxes = _places(tiles)
    found = np.array([len(tile.instances) > 0 for tile in tiles], np.bool_)
    for one in np.flatnonzero(found):
        later = boxes[one + 1 :]
        touching = (later[:, :2] < boxes[one, 2:]).all(axis=1) & (later[:, 2:] > boxes[one, :2]).all(axis=1)
        for other in np.flatnonzero(touching & found[one + 1 :]) + one + 1:
            yield int(one), int(other)


def _partners(
    one: TileDetections, other: TileDetections, *, size: tuple[int, int], min_iou: float, min_containment: float
) -> Iterator[tuple[int, int]]:
    """Findings of the two tiles that are the same object, the surest first, each in one pair at most."""
    height, width = size
    top, left = max(one.window.y, other.window.y), max(one.window.x, other.window.x)
    bottom = min(one.window.y + one.window.height, other.window.y + other.window.height)
    right = min(one.window.x + one.window.width, other.window.x + other.window.width)
    overlap = (left, top, right, bottom)
    shared = place_mask(np.ones((bottom - top, right - left), np.bool_), y=top, x=left, height=height, width=width)
    theirs = {
        index: _clipped(instance.rle, shared)
        for index, instance in enumerate(other.instances)
        if _boxes_meet(instance.bbox, overlap)
    }
    pairs = []
    for index, instance in enumerate(one.instances):
        if not _boxes_meet(instance.bbox, overlap):
            continue
        mine = _clipped(instance.rle, shared)
        area = int(coco_mask.area(mine))
        for their_index, their in theirs.items():
            candidate = other.instances[their_index]
            x, y, w, h = candidate.bbox
            if candidate.class_id != instance.class_id or not _boxes_meet(instance.bbox, (x, y, x + w, y + h)):
                continue
            common = int(coco_mask.area(coco_mask.merge([mine, their], intersect=True)))
            if not common:
                continue
            their_area = int(coco_mask.area(their))
            iou = common / (area + their_area - common)
            cut = _ends_with_tile(instance, one.window, height, width)
            cut = cut or _ends_with_tile(candidate, other.window, height, width)
            if iou >= min_iou or (cut and common / min(area, their_area) >= min_containment):
                pairs.append((iou, index, their_index))
    used: tuple[set[int], set[int]] = set(), set()
    for _, index, their_index in sorted(pairs, key=lambda pair: (-pair[0], pair[1], pair[2])):
        if index not in used[0] and their_index not in used[1]:
            used[0].add(index)
            used[1].add(their_index)
            yield index, their_index


def _clipped(rle: dict[str, Any], shared: dict[str, Any]) -> dict[str, Any]:
    clipped: dict[str, Any] = coco_mask.merge([rle, shared], intersect=True)
    return clipped


def _boxes_meet(bbox: tuple[float, float, float, float], corners: tuple[float, float, float, float]) -> bool:
    x, y, w, h = bbox
    return x < corners[2] and y < corners[3] and x + w > corners[0] and y + h > corners[1]


def _ends_with_tile(instance: Instance, window: Window, height: int, width: int) -> bool:
    """Whether the finding reaches an edge of its tile that is not the image's edge too."""
    place = np.array([(window.y, window.x, window.y + window.height, window.x + window.width)])
    return not _is_within(instance, place, height, width)[0]


def _is_within(instance: Instance, places_N4: NDArray[np.int64], height: int, width: int) -> NDArray[np.bool_]:
    """bool [N]: in which tiles its box ends before all edges that are not the image's edge too."""
    x, y, w, h = instance.bbox
    edge_px = np.maximum(_EDGE_PX, _EDGE_SHARE * (places_N4[:, 2:] - places_N4[:, :2]).max(axis=1))
    before = places_N4[:, :2] + np.where(places_N4[:, :2] > 0, edge_px[:, None], -np.inf)
    after = places_N4[:, 2:] - np.where(places_N4[:, 2:] < (height, width), edge_px[:, None], -np.inf)
    corners_N4 = np.concatenate([before - (y, x), (y + h, x + w) - after], axis=1)
    return np.asarray((corners_N4 <= 0).all(axis=1))


def _merged(group: Sequence[tuple[Instance, bool]]) -> Instance:
    """Of findings that are one object, each with whether it ends with its tile."""
    best = max((instance for instance, _ in group), key=lambda one: one.score)
    if len(group) == 1 or not any(cut for _, cut in group):
        return best
    rle: dict[str, Any] = coco_mask.merge([instance.rle for instance, _ in group])
    x, y, w, h = (float(value) for value in coco_mask.toBbox(rle))
    return Instance(best.class_id, best.score, (x, y, w, h), int(coco_mask.area(rle)), rle)
