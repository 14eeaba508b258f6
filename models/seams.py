"""Instances of an image too large for `split_instances`: the same objects, found block by block. Owns: what is kept
of the network's evidence, flooding with a halo, objects that cross blocks. Must not know: networks, tiles' origin.

Markers are numbered over the whole image before anything is flooded, so blocks agree on what they are, and an object
that crosses a seam has one number on both of its sides: nothing is matched or merged by likeness.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from models.card import WatershedPostprocessing
from models.masks import Instance
from models.postprocessing import counts, flood, threshold_level
from models.tiling import Band


class InstanceEvidence:
    """What instances are made of, for a whole image of height × width: 9 bits a pixel."""

    def __init__(self, height: int, width: int, settings: WatershedPostprocessing) -> None:
        self.settings = settings
        #: Probability, p * 255 rounded.
        self.foreground: NDArray[np.uint8] = np.empty((height, width), np.uint8)
        #: Which pixels may be markers, eight to a byte.
        self._cores: NDArray[np.uint8] = np.empty((height, -(-width // 8)), np.uint8)

    def add(self, y: int, interior: NDArray[np.uint8], foreground: NDArray[np.uint8]) -> None:
        """Takes rows `y` to `y + h`: uint8 [h, width] each. Different rows may come from different threads."""
        rows = slice(y, y + len(foreground))
        self.foreground[rows] = foreground
        cores = (interior >= threshold_level(self.settings.interior_threshold)) & self._inside(foreground)
        self._cores[rows] = np.packbits(cores, axis=1)

    def add_band(self, band: Band) -> None:
        """Takes a band of an instance model. Raises ValueError for one of a semantic model."""
        if band.interior is None or band.foreground is None:
            raise ValueError("a band of a semantic model holds no evidence of instances")
        self.add(band.y, band.interior, band.foreground)

    def inside(self, begin: int, end: int) -> NDArray[np.uint8]:
        """1 where rows begin to end are foreground, else 0."""
        return self._inside(self.foreground[begin:end]).view(np.uint8)

    def cores(self, begin: int, end: int) -> NDArray[np.uint8]:
        """1 where a pixel of these rows may be a marker, else 0."""
        return np.unpackbits(self._cores[begin:end], axis=1, count=self.foreground.shape[1])

    def _inside(self, foreground: NDArray[np.uint8]) -> NDArray[np.bool_]:
        return foreground >= threshold_level(self.settings.foreground_threshold)


def split_in_blocks(
    evidence: InstanceEvidence, *, class_id: int, background_id: int, block_px: int = 1024, halo_px: int = 128
) -> tuple[NDArray[np.uint8], list[Instance]]:
    """Final class ids uint8 [h, w] and instances, in order of their first pixel's row, then column.

    What `split_instances` and `describe_instances` say of the whole image, where
    pixels lie at most `halo_px` from all of their region that decides about them: always for regions of foreground that
    reach no further beyond a block, in practice for touching objects smaller than the halo. Foreground whose only
    markers are beyond the halo becomes one instance of its own for each region. Memory beyond `evidence` and the class
    ids: about 12 bytes for each pixel of `block_px` rows, 45 for each of a block and its halo.
    """
    if not 0 <= halo_px <= block_px:
        raise ValueError(f"the halo of {halo_px} pixels must not be larger than the block of {block_px}")
    height, width = evidence.foreground.shape
    seeds = _Seeds(evidence, block_px)
    class_ids = np.full((height, width), background_id, np.uint8)
    objects = _Objects(class_ids, class_id, background_id, seeds.last_rows(halo_px), evidence.settings)
    above: NDArray[np.int32] = np.zeros((0, width), np.int32)
    current = seeds.rows(0)
    for index, top in enumerate(range(0, height, block_px)):
        bottom = min(top + block_px, height)
        below = seeds.rows(index + 1) if bottom < height else current[:0]
        first = top - len(above)
        for left in range(0, width, block_px):
            right = min(left + block_px, width)
            if not current[:, left:right].any():
                continue
            near = slice(max(0, left - halo_px), min(width, right + halo_px))
            near_seeds = np.concatenate([above[:, near], current[:, near], below[:halo_px, near]])
            labels = _labels(near_seeds, evidence.foreground[first : first + len(near_seeds), near])
            core = labels[top - first : bottom - first, left - near.start : right - near.start]
            objects.add(top, left, core, evidence.foreground[top:bottom, left:right])
        objects.close(bottom)
        above, current = current[max(0, len(current) - halo_px) :].copy(), below
    return class_ids, objects.finished()


def encode_runs(starts: NDArray[np.int64], ends: NDArray[np.int64], height: int, width: int) -> dict[str, Any]:
    """COCO compressed run lengths of ascending runs of x * height + y, at least one; those that touch become one."""
    apart = starts[1:] != ends[:-1]
    edges = np.stack([starts[np.append(True, apart)], ends[np.append(apart, True)]], axis=1).ravel()
    counts = np.diff(edges, prepend=0, append=height * width)
    # A zero at the end is legal but not canonical: pycocotools' own encoder never writes one.
    counts = counts[: counts.size - (counts[-1] == 0)]
    rle: dict[str, Any] = coco_mask.frPyObjects({"size": [height, width], "counts": counts.tolist()}, height, width)
    return rle


def _labels(seeds: NDArray[np.int32], foreground: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Labels of a block with its halo; `seeds` as `_Seeds.rows` gives them."""
    labels = flood(foreground, np.maximum(seeds, 0), seeds != 0)
    return np.where(labels == 0, np.abs(seeds), labels)


