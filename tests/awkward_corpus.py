"""A folder of difficult images, written by code, each with the outcome that a run must record for it."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, PngImagePlugin

ORIENTATION_TAG = 0x0112
#: What turns the upright picture into the one that is stored, for each Exif orientation.
_STORED_BY = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


class Expected(NamedTuple):
    """`outcome` is "ok" or an error kind; `size` is (width, height) as displayed, None for an error."""

    outcome: str
    size: tuple[int, int] | None = None


def blocks(width: int = 64, height: int = 48, seed: int = 0) -> Image.Image:
    """RGB squares of 8 x 8 pixels, one colour each: a JPEG of it without chroma subsampling decodes to the
    same pixels however it was turned before."""
    rng = np.random.default_rng(seed)
    colors = rng.integers(0, 256, (-(-height // 8), -(-width // 8), 3), dtype=np.uint8)
    return Image.fromarray(np.kron(colors, np.ones((8, 8, 1), np.uint8))[:height, :width])


def photo(width: int = 480, height: int = 360, seed: int = 0) -> np.ndarray:
    """uint8 [height, width, 3] with the spectrum of a photograph, more or less."""
    rng = np.random.default_rng(seed)
    picture = np.zeros((height, width, 3), np.float32)
    for step in (4, 8, 16, 32, 64):
        coarse = rng.standard_normal((height // step + 2, width // step + 2, 3)).astype(np.float32)
        fine = [Image.fromarray(coarse[:, :, c]).resize((width, height), Image.Resampling.BICUBIC) for c in range(3)]
        picture += step * np.stack([np.asarray(f) for f in fine], axis=2)
    return np.clip((picture - picture.mean()) / picture.std() * 55 + 120, 0, 255).astype(np.uint8)


def encode(image: Image.Image, name: str, **options: object) -> bytes:
    """The image in the format named ("JPEG", "PNG"), with Pillow's options for it."""
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


def oriented(orientation: int, name: str = "JPEG") -> bytes:
    """`blocks()` stored turned, with the Exif orientation that makes it upright again."""
    how = _STORED_BY[orientation]
    stored = blocks() if how is None else blocks().transpose(how)
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    options = {"quality": 95, "subsampling": 0} if name == "JPEG" else {"lossless": True} if name == "WEBP" else {}
    return encode(stored, name, exif=exif, **options)


def png_chunk(kind: bytes, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload)) + kind + payload + struct.pack(">I", zlib.crc32(kind + payload))


