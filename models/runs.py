"""Instances as runs of pixels: painted, moved and cleaned without a mask of the image's size for each. Owns: COCO run
lengths as arrays. Must not know: torch, networks, tables. Thread safe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.cleanup import clean_mask
from models.detections import place_mask
from models.masks import Instance
from models.refinement import CleanupSettings


class Runs(NamedTuple):
    """Ascending runs of a mask in an image of `height`: int64 [n], as positions x * height + y; ends are exclusive."""

    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    height: int

    def columns(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """(x, top, bottom) [m]: the same pixels, in runs that each lie in one column."""
        first, last = self.starts // self.height, (self.ends - 1) // self.height
        counts = last - first + 1
        owner = np.repeat(np.arange(len(self.starts)), counts)
        x = first[owner] + np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
        top = np.maximum(self.starts[owner] - x * self.height, 0)
        bottom = np.minimum(self.ends[owner] - x * self.height, self.height)
        return x, top, bottom


def decode_runs(rle: Mapping[str, Any]) -> Runs:
    """The runs of COCO compressed run lengths {"size": [h, w], "counts": bytes}. Raises ValueError for counts that are
    cut, or do not fit the size.
    """
    height, width = (int(side) for side in rle["size"])
    counts = run_lengths(rle["counts"])
    if not counts.size:
        return Runs(np.empty(0, np.int64), np.empty(0, np.int64), height)
    edges = np.cumsum(counts)
    if edges[-1] > height * width or (counts < 0).any():
        raise ValueError(f"the run lengths do not fit a mask of {width}×{height}")
    starts, ends = edges[0::2], edges[1::2]
    starts = starts[: len(ends)]
    kept = ends > starts
    return Runs(starts[kept], ends[kept], height)


def run_lengths(text: bytes | str) -> NDArray[np.int64]:
    """int64 [n] of COCO compressed run lengths: pixels outside and inside in turns, outside first.

    The encoding is that of `rleToString` in COCO's maskApi.c: 5 bits a character, low ones first, bit 5 says that more
    follow; from the third number on, differences to the one before the last. Raises ValueError for counts that are cut.
    """
    codes = (
        np.frombuffer(text.encode("ascii") if isinstance(text, str) else bytes(text), np.uint8).astype(np.int64) - 48
    )
    if not codes.size:
        return codes
    last = (codes & 0x20) == 0
    if not last[-1]:
        raise ValueError("the run lengths end in the middle of a number")
    number = np.concatenate([[0], np.cumsum(last)[:-1]])
    begins = np.concatenate([[0], np.flatnonzero(last)[:-1] + 1])
    place = np.arange(codes.size) - begins[number]
    values = np.zeros(int(number[-1]) + 1, np.int64)
    np.add.at(values, number, (codes & 0x1F) << (5 * place))
    ends_at = np.flatnonzero(last)
    negative = (codes[ends_at] & 0x10) != 0
    values -= np.where(negative, np.int64(1) << (5 * (place[ends_at] + 1)), 0)
    # Each number from the fourth on is added to the one two before: two running sums, over odd and even places.
    counts = values.copy()
    counts[1::2] = np.cumsum(values[1::2])
    counts[2::2] = np.cumsum(values[2::2])
    return counts


def crop_mask(rle: Mapping[str, Any], *, margin_px: int = 0) -> tuple[NDArray[np.bool_], int, int]:
    """(mask bool [h, w], y, x): the smallest window that holds all pixels, and a margin where the image goes on.

    Raises ValueError for an empty mask.
    """
    height, width = (int(side) for side in rle["size"])
    xs, tops, bottoms = decode_runs(rle).columns()
    if not xs.size:
        raise ValueError("an empty mask has no window")
    x, y = max(0, int(xs.min()) - margin_px), max(0, int(tops.min()) - margin_px)
    right, below = min(width, int(xs.max()) + 1 + margin_px), min(height, int(bottoms.max()) + margin_px)
    mask = np.zeros((below - y, right - x), np.bool_)
    for column, top, bottom in zip((xs - x).tolist(), (tops - y).tolist(), (bottoms - y).tolist(), strict=True):
        mask[top:bottom, column] = True
    return mask, y, x


def moved(instance: Instance, *, y: int, x: int, height: int, width: int) -> Instance:
    """The instance of a tile, in the image of height × width in which the tile's top left is (y, x)."""
    mask, top, left = crop_mask(instance.rle)
    rle = place_mask(mask, y=top + y, x=left + x, height=height, width=width)
    own_x, own_y, own_width, own_height = instance.bbox
    return instance._replace(rle=rle, bbox=(own_x + x, own_y + y, own_width, own_height))


def paint(instances: Sequence[Instance], *, height: int, width: int, background_id: int) -> NDArray[np.uint8]:
    """Class ids uint8 [h, w]: a pixel of several takes the class of the best score (of equals, the first); of none, the
    background."""
    class_ids = np.full((height, width), background_id, np.uint8)
    for index in sorted(range(len(instances)), key=lambda index: (instances[index].score, -index)):
        xs, tops, bottoms = decode_runs(instances[index].rle).columns()
        for column, top, bottom in zip(xs.tolist(), tops.tolist(), bottoms.tolist(), strict=True):
            class_ids[top:bottom, column] = instances[index].class_id
    return class_ids


def clean_instances(
    instances: Sequence[Instance], settings: CleanupSettings, *, taken: NDArray[np.uint8] | None, background_id: int
) -> list[Instance]:
    """Each instance cleaned by itself, as `models.cleanup.clean_mask` does; those that vanish are dropped.

    `taken` uint8 [h, w]: the class ids of an image whose instances may not overlap; then none grows over a pixel that
    was another's. Boxes become those of the masks.
    """
    reach_px = 2 * (settings.closing_radius_px + settings.opening_radius_px) + 1
    cleaned = []
    for instance in instances:
        height, width = (int(side) for side in instance.rle["size"])
        mask, y, x = crop_mask(instance.rle, margin_px=reach_px)
        after = clean_mask(mask, settings)
        if taken is not None:
            after &= mask | (taken[y : y + mask.shape[0], x : x + mask.shape[1]] == background_id)
        if not after.any():
            continue
        rows, columns = np.flatnonzero(after.any(axis=1)), np.flatnonzero(after.any(axis=0))
        box = (
            float(x + columns[0]),
            float(y + rows[0]),
            float(columns[-1] - columns[0] + 1),
            float(rows[-1] - rows[0] + 1),
        )
        rle = place_mask(after, y=y, x=x, height=height, width=width)
        cleaned.append(instance._replace(rle=rle, bbox=box, area=int(np.count_nonzero(after))))
    return cleaned
