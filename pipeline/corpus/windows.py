"""Windows of an image that is larger than memory, read from its file without the rest of it.
Owns: which files can be read by window, the cache of segments (tiles and strips), orientation. Must not know: grids of
tiles, models, batches.

Only TIFF can be read by window: tiled or striped, classic or BigTIFF (so COG too), 1 to 64 bits a sample, interleaved
or planar, with every compression that `imagecodecs` has. In a JPEG or a PNG each row depends on the rows before it;
`decoded_windows` reads those whole, bounded by `max_pixels`.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from typing import Any, BinaryIO, Protocol

import numpy as np
import tifffile

from pipeline.corpus import header
from pipeline.corpus.bands import Alpha
from pipeline.corpus.decode import Decoded, decode
from pipeline.corpus.tiff_layout import ByteSource, Layout, check_directory_is_there, directory_fault, layout_of
from pipeline.errors import ImageError

_CACHE_BYTES = 128 << 20


class WindowReader(Protocol):
    """An image of which windows can be read. Sizes and windows are of the image as displayed (orientation applied)."""

    @property
    def height(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def bands(self) -> int: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    @property
    def alpha(self) -> Alpha:
        """What the last band is, if it is transparency."""
        ...

    @property
    def format(self) -> str:
        """As `decode` calls it: "TIFF"."""
        ...

    def read(self, y: int, x: int, height: int, width: int) -> np.ndarray:
        """The window [height, width, bands] whose top left pixel is (y, x), of `dtype`. It must lie inside the image
        (else ValueError). Raises ImageError `truncated` or `corrupt`. Safe from several threads.
        """
        ...

    def close(self) -> None: ...


def open_windows(source: bytes | str | os.PathLike[str] | BinaryIO) -> WindowReader | None:
    """A reader of the first page of a TIFF; None where the image cannot be read by window.

    `source`: the file's bytes (not copied), its path, or a file that can seek (its `seek` and `read` are called under a
    lock; it stays the caller's to close). Not read by window: other formats; TIFFs of other colour spaces than gray,
    palette, RGB and YCbCr as JPEG; and compressed segments of more than 256 MiB.

    Guarantees: bands are as stored, except that a palette is looked up (3 bands, uint8), gray where 0 is white is
    inverted, and samples of less than 8 bits are spread over 0..255. With the default `select_bands`, windows are what
    `decode` gives of the whole file, up to the rounding of the JPEG decoders.
    Raises ImageError `truncated` or `corrupt` for damage that the directory shows, `empty` or `not_an_image`.
    """
    file = ByteSource(source)
    try:
        if header.image_format(file.start) != "TIFF":
            file.close()
            return None
        check_directory_is_there(file)
        page = tifffile.TiffFile(file.handle()).pages.first
        layout = layout_of(page, file.size_bytes)
    except ImageError:
        file.close()
        raise
    except Exception as error:
        file.close()
        raise directory_fault(error) from error
    if layout is None:
        file.close()
        return None
    return _TiffWindows(file, page, layout)


def decoded_windows(data: bytes, *, max_pixels: int) -> WindowReader:
    """A reader over the whole decoded image: for formats that `open_windows` refuses.

    Bands are uint8 RGB as `decode` gives them; the image is held in memory, 3 bytes a pixel. Raises ImageError as
    `decode` does: `too_large` above `max_pixels`.
    """
    return _DecodedWindows(decode(data, max_pixels=max_pixels))


class _DecodedWindows:
    def __init__(self, decoded: Decoded) -> None:
        self._pixels = decoded.pixels
        self.height, self.width, self.bands = decoded.pixels.shape
        self.dtype: np.dtype[Any] = decoded.pixels.dtype
        self.alpha: Alpha = None
        self.format = decoded.format

    def read(self, y: int, x: int, height: int, width: int) -> np.ndarray:
        _check_window(self, y, x, height, width)
        return self._pixels[y : y + height, x : x + width].copy()

    def close(self) -> None:
        self._pixels = self._pixels[:0]


class _TiffWindows:
    """Decoded segments are kept, least recently used first out, up to `_CACHE_BYTES`: windows of one row of tiles share
    strips, and neighbours overlap. Windows are best read row by row.
    """

    format = "TIFF"

    def __init__(self, file: ByteSource, page: tifffile.TiffPage, layout: Layout) -> None:
        self._file = file
        self._page = page
        self._layout = layout
        turned = layout.orientation >= 5
        stored = (page.imagelength, page.imagewidth)
        self.height, self.width = stored[::-1] if turned else stored
        self.bands, self.dtype, self.alpha = layout.bands, layout.dtype, layout.alpha
        self._cache: OrderedDict[int, np.ndarray] = OrderedDict()
        self._cache_bytes = 0
        self._lock = threading.Lock()

    def read(self, y: int, x: int, height: int, width: int) -> np.ndarray:
        _check_window(self, y, x, height, width)
        orientation = self._layout.orientation
        # As in `decode`: transposed from orientation 5 on, then mirrored.
        mirror_x, mirror_y = orientation in (2, 3, 6, 7), orientation in (3, 4, 7, 8)
        y = self.height - y - height if mirror_y else y
        x = self.width - x - width if mirror_x else x
        if orientation >= 5:
            window = self._read_stored(x, y, width, height).transpose(1, 0, 2)
        else:
            window = self._read_stored(y, x, height, width)
        if self._layout.look is not None:
            window = self._layout.look(window)
        return np.ascontiguousarray(window[:: -1 if mirror_y else 1, :: -1 if mirror_x else 1])

    def close(self) -> None:
        with self._lock:
            self._cache.clear()
            self._cache_bytes = 0
        self._file.close()

    def _read_stored(self, y: int, x: int, height: int, width: int) -> np.ndarray:
        layout, page = self._layout, self._page
        window = np.empty((height, width, page.samplesperpixel), page.dtype)
        rows = len(layout.edges) - 1
        first = int(np.searchsorted(layout.edges, y, side="right")) - 1
        for row in range(first, rows):
            top = int(layout.edges[row])
            if top >= y + height:
                break
            bottom = int(layout.edges[row + 1])
            for column in range(x // layout.segment_width, -(-(x + width) // layout.segment_width)):
                left = column * layout.segment_width
                y0, y1 = max(top, y), min(bottom, y + height)
                x0, x1 = max(left, x), min(left + layout.segment_width, x + width)
                for plane in range(layout.planes):
                    index = (plane * rows + row) * layout.columns + column
                    segment = self._segment(index, bottom - top)
                    part = segment[y0 - top : y1 - top, x0 - left : x1 - left]
                    into = window[y0 - y : y1 - y, x0 - x : x1 - x]
                    if layout.planes > 1:
                        into = into[:, :, plane : plane + 1]
                    if part.shape != into.shape:
                        raise ImageError(f"segment {index} of the TIFF is too small", kind="corrupt")
                    into[...] = part
        return window

    def _segment(self, index: int, height: int) -> np.ndarray:
        """The samples [height or more, segment width, samples of a plane] of a segment."""
        with self._lock:
            segment = self._cache.get(index)
            if segment is not None:
                self._cache.move_to_end(index)
                return segment
        segment = self._decoded(index, height)
        if self._layout.plain and self._file.in_memory:
            return segment
        with self._lock:
            if index not in self._cache:
                self._cache[index] = segment
                self._cache_bytes += segment.nbytes
            while self._cache_bytes > _CACHE_BYTES and len(self._cache) > 1:
                self._cache_bytes -= self._cache.popitem(last=False)[1].nbytes
        return segment

    def _decoded(self, index: int, height: int) -> np.ndarray:
        layout, page = self._layout, self._page
        offset, count = int(layout.offsets[index]), int(layout.counts[index])
        samples = 1 if layout.planes > 1 else page.samplesperpixel
        if not offset or not count:  # sparse: never written
            return np.full((height, layout.segment_width, samples), page.nodata, page.dtype)
        data = self._file.fetch(offset, count)
        try:
            if layout.plain:
                plain = np.frombuffer(data, np.dtype(page.dtype).newbyteorder(page.parent.byteorder))
                return plain.reshape(-1, layout.segment_width, samples).astype(page.dtype, copy=False)
            decoded, _, _ = page.decode(data, index, jpegtables=page.jpegtables, jpegheader=page.jpegheader)
            if decoded is None or decoded.ndim != 4 or decoded.shape[0] != 1:
                raise ValueError("it holds no plane of pixels")
            return decoded[0]
        except MemoryError as error:
            raise ImageError(f"no memory to decode segment {index} of a TIFF", kind="out_of_memory") from error
        except Exception as error:
            raise ImageError(
                f"segment {index} of the TIFF cannot be decoded ({type(error).__name__}: {error})", kind="corrupt"
            ) from error


def _check_window(reader: WindowReader, y: int, x: int, height: int, width: int) -> None:
    if min(y, x) < 0 or min(height, width) < 1 or y + height > reader.height or x + width > reader.width:
        raise ValueError(
            f"window {width}x{height} at x={x}, y={y} is not inside the image of {reader.width}x{reader.height}"
        )
