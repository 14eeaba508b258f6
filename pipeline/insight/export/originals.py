"""The images of an export, as their sources hold them now. Owns: fetching them, and seeing that each is still the one
that its row is about. Must not know: masks, formats.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.corpus.decode import decode
from pipeline.errors import ImageError, StorageError
from pipeline.insight.export.shape import Unavailable
from pipeline.storage import Storage, open_storage, uri_scheme

_REASONS = {"missing": "gone", "denied": "denied"}


class Originals:
    """Images by their rows. Thread safe; one connection to each store."""

    def __init__(self, profile: str | None = None) -> None:
        self._profile = profile
        self._lock = threading.Lock()
        self._stores: dict[str, Storage] = {}

    def data(self, row: Mapping[str, Any]) -> bytes:
        """The bytes of the image of `row`. Raises Unavailable where it is `gone`, `denied` or `replaced` since, and
        StorageError where its store fails otherwise: then it may be there the next time."""
        uri = row["image_uri"]
        try:
            blob = self._store(uri).get(uri)
        except StorageError as error:
            if error.kind not in _REASONS:
                raise
            raise Unavailable(_REASONS[error.kind], str(error)) from error
        if blob.etag != (row["image_etag"] or ""):
            raise Unavailable("replaced", f"other bytes lie there now (etag {blob.etag}, then {row['image_etag']})")
        return blob.data

    def _store(self, uri: str) -> Storage:
        scheme = uri_scheme(uri)
        # A store that fsspec opens may be of one host.
        key = scheme if scheme in ("file", "s3", "gs") else "/".join(uri.split("/", 3)[:3])
        with self._lock:
            if key not in self._stores:
                self._stores[key] = open_storage(uri, profile=self._profile)
            return self._stores[key]


def upright_pixels(row: Mapping[str, Any], data: bytes, *, max_pixels: int) -> NDArray[np.uint8]:
    """uint8 RGB [h, w, 3] of `data`, the image of `row`, as a run decodes it. Raises Unavailable where it is
    `too_large`, `undecodable`, or of another size than its mask (`replaced`)."""
    try:
        pixels = decode(data, max_pixels=max_pixels).pixels
    except ImageError as error:
        raise Unavailable("too_large" if error.kind == "too_large" else "undecodable", str(error)) from error
    if pixels.shape[:2] != (row["height"], row["width"]):
        raise Unavailable("replaced", f"it has {pixels.shape[1]} x {pixels.shape[0]} pixels, its mask has "
                                      f"{row['width']} x {row['height']}")  # fmt: skip
    return pixels
