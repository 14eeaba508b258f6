from __future__ import annotations

import io
import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from awkward_corpus import make_awkward_corpus
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from large_image import write_large
from PIL import Image

from pipeline.corpus import tiff_layout, windows
from pipeline.corpus.bands import select_bands
from pipeline.corpus.decode import decode
from pipeline.corpus.windows import decoded_windows, open_windows
from pipeline.errors import ImageError

HEIGHT, WIDTH = 117, 93
ROOT = Path(__file__).parents[3]


def scene(bands: int, dtype: type = np.uint8, *, seed: int = 0) -> np.ndarray:
    """[HEIGHT, WIDTH, bands]: smooth, so that JPEG hardly changes it."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).resize((WIDTH, HEIGHT), Image.BICUBIC)
    planes = np.asarray(small)[:, :, np.arange(bands) % 3]
    if np.dtype(dtype).kind == "f":
        return (planes / 255).astype(dtype)
    return planes.astype(dtype) * (257 if dtype == np.uint16 else 1)


def tiff(pixels: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    if options.get("planarconfig") == "separate":
        pixels = pixels.transpose(2, 0, 1)
    elif pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    tifffile.imwrite(buffer, pixels, **options)
    return buffer.getvalue()


def in_windows(data: bytes | Path, height_px: int = 40, width_px: int = 29) -> np.ndarray:
    """The image put together from its windows."""
    reader = open_windows(data)
    assert reader is not None
    whole = np.zeros((reader.height, reader.width, reader.bands), reader.dtype)
    for y, x in itertools.product(range(0, reader.height, height_px), range(0, reader.width, width_px)):
        height, width = min(height_px, reader.height - y), min(width_px, reader.width - x)
        window = reader.read(y, x, height, width)
        assert window.shape == (height, width, reader.bands) and window.dtype == reader.dtype
        assert window.flags.c_contiguous and window.flags.writeable
        whole[y : y + height, x : x + width] = window
    reader.close()
    return whole


LAYOUTS = {
    "tiles": {"tile": (32, 48)},
    "strips": {"rowsperstrip": 13},
    "one strip": {},
    "BigTIFF": {"tile": (64, 64), "bigtiff": True},
    "big-endian": {"rowsperstrip": 20, "byteorder": ">"},
}
COMPRESSIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "deflate": {"compression": "deflate"},
    "predicted deflate": {"compression": "deflate", "predictor": True},
    "LZW": {"compression": "lzw", "predictor": True},
    "zstd": {"compression": "zstd"},
    "packbits": {"compression": "packbits"},
}


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_windows_make_up_the_image(layout: str, compression: str) -> None:
    options = LAYOUTS[layout] | COMPRESSIONS[compression]
    for bands, dtype, planar in itertools.product((1, 3, 5), (np.uint8, np.uint16), ("contig", "separate")):
        if planar == "separate" and bands == 1:
            continue
        pixels = scene(bands, dtype)
        photometric = "rgb" if bands == 3 else "minisblack"
        data = tiff(pixels, photometric=photometric, planarconfig=planar if bands > 1 else None, **options)
        assert np.array_equal(in_windows(data), pixels), (bands, dtype, planar)


@pytest.mark.parametrize("layout", ["tiles", "strips"])
@pytest.mark.parametrize("bands", [1, 3])
def test_windows_of_a_jpeg_tiff(layout: str, bands: int) -> None:
    layouts = {"tiles": {"tile": (32, 48)}, "strips": {"rowsperstrip": 16}}
    pixels = scene(bands)
    data = tiff(pixels, photometric="rgb" if bands == 3 else "minisblack", compression="jpeg", **layouts[layout])
    assert np.array_equal(in_windows(data), tifffile.imread(io.BytesIO(data)).reshape(pixels.shape))
    assert np.abs(in_windows(data).astype(int) - pixels).mean() < 3


def pillow_tiff(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "TIFF", **options)
    return buffer.getvalue()


RGB = Image.fromarray(scene(3))
ALPHA = Image.fromarray(scene(1, seed=4)[:, :, 0])
AS_DECODED: dict[str, bytes] = {
    "rgb": pillow_tiff(RGB, compression="tiff_lzw"),
    "gray": pillow_tiff(RGB.convert("L")),
    "palette": pillow_tiff(RGB.quantize(40), compression="tiff_adobe_deflate"),
    "bilevel": pillow_tiff(RGB.convert("1")),
    "bilevel, fax": pillow_tiff(RGB.convert("1"), compression="group4"),
    "16 bits": pillow_tiff(Image.fromarray(scene(1, np.uint16)[:, :, 0])),
    "white is zero": tiff(scene(1), photometric="miniswhite"),
    "rgb, jpeg": pillow_tiff(RGB, compression="jpeg", quality=95),
    "rgb and alpha": pillow_tiff(Image.merge("RGBA", (*RGB.split(), ALPHA))),
    "gray and alpha": pillow_tiff(Image.merge("LA", (RGB.convert("L"), ALPHA))),
    "16 bits rgb": tiff(scene(3, np.uint16), photometric="rgb", tile=(32, 32)),
}


@pytest.mark.parametrize("name", AS_DECODED)
def test_with_no_bands_chosen_windows_look_like_the_decoded_image(name: str) -> None:
    data = AS_DECODED[name]
    expected = decode(data, max_pixels=10**6).pixels
    reader = open_windows(data)
    assert reader is not None and reader.format == "TIFF"
    for y, x in ((0, 0), (50, 31), (HEIGHT - 40, WIDTH - 30)):
        window = select_bands(reader.read(y, x, 40, 30), None, None, alpha=reader.alpha)
        error = np.abs(window.astype(int) - expected[y : y + 40, x : x + 30])
        assert error.max() <= (2 if "jpeg" in name else 1 if "alpha" in name else 0), name


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("layout", [{"tile": (32, 48)}, {"rowsperstrip": 10, "compression": "deflate"}])
def test_windows_are_upright(orientation: int, layout: dict[str, Any]) -> None:
    data = tiff(scene(3), photometric="rgb", extratags=[(274, 3, 1, orientation, True)], **layout)
    expected = decode(data, max_pixels=10**6).pixels
    assert expected.shape[:2] == ((HEIGHT, WIDTH) if orientation < 5 else (WIDTH, HEIGHT))
    assert np.array_equal(in_windows(data), expected)


def test_paths_and_files_are_read_without_the_rest(tmp_path: Path) -> None:
    pixels = scene(3)
    for name, options in {"plain": {}, "tiles": {"tile": (32, 32), "compression": "zstd"}}.items():
        path = tmp_path / f"{name}.tif"
        path.write_bytes(tiff(pixels, photometric="rgb", **options))
        assert np.array_equal(in_windows(path), pixels)
        with path.open("rb") as file:
            reader = open_windows(file)
            assert reader is not None
            assert np.array_equal(reader.read(30, 20, 50, 60), pixels[30:80, 20:80])
            reader.close()
            assert not file.closed


def test_an_uncompressed_strip_is_read_in_pieces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tiff_layout, "_PIECE_BYTES", 1000)
    fetched: list[int] = []
    fetch = tiff_layout.ByteSource.fetch
    monkeypatch.setattr(
        tiff_layout.ByteSource, "fetch", lambda self, at, count: fetched.append(count) or fetch(self, at, count)
    )
    for planar in ("contig", "separate"):
        path = tmp_path / f"{planar}.tif"
        path.write_bytes(tiff(scene(3, np.uint16), photometric="rgb", planarconfig=planar))
        fetched.clear()
        assert np.array_equal(in_windows(path), scene(3, np.uint16))
        assert max(fetched) <= 1024


def test_segments_that_were_never_written_are_empty() -> None:
    data = tiff(scene(1), tile=(32, 32), compression="zstd", photometric="minisblack")
    page = tifffile.TiffFile(io.BytesIO(data)).pages.first
    tag = page.tags["TileByteCounts"]
    damaged = bytearray(data)
    start = tag.valueoffset + 5 * (2 if tag.dtype == 3 else 4)
    damaged[start : start + (2 if tag.dtype == 3 else 4)] = bytes(2 if tag.dtype == 3 else 4)
    expected = scene(1).copy()
    expected[32:64, 64:96] = 0
    assert np.array_equal(in_windows(bytes(damaged)), expected)


def test_the_cache_is_bounded_and_saves_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    data = tiff(scene(1), rowsperstrip=10, compression="deflate", photometric="minisblack")
    decoded: list[int] = []
    original = windows._TiffWindows._decoded
    monkeypatch.setattr(
        windows._TiffWindows, "_decoded", lambda self, index, rows: decoded.append(index) or original(self, index, rows)
    )
    assert np.array_equal(in_windows(data), scene(1))
    assert sorted(decoded) == list(range(12))
    decoded.clear()
    monkeypatch.setattr(windows, "_CACHE_BYTES", 2 * 10 * WIDTH)
    assert np.array_equal(in_windows(data), scene(1))
    assert len(decoded) > 12


def test_several_threads_read_the_same(tmp_path: Path) -> None:
    path = tmp_path / "shared.tif"
    path.write_bytes(tiff(scene(3), photometric="rgb", tile=(16, 16), compression="lzw"))
    with path.open("rb") as file:
        for source in (path, path.read_bytes(), file):
            reader = open_windows(source)
            assert reader is not None
            places = [(y, x) for y in range(0, HEIGHT - 20, 7) for x in range(0, WIDTH - 20, 7)]
            with ThreadPoolExecutor(6) as pool:
                found = pool.map(lambda place, reader=reader: reader.read(*place, 20, 20), places)
                for (y, x), window in zip(places, found, strict=True):
                    assert np.array_equal(window, scene(3)[y : y + 20, x : x + 20])


def test_other_formats_are_decoded_whole() -> None:
    for name in ("JPEG", "PNG"):
        buffer = io.BytesIO()
        RGB.save(buffer, name)
        data = buffer.getvalue()
        assert open_windows(data) is None
        reader = decoded_windows(data, max_pixels=HEIGHT * WIDTH)
        assert (reader.height, reader.width, reader.bands, reader.format) == (HEIGHT, WIDTH, 3, name)
        expected = decode(data, max_pixels=10**6).pixels
        assert np.array_equal(reader.read(10, 20, 30, 40), expected[10:40, 20:60])
        with pytest.raises(ValueError, match="is not inside"):
            reader.read(HEIGHT - 5, 0, 6, 3)
        with pytest.raises(ImageError) as caught:
            decoded_windows(data, max_pixels=HEIGHT * WIDTH - 1)
        assert caught.value.kind == "too_large"


def test_what_cannot_be_read_by_window_is_left_to_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_windows(pillow_tiff(RGB.convert("CMYK"))) is None
    monkeypatch.setattr(tiff_layout, "_SEGMENT_BYTES", 1000)
    assert open_windows(tiff(scene(3), photometric="rgb", compression="deflate")) is None
    assert open_windows(tiff(scene(3), photometric="rgb")) is not None


@pytest.mark.parametrize(
    "window", [(-1, 0, 5, 5), (0, -1, 5, 5), (0, 0, 0, 5), (HEIGHT - 4, 0, 5, 5), (0, WIDTH, 1, 1)]
)
def test_windows_outside_are_refused(window: tuple[int, int, int, int]) -> None:
    reader = open_windows(AS_DECODED["rgb"])
    assert reader is not None
    with pytest.raises(ValueError, match="is not inside"):
        reader.read(*window)


def outcome(data: bytes) -> str:
    try:
        reader = open_windows(data)
        if reader is None:
            return "unread"
        if reader.height * reader.width > 10**6:
            return "large"
        for y in range(0, reader.height, 20):
            reader.read(y, 0, min(20, reader.height - y), reader.width)
    except ImageError as error:
        return error.kind
    return "ok"


VICTIMS = [
    tiff(scene(3), photometric="rgb", tile=(32, 32), compression="deflate"),
    tiff(scene(3), photometric="rgb", rowsperstrip=20, compression="lzw", bigtiff=True),
    tiff(scene(1), photometric="minisblack", rowsperstrip=20),
    pillow_tiff(RGB, compression="jpeg"),
    pillow_tiff(RGB.quantize(40), compression="packbits"),
]


@pytest.mark.parametrize("victim", range(len(VICTIMS)))
def test_cut_files_are_truncated(victim: int) -> None:
    data = VICTIMS[victim]
    assert outcome(data) == "ok"
    for share in (0.99, 0.6, 0.3):
        assert outcome(data[: int(len(data) * share)]) == "truncated"
    assert outcome(data[:4]) == "truncated"
    assert outcome(b"") == "empty"
    assert outcome(b"no picture at all") == "not_an_image"


def test_a_damaged_segment_is_corrupt_and_the_others_are_read() -> None:
    data = bytearray(VICTIMS[0])
    page = tifffile.TiffFile(io.BytesIO(VICTIMS[0])).pages.first
    data[page.dataoffsets[5] : page.dataoffsets[5] + 20] = bytes(20)
    reader = open_windows(bytes(data))
    assert reader is not None
    assert np.array_equal(reader.read(0, 0, 30, 60), scene(3)[:30, :60])
    with pytest.raises(ImageError, match="segment 5") as caught:
        reader.read(30, 30, 60, 60)
    assert caught.value.kind == "corrupt"


def test_a_tile_that_is_taller_than_memory_is_damage() -> None:
    """The image is small: it is its tile that would take 25 GB."""
    data = bytearray(VICTIMS[0])
    data[tifffile.TiffFile(io.BytesIO(VICTIMS[0])).pages.first.tags[323].valueoffset + 3] = 16
    assert outcome(bytes(data)) == "unread"
    with pytest.raises(ImageError) as caught:
        decode(bytes(data), max_pixels=10**6)
    assert caught.value.kind in {"corrupt", "truncated", "too_large"}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    victim=st.sampled_from(VICTIMS),
    changes=st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=6),
    head=st.booleans(),
)
def test_damage_is_an_image_error_and_nothing_else(victim: bytes, changes: list[tuple[int, int]], head: bool) -> None:
    data = bytearray(victim)
    for at, value in changes:
        data[at % (400 if head else len(data))] = value
    assert outcome(bytes(data)) in {
        "ok", "large", "unread", "truncated", "corrupt", "not_an_image", "unsupported", "empty"
    }  # fmt: skip


def test_the_awkward_corpus_ends_as_with_decode(tmp_path: Path) -> None:
    expected = make_awkward_corpus(tmp_path)
    seen = {}
    for name, one in expected.items():
        data = (tmp_path / name).read_bytes()
        if name.endswith((".tif", ".tiff")) and (found := outcome(data)) != "unread":
            seen[name] = (found, one.outcome)
    assert seen and all(found == wanted for found, wanted in seen.values()), seen


def run_large(path: Path, task: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "large_image.py"), str(path), task],
        cwd=ROOT,
        # A script's own folder comes first on its path, and `tests/models` would stand for `models`.
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def test_memory_does_not_grow_with_the_height(tmp_path: Path) -> None:
    peaks_mb = []
    for height in (3000, 9000):
        write_large(tmp_path / "tall.tif", height=height, width=600, bands=1, tile_px=None)
        took = run_large(tmp_path / "tall.tif", "instance")
        peaks_mb.append(took["peak_mb"] - took["start_mb"])
        assert took["instances"] > height / 6
    # The mask, the evidence of instances and the instances grow with the pixels, by 3 bytes each for 3.6 million here.
    # Probabilities, float16 in three channels, would be 22 MB more, and labels as much again.
    assert peaks_mb[1] - peaks_mb[0] < 40


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("task", ["semantic", "instance"])
@pytest.mark.parametrize(("bands", "tile_px"), [(3, 512), (1, None)])
def test_400_megapixels_in_less_than_3_gb(tmp_path: Path, bands: int, tile_px: int | None, task: str) -> None:
    write_large(tmp_path / "large.tif", height=20_000, width=20_000, bands=bands, tile_px=tile_px)
    took = run_large(tmp_path / "large.tif", task)
    assert sum(took["pixels"]) == 400_000_000
    assert took["peak_mb"] < 3000, took
    assert (took["instances"] > 100_000) == (task == "instance")
