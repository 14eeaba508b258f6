"""What the first bytes of an image say: format, stored size, orientation, and whether the rest is there.
Must not know: pixels, Pillow, or where the bytes came from. Reads headers only; nothing here decompresses.

Sources: JPEG is ITU-T T.81 annex B, Exif is CIPA DC-008, PNG is the W3C recommendation (third edition),
WebP is RFC 9649, TIFF is revision 6.0.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Literal

from pipeline.errors import ImageError

#: Formats that `decode` reads, by the bytes that they begin with.
_MAGIC = (
    (b"\xff\xd8", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"II+\x00", "TIFF"),
    (b"MM\x00+", "TIFF"),
    (b"\x00\x00\x00\x0cjP  \r\n\x87\n", "JPEG2000"),
    (b"\xff\x4f\xff\x51", "JPEG2000"),
)
#: Formats that are pictures, and that `decode` does not read.
_UNREAD_MAGIC = (
    (b"8BPS", "PSD"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\x00\x00\x00\x0cJXL \r\n\x87\n", "JPEG XL"),
    (b"II\xbc\x01", "JPEG XR"),
    (b"\x00\x00\x01\x00", "ICO"),
    (b"\x76\x2f\x31\x01", "OpenEXR"),
    (b"#?RADIANCE", "Radiance HDR"),
    (b"DDS ", "DDS"),
    (b"qoif", "QOI"),
    (b"gimp xcf", "XCF"),
    (b"%!PS", "PostScript"),
    (b"SIMPLE  =", "FITS"),
    (b"AT&TFORM", "DjVu"),
    (b"icns", "ICNS"),
)
_UNREAD_BRANDS = {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"}
_BMP_HEADER_BYTES = {12, 16, 40, 52, 56, 64, 108, 124}

_ORIENTATION_TAG = 0x0112
_TIFF_TYPE_BYTES = {3: 2, 4: 4, 5: 8, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}
_SOS = 0xDA
_DHT = 0xC4
_EOI = b"\xff\xd9"
#: Frame markers that libjpeg-turbo decodes: baseline, extended, progressive, and the two arithmetic ones.
_READ_FRAMES = {0xC0, 0xC1, 0xC2, 0xC9, 0xCA}
_FRAMES = {0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}


def image_format(data: bytes) -> str:
    """The format's name as Pillow spells it, from the leading bytes alone: a file's name is never asked.

    Raises ImageError: `empty` for no bytes, `unsupported` for a picture of a format that `decode` does not
    read, `not_an_image` for everything else.
    """
    for magic, name in _MAGIC:
        if data.startswith(magic):
            return name
    if not data:
        raise ImageError("the object holds no bytes", kind="empty")
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[:2] == b"BM" and int.from_bytes(data[14:18], "little") in _BMP_HEADER_BYTES:
        return "BMP"
    if len(data) > 2 and data[:1] == b"P" and data[1:2] in b"123456" and data[2:3].isspace():
        return "PPM"
    if data[4:8] == b"ftyp":
        brands = {data[8:12], *(data[i : i + 4] for i in range(16, min(int.from_bytes(data[:4]), 64), 4))}
        if brands & {b"avif", b"avis"}:
            return "AVIF"
        if brands & _UNREAD_BRANDS:
            raise ImageError("the picture is HEIC, which is not read: convert it first", kind="unsupported")
    for magic, name in _UNREAD_MAGIC:
        if data.startswith(magic):
            raise ImageError(f"the picture is {name}, which is not read: convert it first", kind="unsupported")
    start = data[:1024].lower()
    if b"<svg" in start:
        raise ImageError("the picture is SVG, which is not read: convert it first", kind="unsupported")
    raise ImageError(f"no image format begins with the bytes {data[:12]!r}", kind="not_an_image")


def _tiff_fields(tiff: bytes) -> Iterator[tuple[int, int, list[int]]]:
    """(tag, end, values) of the fields in a TIFF's first directory; `end` is the last byte that the field
    needs, `values` are those of integer fields. Damaged or absent directories give fewer fields, BigTIFF
    none."""
    order: Literal["little", "big"] = "little" if tiff[:2] == b"II" else "big"
    if int.from_bytes(tiff[2:4], order) != 42:
        return
    directory = int.from_bytes(tiff[4:8], order)
    entries = int.from_bytes(tiff[directory : directory + 2], order)
    for at in range(directory + 2, min(directory + 2 + 12 * entries, len(tiff) - 11), 12):
        tag = int.from_bytes(tiff[at : at + 2], order)
        kind = int.from_bytes(tiff[at + 2 : at + 4], order)
        step, count = _TIFF_TYPE_BYTES.get(kind, 1), int.from_bytes(tiff[at + 4 : at + 8], order)
        start = at + 8 if count * step <= 4 else int.from_bytes(tiff[at + 8 : at + 12], order)
        end = start + count * step
        readable = kind in (3, 4) and end <= len(tiff)
        values = range(start, end, step) if readable else ()
        yield tag, end, [int.from_bytes(tiff[i : i + step], order) for i in values]


def exif_orientation(exif: bytes) -> int:
    """The orientation (1 to 8) in an Exif block, which is a small TIFF file; 1 where absent or damaged."""
    for tag, _, values in _tiff_fields(exif):
        if tag == _ORIENTATION_TAG:
            return values[0] if values and 1 <= values[0] <= 8 else 1
    return 1


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, start, end) of each segment's payload up to and including the first scan's header."""
    at = 2
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            return
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        end = at + 2 + (data[at + 2] << 8 | data[at + 3])
        yield marker, at + 4, end
        if marker == _SOS:
            return
        at = end


