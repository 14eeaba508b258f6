"""A folder of a data set, on disk or in any store. Owns: reading its files by their names, and reading ahead.
Must not know: layouts, labels.
"""

from __future__ import annotations

import io
import re
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.errors import StorageError, UsageError
from pipeline.json_text import read_json
from pipeline.learning.labels.truth import LabelError
from pipeline.storage import duckdb_path, join_uri, normalize_uri, open_storage

T = TypeVar("T")
R = TypeVar("R")

#: What systems leave in folders: hidden files, and two of Windows'.
_FOREIGN = re.compile(r"(^|/)(\.[^/]*|Thumbs\.db|desktop\.ini)(/|$)")
#: What Pillow says of files that are no pictures, damaged ones, and those that would unfold beyond all measure.
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
#: Without a list Pillow would try them all, PostScript among them, which another program then runs.
_FORMATS = ("PNG", "TIFF", "BMP", "GIF")
_HIGHEST_ID = 65535
#: Files that are read at once.
READERS = 16


class Place:
    """A folder. Names are relative to it, with `/` between folders. Thread safe; pickles."""

    def __init__(self, folder: str | Path, *, profile: str | None = None) -> None:
        self.uri = normalize_uri(str(folder)).rstrip("/")
        self.profile = profile
        self._storage = open_storage(self.uri, profile=profile)

    def __str__(self) -> str:
        return duckdb_path(self.uri) if self.uri.startswith("file://") else self.uri

    def read(self, name: str) -> bytes:
        """The bytes of one file. Raises StorageError."""
        return self._storage.get(join_uri(self.uri, name)).data

    def read_text(self, name: str) -> str:
        """Raises UsageError where it is no UTF-8, StorageError."""
        try:
            return self.read(name).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UsageError(f"{self}/{name} is not a text in UTF-8: {error}") from error

    def uri_of(self, name: str) -> str:
        """The URI of one file."""
        return join_uri(self.uri, name)

    def read_json(self, name: str) -> Any:
        """Raises UsageError where the file is not there or is not JSON, or has text that is no Unicode."""
        try:
            return read_json(self.read(name))
        except StorageError as error:
            if error.kind != "missing":
                raise
            raise UsageError(f"{self} is not a data set: it has no {name}") from error
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{self}/{name} is not valid JSON: {error}") from error

    def has(self, name: str) -> bool:
        """Whether `name` is a file."""
        return self._storage.exists(join_uri(self.uri, name))

    def has_folder(self, name: str) -> bool:
        """Whether there is a file below `name`."""
        return next(self._listed(name), None) is not None

    def files(self, folder: str) -> list[str]:
        """Names below `folder`, relative to it, sorted, hidden files left out; none where it is not there."""
        return sorted(self._listed(folder))

    def _listed(self, folder: str) -> Iterator[str]:
        prefix = join_uri(self.uri, folder) + "/"
        try:
            for batch in self._storage.list(prefix.rstrip("/")):
                names = (uri.removeprefix(prefix) for uri in batch["uri"].to_pylist())
                yield from (name for name in names if not _FOREIGN.search(name))
        except StorageError as error:
            if error.kind != "missing":
                raise


def in_order(function: Callable[[T], R], items: Iterable[T], *, threads: int = READERS) -> Iterator[R]:
    """`function` of each item, in the items' order, computed by threads at most `2 * threads` items ahead."""
    with ThreadPoolExecutor(threads) as pool:
        ahead: deque[Future[R]] = deque()
        try:
            for item in items:
                ahead.append(pool.submit(function, item))
                if len(ahead) >= 2 * threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def decode_ids(data: bytes, name: str) -> NDArray[np.int32]:
    """int32 [h, w] of a label image: palette or gray, 1 to 16 bits. Raises LabelError for anything else."""
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if image.mode not in ("1", "P", "L", "I", "I;16", "I;16B"):
                raise LabelError(
                    f"label {name} has mode {image.mode}: it must be gray or palette, with an id in each pixel",
                    kind="unreadable",
                )
            ids = np.array(image).astype(np.int32)
    except _UNREADABLE as error:
        raise LabelError(f"label {name} cannot be read: {error}", kind="unreadable") from error
    if ids.size and (ids.min() < 0 or ids.max() > _HIGHEST_ID):
        raise LabelError(
            f"label {name} has ids from {ids.min()} to {ids.max()}: they must be 0 to {_HIGHEST_ID}", kind="unreadable"
        )
    return ids


def id_size(data: bytes, name: str) -> tuple[int, int]:
    """(height, width) of a label image, from its header. Raises LabelError."""
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            return image.height, image.width
    except _UNREADABLE as error:
        raise LabelError(f"label {name} cannot be read: {error}", kind="unreadable") from error
