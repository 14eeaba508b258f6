"""From the bands of an image, of any number and type, to the 8-bit channels that networks take.
Owns: which bands, the range of values that counts, transparency; and the statistics of an image read by window. Must
not know: files, how windows are read, models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import cv2
import numpy as np

from models.preprocessing import histogram_statistics
from pipeline.errors import ImageError

_WIDE = ("int16", "int32", "uint32", "float32")

#: Transparency: none, colours that were multiplied by it (TIFF 6.0 calls it associated), or colours that were not.
Alpha = Literal["premultiplied", "straight"] | None


class Windows(Protocol):
    """What is asked of `pipeline.corpus.windows.WindowReader` here."""

    @property
    def height(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def bands(self) -> int: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    def read(self, y: int, x: int, height: int, width: int) -> np.ndarray: ...


def select_bands(
    array: np.ndarray,
    bands: Sequence[int] | None,
    value_range: tuple[float, float] | None,
    *,
    alpha: Alpha = None,
    dtype: type[np.uint8] | type[np.float32] = np.uint8,
) -> np.ndarray:
    """[h, w, n] of `dtype` from a window [h, w, m] of any number type: n = 3 where `bands` is None, else their number.

    `bands`: which ones, from 0, in this order. None takes what a viewer shows: one band three times over, or three;
    a last band that is transparency (`alpha` of the reader) is composited over white, and other numbers of bands have
    no agreed look. `value_range`: (low, high) in the samples' units become 0 and 255, what is beyond is clipped, NaN
    becomes 0. None takes 8 bits as they are and the high byte of 16 bits, as `decode` does. uint8 results are rounded.
    Each pixel depends on itself alone. Raises ImageError `unsupported` for bands that are not there, or samples of
    other types without a range; ValueError for a range whose high is not above its low.
    """
    count = array.shape[2]
    if bands is None:
        colors = count - (alpha is not None)
        if colors not in (1, 3):
            raise ImageError(
                f"{count} bands have no agreed look: name those to use, by their numbers 0 to {count - 1}",
                kind="unsupported",
            )
        scaled = _scaled(array, value_range, dtype)
        if alpha is not None:
            scaled = _over_white(scaled, alpha)
        return np.repeat(scaled, 3, axis=2) if colors == 1 else np.ascontiguousarray(scaled)
    missing = [band for band in bands if not 0 <= band < count]
    if missing:
        raise ImageError(f"band {missing[0]} is not among the image's {count} (0 to {count - 1})", kind="unsupported")
    return np.ascontiguousarray(_scaled(array[:, :, list(bands)], value_range, dtype))


def gray_of_wide(samples: np.ndarray, extremes: tuple[float, float], *, small_as_is: bool) -> np.ndarray:
    """8-bit gray, of the same shape, of samples that are wider than 16 bits, signed or floats.

    What they mean is seen by the smallest and the largest of the whole image, `extremes`: 0..1 (floats), 0..255 (where
    `small_as_is`: their format has such images), or 0..65535, of which the high byte is taken. Raises ImageError
    `unsupported` for others, NaN among them.
    """
    low, high = extremes
    if low >= 0 and samples.dtype.kind == "f" and high <= 1:
        return np.rint(samples * 255).astype(np.uint8)
    if low >= 0 and high <= 255 and small_as_is:
        return np.rint(samples).astype(np.uint8)
    if low >= 0 and high <= 65535:
        return (samples.astype(np.uint16) >> 8).astype(np.uint8)
    raise ImageError(
        f"{samples.dtype} samples from {low:g} to {high:g} have no agreed look: convert the image to 8 or 16 bits",
        kind="unsupported",
    )


def wide_extremes(reader: Windows, *, band_px: int = 512) -> tuple[float, float] | None:
    """(smallest, largest) sample of an image whose look depends on them (`gray_of_wide`): one band of the types that
    `decode` shows too. None for all others. Reads and decodes every pixel once; NaN where there is one."""
    if reader.bands != 1 or reader.dtype.name not in _WIDE:
        return None
    parts = (reader.read(y, 0, min(band_px, reader.height - y), reader.width) for y in range(0, reader.height, band_px))
    found = np.array([(part.min(), part.max()) for part in parts], np.float64)
    return float(found[:, 0].min()), float(found[:, 1].max())


def window_statistics(
    reader: Windows, select: Callable[[np.ndarray], np.ndarray], *, band_px: int = 512
) -> tuple[float, float, float, float]:
    """`picture_statistics` of the whole image, from bands of `band_px` rows: (mean, std, brightness, contrast).

    `select` makes uint8 [h, w, n] of what is read. Networks that normalise per image need this of the whole image
    before the first tile. Reads and decodes every pixel once. Sums are of integers: the result does not depend on
    `band_px`. Luma is as in `picture_statistics` for 3 bands, else the first band.
    """
    counts, luma_counts = np.zeros(256, np.int64), np.zeros(256, np.int64)
    for y in range(0, reader.height, band_px):
        pixels = select(reader.read(y, 0, min(band_px, reader.height - y), reader.width))
        luma = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY) if pixels.shape[2] == 3 else pixels[:, :, 0]
        counts += _histogram(pixels)
        luma_counts += _histogram(luma)
    values = np.arange(256, dtype=np.float64)
    mean, std = histogram_statistics(counts, values)
    luma_mean, luma_std = histogram_statistics(luma_counts, values)
    return mean, std, luma_mean / 255, luma_std / 255


def _histogram(values: np.ndarray) -> np.ndarray:
    flat = np.ascontiguousarray(values).reshape(-1, 1)
    return cv2.calcHist([flat], [0], None, [256], [0, 256]).ravel().astype(np.int64)


def _scaled(array: np.ndarray, value_range: tuple[float, float] | None, dtype: type) -> np.ndarray:
    if value_range is None:
        if array.dtype == np.uint8:
            return array.astype(dtype, copy=False)
        if array.dtype == np.uint16:
            return (array >> 8).astype(dtype)
        raise ImageError(
            f"samples of type {array.dtype} have no agreed look: name the range of values that counts",
            kind="unsupported",
        )
    low, high = value_range
    if not low < high:
        raise ValueError(f"value_range must rise, got {value_range}")
    if array.dtype in (np.uint8, np.uint16):
        table = _scaled_floats(np.arange(np.iinfo(array.dtype).max + 1), low, high, dtype)
        return table[array]
    return _scaled_floats(array, low, high, dtype)


def _scaled_floats(array: np.ndarray, low: float, high: float, dtype: type) -> np.ndarray:
    scaled = (array.astype(np.float64) - low) / (high - low) * 255
    scaled = np.nan_to_num(scaled, copy=False, nan=0.0).clip(0, 255)
    return (np.rint(scaled) if dtype is np.uint8 else scaled).astype(dtype)


def _over_white(scaled: np.ndarray, alpha: Alpha) -> np.ndarray:
    """Colours [h, w, n - 1] over white, of [h, w, n] whose last band is transparency, 0..255."""
    opacity = scaled[:, :, -1:].astype(np.float32)
    colors = scaled[:, :, :-1].astype(np.float32)
    blended = colors * (opacity / 255) if alpha == "straight" else colors
    blended = (blended + (255 - opacity)).clip(0, 255)
    return np.rint(blended).astype(np.uint8) if scaled.dtype == np.uint8 else blended