def bomb(width: int = 50_000, height: int = 50_000) -> bytes:
    """A valid beginning of a 1-bit PNG of that size in fewer than 100 bytes."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    row = zlib.compress(bytes(1 + -(-width // 8)), 9)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", row) + png_chunk(b"IEND", b"")


def _pictures() -> dict[str, tuple[bytes, Expected]]:
    ok = Expected("ok", (64, 48))
    upright = blocks()
    alpha = Image.fromarray(np.linspace(0, 255, 64 * 48).reshape(48, 64).astype(np.uint8))
    rgba, la = upright.copy(), upright.convert("L").convert("LA")
    rgba.putalpha(alpha)
    la.putalpha(alpha)
    palette = upright.quantize(16)
    gray16 = Image.fromarray(np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16))
    frames = [upright, blocks(seed=1), blocks(seed=2)]
    jpeg = encode(Image.fromarray(photo(96, 64)), "JPEG", quality=90)
    png = encode(Image.fromarray(photo(96, 64)), "PNG")
    animated = {"save_all": True, "append_images": frames[1:], "duration": 100}
    damaged = bytearray(png)
    damaged[len(png) // 2] ^= 0xFF

    pictures = {
        "zero_bytes.jpg": (b"", Expected("empty")),
        "truncated.jpg": (jpeg[: len(jpeg) // 2], Expected("truncated")),
        "truncated_in_header.jpg": (jpeg[:100], Expected("truncated")),
        "truncated.png": (png[: len(png) // 2], Expected("truncated")),
        "bad_checksum.png": (bytes(damaged), Expected("corrupt")),
        "text.jpg": (b"This is not a picture.\n" * 20, Expected("not_an_image")),
        "zeros.jpg": (bytes(4096), Expected("not_an_image")),
        "drawing.svg.png": (
            b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
            Expected("unsupported"),
        ),
        "layers.psd.jpg": (b"8BPS\x00\x01" + bytes(64), Expected("unsupported")),
        "phone.heic.jpg": (
            b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(64),
            Expected("unsupported"),
        ),
        "bomb.png": (bomb(), Expected("too_large")),
        "one_pixel.png": (encode(blocks(1, 1), "PNG"), Expected("ok", (1, 1))),
        "one_pixel.jpg": (encode(blocks(1, 1), "JPEG"), Expected("ok", (1, 1))),
        "tall_1x20000.png": (encode(blocks(1, 20_000), "PNG"), Expected("ok", (1, 20_000))),
        "odd_17x13.jpg": (encode(blocks(17, 13), "JPEG"), Expected("ok", (17, 13))),
        "upright.png": (encode(upright, "PNG"), ok),
        "cmyk.jpg": (encode(upright.convert("CMYK"), "JPEG", quality=95), ok),
        "progressive.jpg": (encode(upright, "JPEG", progressive=True), ok),
        "gray.jpg": (encode(upright.convert("L"), "JPEG"), ok),
        "gray.png": (encode(upright.convert("L"), "PNG"), ok),
        "bilevel.png": (encode(upright.convert("1"), "PNG"), ok),
        "gray16.png": (encode(gray16, "PNG"), ok),
        "palette.png": (encode(palette, "PNG"), ok),
        "palette_alpha.png": (encode(palette, "PNG", transparency=bytes(range(0, 256, 16))), ok),
        "rgba.png": (encode(rgba, "PNG"), ok),
        "gray_alpha.png": (encode(la, "PNG"), ok),
        "animated.gif": (encode(palette, "GIF", **animated), ok),
        "animated.webp": (encode(upright, "WEBP", lossless=True, **animated), ok),
        "animated.png": (encode(upright, "PNG", **animated), ok),
        "lossy.webp": (encode(upright, "WEBP"), ok),
        "plain.bmp": (encode(upright, "BMP"), ok),
        "plain.tif": (encode(upright, "TIFF"), ok),
        "pages.tiff": (
            encode(upright, "TIFF", compression="tiff_lzw", save_all=True, append_images=frames[1:]),
            ok,
        ),
        "trailing_bytes.jpg": (jpeg + b"\x00" * 100, Expected("ok", (96, 64))),
    }
    for orientation in range(1, 9):
        pictures[f"orientation_{orientation}.jpg"] = (oriented(orientation), ok)
    return pictures


#: Names that tools like to quote, decode or cut, each of a good JPEG.
AWKWARD_NAMES = (
    "with space.jpg",
    " leading and trailing .jpg",
    "single'quote.jpg",
    'double"quote.jpg',
    "ünï-çødé-写真-🙂.jpg",
    "e\u0301 decomposed.jpg",
    "hash#fragment.jpg",
    "question?query=1.jpg",
    "percent%.jpg",
    "percent%20space.jpg",
    "percent%2Fslash.jpg",
    "plus+and&.jpg",
    "brackets[1].jpg",
    "star*.jpg",
    "braces{a,b}.jpg",
    "comma,semi;colon.jpg",
    "back\\slash.jpg",
    "$(touch x) `y`.jpg",
    "<b>bold</b>.jpg".replace("/", "-"),
    "UPPER.JPG",
    "-dash.jpg",
    "many.dots.in.name.jpeg",
    "folder with space/100%/a#b?.jpg",
)


def make_awkward_corpus(folder: Path) -> dict[str, Expected]:
    """Write the corpus under `folder`; returns for each file's name, relative to it, what is expected of it.

    With a pixel limit of 100 million every outcome is reached. All `orientation_*.jpg` decode to the same
    pixels. Some names hold a slash, and so lie in sub-folders.
    """
    expected = {}
    named = encode(Image.fromarray(photo(96, 64)), "JPEG", quality=90)
    files = _pictures() | {name: (named, Expected("ok", (96, 64))) for name in AWKWARD_NAMES}
    for name, (data, outcome) in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        expected[name] = outcome
    return expected


def png_with_late_exif(orientation: int) -> bytes:
    """A PNG whose eXIf chunk follows its pixels."""
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    plain = encode(blocks(), "PNG", pnginfo=PngImagePlugin.PngInfo())
    return plain[:-12] + png_chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\x00\x00")) + plain[-12:]
