"""The image that a row is about, as its source holds it now. Owns: fetching it, and seeing that it is still the same.
Must not know: masks, what is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.corpus.decode import decode
from pipeline.storage import open_storage


class ReplacedError(Exception):
    """The image is not the one that the row is about."""


def original_pixels(
    row: Mapping[str, Any], *, max_pixels: int, profile: str | None = None, timeout_s: float | None = None
) -> NDArray[np.uint8]:
    """uint8 RGB [h, w, 3] of the image of `row` (its `image_uri`, `image_etag`, `height` and `width`).

    Raises ReplacedError where other bytes lie there now, StorageError where they cannot be had, ImageError where they
    cannot be decoded or have more than `max_pixels`.
    """
    uri = row["image_uri"]
    blob = open_storage(uri, profile=profile, timeout_s=timeout_s).get(uri)
    if blob.etag != row["image_etag"]:
        raise ReplacedError(uri)
    pixels = decode(blob.data, max_pixels=max_pixels).pixels
    if pixels.shape[:2] != (row["height"], row["width"]):
        raise ReplacedError(uri)
    return pixels
