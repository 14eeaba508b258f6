"""All bands of an image as they are stored, for networks that take other pixels than 8-bit RGB. Owns: which decoder
keeps them. Must not know: models, batches.
"""

from __future__ import annotations

import cv2
import numpy as np

from pipeline.corpus import header
from pipeline.corpus.decode import Decoded, decode, peek, upright
from pipeline.corpus.windows import open_windows
from pipeline.errors import ImageError


def peek_bands(data: bytes) -> tuple[int, int]:
    """(height, width) as displayed, of whatever `read_bands` reads. Raises ImageError as `peek` does."""
    if header.image_format(data) == "TIFF" and (reader := open_windows(data)) is not None:
        try:
            return reader.height, reader.width
        finally:
            reader.close()
    return peek(data)


def read_bands(data: bytes, *, max_pixels: int) -> Decoded:
    """Pixels [h, w, bands] of the stored type, upright; colours in the order R, G, B, transparency last and as it is.

    TIFFs of any type and number of bands; PNGs of 8 and 16 bits (palettes as RGB); every other format as `decode`
    gives it, uint8 RGB. Raises ImageError as `decode` does.
    """
    name = header.image_format(data)
    if name == "TIFF" and (reader := open_windows(data)) is not None:
        try:
            if reader.height * reader.width > max_pixels:
                raise ImageError(
                    f"{reader.width}×{reader.height} is more than max_pixels={max_pixels}", kind="too_large"
                )
            return Decoded(reader.read(0, 0, reader.height, reader.width), name)
        finally:
            reader.close()
    shown = decode(data, max_pixels=max_pixels)
    if name != "PNG":
        return shown
    # What `decode` has seen whole, OpenCV does not choke on.
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None:
        return shown
    pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
    if pixels.shape[2] >= 3:
        pixels = pixels[:, :, [2, 1, 0, *range(3, pixels.shape[2])]]
    return Decoded(upright(pixels, header.png_orientation(data, check=False)), name)
