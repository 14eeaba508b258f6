"""One image's bytes to RGB pixels as a viewer shows them, or an ImageError that says what is wrong with them.
Must not know: storage, batches, models, tables.

JPEG takes a fast path (simplejpeg, strict); what that refuses, and every other format, goes to Pillow, whose plugins
are called by name rather than through `Image.open`: none guesses at unknown bytes, and the limit on pixels is
`max_pixels`, checked against the header (GIF, TIFF and WebP keep Pillow's own limit besides, 179 million unless
`PIL.Image.MAX_IMAGE_PIXELS` was changed). ICC profiles are ignored. Everything here is thread safe, and the decoders
release the GIL.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from pipeline.corpus import header
from pipeline.corpus.bands import gray_of_wide
from pipeline.errors import ImageError

_PLUGINS: dict[str, type[ImageFile.ImageFile]] = {
    "AVIF": AvifImagePlugin.AvifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "JPEG": JpegImagePlugin.JpegImageFile,
    "JPEG2000": Jpeg2KImagePlugin.Jpeg2KImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "PPM": PpmImagePlugin.PpmImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
}
# libjpeg's words for a picture with missing or wrong blocks, which Pillow lets through without an error.
_JPEG_DAMAGE = re.compile(r"bad Huffman|premature end of data|instead of RST|bad arithmetic|Inconsistent progression")
_TRUNCATED = re.compile(
    r"truncat|not enough (?:image )?data|unexpected end|EOF|end of (?:file|data)|no more images|only got",
    re.IGNORECASE,
)
_UNENDED = re.compile(r"premature end of data|extraneous bytes before marker 0xd9")
_END = b"\xff\xd9"
_ZEROS = bytes(512)
_UNSUPPORTED = re.compile(r"unsupported|not supported|unknown \w*\s?(?:pixel )?mode|cannot handle", re.IGNORECASE)


class Decoded(NamedTuple):
    """`pixels`: uint8 [h, w, 3], RGB, upright. `format`: Pillow's name for it ("JPEG", "PNG")."""

    pixels: np.ndarray
    format: str


def peek(data: bytes) -> tuple[int, int]:
    """(height, width) as displayed, after the Exif orientation, from the header alone.

    Raises ImageError as `decode` does, except that it sees no damage beyond the header and sets no limit.
    """
    name = header.image_format(data)
    try:
        if name == "JPEG":
            try:
                height, width, _, _ = simplejpeg.decode_jpeg_header(data, strict=False)
            except ValueError:
                width, height = _PLUGINS[name](io.BytesIO(data)).size
            orientation = header.jpeg_orientation(data)
        elif name == "PNG" and (size := header.png_size(data)) is not None:
            (height, width), orientation = size, header.png_orientation(data, check=False)
        elif name == "WEBP":
            (height, width), orientation = header.webp_size(data), header.webp_orientation(data)
        else:
            image = _PLUGINS[name](io.BytesIO(data))
            (width, height), orientation = image.size, _orientation(data, name, image, check=False)
    except Exception as error:
        raise _image_error(error, data, name) from error
    if height == 0 or width == 0:
        raise ImageError(f"the {name} header gives no size", kind="corrupt")
    return (width, height) if orientation >= 5 else (height, width)


def decode(data: bytes, *, max_pixels: int, out: np.ndarray | None = None) -> Decoded:
    """Decode one image of any supported format to uint8 RGB [h, w, 3] as a viewer shows it.

    Guarantees: the Exif orientation is applied; transparency is composited over white; the first frame or
    page is taken; 16-bit samples are cut to their high byte; equal bytes give equal pixels in every thread.
    `out`: a writable uint8 array. Where its shape is the image's, the pixels are put there and `pixels` is
    `out`, without a copy where it is C-contiguous and a JPEG needs no turning. Otherwise `pixels` is a new
    C-contiguous array. The contents of `out` are undefined after an error.

    Raises only ImageError, whatever the bytes: `empty`, `not_an_image`, `unsupported` (a picture that is not
    read), `too_large` (more than `max_pixels`, seen in the header before anything is decompressed),
    `truncated`, `corrupt`, and `out_of_memory`. All but the last are final: the same bytes fail the same way.
    """
    name = header.image_format(data)
    try:
        pixels = _decode_jpeg(data, max_pixels, out) if name == "JPEG" else None
        if pixels is None:
            pixels = _decode_with_pillow(data, name, max_pixels, out)
    except Exception as error:
        raise _image_error(error, data, name) from error
    return Decoded(pixels, name)


