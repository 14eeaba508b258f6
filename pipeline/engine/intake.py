"""From an image's bytes to pixels on a canvas, or on many. Owns: which decoder serves which card, what is measured on
the pixels. Must not know: threads, batches' order, rows, storage.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from models.card import Preprocessing
from models.mosaic import DetectionMosaic, Mosaic
from models.preprocessing import image_statistics, picture_statistics
from models.preprocessing import select_bands as choose_bands
from models.tiling import Window
from pipeline.corpus.bands import gray_of_wide, select_bands, wide_extremes, window_statistics
from pipeline.corpus.decode import decode, peek
from pipeline.corpus.raw import peek_bands, read_bands
from pipeline.corpus.windows import WindowReader, decoded_windows, open_windows
from pipeline.engine.forward import SegmenterLike
from pipeline.engine.rows import Picture
from pipeline.errors import ImageError

_MEASURED_ROWS = 512
_TILES_PER_PIXEL = 4


class Placed(NamedTuple):
    """What lies on a canvas: its height and width there, and mean and standard deviation of the pixels to normalise
    by."""

    height: int
    width: int
    mean: float
    std: float


def is_plain(preprocessing: Preprocessing) -> bool:
    """True for networks that take an image as a viewer shows it: 8-bit RGB."""
    return preprocessing.dtype == "uint8" and preprocessing.bands == (0, 1, 2)


def size_of(segmenter: SegmenterLike, data: bytes) -> tuple[int, int]:
    """(height, width) as displayed, from the header alone. Raises ImageError."""
    return peek(data) if is_plain(segmenter.card.preprocessing) else peek_bands(data)


def check_size(data: bytes, height: int, width: int, *, max_pixels: int, max_tiled_pixels: int) -> None:
    """Raises ImageError `too_large` above `max_pixels`, or above `max_tiled_pixels` for what is read by window.

    To be asked before anything is made in the size that a header claims.
    """
    if height * width <= max_pixels:
        return
    reader = open_windows(data) if height * width <= max_tiled_pixels else None
    if reader is None:
        raise ImageError(
            f"{width}×{height} is more than max_pixels={max_pixels}; only TIFFs are read in pieces, up to "
            f"{max_tiled_pixels} pixels",
            kind="too_large",
        )
    reader.close()


def check_tiles(segmenter: SegmenterLike, mosaic: Mosaic | DetectionMosaic, *, max_pixels: int) -> None:
    """Raises ImageError `too_large` where the canvases of all tiles come to more than `_TILES_PER_PIXEL` times
    `max_pixels`: an image one pixel wide is padded to the least that a network takes, and few bytes become days of
    work."""
    windows = mosaic.grid.windows()
    height, width = segmenter.canvas(windows[0].height, windows[0].width)
    if (cost_pixels := len(windows) * height * width) > _TILES_PER_PIXEL * max_pixels:
        raise ImageError(
            f"in {len(windows):,} tiles of {width}×{height}, {mosaic.grid.width}×{mosaic.grid.height} is "
            f"{cost_pixels:,} pixels for the network, more than {_TILES_PER_PIXEL} × the limit of {max_pixels:,}",
            kind="too_large",
        )


def place_image(
    segmenter: SegmenterLike, data: bytes, canvas: np.ndarray, *, height: int, width: int, max_pixels: int
) -> tuple[Placed, Picture]:
    """Decodes an image of height × width onto `canvas`. Raises ImageError; the canvas is then undefined."""
    if height * width > max_pixels:
        raise ImageError(
            f"{width}×{height} is more than max_pixels={max_pixels}; tiled TIFFs may be larger", kind="too_large"
        )
    preprocessing = segmenter.card.preprocessing
    plain = is_plain(preprocessing)
    straight = plain and segmenter.lies_as_it_is
    if plain:
        out = canvas if straight and canvas.shape[:2] == (height, width) else None
        pixels, image_format = decode(data, max_pixels=max_pixels, out=out)
    else:
        pixels, image_format = read_bands(data, max_pixels=max_pixels)
    if pixels.shape[:2] != (height, width):
        raise ImageError(
            f"header says {width}×{height}, pixels are {pixels.shape[1]}×{pixels.shape[0]}", kind="corrupt"
        )
    placed = (height, width) if pixels is canvas else _fitted(segmenter, pixels, canvas)
    measured = picture_statistics(choose_bands(pixels, preprocessing), preprocessing.low_high)
    mean, std = measured.mean, measured.std
    if placed != (height, width):
        mean, std = image_statistics(canvas[: placed[0], : placed[1]])
    return Placed(*placed, mean, std), Picture(height, width, image_format, measured.brightness, measured.contrast)


class Tiles:
    """The tiles of one image, read one after the other. Not thread safe."""

    def __init__(
        self, segmenter: SegmenterLike, data: bytes, mosaic: Mosaic | DetectionMosaic, *, max_pixels: int
    ) -> None:
        """Raises ImageError: `too_large` above `max_pixels` for what has to be decoded whole."""
        height, width = mosaic.grid.height, mosaic.grid.width
        reader = open_windows(data) or decoded_windows(data, max_pixels=max_pixels)
        self._reader: WindowReader = reader
        self._segmenter = segmenter
        self._mosaic = mosaic
        self._preprocessing = segmenter.card.preprocessing
        self._plain = is_plain(self._preprocessing)
        self._extremes: tuple[float, float] | None = None
        if (reader.height, reader.width) != (height, width):
            raise ImageError(f"header says {width}×{height}, pixels are {reader.width}×{reader.height}", kind="corrupt")

    def measure(self) -> tuple[Picture, float, float]:
        """The picture, and the mean and standard deviation to normalise all tiles by: one pass over all of it, two
        where its look depends on its extremes. To be asked before any tile is placed."""
        reader = self._reader
        if self._plain:
            self._extremes = wide_extremes(reader)
            mean, std, brightness, contrast = window_statistics(reader, self._as_shown)
        else:
            mean, std, brightness, contrast = self._measure_bands()
        return Picture(reader.height, reader.width, reader.format, brightness, contrast), mean, std

    def _measure_bands(self) -> tuple[float, float, float, float]:
        """Figures of parts, weighted by their rows."""
        reader, settings = self._reader, self._preprocessing
        parts = []
        for y in range(0, reader.height, _MEASURED_ROWS):
            rows = min(_MEASURED_ROWS, reader.height - y)
            try:
                chosen = choose_bands(reader.read(y, 0, rows, reader.width), settings)
            except ValueError as error:
                raise ImageError(str(error), kind="unsupported") from error
            parts.append((rows, picture_statistics(chosen, settings.low_high)))
        weights = np.array([rows for rows, _ in parts]) / reader.height
        means = np.array([(part.mean, part.brightness) for _, part in parts])
        squares = np.array([(part.std**2, part.contrast**2) for _, part in parts]) + means**2
        mean = weights @ means
        std = np.sqrt(np.maximum(weights @ squares - mean**2, 0))
        return float(mean[0]), float(std[0]), float(mean[1]), float(std[1])

    def windows(self) -> Iterator[Window]:
        """Row by row."""
        yield from self._mosaic.grid.windows()

    def place(self, window: Window, canvas: np.ndarray) -> tuple[int, int]:
        """Reads one tile onto its canvas; gives its height and width there. Raises ImageError."""
        return _fitted(self._segmenter, self._pixels(window.y, window.x, window.height, window.width), canvas)

    def close(self) -> None:
        self._reader.close()

    def _pixels(self, y: int, x: int, height: int, width: int) -> np.ndarray:
        window = self._reader.read(y, x, height, width)
        return self._as_shown(window) if self._plain else window

    def _as_shown(self, window: np.ndarray) -> np.ndarray:
        if self._extremes is not None:
            gray = gray_of_wide(window, self._extremes, small_as_is=True)
            return np.repeat(gray, 3, axis=2)
        return select_bands(window, None, None, alpha=self._reader.alpha)


def _fitted(segmenter: SegmenterLike, pixels: np.ndarray, canvas: np.ndarray) -> tuple[int, int]:
    try:
        return segmenter.fit(pixels, canvas)
    except ValueError as error:
        raise ImageError(str(error), kind="unsupported") from error