class _Seeds:
    """The markers of the whole image, numbered; computed band by band, and held as tables only.

    Numbers 1 .. m are markers; those above are regions of foreground, for what no marker reaches.
    """

    def __init__(self, evidence: InstanceEvidence, band_px: int) -> None:
        self._evidence = evidence
        self._band_px = band_px
        cores, regions = _Components(), _Components()
        owners = []
        for top in range(0, len(evidence.foreground), band_px):
            first_region = regions.count
            core_labels = cores.add(top, evidence.cores(top, top + band_px))
            region_labels = regions.add(top, evidence.inside(top, top + band_px))
            where = np.flatnonzero(core_labels)
            owner = np.zeros(int(core_labels.max()) + 1, np.int64)
            owner[core_labels.ravel()[where]] = region_labels.ravel()[where] + first_region
            owners.append(owner)
        core_of, areas, core_bottoms = cores.join()
        region_of, _, self._region_bottoms = regions.join()
        kept = areas >= max(evidence.settings.min_marker_px, 1)
        number = np.where(kept, np.cumsum(kept), 0).astype(np.int32)[core_of]
        self._core_bottoms = core_bottoms[kept]
        marked = np.zeros(len(self._region_bottoms), np.bool_)
        marked[region_of[np.concatenate(owners)[number > 0]]] = True
        region_number = np.arange(len(marked), dtype=np.int32) + np.int32(kept.sum() + 1)
        self._core_tables = cores.tables(number)
        self._region_tables = regions.tables(np.where(marked, -region_number, region_number)[region_of])

    def rows(self, band: int) -> NDArray[np.int32]:
        """int32 [band_px or less, width]: the number of the marker at each pixel; minus the number of its region where
        there is foreground that some marker must reach; 0 for background.
        """
        top = band * self._band_px
        seeds = _labelled(self._evidence.inside(top, top + self._band_px))
        cores = _labelled(self._evidence.cores(top, top + self._band_px))
        for row, core in zip(seeds, cores, strict=True):  # in place: these are the largest arrays here
            number = self._core_tables[band][core]
            row[:] = np.where(number > 0, number, self._region_tables[band][row])
        return seeds

    def last_rows(self, halo_px: int) -> NDArray[np.int64]:
        """By number, the row from which on no pixel can have it."""
        return np.concatenate([np.zeros(1, np.int64), self._core_bottoms + halo_px, self._region_bottoms])


def _labelled(mask: NDArray[np.uint8]) -> NDArray[np.int32]:
    """4-connected components; the labels are those of `_Components.add`."""
    return np.asarray(cv2.connectedComponents(mask, connectivity=4, ltype=cv2.CV_32S)[1], np.int32)


class _Components:
    """4-connected components of a mask that comes in bands, from top to bottom."""

    def __init__(self) -> None:
        self.count = 0
        self._areas: list[NDArray[np.int64]] = []
        self._bottoms: list[NDArray[np.int64]] = []
        self._contacts: list[NDArray[np.int64]] = [np.zeros((2, 0), np.int64)]
        self._last_row: NDArray[np.int64] | None = None

    def add(self, top: int, mask: NDArray[np.uint8]) -> NDArray[np.int32]:
        """The band's own labels int32 [h, w]. A component of the band is known as `count` before the call + label."""
        _, found, table, _ = cv2.connectedComponentsWithStats(mask, connectivity=4, ltype=cv2.CV_32S)
        labels, stats = np.asarray(found, np.int32), np.asarray(table, np.int64)
        stats[0] = 0  # the background
        row = np.where(labels[0] > 0, labels[0].astype(np.int64) + self.count, 0)
        if self._last_row is not None:
            touching = (self._last_row > 0) & (row > 0)
            self._contacts.append(np.unique(np.stack([self._last_row[touching], row[touching]]), axis=1))
        self._last_row = np.where(labels[-1] > 0, labels[-1].astype(np.int64) + self.count, 0)
        self._areas.append(stats[:, cv2.CC_STAT_AREA])
        self._bottoms.append(top + stats[:, cv2.CC_STAT_TOP] + stats[:, cv2.CC_STAT_HEIGHT])
        self.count += len(stats)
        return labels

    def join(self) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
        """The component that each component of a band belongs to, and the areas and lower ends of the whole ones."""
        one, other = np.concatenate(self._contacts, axis=1)
        graph = coo_array((np.ones(len(one), np.bool_), (one, other)), shape=(self.count, self.count))
        total, whole = connected_components(graph, directed=False)
        areas, bottoms = np.zeros(total, np.int64), np.zeros(total, np.int64)
        np.add.at(areas, whole, np.concatenate(self._areas))
        np.maximum.at(bottoms, whole, np.concatenate(self._bottoms))
        return whole, areas, bottoms

    def tables(self, values: NDArray[np.int32]) -> list[NDArray[np.int32]]:
        """`values` of all components of bands, as one table for the labels of each band; 0 for background."""
        tables = np.split(values, np.cumsum([len(areas) for areas in self._areas])[:-1])
        for table in tables:
            table[0] = 0
        return tables


