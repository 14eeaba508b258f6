"""Where the samples of a TIFF's first page are, and what they mean. Owns: the bytes of a file wherever they lie, the
table of segments (tiles or strips), colour spaces. Must not know: windows, caches, orientation's arithmetic.

Sources: TIFF is revision 6.0, BigTIFF the proposal of 2007 (AWare Systems). tifffile parses and imagecodecs
decompresses.
"""

from __future__ import annotations

import io
import itertools
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
import tifffile

from pipeline.corpus.bands import Alpha
from pipeline.errors import ImageError

_MINISWHITE, _MINISBLACK, _RGB, _PALETTE, _YCBCR = 0, 1, 2, 3, 6
#: tifffile's decoders turn YCbCr into RGB for these only.
_JPEG_COMPRESSIONS = {6, 7, 34892, 33007}
#: Bytes of one value, by the type of a field.
_TYPE_BYTES = {3: 2, 4: 4, 5: 8, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
#: What pixels need: bits, offsets and sizes of segments, colours, kinds of samples, tables of JPEGs.
_FIELDS = {258, 273, 279, 320, 324, 325, 338, 339, 347}
#: A segment that decodes to more than this is no window on anything.
_SEGMENT_BYTES = 256 << 20
#: Uncompressed strips are read in pieces of about this size.
_PIECE_BYTES = 1 << 18


class ByteSource:
    """Bytes of a file, wherever they are. `fetch` is thread safe."""

    def __init__(self, source: bytes | str | os.PathLike[str] | BinaryIO) -> None:
        self.in_memory = isinstance(source, bytes)
        self._lock = threading.Lock()
        self._owned: BinaryIO | None = None
        if isinstance(source, bytes):
            self._data = source
            self._handle: BinaryIO = io.BytesIO(source)  # shares the bytes
        elif isinstance(source, str | os.PathLike):
            self._handle = self._owned = Path(source).open("rb")  # noqa: SIM115 - closed by `close`
        else:
            self._handle = source
        self.size_bytes = self._handle.seek(0, os.SEEK_END)
        self.start = bytes(self.fetch(0, 1024))

    def handle(self) -> BinaryIO:
        """For one thread, before the first `fetch` of another."""
        self._handle.seek(0)
        return self._handle

    def fetch(self, offset: int, count: int) -> bytes | memoryview:
        """`count` bytes, or what there is of them."""
        if self.in_memory:
            return memoryview(self._data)[offset : offset + count]
        if self._owned is not None:
            return os.pread(self._owned.fileno(), count, offset)
        with self._lock:
            self._handle.seek(offset)
            return self._handle.read(count)

    def close(self) -> None:
        """Lets go of the bytes, and of the file unless it is the caller's."""
        if self.in_memory:
            self._data = b""
            self._handle.close()  # tifffile's objects refer to it in circles
        if self._owned is not None:
            self._owned.close()


class Layout(NamedTuple):
    """Where the samples of a page are. Segments are rows × columns × planes, in the order of the file's tables."""

    #: First row of each row of segments, and the height.
    edges: np.ndarray
    segment_width: int
    columns: int
    planes: int
    offsets: np.ndarray
    counts: np.ndarray
    #: Segments are slices of the file, not compressed in any way.
    plain: bool
    orientation: int
    #: From stored samples [h, w, s] to bands; None: they are bands.
    look: Callable[[np.ndarray], np.ndarray] | None
    bands: int
    dtype: np.dtype[Any]
    alpha: Alpha


def layout_of(page: tifffile.TiffPage, size_bytes: int) -> Layout | None:
    """How to read the page; None where it cannot be read by window.

    Raises ImageError `truncated` where samples lie beyond `size_bytes`, ValueError for a directory that makes no sense.
    """
    height, width, samples, stored = page.imagelength, page.imagewidth, page.samplesperpixel, page.dtype
    look = _look(page)
    if look is None or stored is None or page.imagedepth != 1:
        return None
    planes = samples if page.planarconfig == 2 and samples > 1 else 1
    rows_px, columns_px = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, width)
    if min(height, width, rows_px, columns_px, samples) < 1:
        raise ValueError(f"an image of {width}x{height} in segments of {columns_px}x{rows_px}")
    rows, columns = -(-height // rows_px), -(-width // columns_px)
    needed = rows * columns * planes
    listed = min(len(page.dataoffsets), len(page.databytecounts))
    if listed < needed:
        raise ValueError(f"{listed} segments are listed, {needed} are needed")
    offsets = np.asarray(page.dataoffsets[:needed], np.int64)
    counts = np.asarray(page.databytecounts[:needed], np.int64)
    edges = np.append(np.arange(0, height, rows_px), height)
    row_bytes = columns_px * (samples // planes) * stored.itemsize
    plain = page.compression == page.predictor == page.fillorder == 1 and page.bitspersample == stored.itemsize * 8
    if plain:
        stored_rows = np.full(needed, rows_px) if page.is_tiled else np.tile(np.diff(edges), planes)
        counts = np.where(counts > 0, row_bytes * stored_rows, 0)
    end = int((offsets + counts).max())
    if end > size_bytes:
        raise ImageError(f"the TIFF ends {end - size_bytes} bytes too early", kind="truncated")
    if plain and not page.is_tiled and offsets.all() and counts.all():
        edges, offsets, counts = _in_pieces(edges, offsets, row_bytes, planes)
    elif (rows_px if page.is_tiled else min(rows_px, height)) * row_bytes > _SEGMENT_BYTES:  # tiles are stored whole
        return None
    function, bands, dtype = look
    orientation = page.tags.valueof(274, 1)
    return Layout(
        edges=edges,
        segment_width=columns_px,
        columns=columns,
        planes=planes,
        offsets=offsets,
        counts=counts,
        plain=plain,
        orientation=orientation if orientation in range(1, 9) else 1,
        look=function,
        bands=bands,
        dtype=dtype,
        alpha=_alpha(page),
    )


def directory_fault(error: Exception) -> ImageError:
    """The ImageError for a directory that cannot be read."""
    if isinstance(error, MemoryError):
        return ImageError("no memory to read a TIFF's directory", kind="out_of_memory")
    return ImageError(f"the TIFF's directory cannot be read ({type(error).__name__}: {error})", kind="corrupt")


def check_directory_is_there(file: ByteSource) -> None:
    """Raises ImageError `truncated` where the file ends before its first directory or the fields that matter do:
    tifffile takes such fields for absent.
    """
    missing_bytes = _directory_end(file) - file.size_bytes
    if missing_bytes > 0:
        raise ImageError(f"the TIFF ends {missing_bytes} bytes before its directory does", kind="truncated")


def _in_pieces(
    edges: np.ndarray, offsets: np.ndarray, row_bytes: int, planes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Uncompressed strips cut into pieces of about `_PIECE_BYTES`: new edges, offsets and counts."""
    step = max(1, _PIECE_BYTES // row_bytes)
    starts = [np.arange(top, bottom, step) for top, bottom in itertools.pairwise(edges)]
    strip_of = np.repeat(np.arange(len(starts)), [len(part) for part in starts])
    tops = np.concatenate(starts)
    piece_edges = np.append(tops, edges[-1])
    first_of_plane = np.arange(planes)[:, None] * len(starts)
    piece_offsets = offsets[first_of_plane + strip_of] + (tops - edges[strip_of]) * row_bytes
    return piece_edges, piece_offsets.ravel(), np.tile(np.diff(piece_edges) * row_bytes, planes)


def _alpha(page: tifffile.TiffPage) -> Alpha:
    kinds: dict[int, Alpha] = {1: "premultiplied", 2: "straight"}
    extra = page.tags.valueof(338)
    if extra is None:  # four samples of RGB that say nothing of the fourth
        return "straight" if page.photometric == _RGB and page.samplesperpixel == 4 else None
    return kinds.get(int(np.atleast_1d(extra)[-1])) if page.photometric != _PALETTE else None


def _look(page: tifffile.TiffPage) -> tuple[Callable[[np.ndarray], np.ndarray] | None, int, np.dtype[Any]] | None:
    """(function, bands, dtype) that make bands of stored samples; None for a colour space that is not read here."""
    photometric, samples, dtype, bits = page.photometric, page.samplesperpixel, page.dtype, page.bitspersample
    if dtype is None or dtype.kind not in "buif" or not isinstance(bits, int):
        return None
    unsigned = dtype.kind in "bu"
    if photometric == _PALETTE:
        if samples != 1 or page.colormap is None or not unsigned or bits > 8:
            return None
        table = np.zeros((256, 3), np.uint8)
        colors = (page.colormap[:, :256] >> 8).T
        table[: len(colors)] = colors
        return (lambda window: table[window[:, :, 0].astype(np.uint8)]), 3, np.dtype(np.uint8)
    inverted = photometric == _MINISWHITE
    if photometric == _YCBCR and page.compression not in _JPEG_COMPRESSIONS:
        return None
    if photometric not in (_MINISWHITE, _MINISBLACK, _RGB, _YCBCR) or (inverted and not (unsigned and samples == 1)):
        return None
    if bits < 8:
        levels = (np.arange(256) * (255 // ((1 << bits) - 1))).clip(0, 255).astype(np.uint8)
        levels = 255 - levels if inverted else levels
        return (lambda window: levels[window.astype(np.uint8)]), samples, np.dtype(np.uint8)
    return (np.invert if inverted else None), samples, dtype


def _directory_end(file: ByteSource) -> int:
    """The last byte that the first directory and its `_FIELDS` need, of a classic TIFF or a BigTIFF."""
    start = file.start
    order: Literal["little", "big"] = "little" if start[:2] == b"II" else "big"
    big = start[2:4] in (b"+\x00", b"\x00+")
    word, count_bytes, entry_bytes = (8, 8, 20) if big else (4, 2, 12)
    at = int.from_bytes(start[word : 2 * word], order)
    if len(start) < 2 * word or at + count_bytes > file.size_bytes:
        return max(2 * word, at + count_bytes)
    entries = int.from_bytes(file.fetch(at, count_bytes), order)
    end = at + count_bytes + entry_bytes * entries
    if end > file.size_bytes:
        return end
    table = bytes(file.fetch(at + count_bytes, entry_bytes * entries))
    for entry in (table[i : i + entry_bytes] for i in range(0, len(table), entry_bytes)):
        size_bytes = _TYPE_BYTES.get(int.from_bytes(entry[2:4], order), 1) * int.from_bytes(entry[4 : 4 + word], order)
        if size_bytes > word and int.from_bytes(entry[:2], order) in _FIELDS:
            end = max(end, int.from_bytes(entry[4 + word :], order) + size_bytes)
    return end
