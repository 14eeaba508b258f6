from __future__ import annotations

import io

import numpy as np
import pytest
import tifffile
from handmade import picture
from PIL import Image

from models.preprocessing import picture_statistics
from pipeline.corpus.bands import gray_of_wide, select_bands, wide_extremes, window_statistics
from pipeline.corpus.decode import decode
from pipeline.corpus.windows import decoded_windows, open_windows
from pipeline.errors import ImageError


def samples(bands: int, dtype: type = np.uint16) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 4000, (6, 7, bands)).astype(dtype)


def test_bands_are_taken_in_the_order_named() -> None:
    raw = samples(5)
    chosen = select_bands(raw, [4, 0], (0, 4000))
    assert chosen.dtype == np.uint8 and chosen.flags.c_contiguous
    assert np.array_equal(chosen, np.rint(raw[:, :, [4, 0]] / 4000 * 255).astype(np.uint8))
    assert select_bands(raw, [2], None).shape == (6, 7, 1)


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.int32, np.float32, np.float64])
def test_the_range_is_scaled_and_the_rest_clipped(dtype: type) -> None:
    raw = np.array([0, 99, 100, 200, 300, 301, 4000], dtype).reshape(1, 7, 1)
    assert select_bands(raw, [0], (100, 300)).ravel().tolist() == [0, 0, 0, 128, 255, 255, 255]
    floats = select_bands(raw, [0], (100, 300), dtype=np.float32)
    assert floats.dtype == np.float32
    assert floats.ravel().tolist() == [0, 0, 0, 127.5, 255, 255, 255]


def test_nan_and_infinity_become_ends_of_the_range() -> None:
    raw = np.array([np.nan, np.inf, -np.inf, 0.5], np.float32).reshape(1, 4, 1)
    assert select_bands(raw, [0], (0, 1)).ravel().tolist() == [0, 255, 0, 128]


def test_without_a_choice_it_is_what_a_viewer_shows() -> None:
    gray = samples(1)
    assert np.array_equal(select_bands(gray, None, None), np.repeat(gray >> 8, 3, axis=2))
    rgb = np.asarray(picture(1))
    assert np.array_equal(select_bands(rgb, None, None), rgb)
    colors = np.array([[[200, 100, 0, 128]]], np.uint8)
    assert select_bands(colors, None, None, alpha="straight").ravel().tolist() == [227, 177, 127]
    assert select_bands(colors, None, None, alpha="premultiplied").ravel().tolist() == [255, 227, 127]


WIDE = [
    ("float32", 0, 1), ("float32", 0, 255), ("float32", 0, 60_000), ("float32", -1, 1), ("float32", 0, 1e6),
    ("int16", 0, 200), ("int16", 0, 30_000), ("int16", -5, 100), ("int32", 0, 255), ("int32", 0, 65_535),
    ("uint32", 0, 200), ("uint32", 0, 4_000_000_000),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "low", "high"), WIDE)
def test_wide_samples_look_the_same_whole_and_by_window(dtype: str, low: float, high: float) -> None:
    values = np.random.default_rng(2).uniform(low, high, (50, 40))
    values[3, 4], values[5, 6] = low, high
    sink = io.BytesIO()
    tifffile.imwrite(sink, values.astype(dtype), tile=(16, 16), photometric="minisblack")
    reader = open_windows(sink.getvalue())
    assert reader is not None
    extremes = wide_extremes(reader, band_px=16)
    assert extremes is not None
    window = reader.read(10, 20, 30, 20)
    try:
        whole = decode(sink.getvalue(), max_pixels=10_000).pixels
    except ImageError as error:
        assert error.kind == "unsupported"
        with pytest.raises(ImageError, match="no agreed look"):
            gray_of_wide(window, extremes, small_as_is=True)
        assert not 0 <= low <= high <= 65_535
    else:
        by_window = np.repeat(gray_of_wide(window, extremes, small_as_is=True), 3, axis=2)
        assert np.array_equal(by_window, whole[10:40, 20:40])


def test_what_has_no_agreed_look_is_unsupported() -> None:
    for raw, bands, value_range in (
        (samples(5), None, None),
        (samples(4), None, None),
        (samples(3), [3], None),
        (samples(3), [-1], None),
        (samples(1, np.float32), None, None),
    ):
        with pytest.raises(ImageError) as caught:
            select_bands(raw, bands, value_range)
        assert caught.value.kind == "unsupported"
    with pytest.raises(ValueError, match="rise"):
        select_bands(samples(1), None, (5, 5))


def test_statistics_by_window_are_those_of_the_image() -> None:
    image = picture(2, width=130, height=97)
    buffer = io.BytesIO()
    image.save(buffer, "TIFF", compression="tiff_lzw")
    expected = picture_statistics(np.asarray(image))
    for band_px in (10, 64, 500):
        for reader in (open_windows(buffer.getvalue()), decoded_windows(buffer.getvalue(), max_pixels=10**6)):
            assert reader is not None
            found = window_statistics(reader, lambda raw: select_bands(raw, None, None), band_px=band_px)
            assert found == pytest.approx(expected, rel=1e-9)
            assert np.array_equal(np.float32(found), np.float32(expected))


def test_statistics_of_other_numbers_of_bands() -> None:
    raw = Image.fromarray(np.arange(200, dtype=np.uint8).reshape(10, 20))
    buffer = io.BytesIO()
    raw.save(buffer, "TIFF")
    reader = open_windows(buffer.getvalue())
    assert reader is not None
    mean, std, brightness, contrast = window_statistics(reader, lambda window: select_bands(window, [0], None))
    assert (mean, brightness) == pytest.approx((99.5, 99.5 / 255))
    assert (std, contrast) == pytest.approx((np.arange(200).std(), np.arange(200).std() / 255))