def jpeg_orientation(data: bytes) -> int:
    """The Exif orientation of a JPEG, 1 where there is none. Reads the segments before the first scan."""
    for marker, start, end in _jpeg_segments(data):
        if marker == 0xE1 and data[start : start + 6] == b"Exif\x00\x00":
            return exif_orientation(data[start + 6 : end])
    return 1


def jpeg_has_one_scan(data: bytes) -> bool:
    """Whether a JPEG's first scan holds all components entirely, so that none can be missing after it."""
    components = 0
    for marker, start, end in _jpeg_segments(data):
        if marker in (0xC0, 0xC1, 0xC9) and start + 5 < min(end, len(data)):
            components = data[start + 5]
        elif marker == _SOS and start < len(data):
            return data[start] == components
    return False


def jpeg_flat_bytes(data: bytes) -> int:
    """How many bytes of zeros can stand for blocks of one colour in a JPEG of one scan, at most: 0 where none can.

    The shortest Huffman code is all zeros, and belongs to a table's first symbol (ITU-T T.81, annex C). A block is a
    code for its mean, as many bits as that says, and, if it is flat, the code for "nothing more in this block".
    """
    blocks = bits = 0
    firsts: dict[int, tuple[int, int]] = {}
    for marker, start, end in _jpeg_segments(data):
        if marker in _FRAMES:
            blocks = _jpeg_blocks(data[start:end])
        at = start
        while marker == _DHT and at + 17 < min(end, len(data)):
            counts = data[at + 1 : at + 17]
            firsts[data[at]] = next((length for length, count in enumerate(counts, 1) if count), 0), data[at + 17]
            at += 17 + sum(counts)
        if marker == _SOS and start < len(data):
            for tables in data[start + 2 : min(end, start + 1 + 2 * data[start]) : 2]:
                mean_bits, more_bits = firsts.get(tables >> 4, (0, 0))
                rest_bits, rest = firsts.get(0x10 | tables & 15, (0, 1))
                if rest != 0:
                    return 0
                bits = max(bits, mean_bits + more_bits + rest_bits)
    # A code of 16 bits with 15 of its own may have begun before the zeros, with its block's end behind it.
    return blocks * bits // 8 + 8