def _decode_jpeg(data: bytes, max_pixels: int, out: np.ndarray | None) -> np.ndarray | None:
    """The fast path; None where Pillow should have a look. Raises for damage that Pillow would hide."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except ValueError:
        return None
    _check_size(height, width, max_pixels)
    if colorspace not in ("YCbCr", "RGB", "Gray"):
        return None
    orientation = header.jpeg_orientation(data)
    direct = orientation == 1 and out is not None and out.shape == (height, width, 3) and out.flags.c_contiguous
    buffer = out if direct else None
    try:
        if header.jpeg_lacks_end(data):
            pixels = _decode_unended_jpeg(data, buffer)
        else:
            pixels = simplejpeg.decode_jpeg(data, buffer=buffer, strict=True)
    except ValueError as error:
        if "Premature end of JPEG file" in str(error):
            raise ImageError(f"the JPEG ends too early, after {len(data)} bytes", kind="truncated") from error
        if _JPEG_DAMAGE.search(str(error)):
            raise ImageError(f"the JPEG has damaged blocks ({error})", kind="corrupt") from error
        return None
    return out if direct else _place(pixels, orientation, out)


def _decode_unended_jpeg(data: bytes, buffer: np.ndarray | None) -> np.ndarray:
    """A JPEG without its end marker: taken where nothing else is missing, else ImageError `truncated`, or ValueError
    for damage before that."""
    cause = None
    for ended in _with_ends(data) if header.jpeg_has_one_scan(data) else ():
        try:
            # Gray, at an eighth of its size, an image shows in half the time whether anything is missing.
            simplejpeg.decode_jpeg(ended, colorspace="GRAY", min_height=1, min_width=1, strict=True)
            return simplejpeg.decode_jpeg(ended, buffer=buffer, strict=True)
        except ValueError as error:
            if not _UNENDED.search(str(error)):
                raise
            cause = error
    raise ImageError(f"the JPEG ends too early, after {len(data)} bytes", kind="truncated") from cause


def _with_ends(data: bytes) -> Iterator[bytes]:
    """What a JPEG without its end marker may be, ended. Zeros at its end are padding, or a place made for it that was
    never filled; part of the picture only where zeros stand for flat blocks, and are no more than these can take."""
    if not data.endswith(_ZEROS):
        yield data + _END
        return
    scan, size_bytes = header.jpeg_scan(data), len(data)
    while data.endswith(_ZEROS, scan, size_bytes):  # by far faster than byte by byte
        size_bytes -= len(_ZEROS)
    written = data[:scan] + data[scan:size_bytes].rstrip(b"\0")
    if written.endswith(b"\xff"):  # which in a scan is followed by a zero of its own
        written += b"\0"
    yield written + _END
    if len(data) - len(written) <= header.jpeg_flat_bytes(data):
        yield data + _END


def _decode_with_pillow(data: bytes, name: str, max_pixels: int, out: np.ndarray | None) -> np.ndarray:
    if name == "WEBP":  # opening it allocates the canvas
        _check_size(*header.webp_size(data), max_pixels)
    image = _PLUGINS[name](io.BytesIO(data))
    _check_size(image.height, image.width, max_pixels)
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        _check_size(image.tag_v2.get(323, 1), image.tag_v2.get(322, 1), max_pixels)  # a tile is decoded whole
        _mend_wide_planes(image)
    orientation = _orientation(data, name, image, check=True)
    image.load()
    _check_size(image.height, image.width, max_pixels)
    return _place(_rgb(image), orientation, out)


def _mend_wide_planes(image: TiffImagePlugin.TiffImageFile) -> None:
    """Pillow takes the samples of uncompressed planes for 8 bits, whatever they are: right pixels of another image."""
    if image.tag_v2.get(284) != 2 or set(image.tag_v2.get(258, ())) != {16}:
        return
    order = "L" if image.tag_v2.prefix == b"II" else "B"
    for index, tile in enumerate(image.tile):
        band, *rest = tile.args if isinstance(tile.args, tuple) else ("",)
        if tile.codec_name == "raw" and len(band) == 1:
            wide = ("I;16" if order == "L" else "I;16B") if band == "I" else f"{band};16{order}"
            image.tile[index] = tile._replace(args=(wide, *rest))


def _orientation(data: bytes, name: str, image: ImageFile.ImageFile, *, check: bool) -> int:
    if name == "JPEG":
        return header.jpeg_orientation(data)
    if name == "PNG":
        return header.png_orientation(data, check=check)
    if name == "WEBP":
        return header.webp_orientation(data)
    if name == "AVIF":
        return header.exif_orientation(image.info.get("exif", b"").removeprefix(b"Exif\x00\x00"))
    return 1  # Pillow turns TIFF by itself, and reports the displayed size; the others have no Exif


def _check_size(height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise ImageError(
            f"the image is {width} x {height} = {height * width} pixels, more than the limit of {max_pixels}",
            kind="too_large",
        )


def _rgb(image: Image.Image) -> np.ndarray:
    """uint8 [h, w, 3] of a loaded image of any mode. Raises ImageError `unsupported` for one with no one
    look."""
    mode = image.mode
    if mode == "RGB" and "transparency" not in image.info:
        return np.asarray(image)
    if mode.startswith("I;16"):
        gray = (np.asarray(image) >> 8).astype(np.uint8)
    elif mode in ("I", "F"):
        samples = np.asarray(image)
        extremes = float(samples.min()), float(samples.max())
        gray = gray_of_wide(samples, extremes, small_as_is=image.format == "TIFF")
    elif image.has_transparency_data:
        return _over_white(image)
    else:
        return np.asarray(image.convert("RGB"))
    return np.repeat(gray[:, :, None], 3, axis=2)


def _over_white(image: Image.Image) -> np.ndarray:
    key = image.info.get("transparency")
    if image.mode in ("RGB", "L") and key is not None and np.max(key) > 255:
        # A 16-bit colour key, of which Pillow kept the high bytes of the pixels only.
        image.info["transparency"] = tuple(v >> 8 for v in key) if isinstance(key, tuple) else key >> 8
    rgba = image.convert("RGBA")
    canvas = Image.new("RGB", rgba.size, (255, 255, 255))
    canvas.paste(rgba, mask=rgba.getchannel("A"))
    return np.asarray(canvas)


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels [h, w, ...] turned as the Exif orientation says (tag 0x0112, CIPA DC-008)."""
    if orientation >= 5:
        pixels = cv2.transpose(pixels)
    # After the transposition, what is left of each orientation is a mirroring of columns, rows, or both.
    flip = {2: 1, 3: -1, 4: 0, 6: 1, 7: -1, 8: 0}.get(orientation)
    return pixels if flip is None else cv2.flip(pixels, flip)


