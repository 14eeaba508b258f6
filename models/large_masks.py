"""What `models.masks` says of a mask, in bands of rows: for masks of hundreds of megapixels, where one more array of
the mask's size is too much. Owns: the seams between bands. Must not know: torch, networks, tables.

Measured on 20,000 × 20,000 pixels, beyond the mask itself: docs/decisions/0009.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

import cc3d
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from zlib_ng import zlib_ng

from models.masks import _DEFLATE_LEVEL, _FILTER_UP, _PNG_SIGNATURE, _chunk

_BAND_BYTES = 16 << 20


def count_pixels(class_ids: NDArray[np.uint8]) -> NDArray[np.int64]:
    """int64 [256]: pixels of each id in a uint8 [h, w] mask. (`np.bincount` alone would need 8 bytes a pixel.)"""
    counts = np.zeros(256, np.int64)
    for rows in _bands(class_ids):
        counts += np.bincount(class_ids[rows].ravel(), minlength=256)
    return counts


def encode_mask_png(class_ids: NDArray[np.uint8], palette: Sequence[tuple[int, int, int]]) -> bytes:
    """The same bytes as `models.masks.encode_mask_png`, with two bands of memory instead of a second mask."""
    if class_ids.dtype != np.uint8 or class_ids.ndim != 2 or class_ids.size == 0:
        raise ValueError(f"a mask is a non-empty uint8 [h, w] array, got {class_ids.dtype} {class_ids.shape}")
    height, width = class_ids.shape
    deflate = zlib_ng.compressobj(_DEFLATE_LEVEL)
    packed = [b"IDAT"]
    for rows in _bands(class_ids):
        band = class_ids[rows]
        filtered = np.empty((len(band), width + 1), np.uint8)
        filtered[:, 0] = _FILTER_UP
        filtered[0, 1:] = band[0] - class_ids[rows.start - 1] if rows.start else band[0]
        np.subtract(band[1:], band[:-1], out=filtered[1:, 1:])
        packed.append(deflate.compress(filtered))
    packed.append(deflate.flush())
    colors = [*palette, *([(128, 128, 128)] * (int(class_ids.max()) + 1 - len(palette)))]
    chunks = (
        b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0),
        b"PLTE" + bytes(channel for color in colors for channel in color),
        b"".join(packed),
        b"IEND",
    )
    return _PNG_SIGNATURE + b"".join(_chunk(chunk) for chunk in chunks)


def count_regions_by_class(class_ids: NDArray[np.uint8]) -> dict[int, int]:
    """The same as `models.masks.count_regions_by_class`, with 12 bytes for each pixel of a band instead of the mask.

    Regions are counted in each band; those that touch across a seam are then counted once.
    """
    counts = np.zeros(256, np.int64)
    contacts: list[NDArray[np.int64]] = []
    contact_ids: list[NDArray[np.uint8]] = []
    known = 0
    above: tuple[NDArray[np.int64], NDArray[np.uint8]] | None = None
    for rows in _bands(class_ids):
        band = class_ids[rows]
        labels, count = cc3d.connected_components(band.astype(np.uint16) + 1, connectivity=8, return_N=True)
        owners = _class_of_label(band, labels, count)
        counts += np.bincount(owners[1:], minlength=256)
        row = labels[0].astype(np.int64) + known
        if above is not None:
            for here, there in _neighbours(class_ids.shape[1]):
                same = above[1][there] == band[0][here]
                contacts.append(np.stack([above[0][there][same], row[here][same]]))
                contact_ids.append(band[0][here][same])
        above = labels[-1].astype(np.int64) + known, band[-1]
        known += count
    if contacts:
        pairs, ids = np.concatenate(contacts, axis=1), np.concatenate(contact_ids)
        counts -= _joined(pairs, ids)
    return {class_id: number for class_id, number in enumerate(counts.tolist()) if number}


def _bands(class_ids: NDArray[np.uint8]) -> Iterator[slice]:
    height, width = class_ids.shape
    step = max(1, _BAND_BYTES // width)
    return (slice(top, min(top + step, height)) for top in range(0, height, step))


def _class_of_label(band: NDArray[np.uint8], labels: NDArray[np.integer], count: int) -> NDArray[np.uint8]:
    """uint8 [count + 1]; the first is nothing. Every region begins with a run, so the runs' first pixels say enough."""
    flat = band.reshape(-1)
    begins = np.empty(flat.size, np.bool_)
    np.not_equal(flat[1:], flat[:-1], out=begins[1:])
    begins[:: band.shape[1]] = True
    starts = np.flatnonzero(begins)
    owners = np.zeros(count + 1, np.uint8)
    owners[labels.reshape(-1)[starts]] = flat[starts]
    return owners


def _neighbours(width: int) -> Iterator[tuple[slice, slice]]:
    """Columns of a row and of the row above it that touch: straight, and along both diagonals."""
    yield slice(0, width), slice(0, width)
    if width > 1:
        yield slice(1, width), slice(0, width - 1)
        yield slice(0, width - 1), slice(1, width)


def _joined(pairs: NDArray[np.int64], ids: NDArray[np.uint8]) -> NDArray[np.int64]:
    """int64 [256]: by how many regions of a class there are less, when these pairs are one region each."""
    nodes, where = np.unique(pairs, return_inverse=True)
    one, other = where.reshape(pairs.shape)
    graph = coo_array((np.ones(len(one), np.bool_), (one, other)), shape=(len(nodes), len(nodes)))
    total, whole = connected_components(graph, directed=False)
    class_of = np.zeros(len(nodes), np.uint8)
    class_of[one], class_of[other] = ids, ids
    class_of_whole = np.zeros(total, np.uint8)
    class_of_whole[whole] = class_of
    return np.bincount(class_of, minlength=256) - np.bincount(class_of_whole, minlength=256)