class _Runs(NamedTuple):
    """Vertical runs of pixels of one number: x * height + y of the first, how many, and the sum of their foreground."""

    numbers: NDArray[np.int32]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    sums: NDArray[np.int64]

    def only(self, which: NDArray[np.generic]) -> _Runs:
        return _Runs(self.numbers[which], self.starts[which], self.lengths[which], self.sums[which])


class _Objects:
    """Collects blocks from top to bottom; makes Instances of what cannot grow any more."""

    def __init__(
        self,
        class_ids: NDArray[np.uint8],
        class_id: int,
        background_id: int,
        last_rows: NDArray[np.int64],
        settings: WatershedPostprocessing,
    ) -> None:
        self._class_ids = class_ids
        self._class_id = class_id
        self._background_id = background_id
        self._last_rows = last_rows
        self._settings = settings
        self._runs: list[_Runs] = []
        #: With the place of the first pixel, y * width + x.
        self._done: list[tuple[int, Instance]] = []

    def add(self, top: int, left: int, numbers: NDArray[np.int32], foreground: NDArray[np.uint8]) -> None:
        """The pixels of a block, [h, w] each; writes their class ids."""
        height, width = numbers.shape
        block = self._class_ids[top : top + height, left : left + width]
        np.copyto(block, np.uint8(self._class_id), where=numbers > 0)
        columns = np.ascontiguousarray(numbers.T)
        changes = np.ones((width, height), np.bool_)
        np.not_equal(columns[:, 1:], columns[:, :-1], out=changes[:, 1:])
        starts = np.flatnonzero(changes)
        lengths = np.diff(starts, append=height * width)
        values = columns.ravel()[starts]
        sums = np.add.reduceat(np.ascontiguousarray(foreground.T).ravel(), starts, dtype=np.int64)
        keep = values > 0
        x, y = np.divmod(starts[keep], height)
        self._runs.append(_Runs(values[keep], (x + left) * len(self._class_ids) + y + top, lengths[keep], sums[keep]))

    def close(self, bottom: int) -> None:
        """All blocks above row `bottom` have come."""
        if not self._runs:
            return
        runs = _Runs(
            np.concatenate([part.numbers for part in self._runs]),
            np.concatenate([part.starts for part in self._runs]),
            np.concatenate([part.lengths for part in self._runs]),
            np.concatenate([part.sums for part in self._runs]),
        )
        closed = self._last_rows[runs.numbers] <= bottom
        if bottom == len(self._class_ids):
            closed[:] = True
        self._runs = [runs.only(~closed)]
        runs = runs.only(closed)
        self._describe(runs.only(np.lexsort((runs.starts, runs.numbers))))

    def finished(self) -> list[Instance]:
        """All instances, in order of their first pixel."""
        return [instance for _, instance in sorted(self._done, key=lambda entry: entry[0])]

    def _describe(self, runs: _Runs) -> None:
        """Instances of complete objects, whose runs are sorted by number, then start."""
        if not len(runs.numbers):
            return
        height, width = self._class_ids.shape
        x, y = np.divmod(runs.starts, height)
        first = np.flatnonzero(np.diff(runs.numbers, prepend=0))
        areas = np.add.reduceat(runs.lengths, first)
        sums = np.add.reduceat(runs.sums, first)
        counted = counts(areas, sums, self._settings)
        left, right = np.minimum.reduceat(x, first), np.maximum.reduceat(x, first) + 1
        top, bottom = np.minimum.reduceat(y, first), np.maximum.reduceat(y + runs.lengths, first)
        places = np.minimum.reduceat(y * width + x, first)
        ends = runs.starts + runs.lengths
        bounds = np.append(first, len(runs.numbers))
        for index in range(len(first)):
            own = slice(bounds[index], bounds[index + 1])
            if not counted[index]:
                for at_x, at_y, length in zip(x[own], y[own], runs.lengths[own], strict=True):
                    self._class_ids[at_y : at_y + length, at_x] = self._background_id
                continue
            box = (left[index], top[index], right[index] - left[index], bottom[index] - top[index])
            instance = Instance(
                class_id=self._class_id,
                score=float(sums[index] / (255 * areas[index])),
                bbox=(float(box[0]), float(box[1]), float(box[2]), float(box[3])),
                area=int(areas[index]),
                rle=encode_runs(runs.starts[own], ends[own], height, width),
            )
            self._done.append((int(places[index]), instance))
