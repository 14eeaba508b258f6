"""One image in overlapping tiles: where the tiles lie, and one answer from what the network says of each.
Owns: the grid, the weights, blending, and the sums that go with it. Must not know: files, batches, instances.

Where tiles overlap, class probabilities are averaged with weights that fall off from the tile's centre as a Gaussian
of sigma = tile / 8 (nnU-Net: Isensee et al., Nature Methods 18, 2021; `compute_gaussian` in its inference code). A
pixel under one tile alone keeps that tile's probabilities exactly.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from models.card import Card, Postprocessing, WatershedPostprocessing
from models.postprocessing import threshold_level

#: Probabilities and entropies are summed in units of 1 / _QUANTUM, as `models.reduction` does.
_QUANTUM = 65535
#: Values of all channels that are blended at a time: bounds the memory, and fits a cache.
_CHUNK_VALUES = 1 << 20


class Window(NamedTuple):
    """A tile's place: `row` and `column` in the grid, the rest in pixels of the image."""

    row: int
    column: int
    y: int
    x: int
    height: int
    width: int


class TileGrid:
    """Overlapping tiles that cover an image of height × width pixels.

    Along each axis tiles of `tile_px`, or of the image's side where that is less, lie `tile_px - overlap_px` apart,
    the first at 0, the last where it ends with the image. With `multiple` all of them begin at multiples of it: the
    distance is rounded down to one, and the last begins where it would end with the image if that were padded to a
    multiple, so that its window is up to `multiple - 1` shorter. Then a network whose stride divides `multiple` divides
    the tiles into the same cells as the whole image, padded as tiles are. (A step smaller than `multiple` leaves it out
    of account.) `offset` (y, x), 0 up to the distance, moves all tiles between the first and the last: an image's
    answer should hardly depend on it.
    """

    def __init__(
        self,
        height: int,
        width: int,
        *,
        tile_px: int,
        overlap_px: int,
        multiple: int = 1,
        offset: tuple[int, int] = (0, 0),
    ) -> None:
        if min(height, width, multiple) < 1 or not 0 <= overlap_px < tile_px:
            raise ValueError(
                f"no grid for {width}x{height} with tiles of {tile_px} that overlap by {overlap_px}: sizes must be at "
                "least 1, and the overlap less than the tile"
            )
        step = tile_px - overlap_px
        if step < multiple:
            multiple = 1
        step -= step % multiple
        if not all(0 <= shift < step for shift in offset):
            raise ValueError(f"the offset {offset} must be at least 0 and below {step}, the distance of tiles")
        self.height, self.width = height, width
        self.tile_px, self.overlap_px = tile_px, overlap_px
        self.rows = _Axis(height, tile_px, step, multiple, offset[0])
        self.columns = _Axis(width, tile_px, step, multiple, offset[1])

    def __len__(self) -> int:
        return len(self.rows.starts) * len(self.columns.starts)

    def windows(self) -> list[Window]:
        """All windows, row by row."""
        return [
            Window(row, column, y, x, bottom - y, right - x)
            for row, (y, bottom) in enumerate(zip(self.rows.starts, self.rows.ends, strict=True))
            for column, (x, right) in enumerate(zip(self.columns.starts, self.columns.ends, strict=True))
        ]


