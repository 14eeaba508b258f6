from __future__ import annotations

import io
import os
import pickle
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import pytest
import tifffile
from awkward_corpus import (
    Expected,
    blocks,
    encode,
    make_awkward_corpus,
    oriented,
    photo,
    png_chunk,
    png_with_late_exif,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from models.preprocessing import picture_statistics
from pipeline.corpus import header
from pipeline.corpus.decode import decode, peek
from pipeline.errors import BYTES_KINDS, ImageError

LIMIT = 100_000_000
PICTURE = Image.fromarray(photo(96, 64))
SMALL = Image.fromarray(photo(40, 24))


def kind_of(data: bytes, max_pixels: int = LIMIT) -> str:
    try:
        decode(data, max_pixels=max_pixels)
    except ImageError as error:
        return error.kind
    return "ok"


def outcome_of(data: bytes) -> Expected:
    try:
        pixels = decode(data, max_pixels=LIMIT).pixels
    except ImageError as error:
        return Expected(error.kind)
    assert pixels.dtype == np.uint8 and pixels.shape[2] == 3 and pixels.flags.c_contiguous
    return Expected("ok", (pixels.shape[1], pixels.shape[0]))


def test_every_file_of_the_awkward_corpus_ends_as_expected(tmp_path: Path) -> None:
    expected = make_awkward_corpus(tmp_path)
    found = {name: outcome_of((tmp_path / name).read_bytes()) for name in expected}
    assert found == expected
    assert {e.outcome for e in expected.values()} == {"ok", *BYTES_KINDS} - {"model_failed"}


def test_peek_gives_the_displayed_size_of_everything_that_decodes(tmp_path: Path) -> None:
    for name, expected in make_awkward_corpus(tmp_path).items():
        if expected.size is not None:
            assert peek((tmp_path / name).read_bytes()) == (expected.size[1], expected.size[0]), name


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_orientations_decode_to_the_upright_pixels(name: str, orientation: int) -> None:
    data = oriented(orientation, name)
    upright = decode(oriented(1, name), max_pixels=LIMIT).pixels
    assert np.abs(upright.astype(int) - np.asarray(blocks())).max() <= (2 if name == "JPEG" else 0)
    np.testing.assert_array_equal(decode(data, max_pixels=LIMIT).pixels, upright)
    assert peek(data) == upright.shape[:2]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_avif_orientations(orientation: int) -> None:
    data = encode(PICTURE, "AVIF", quality=90)
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = decode(encode(PICTURE, "AVIF", quality=90, exif=exif), max_pixels=LIMIT).pixels
    plain = Image.fromarray(decode(data, max_pixels=LIMIT).pixels)
    how = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}.get(orientation)
    wanted = plain if how is None else plain.transpose(Image.Transpose(how))
    np.testing.assert_array_equal(turned, np.asarray(wanted))


def test_exif_after_the_pixels_of_a_png_counts() -> None:
    data = png_with_late_exif(6)
    assert decode(data, max_pixels=LIMIT).pixels.shape == (64, 48, 3)
    assert peek(data) == (64, 48)


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_means_upright(value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    data = encode(blocks(), "JPEG", exif=exif)
    assert decode(data, max_pixels=LIMIT).pixels.shape == (48, 64, 3)


def test_big_endian_exif_and_a_jfif_segment_before_it() -> None:
    tiff = b"MM\x00*\x00\x00\x00\x08\x00\x01" + struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0) + bytes(4)
    segment = b"Exif\x00\x00" + tiff
    plain = encode(blocks(), "JPEG")  # Pillow writes JFIF first
    at = 4 + int.from_bytes(plain[4:6])
    data = plain[:at] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + plain[at:]
    assert decode(data, max_pixels=LIMIT).pixels.shape == (64, 48, 3)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 1}])
def test_jpeg_pixels_agree_with_pillow(options: dict[str, object]) -> None:
    data = encode(PICTURE, "JPEG", quality=90, **options)
    wanted = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(decode(data, max_pixels=LIMIT).pixels - wanted).max() <= 1


