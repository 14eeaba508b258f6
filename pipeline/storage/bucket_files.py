"""A bucket as a file system of files to read: what DuckDB is given. Owns: which requests a read becomes.
Must not know: clients, retries, what the files hold.

DuckDB asks the same file for its size, time and bytes several times a query. Through s3fs each question is a
request of its own, and nothing is checked (docs/decisions/0007). Here a file
costs one HEAD and, up to `WHOLE_BYTES`, one GET whose digest is checked. A larger one is read in ranges, for which no
store gives a digest; whoever asks for all of it at once gets one GET and its check."""

from __future__ import annotations

import io
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

from fsspec import AbstractFileSystem

from pipeline.errors import StorageError
from pipeline.storage.blob import ObjectInfo

#: Files up to this size are read whole, once.
WHOLE_BYTES = 1 << 20
_KEPT_BYTES = 64 << 20
_CHUNK_BYTES = 256 << 10
#: A wild card as a character of a name.
_ESCAPED = re.compile(r"\[([*?\[])\]")


class Folder(NamedTuple):
    """What lies right below a URI: files with their sizes, and folders."""

    files: list[tuple[str, int]]
    folders: list[str]


class Reads(NamedTuple):
    """What a store can do, for absolute URIs. All of it raises StorageError and is thread safe."""

    head: Callable[[str], ObjectInfo]
    whole: Callable[[str], bytes]
    part: Callable[[str, int, int], bytes]
    level: Callable[[str], Folder]


class BucketFiles(AbstractFileSystem):  # type: ignore[misc]
    """Read-only and thread safe. Remembers what it has seen: make a new one where files may have changed.

    Failures other than a missing file are StorageErrors, never an answer such as "does not exist"."""

    cachable = False
    protocol: str | tuple[str, ...] = ("s3", "gs")

    def __init__(self, scheme: str, reads: Reads, sizes: Mapping[str, int] | None = None) -> None:
        super().__init__()
        self.protocol = scheme  # DuckDB hands on the paths of this one only
        self._prefix = f"{scheme}://"
        self._reads = reads
        self._lock = threading.Lock()
        self._infos = {uri: ObjectInfo("", size_bytes, None) for uri, size_bytes in (sizes or {}).items()}
        self._kept: OrderedDict[str, bytes] = OrderedDict()
        self._kept_bytes = 0

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Name, size and time of a file; FileNotFoundError for anything else."""
        found = self._info(path)
        return {"name": self._strip(path), "size": found.size_bytes, "type": "file", "mtime": found.modified}

    def exists(self, path: str, **_: Any) -> bool:
        """Whether `path` is a file."""
        try:
            self._info(path)
        except FileNotFoundError:
            return False
        return True

    def modified(self, path: str) -> datetime:
        """When `path` was written, as the store says."""
        return self._info(path).modified or datetime.fromtimestamp(0, UTC)

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        """Files and folders right below `path`."""
        files, folders = self._reads.level(self._uri(path).rstrip("/") + "/")
        entries: list[dict[str, Any]] = [{"name": self._strip(u), "size": n, "type": "file"} for u, n in files]
        entries += [{"name": self._strip(u).rstrip("/"), "size": 0, "type": "directory"} for u in folders]
        return entries if detail else [entry["name"] for entry in entries]

    def glob(self, path: str, maxdepth: int | None = None, **options: Any) -> Any:
        """Names that match `path`. One in which every wild card is escaped is asked for, and no bucket is listed."""
        if set("*?[") & set(_ESCAPED.sub("", path)):
            return super().glob(path, maxdepth=maxdepth, **options)
        name = _ESCAPED.sub(r"\1", path)
        return [self._strip(name)] if self.exists(name) else []

    def open(self, path: str, mode: str = "rb", **_: Any) -> ObjectFile:
        """A file to read."""
        if mode != "rb":
            raise PermissionError(f"{self._uri(path)!r} can only be read here, not opened as {mode!r}")
        size_bytes = self._info(path).size_bytes
        uri = self._uri(path)
        if size_bytes <= WHOLE_BYTES:
            data = self._whole(uri)
            return ObjectFile(len(data), lambda start, stop: data[start:stop])

        def part(start: int, stop: int) -> bytes:
            if (start, stop) == (0, size_bytes):
                return self._reads.whole(uri)
            return self._reads.part(uri, start, stop)

        return ObjectFile(size_bytes, part)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        """The bytes of a file, or some of them."""
        with self.open(path) as file:
            first, last = slice(start, end).indices(file.size_bytes)[:2]
            file.seek(first)
            return file.read(max(0, last - first))

    def _info(self, path: str) -> ObjectInfo:
        uri = self._uri(path)
        if "/" not in self._strip(uri).rstrip("/"):  # the bucket itself
            raise FileNotFoundError(uri)
        with self._lock:
            found = self._infos.get(uri)
        if found is None:
            try:
                found = self._reads.head(uri)
            except StorageError as error:
                if error.kind == "missing":
                    raise FileNotFoundError(uri) from error
                raise
            with self._lock:
                self._infos[uri] = found
        return found

    def _whole(self, uri: str) -> bytes:
        with self._lock:
            data = self._kept.get(uri)
            if data is not None:
                self._kept.move_to_end(uri)
                return data
        data = self._reads.whole(uri)
        with self._lock:
            if uri not in self._kept:
                self._kept[uri] = data
                self._kept_bytes += len(data)
            while self._kept_bytes > _KEPT_BYTES:
                self._kept_bytes -= len(self._kept.popitem(last=False)[1])
        return data

    def _uri(self, path: str) -> str:
        return path if path.startswith(self._prefix) else self._prefix + path

    def _strip(self, path: str) -> str:
        return path.removeprefix(self._prefix)


class ObjectFile(io.RawIOBase):
    """A file over a function that reads a range; keeps the chunk around the last read. For one thread at a time."""

    def __init__(self, size_bytes: int, part: Callable[[int, int], bytes]) -> None:
        super().__init__()
        self.size_bytes = size_bytes
        self._part = part
        self._at = 0
        self._chunk = b""
        self._chunk_at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size_bytes}[whence]
        self._at = max(0, base + offset)
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        """Exactly `size` bytes, fewer at the end of the file only."""
        start = self._at
        stop = self.size_bytes if size is None or size < 0 else min(start + size, self.size_bytes)
        if start >= stop:
            return b""
        if start < self._chunk_at or stop > self._chunk_at + len(self._chunk):
            # Near the end, as for a Parquet footer, the chunk reaches back instead of ahead.
            first = max(0, min(start, self.size_bytes - _CHUNK_BYTES))
            last = min(self.size_bytes, max(stop, first + _CHUNK_BYTES))
            self._chunk, self._chunk_at = self._part(first, last), first
        self._at = stop
        return self._chunk[start - self._chunk_at : stop - self._chunk_at]

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        return self.read()