class _Axis:
    """Tiles along one axis, and the spans between all their ends: a span lies under the same tiles everywhere."""

    def __init__(self, size: int, tile_px: int, step: int, multiple: int, shift: int) -> None:
        length = min(tile_px, size)
        last = -(-(size - length) // multiple) * multiple
        self.starts = sorted({0, *range(shift, last, step), last})
        self.ends = [min(start + length, size) for start in self.starts]
        self.edges = sorted({*self.starts, *self.ends})
        #: The tiles over each span, as a range.
        self.tiles_over: list[range] = []
        profile = _gaussian(length)
        # Towards the image's own edge a tile sees all that there is: its answer is worth no less there.
        first_profile, last_profile = profile.copy(), profile.copy()
        first_profile[: length // 2] = last_profile[(length + 1) // 2 :] = profile.max()
        profiles = {0: first_profile, len(self.starts) - 1: last_profile}
        #: For each span the weight [tiles, pixels] of each of its tiles, float32; they add up to 1 at each pixel.
        self.weights: list[NDArray[np.float32]] = []
        # An axis of a million tiles has a handful of different spans.
        known: dict[tuple[int, ...], NDArray[np.float32]] = {}
        for begin, end in zip(self.edges[:-1], self.edges[1:], strict=True):
            over = range(bisect_left(self.ends, end), bisect_right(self.starts, begin))
            self.tiles_over.append(over)
            offsets = [begin - self.starts[tile] for tile in over]
            kinds = [tile if tile in profiles else -1 for tile in over]
            key = (end - begin, *offsets, *kinds)
            if key not in known:
                chosen = [
                    profiles.get(tile, profile)[at : at + end - begin] for tile, at in zip(over, offsets, strict=True)
                ]
                weights = np.stack(chosen)
                known[key] = (weights / weights.sum(axis=0)).astype(np.float32)
            self.weights.append(known[key])

    def spans_under(self, tile: int) -> range:
        return range(bisect_left(self.edges, self.starts[tile]), bisect_left(self.edges, self.ends[tile]))


def _gaussian(length: int) -> NDArray[np.float64]:
    """Weights along one axis of a tile; those of a pixel are the product of its row's and its column's."""
    distance = np.arange(length) - (length - 1) / 2
    return np.exp(-0.5 * (distance / (length / 8)) ** 2)


class Band(NamedTuple):
    """Rows `y` to `y + h` of the whole image, final. Arrays are uint8 [h, width]."""

    y: int
    #: Before post-processing.
    class_ids: NDArray[np.uint8]
    #: Instance models: probabilities (p * 255, rounded). Else None.
    interior: NDArray[np.uint8] | None
    foreground: NDArray[np.uint8] | None


class Summary(NamedTuple):
    """Figures of the whole image, as in `models.prediction.Prediction`."""

    pixels: NDArray[np.int64]
    confidence: NDArray[np.float64]
    mean_confidence: float
    mean_entropy: float


class _Cell(NamedTuple):
    """What is kept of a rectangle that waits for tiles: (tile's place, its probabilities there)."""

    pieces: list[tuple[tuple[int, int], torch.Tensor]]


class TileBlender:
    """Takes the tiles of a grid, in any order and from any thread, and gives back the image in bands.

    Guarantees: bands come from top to bottom, each as soon as all tiles over its rows and over those above are there;
    bands and figures are equal bit for bit whatever the order of the tiles, because each rectangle of the image is
    blended once, when its last tile has come, and its tiles in the grid's order; figures are sums of integers.
    Memory: rectangles under several tiles wait as they came. For tiles row by row that is about
    overlap × width × channels values and two bands, whatever the height. A tile row that is ahead of its turn costs
    another overlap on each of its sides.
    """

    def __init__(self, grid: TileGrid, card: Card, *, postprocessing: Postprocessing | None = None) -> None:
        """`postprocessing`: as in the settings of a Segmenter; None takes the card's."""
        self._grid = grid
        self._postprocessing = postprocessing or card.postprocessing
        self._channels = card.network_channels
        self._ids = torch.tensor([info.id for info in card.classes], dtype=torch.uint8)
        self._foreground_index = 0
        if isinstance(self._postprocessing, WatershedPostprocessing):
            self._foreground_index = [info.id for info in card.classes].index(card.foreground_id)
        spans = len(grid.columns.tiles_over)
        self._lock = threading.Lock()
        self._seen: set[tuple[int, int]] = set()
        self._waiting: dict[tuple[int, int], _Cell] = {}
        self._open: dict[int, Band] = {}
        self._unfinished = [spans] * len(grid.rows.tiles_over)
        self._next_band = 0
        self._pixels = np.zeros(len(card.classes), np.int64)
        self._confidence = np.zeros(len(card.classes), np.int64)
        self._entropy = 0
        self._broken = False

    def add(self, window: Window, probabilities_CHW: torch.Tensor | NDArray[np.generic]) -> list[Band]:
        """Takes one tile; gives the bands that it completes, of which there may be none.

        `probabilities_CHW` [C, window.height, window.width]: float16 or float32 in 0..1, or uint8 (p * 255, rounded),
        on any device, where the arithmetic is then done; it may be reused as soon as this returns. Raises ValueError
        for another shape or type, or a window that has come before.
        """
        tile = torch.as_tensor(probabilities_CHW)
        expected = (self._channels, window.height, window.width)
        if tuple(tile.shape) != expected or tile.dtype not in (torch.float16, torch.float32, torch.uint8):
            raise ValueError(
                f"probabilities must be float16, float32 or uint8 {expected}, got {tile.dtype} {tuple(tile.shape)}"
            )
        with self._lock:
            if (window.row, window.column) in self._seen:
                raise ValueError(f"the tile at row {window.row}, column {window.column} has come before")
            self._seen.add((window.row, window.column))
        bands: list[Band] = []
        with torch.inference_mode():
            for down in self._grid.rows.spans_under(window.row):
                for across in self._grid.columns.spans_under(window.column):
                    bands += self._put(window, tile, down, across)
        return bands

    def summary(self) -> Summary:
        """The figures, once all tiles have come. Raises ValueError before. NaN stands where a probability was NaN."""
        missing = len(self._grid) - len(self._seen)
        if missing or self._waiting or any(self._unfinished):
            raise ValueError(f"{missing} of {len(self._grid)} tiles are missing")
        with np.errstate(invalid="ignore"):
            confidence = self._confidence / (self._pixels * float(_QUANTUM))
        scale = float("nan") if self._broken else 1 / (self._grid.height * self._grid.width * _QUANTUM)
        return Summary(
            pixels=self._pixels.copy(),
            confidence=confidence,
            mean_confidence=float(self._confidence.sum()) * scale,
            mean_entropy=float(self._entropy) * scale,
        )

    def _put(self, window: Window, tile: torch.Tensor, down: int, across: int) -> list[Band]:
        """One rectangle of a tile; gives the bands that are complete with it."""
        rows, columns = self._grid.rows, self._grid.columns
        top, left = rows.edges[down] - window.y, columns.edges[across] - window.x
        height = rows.edges[down + 1] - rows.edges[down]
        width = columns.edges[across + 1] - columns.edges[across]
        piece = tile[:, top : top + height, left : left + width]
        needed = len(rows.tiles_over[down]) * len(columns.tiles_over[across])
        pieces = [((window.row, window.column), piece)]
        if needed > 1:
            kept = ((window.row, window.column), piece.clone(memory_format=torch.contiguous_format))
            with self._lock:
                cell = self._waiting.setdefault((down, across), _Cell([]))
                cell.pieces.append(kept)
                if len(cell.pieces) < needed:
                    return []
                del self._waiting[down, across]
            pieces = sorted(cell.pieces, key=lambda entry: entry[0])
        self._finish(down, across, [piece for _, piece in pieces])
        return self._completed(down)

    def _finish(self, down: int, across: int, pieces: Sequence[torch.Tensor]) -> None:
        """Blends one rectangle, whose pieces come in the grid's order, into its band."""
        band = self._band(down)
        left = self._grid.columns.edges[across]
        channels, height, width = pieces[0].shape
        device = pieces[0].device
        weights_y = torch.from_numpy(self._grid.rows.weights[down]).to(device)
        weights_x = torch.from_numpy(self._grid.columns.weights[across]).to(device)
        step = max(1, _CHUNK_VALUES // (channels * width))
        for begin in range(0, height, step):
            end = min(begin + step, height)
            blended_CHW = torch.zeros((channels, end - begin, width), device=device)
            for order, piece in enumerate(pieces):
                values = piece[:, begin:end].to(torch.float32, memory_format=torch.contiguous_format)
                if piece.dtype == torch.uint8:
                    values = values / 255
                if len(pieces) == 1:
                    blended_CHW.copy_(values)
                    break
                row, column = divmod(order, len(weights_x))
                weights_HW = weights_y[row, begin:end].unsqueeze(1) * weights_x[column].unsqueeze(0)
                blended_CHW += values * weights_HW
            self._reduce(band, blended_CHW, begin, left)

    def _reduce(self, band: Band, probabilities_CHW: torch.Tensor, top: int, left: int) -> None:
        """Pixel maps into the band, integer sums into the totals."""
        channels, height, width = probabilities_CHW.shape
        place = np.s_[top : top + height, left : left + width]
        entropy_HW = torch.special.entr(probabilities_CHW).sum(dim=0).div_(math.log(max(channels, 2)))
        settings = self._postprocessing
        if not isinstance(settings, WatershedPostprocessing) or band.foreground is None or band.interior is None:
            winner_HW, index_HW = probabilities_CHW.max(dim=0)
        else:
            foreground = _to_uint8(probabilities_CHW[1] + probabilities_CHW[2])
            inside = foreground >= threshold_level(settings.foreground_threshold)
            index_HW = (inside if self._foreground_index == 1 else ~inside).long()
            winner_HW = torch.where(inside, 1 - probabilities_CHW[0], probabilities_CHW[0])
            band.foreground[place] = foreground.cpu().numpy()
            band.interior[place] = _to_uint8(probabilities_CHW[1]).cpu().numpy()
        index = index_HW.cpu()
        band.class_ids[place] = self._ids[index].numpy()
        classes = len(self._ids)
        winner = _quantised(winner_HW)
        pixels = torch.bincount(index.view(-1), minlength=classes).numpy()
        confidence = torch.zeros(classes, dtype=torch.int64)
        confidence.scatter_add_(0, index.view(-1), winner.view(-1))
        entropy = int(_quantised(entropy_HW).sum())
        broken = bool(winner_HW.isnan().any())
        with self._lock:
            self._pixels += pixels
            self._confidence += confidence.numpy()
            self._entropy += entropy
            self._broken |= broken

    def _band(self, down: int) -> Band:
        """The band of a span of rows, made when it is first needed."""
        edges = self._grid.rows.edges
        shape = (edges[down + 1] - edges[down], self._grid.width)
        with self._lock:
            if down not in self._open:
                instances = isinstance(self._postprocessing, WatershedPostprocessing)
                maps = [np.empty(shape, np.uint8) if instances else None for _ in range(2)]
                self._open[down] = Band(edges[down], np.empty(shape, np.uint8), *maps)
            return self._open[down]

    def _completed(self, down: int) -> list[Band]:
        """One rectangle less to wait for; the bands that can go now."""
        bands = []
        with self._lock:
            self._unfinished[down] -= 1
            while self._next_band < len(self._unfinished) and not self._unfinished[self._next_band]:
                bands.append(self._open.pop(self._next_band))
                self._next_band += 1
        return bands


def _to_uint8(probability: torch.Tensor) -> torch.Tensor:
    return probability.nan_to_num(0.0).mul_(255).round_().clamp_(0, 255).to(torch.uint8)


def _quantised(values: torch.Tensor) -> torch.Tensor:
    """float in 0..1 to int64 multiples of 1 / _QUANTUM, on the CPU; 0 where NaN."""
    return values.nan_to_num(0.0).clamp(0, 1).mul(_QUANTUM).round_().to(torch.int64).cpu()