def _place(pixels: np.ndarray, orientation: int, out: np.ndarray | None) -> np.ndarray:
    """Upright, and in `out` where it has the right shape."""
    pixels = upright(pixels, orientation)
    if out is not None and out.shape == pixels.shape:
        np.copyto(out, pixels)
        return out
    return np.ascontiguousarray(pixels)


def _image_error(error: Exception, data: bytes, name: str) -> ImageError:
    """The ImageError for whatever a decoder raised."""
    if isinstance(error, ImageError):
        return error
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, MemoryError):
        return ImageError(f"no memory to decode a {name} of {len(data)} bytes", kind="out_of_memory")
    if isinstance(error, Image.DecompressionBombError):
        return ImageError(f"the {name} is too large for its decoder: {error}", kind="too_large")
    if name == "JPEG" and (fault := header.jpeg_fault(data)):
        return ImageError(fault[1], kind=fault[0])
    if _TRUNCATED.search(text) or isinstance(error, EOFError) or header.ends_early(data, name):
        return ImageError(f"the {name} ends too early ({text})", kind="truncated")
    if _UNSUPPORTED.search(text) or isinstance(error, NotImplementedError):
        return ImageError(f"a variant of {name} that is not read ({text})", kind="unsupported")
    return ImageError(f"the {name} cannot be decoded ({text})", kind="corrupt")
