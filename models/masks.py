"""Masks as bytes: palette PNG for class ids, COCO run lengths for instances, checksums.
Owns: encodings. Must not know: torch, networks, tables.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from pycocotools import mask as coco_mask
from zlib_ng import zlib_ng

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Measured on label maps (docs/decisions/0017). With the strategy "RLE" all levels above 0 are one.
_DEFLATE = (1, zlib_ng.DEFLATED, zlib_ng.MAX_WBITS, zlib_ng.DEF_MEM_LEVEL, zlib_ng.Z_RLE)
_FILTER_UP = 2
# Larger masks are written in bands of so many pixels.
_BAND_PX = 16 << 20


class Instance(NamedTuple):
    """One object of an instance mask."""

    class_id: int
    #: Mean foreground probability of its pixels, 0..1.
    score: float
    #: x, y, width, height in pixels (COCO).
    bbox: tuple[float, float, float, float]
    #: Pixels.
    area: int
    #: COCO compressed run lengths: {"size": [h, w], "counts": bytes}.
    rle: dict[str, Any]


def encode_mask_png(class_ids: NDArray[np.uint8], palette: Sequence[tuple[int, int, int]]) -> bytes:
    """An 8-bit palette PNG [h, w] whose pixel values are the class ids.

    `palette` holds RGB by id; ids beyond it are shown grey. Deterministic. Raises ValueError on anything but
    uint8 [h, w].
    """
    if class_ids.dtype != np.uint8 or class_ids.ndim != 2 or class_ids.size == 0:
        raise ValueError(f"a mask is a non-empty uint8 [h, w] array, got {class_ids.dtype} {class_ids.shape}")
    height, width = class_ids.shape
    deflate = zlib_ng.compressobj(*_DEFLATE)
    packed = [b"IDAT"]
    above: NDArray[np.uint8] = np.zeros(width, np.uint8)
    for band in _bands(class_ids):
        # Filter "up" (PNG, section 9.2): each row less the one above, modulo 256. Label maps repeat from row to row.
        filtered = np.empty((len(band), width + 1), np.uint8)
        filtered[:, 0] = _FILTER_UP
        np.subtract(band[0], above, out=filtered[0, 1:])
        np.subtract(band[1:], band[:-1], out=filtered[1:, 1:])
        packed.append(deflate.compress(filtered))
        above = band[-1]
    packed.append(deflate.flush())
    colors = [*palette, *([(128, 128, 128)] * (int(class_ids.max()) + 1 - len(palette)))]
    chunks = (
        b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0),
        b"PLTE" + bytes(channel for color in colors for channel in color),
        b"".join(packed),
        b"IEND",
    )
    return _PNG_SIGNATURE + b"".join(_chunk(chunk) for chunk in chunks)


def decode_mask_png(data: bytes) -> NDArray[np.uint8]:
    """Class ids uint8 [h, w] of a palette or gray PNG. Raises ValueError for other modes, OSError if it is no
    image.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            if image.mode not in ("P", "L"):
                raise ValueError(f"a mask PNG has 8 bits a pixel (mode P or L), got mode {image.mode}")
            return np.array(image, dtype=np.uint8)
    except UnidentifiedImageError as error:  # its text is of an object in memory
        raise OSError(f"{len(data)} bytes of no image") from error
    except (SyntaxError, EOFError, struct.error, Image.DecompressionBombError) as error:  # so Pillow tells of damage
        raise OSError(f"{len(data)} bytes of a damaged image: {error}") from error


def mask_crc32(class_ids: NDArray[np.uint8], rles: Iterable[Mapping[str, Any]] = ()) -> int:
    """CRC-32 (0 .. 2**32 - 1) of the class ids' bytes in row order, then of each run-length's size and
    counts.
    """
    crc = zlib_ng.crc32(np.ascontiguousarray(class_ids).data)
    for rle in rles:
        crc = zlib_ng.crc32(struct.pack("<qq", *rle["size"]), crc)
        crc = zlib_ng.crc32(_counts_bytes(rle["counts"]), crc)
    return crc


def encode_rle(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """COCO compressed run lengths of a bool [h, w] mask: {"size": [h, w], "counts": bytes}."""
    rle: dict[str, Any] = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return rle


def decode_rle(rle: Mapping[str, Any]) -> NDArray[np.bool_]:
    """The bool [h, w] mask of COCO compressed run lengths."""
    decoded = coco_mask.decode({"size": list(rle["size"]), "counts": _counts_bytes(rle["counts"])})
    return np.ascontiguousarray(decoded).astype(bool)


def encode_label_rles(labels: NDArray[np.int32], count: int) -> list[dict[str, Any]]:
    """COCO compressed run lengths of labels 1 .. count of an int32 [h, w] label map (0 is nothing), in order.

    One pass over the map: time and memory do not grow with pixels times objects. A label that is absent gives
    an empty mask.
    """
    height, width = labels.shape
    columns = cv2.transpose(labels).ravel()
    starts = np.concatenate(([0], np.flatnonzero(columns[1:] != columns[:-1]) + 1))
    ends = np.append(starts[1:], columns.size)
    values = columns[starts]
    keep = values > 0
    starts, ends, values = starts[keep], ends[keep], values[keep]
    order = np.argsort(values, kind="stable")
    edges = np.stack([starts[order], ends[order]], axis=1)
    bounds = np.searchsorted(values[order], np.arange(1, count + 2))
    raw = []
    for index in range(count):
        own = edges[bounds[index] : bounds[index + 1]].ravel()
        counts = np.diff(own, prepend=0, append=columns.size)
        # A zero at the end is legal but not canonical: pycocotools' own encoder never writes one.
        counts = counts[: counts.size - (counts.size > 1 and counts[-1] == 0)]
        raw.append({"size": [height, width], "counts": counts.tolist()})
    return coco_mask.frPyObjects(raw, height, width) if raw else []


def _bands(class_ids: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    rows = max(1, _BAND_PX // class_ids.shape[1])
    for top in range(0, len(class_ids), rows):
        yield class_ids[top : top + rows]


def _chunk(body: bytes) -> bytes:
    return struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib_ng.crc32(body))


def _counts_bytes(counts: bytes | str) -> bytes:
    return counts.encode("ascii") if isinstance(counts, str) else counts
