"""From detections' small masks to instances of the image's size, on the CPU. Owns: how a mask is laid over its box.
Must not know: torch, devices, networks. Thread safe.

Nothing of the size of the image is held but the class ids: a mask goes from its grid to run lengths in bands of
columns, one instance after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from models.masks import Instance

#: Pixels of a mask that are interpolated at once.
_BAND_PIXELS = 1 << 18


class Detections(NamedTuple):
    """What was found in one image, best score first. K detections."""

    #: float32 [K, 4]: x1, y1, x2, y2 in pixels of the image.
    boxes: NDArray[np.float32]
    #: float32 [K], 0..1.
    scores: NDArray[np.float32]
    #: int64 [K]: channel of the class, from 1.
    labels: NDArray[np.int64]
    #: float32 [K, M, M]: probability of the instance on a grid over its box.
    masks: NDArray[np.float32]
    #: Pixels of the image.
    height: int
    width: int


def paste_detections(
    found: Detections, class_ids_by_label: Sequence[int], *, background_id: int, mask_threshold: float
) -> tuple[NDArray[np.uint8], list[Instance]]:
    """Class ids uint8 [h, w], and the instances, best score first.

    Each mask is interpolated over its box as torchvision's `paste_masks_in_image` does; a pixel belongs to it where the
    probability is at least `mask_threshold`. A pixel of several takes the class of the best score; of none, the
    background. Detections without any pixel are dropped. `bbox` is the network's box, not the mask's.
    """
    class_ids = np.full((found.height, found.width), background_id, np.uint8)
    instances: list[Instance] = []
    # From the worst to the best: later ones lie above.
    for index in reversed(range(len(found.scores))):
        class_id = class_ids_by_label[int(found.labels[index])]
        runs: list[NDArray[np.int64]] = []
        for first_column, first_row, inside_CR in _bands(found, index, mask_threshold):
            rows, columns = inside_CR.shape[1], inside_CR.shape[0]
            window = class_ids[first_row : first_row + rows, first_column : first_column + columns]
            window[inside_CR.T] = class_id
            runs.append(_column_runs(inside_CR, first_column, first_row, found.height))
        edges = _joined(runs)
        if not edges.size:
            continue
        x1, y1, x2, y2 = (float(value) for value in found.boxes[index])
        instances.append(
            Instance(
                class_id=class_id,
                score=float(found.scores[index]),
                bbox=(x1, y1, x2 - x1, y2 - y1),
                area=int((edges[:, 1] - edges[:, 0]).sum()),
                rle=_rle(edges, found.height, found.width),
            )
        )
    instances.reverse()
    return class_ids, instances


def _bands(found: Detections, index: int, threshold: float) -> Iterator[tuple[int, int, NDArray[np.bool_]]]:
    """Column and row at which it begins, and which pixels are inside, bool [columns, rows]: left to right."""
    grid = np.pad(found.masks[index], 1)
    scale = np.float32(grid.shape[0] / found.masks[index].shape[0])
    x1, y1, x2, y2 = _expanded(found.boxes[index], scale)
    rows = _axis(y1, y2, grid.shape[0], found.height)
    columns = _axis(x1, x2, grid.shape[1], found.width)
    if not rows[0].size or not columns[0].size:
        return
    first_row, first_column = max(y1, 0), max(x1, 0)
    # Rows first: [grid columns, rows of the image], of which a band's columns are mixtures.
    low, high, weight = rows
    tall = (grid[low] * (1 - weight)[:, None] + grid[high] * weight[:, None]).T
    step = max(1, _BAND_PIXELS // len(low))
    for start in range(0, len(columns[0]), step):
        left, right, to_right = (values[start : start + step] for values in columns)
        yield (
            first_column + start,
            first_row,
            tall[left] * (1 - to_right)[:, None] + tall[right] * to_right[:, None] >= np.float32(threshold),
        )


def _expanded(box: NDArray[np.float32], scale: np.float32) -> tuple[int, int, int, int]:
    """As torchvision's `expand_boxes`, in float32, then cut to integers."""
    half = np.float32(0.5)
    half_width, half_height = (box[2] - box[0]) * half * scale, (box[3] - box[1]) * half * scale
    x, y = (box[2] + box[0]) * half, (box[3] + box[1]) * half
    return int(x - half_width), int(y - half_height), int(x + half_width), int(y + half_height)


def _axis(
    first: int, last: int, grid: int, limit: int
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float32]]:
    """For pixels first .. last (both included) within 0 .. limit - 1: the two grid points, and the second's weight."""
    length = max(last - first + 1, 1)
    pixels = np.arange(max(first, 0), min(last + 1, limit)) - first
    half = np.float32(0.5)
    position = np.maximum((pixels.astype(np.float32) + half) * np.float32(grid / length) - half, 0)
    low = np.minimum(position.astype(np.intp), grid - 1)
    return low, np.minimum(low + 1, grid - 1), position - low.astype(np.float32)


def _column_runs(inside_CR: NDArray[np.bool_], first_column: int, first_row: int, height: int) -> NDArray[np.int64]:
    """Begin and end [n, 2] of the runs of a window, as positions in the image's column-major order."""
    columns, rows = inside_CR.shape
    framed = np.zeros((columns, rows + 2), np.int8)
    framed[:, 1:-1] = inside_CR
    column, row = np.nonzero(np.diff(framed, axis=1))
    # Of each column the changes come in pairs: where a run begins, and where it has ended.
    return ((column + first_column) * height + row + first_row).reshape(-1, 2)


def _joined(runs: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    """All runs in order, those that touch made one: a run may go on at the top of the next column."""
    edges = np.concatenate(runs) if runs else np.empty((0, 2), np.int64)
    if not edges.size:
        return edges
    apart = edges[1:, 0] != edges[:-1, 1]
    return np.stack([edges[np.append(True, apart), 0], edges[np.append(apart, True), 1]], axis=1)


def _rle(edges: NDArray[np.int64], height: int, width: int) -> dict[str, Any]:
    """COCO compressed run lengths: {"size": [h, w], "counts": bytes}."""
    counts = np.diff(edges.ravel(), prepend=0, append=height * width)
    counts = counts[: counts.size - (counts[-1] == 0)]
    rle: dict[str, Any] = coco_mask.frPyObjects({"size": [height, width], "counts": counts.tolist()}, height, width)
    return rle