def test_gray_jpeg_has_three_equal_channels() -> None:
    pixels = decode(encode(PICTURE.convert("L"), "JPEG"), max_pixels=LIMIT).pixels
    assert pixels.std() > 10
    assert (pixels[:, :, 0] == pixels[:, :, 1]).all() and (pixels[:, :, 0] == pixels[:, :, 2]).all()


def test_cmyk_jpeg_looks_like_the_picture() -> None:
    pixels = decode(encode(blocks().convert("CMYK"), "JPEG", quality=95), max_pixels=LIMIT).pixels
    assert np.abs(pixels.astype(int) - np.asarray(blocks())).mean() < 20


def test_transparency_is_composited_over_white() -> None:
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0] = (200, 0, 0, 255)
    rgba[0, 1] = (200, 0, 0, 0)
    rgba[1, 0] = (200, 0, 0, 51)
    pixels = decode(encode(Image.fromarray(rgba), "PNG"), max_pixels=LIMIT).pixels
    np.testing.assert_array_equal(pixels[0], [(200, 0, 0), (255, 255, 255)])
    np.testing.assert_allclose(pixels[1, 0], (244, 204, 204), atol=1)

    gray = Image.fromarray(np.array([[10, 10]], np.uint8))
    gray.putalpha(Image.fromarray(np.array([[255, 0]], np.uint8)))
    np.testing.assert_array_equal(
        decode(encode(gray, "PNG"), max_pixels=LIMIT).pixels, [[(10, 10, 10), (255, 255, 255)]]
    )

    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((1, 0), 1)
    transparent = encode(palette, "PNG", transparency=1)
    np.testing.assert_array_equal(decode(transparent, max_pixels=LIMIT).pixels, [[(255, 0, 0), (255, 255, 255)]])
    np.testing.assert_array_equal(decode(encode(palette, "PNG"), max_pixels=LIMIT).pixels, [[(255, 0, 0), (0, 255, 0)]])


def test_a_colour_key_is_transparent() -> None:
    image = Image.fromarray(np.array([[(1, 2, 3), (4, 5, 6)]], np.uint8))
    data = encode(image, "PNG", transparency=(1, 2, 3))
    np.testing.assert_array_equal(decode(data, max_pixels=LIMIT).pixels, [[(255, 255, 255), (4, 5, 6)]])


@pytest.mark.parametrize("name", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_keep_the_high_byte(name: str) -> None:
    samples = np.array([[0, 255, 256, 0x8000, 0xFFFF]], np.uint16)
    data = encode(Image.fromarray(samples), name)
    np.testing.assert_array_equal(decode(data, max_pixels=LIMIT).pixels[0, :, 1], [0, 0, 1, 0x80, 0xFF])


def test_sixteen_bit_rgb_png() -> None:
    rows = b"\x00" + struct.pack(">6H", 0, 0x1234, 0xFFFF, 0x8000, 0x00FF, 0x0100)
    data = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0))
    data += png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    np.testing.assert_array_equal(decode(data, max_pixels=LIMIT).pixels, [[(0, 0x12, 0xFF), (0x80, 0, 1)]])


@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("tile", [None, (16, 16)])
@pytest.mark.parametrize("compression", [None, "lzw"])
@pytest.mark.parametrize("bands", [3, 4])
def test_sixteen_bit_planes_are_what_interleaved_samples_are(
    byteorder: Literal["<", ">"], tile: tuple[int, int] | None, compression: str | None, bands: int
) -> None:
    """One colour after the other, as GDAL writes with INTERLEAVE=BAND."""
    samples = np.random.default_rng(0).integers(0, 65536, (24, 40, bands)).astype(np.uint16)
    samples[..., 3:] = 65535
    file = io.BytesIO()
    planes = samples.transpose(2, 0, 1)
    extra = ["unassalpha"] if bands == 4 else None
    options = {"photometric": "rgb", "planarconfig": "separate", "tile": tile, "compression": compression}
    tifffile.imwrite(file, planes, byteorder=byteorder, extrasamples=extra, **options)
    np.testing.assert_array_equal(decode(file.getvalue(), max_pixels=LIMIT).pixels, samples[..., :3] >> 8)