def _jpeg_blocks(frame: bytes) -> int:
    """How many blocks of 8 × 8 a frame's header speaks of, at most; 0 where it is damaged."""
    if len(frame) < 6 or len(frame) < 6 + 3 * frame[5]:
        return 0
    factors = [(frame[at] >> 4, frame[at] & 15) for at in range(7, 6 + 3 * frame[5], 3)]
    across, down = max((one for one, _ in factors), default=0), max((one for _, one in factors), default=0)
    if not across or not down:
        return 0
    height, width = int.from_bytes(frame[1:3]), int.from_bytes(frame[3:5])
    units = -(-height // (8 * down)) * -(-width // (8 * across))
    return units * sum(x * y for x, y in factors)


def jpeg_scan(data: bytes) -> int | None:
    """Where a JPEG's first scan begins, behind its header; None where there is none."""
    return next((end for marker, _, end in _jpeg_segments(data) if marker == _SOS), None)


def jpeg_lacks_end(data: bytes) -> bool:
    """Whether no end marker follows the first scan's header. Whatever follows an end marker does not matter."""
    if data.endswith(_EOI):
        return False
    scan = jpeg_scan(data)
    # Among the bits of a scan 0xFF is always followed by 0x00 or a restart marker.
    return scan is not None and data.rfind(_EOI, scan) < 0


def jpeg_fault(data: bytes) -> tuple[str, str] | None:
    """(kind, message) where the header alone explains why a JPEG cannot be decoded, else None."""
    end = 2
    for marker, start, end in _jpeg_segments(data):
        if marker in _FRAMES and len(data) > start:
            if marker not in _READ_FRAMES:
                return "unsupported", f"the JPEG's coding process (marker 0xFF{marker:02X}) is not read"
            if data[start] != 8:
                return "unsupported", f"the JPEG has {data[start]} bits per sample: only 8 are read"
        if marker == _SOS and end < len(data):
            return None
    return ("truncated", "the JPEG ends inside its header") if end + 4 > len(data) else None


def png_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) of a PNG whose first chunk is a whole IHDR; None where it is not: a decoder may say why."""
    if len(data) < 33 or data[8:16] != b"\0\0\0\rIHDR" or zlib.crc32(data[12:29]) != int.from_bytes(data[29:33]):
        return None
    return int.from_bytes(data[20:24]), int.from_bytes(data[16:20])


def png_orientation(data: bytes, *, check: bool) -> int:
    """The Exif orientation of a PNG, wherever its eXIf chunk is.

    With `check`, also reads the checksum of every critical chunk, because Pillow skips those of the pixels.
    Raises ImageError `truncated` where a chunk is cut off, `corrupt` where a checksum is wrong.
    """
    at, orientation, view = 8, 1, memoryview(data)
    while at + 8 <= len(data):
        size, kind = int.from_bytes(data[at : at + 4]), data[at + 4 : at + 8]
        end = at + 12 + size
        if end > len(data) and kind != b"IEND":
            if not kind.isalpha():
                raise ImageError(f"the PNG has a chunk named {kind!r} at byte {at}", kind="corrupt")
            raise ImageError(
                f"the PNG ends inside its {kind.decode()} chunk, {end - len(data)} bytes too early",
                kind="truncated",
            )
        checked = check and kind[0] < 0x60 and kind != b"IEND"
        if checked and zlib.crc32(view[at + 4 : end - 4]) != int.from_bytes(data[end - 4 : end]):
            raise ImageError(f"the PNG's {kind!r} chunk at byte {at} has a wrong checksum", kind="corrupt")
        if kind == b"eXIf":
            orientation = exif_orientation(data[at + 8 : end - 4])
        if kind == b"IEND":
            break
        at = end
    return orientation


def webp_orientation(data: bytes) -> int:
    """The Exif orientation of a WebP file, 1 where there is none.

    Raises ImageError `truncated` where the file is shorter than it says.
    """
    size = int.from_bytes(data[4:8], "little")
    if size + 8 > len(data):
        raise ImageError(f"the WebP file says {size + 8} bytes and has {len(data)}", kind="truncated")
    at = 12
    while at + 8 <= len(data):
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        if data[at : at + 4] == b"EXIF":
            return exif_orientation(data[at + 8 : at + 8 + size].removeprefix(b"Exif\x00\x00"))
        at += 8 + size + (size & 1)
    return 1


def webp_size(data: bytes) -> tuple[int, int]:
    """(height, width) of the canvas, before any decoder allocates it; (0, 0) where the header is damaged."""
    kind, at = data[12:16], 20
    if kind == b"VP8X":
        width, height = data[at + 4 : at + 7], data[at + 7 : at + 10]
        return int.from_bytes(height, "little") + 1, int.from_bytes(width, "little") + 1
    if kind == b"VP8L":
        bits = int.from_bytes(data[at + 1 : at + 5], "little")
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    if kind == b"VP8 ":
        width, height = data[at + 6 : at + 8], data[at + 8 : at + 10]
        return int.from_bytes(height, "little") & 0x3FFF, int.from_bytes(width, "little") & 0x3FFF
    return 0, 0


def ends_early(data: bytes, name: str) -> bool:
    """Whether a file that failed to decode points beyond its own end, or lacks its format's last mark."""
    if name == "PNG":
        return b"IEND" not in data
    if name == "JPEG2000":
        return not data.endswith(_EOI)
    if name == "WEBP":
        return int.from_bytes(data[4:8], "little") + 8 > len(data)
    if name == "AVIF":
        return _last_box_end(data) > len(data)
    if name == "TIFF":
        return _tiff_end(data) > len(data)
    return False


def _last_box_end(data: bytes) -> int:
    """Where the last top-level box of an ISO base media file says that it ends."""
    at = 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4])
        if size == 0:  # to the end of the file
            return len(data)
        at += max(int.from_bytes(data[at + 8 : at + 16]), 16) if size == 1 else max(size, 8)
    return at


def _tiff_end(data: bytes) -> int:
    """The last byte that a TIFF's first directory, its fields, strips or tiles need."""
    order: Literal["little", "big"] = "little" if data[:2] == b"II" else "big"
    directory = int.from_bytes(data[4:8], order)
    ends = [directory + 6 + 12 * int.from_bytes(data[directory : directory + 2], order)]
    fields = {}
    for tag, end, values in _tiff_fields(data):
        ends.append(end)
        fields[tag] = values
    for offsets, sizes in ((273, 279), (324, 325)):
        ends += [a + b for a, b in zip(fields.get(offsets, []), fields.get(sizes, []), strict=False)]
    return max(ends)