def test_wide_samples_are_shown_where_their_range_says_how() -> None:
    def shown(samples: np.ndarray) -> list[int]:
        return decode(encode(Image.fromarray(samples), "TIFF"), max_pixels=LIMIT).pixels[0, :, 0].tolist()

    assert shown(np.array([[0, 0.5, 1]], np.float32)) == [0, 128, 255]
    assert shown(np.array([[0, 7.4, 255]], np.float32)) == [0, 7, 255]
    assert shown(np.array([[0, 256, 65535]], np.int32)) == [0, 1, 255]
    for samples in (np.array([[-1.0, 2.0]]), np.array([[np.nan, 1.0]]), np.array([[0, 1e9]])):
        assert kind_of(encode(Image.fromarray(samples.astype(np.float32)), "TIFF")) == "unsupported"


@pytest.mark.parametrize("name", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_is_taken(name: str) -> None:
    frames = [Image.new("RGB", (20, 10), color) for color in ("red", "lime", "blue")]
    options = {"lossless": True} if name == "WEBP" else {}
    data = encode(frames[0], name, save_all=True, append_images=frames[1:], **options)
    pixels = decode(data, max_pixels=LIMIT).pixels
    np.testing.assert_array_equal(pixels, np.broadcast_to(np.uint8([255, 0, 0]), (10, 20, 3)))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("GIF", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("WEBP", {}),
        ("JPEG2000", {}),
    ],
)
def test_a_file_cut_anywhere_is_truncated(name: str, options: dict[str, object]) -> None:
    data = encode(PICTURE, name, **options)
    cuts = range(20, len(data) - 12, max(1, len(data) // 60))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        assert {cut: kind_of(data[:cut]) for cut in cuts} == dict.fromkeys(cuts, "truncated")


@pytest.mark.parametrize("cut", [1, 2])
def test_a_jpeg_without_its_end_marker_is_whole(cut: int) -> None:
    data = encode(PICTURE, "JPEG")
    np.testing.assert_array_equal(decode(data[:-cut], max_pixels=LIMIT).pixels, decode(data, max_pixels=LIMIT).pixels)


def test_a_jpeg_whose_rest_was_never_written_is_truncated() -> None:
    plain = np.full((640, 640), 90, np.uint8)
    plain[-16:] = np.random.default_rng(0).integers(0, 255, (16, 640))
    data = encode(Image.fromarray(plain), "JPEG", optimize=True)
    cut = data[: len(data) // 8]
    # To this picture's codes zeros are flat blocks: a decoder finds all of them.
    flat = np.asarray(Image.open(io.BytesIO(cut + bytes(4096))))
    assert (flat[-16:] == 90).all()
    for zeros in (600, 4096, len(data)):
        assert kind_of(cut + bytes(zeros)) == "truncated"
    photo = encode(PICTURE, "JPEG")
    assert kind_of(photo[: len(photo) // 2] + bytes(len(photo) // 2)) == "truncated"


@pytest.mark.parametrize("optimize", [False, True])
def test_zeros_behind_a_whole_jpeg_are_padding_with_and_without_its_end_marker(optimize: bool) -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        noise = Image.fromarray(random.integers(0, 255, (40, 48, 3), np.uint8))
        data = encode(noise, "JPEG", optimize=optimize)
        pixels = decode(data, max_pixels=LIMIT).pixels
        for padded in (data + bytes(4096), data[:-2] + bytes(4096), data[:-2] + bytes(600)):
            np.testing.assert_array_equal(decode(padded, max_pixels=LIMIT).pixels, pixels)


def test_flat_blocks_that_are_zeros_may_be_a_jpegs_end() -> None:
    met = 0
    for width in range(600, 660, 8):
        for top in (8, 16, 24, 40):
            gray = np.zeros((640, width), np.uint8)
            gray[:top] = np.random.default_rng(top).integers(0, 255, (top, width))
            data = encode(Image.fromarray(gray), "JPEG", optimize=True)[:-2]
            met += data.endswith(bytes(512))
            assert kind_of(data) == "ok"
            assert kind_of(data + bytes(2000)) in ("ok", "truncated")  # nobody can tell
    assert met


def test_zeros_are_no_more_than_flat_blocks_can_take() -> None:
    """What is said without decoding holds for pictures that end in flat blocks, of which it is nearly the number."""
    random, shares = np.random.default_rng(0), []
    for _ in range(600):
        height, width = random.integers(8, 400, 2).tolist()
        picture = np.full((height, width, 3)[: random.integers(2, 4)], random.integers(0, 256), np.uint8)
        rough = random.integers(0, height)
        picture[:rough] = random.integers(0, 4, picture[:rough].shape) * 64
        options = (cv2.IMWRITE_JPEG_QUALITY, int(random.integers(5, 100)), cv2.IMWRITE_JPEG_OPTIMIZE, 1)
        data = cv2.imencode(".jpg", picture, options)[1].tobytes()[:-2]
        zeros = len(data) - len(data.rstrip(b"\0"))
        if zeros > 8:
            shares.append(zeros / header.jpeg_flat_bytes(data))
    assert len(shares) > 5 and 0.8 < max(shares) <= 1
    assert header.jpeg_flat_bytes(encode(PICTURE, "JPEG")) == 0  # by the usual tables zeros are waves, not flat


@pytest.mark.parametrize("shape", [(700, 700), (700, 700, 3)])
def test_a_picture_of_zeros_alone_may_lack_its_end(shape: tuple[int, ...]) -> None:
    """Of the middle gray every block is zeros, and the header of the scan ends in one, too."""
    options = (cv2.IMWRITE_JPEG_OPTIMIZE, 1)
    data = cv2.imencode(".jpg", np.full(shape, 128, np.uint8), options)[1].tobytes()
    assert data[:-3].endswith(bytes(512))
    np.testing.assert_array_equal(decode(data[:-2], max_pixels=LIMIT).pixels, np.full((700, 700, 3), 128))
    assert kind_of(data[:-600]) == "truncated"


def test_a_frame_that_is_cut_off_in_its_header_has_no_scan() -> None:
    data = encode(PICTURE, "JPEG")
    at = data.index(b"\xff\xc0")
    short = data[:at] + b"\xff\xc0\x00\x04\x08\x00" + data[data.index(b"\xff\xda") :]
    assert not header.jpeg_has_one_scan(short) and header.jpeg_flat_bytes(short) == 0
    assert kind_of(short) == "corrupt"


def test_only_an_end_marker_after_the_scan_ends_a_jpeg() -> None:
    data = encode(PICTURE, "JPEG")
    pixels = decode(data, max_pixels=LIMIT).pixels
    np.testing.assert_array_equal(decode(data + b"a trailer", max_pixels=LIMIT).pixels, pixels)
    comment = b"\xff\xfe\x00\x06a\xff\xd9b"  # as a thumbnail has one
    commented = data[:2] + comment + data[2:]
    np.testing.assert_array_equal(decode(commented[:-2], max_pixels=LIMIT).pixels, pixels)
    assert kind_of(commented[: len(commented) * 3 // 4]) == "truncated"


def test_a_jpeg_with_a_hole_is_corrupt() -> None:
    data = bytearray(encode(PICTURE, "JPEG"))
    data[len(data) // 2 : len(data) // 2 + 2] = b"\xff\xd5"
    assert kind_of(bytes(data)) == "corrupt"


def test_twelve_bit_and_lossless_jpeg_are_unsupported() -> None:
    data = encode(PICTURE, "JPEG")
    at = data.index(b"\xff\xc0")
    assert kind_of(data[: at + 4] + b"\x0c" + data[at + 5 :]) == "unsupported"
    assert kind_of(data[: at + 1] + b"\xc3" + data[at + 2 :]) == "unsupported"


def test_size_is_checked_before_anything_is_decompressed() -> None:
    for data, pixels in ((encode(PICTURE, name), 96 * 64) for name in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP")):
        assert kind_of(data, max_pixels=pixels) == "ok"
        assert kind_of(data, max_pixels=pixels - 1) == "too_large"
        assert kind_of(data[: len(data) * 3 // 4], max_pixels=pixels - 1) in ("too_large", "truncated")
    huge_webp = b"RIFF\x1e\x00\x00\x00WEBPVP8X\x0a\x00\x00\x00\x10\x00\x00\x00\xff\x3f\x00\xff\x3f\x00" + bytes(8)
    assert kind_of(huge_webp) == "too_large"


def test_pillows_own_limit_binds_tiff_and_webp_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    files = {name: encode(PICTURE, name) for name in ("PNG", "JPEG", "BMP", "PPM", "GIF", "TIFF", "WEBP")}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert {name: kind_of(data) for name, data in files.items()} == {
            **dict.fromkeys(("PNG", "JPEG", "BMP", "PPM", "GIF"), "ok"),
            **dict.fromkeys(("TIFF", "WEBP"), "too_large"),
        }


def test_importing_decode_leaves_pillow_and_torch_alone() -> None:
    code = (
        "import sys; from PIL import Image, ImageFile\n"
        "before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES\n"
        "import pipeline.corpus.decode\n"
        "assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


@pytest.mark.parametrize("name", ["JPEG", "PNG"])
def test_pixels_land_in_out(name: str) -> None:
    data = encode(PICTURE, name)
    wanted = decode(data, max_pixels=LIMIT).pixels
    batch = np.zeros((3, 64, 96, 3), np.uint8)
    slot = batch[1]
    assert decode(data, max_pixels=LIMIT, out=slot).pixels is slot
    np.testing.assert_array_equal(slot, wanted)
    assert not batch[0].any() and not batch[2].any()

    canvas = np.zeros((80, 100, 3), np.uint8)
    window = canvas[:64, :96]
    assert decode(data, max_pixels=LIMIT, out=window).pixels is window
    np.testing.assert_array_equal(window, wanted)
    assert not canvas[64:].any() and not canvas[:, 96:].any()

    other = np.zeros((96, 64, 3), np.uint8)
    pixels = decode(data, max_pixels=LIMIT, out=other).pixels
    assert pixels is not other and pixels.flags.c_contiguous
    np.testing.assert_array_equal(pixels, wanted)


def test_turned_pixels_land_in_out() -> None:
    out = np.zeros((48, 64, 3), np.uint8)
    for orientation in range(1, 9):
        out[:] = 0
        assert decode(oriented(orientation), max_pixels=LIMIT, out=out).pixels is out
        np.testing.assert_array_equal(out, decode(oriented(1), max_pixels=LIMIT).pixels)


def test_threads_get_the_same_pixels_and_opencv_starts_none() -> None:
    code = """
import os, sys
sys.path.insert(0, "tests")
from awkward_corpus import blocks, encode, oriented, photo
from PIL import Image
from pipeline.corpus.decode import decode
large = Image.fromarray(photo(1600, 1200))
threads = len(os.listdir("/proc/self/task"))
for data in (encode(large, "JPEG"), encode(large, "PNG"), *(oriented(n) for n in range(1, 9))):
    decode(data, max_pixels=10**8)
assert len(os.listdir("/proc/self/task")) == threads
"""
    if os.path.isdir("/proc/self/task"):
        subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])
    data = [encode(PICTURE, "JPEG"), encode(PICTURE, "PNG"), oriented(6), encode(PICTURE, "WEBP")] * 8
    wanted = [decode(d, max_pixels=LIMIT).pixels for d in data]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda d: decode(d, max_pixels=LIMIT).pixels, data))
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP"])
def test_decoding_releases_the_gil(name: str) -> None:
    """While one thread decodes, another takes its steps, although no thread is ever made to let go."""
    data = encode(Image.fromarray(photo(1600, 1200)), name)
    started, finished = threading.Event(), threading.Event()
    steps_meanwhile = 0

    def work() -> None:
        started.set()
        decode(data, max_pixels=LIMIT)
        finished.set()

    worker = threading.Thread(target=work)
    previous = sys.getswitchinterval()
    sys.setswitchinterval(60)
    try:
        worker.start()
        started.wait()
        while steps_meanwhile < 100 and not finished.is_set():
            steps_meanwhile += 1
    finally:
        sys.setswitchinterval(previous)
    worker.join()
    assert steps_meanwhile == 100


def test_statistics_are_exact() -> None:
    pixels = photo(48, 37)
    mean, std, brightness, contrast = picture_statistics(pixels)
    exact = pixels.astype(np.float64)
    assert mean == pytest.approx(exact.mean(), rel=1e-12) and std == pytest.approx(exact.std(), rel=1e-9)
    luma = np.rint(exact @ [0.299, 0.587, 0.114]) / 255
    assert brightness == pytest.approx(luma.mean(), abs=1e-3) and contrast == pytest.approx(luma.std(), abs=1e-3)
    window = np.zeros((60, 70, 3), np.uint8)[:37, :48]
    window[:] = pixels
    assert picture_statistics(window) == (mean, std, brightness, contrast)
    assert picture_statistics(np.full((1, 1, 3), 255, np.uint8)) == (255, 0, 1, 0)


def test_image_errors_survive_pickling() -> None:
    with pytest.raises(ImageError) as caught:
        decode(b"", max_pixels=1)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.kind, str(copy)) == ("empty", str(caught.value))


SEEDS = [
    encode(SMALL, name, **options)
    for name, options in (
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("GIF", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("WEBP", {}),
        ("AVIF", {}),
        ("JPEG2000", {}),
        ("PPM", {}),
    )
] + [oriented(6), oriented(6, "PNG"), oriented(6, "TIFF"), oriented(6, "WEBP"), encode(SMALL.convert("CMYK"), "JPEG")]
MAGICS = [seed[:16] for seed in SEEDS] + [b"\x00\x00\x00\x18ftypavif", b"<svg", b"RIFF____WEBPVP8X", b"P6 "]
quietly = settings(deadline=None, max_examples=300, suppress_health_check=list(HealthCheck))


def only_image_errors(data: bytes) -> None:
    for call in (lambda: decode(data, max_pixels=1_000_000), lambda: peek(data)):
        try:
            call()
        except ImageError as error:
            assert error.kind in BYTES_KINDS | {"out_of_memory"}


@pytest.mark.filterwarnings("ignore")
@quietly
@given(st.sampled_from([b"", *MAGICS]), st.binary(max_size=400))
def test_no_bytes_raise_anything_else(magic: bytes, data: bytes) -> None:
    only_image_errors(magic + data)


@pytest.mark.filterwarnings("ignore")
@quietly
@given(
    st.sampled_from(SEEDS),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6),
    st.floats(0, 1),
)
def test_no_mutation_raises_anything_else(seed: bytes, changes: list[tuple[float, int]], keep: float) -> None:
    data = bytearray(seed)
    for at, value in changes:
        # Cubed: most changes fall into the header, where they do most.
        data[int(at**3 * len(data))] = value
    only_image_errors(bytes(data))
    only_image_errors(bytes(data[: int(keep * len(data))]))


@pytest.mark.timeout(20)
def test_a_box_of_an_avif_that_says_it_has_no_length_ends_all_the_same() -> None:
    """Found by fuzzing: looking for the end of the last box went on for ever."""
    data = b"\x00\x00\x00\x10ftypavif\x00\x00\x00\x00" + b"\x00\x00\x00\x01meta" + bytes(8)
    with pytest.raises(ImageError) as failed:
        decode(data, max_pixels=LIMIT)
    assert failed.value.kind in ("corrupt", "truncated")
