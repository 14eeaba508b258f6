"""Every other store, through fsspec: `memory://`, `https://`, `abfs://` and what else is installed. Owns:
that translation. Must not know: S3, local disks.
"""

from __future__ import annotations

import contextlib
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any

import fsspec
import pyarrow as pa
from fsspec import AbstractFileSystem

from pipeline.errors import StorageError, UsageError
from pipeline.storage.blob import (
    Blob,
    DigestCheck,
    ObjectInfo,
    failed,
    failure_text,
    listing_batch,
    wait_before_retry,
)
from pipeline.storage.parallel import Jobs, spread
from pipeline.storage.uris import (
    check_web_address,
    clean_etag,
    is_chain,
    join_uri,
    refuse_chain,
    uri_scheme,
    without_secrets,
)

_ATTEMPTS = 4
_ROWS_PER_BATCH = 5_000
_STALE_TEMPORARY = timedelta(days=1)
_READ_ONLY = ("http", "https")
# fsspec's client of FTP is one connection, on which threads would talk at once; what is generic calls itself for ever.
_FTP = "is not served, since threads cannot share its client; use sftp://, or copy the files to a disk or a bucket"
_UNSERVED = {"ftp": _FTP, "ftps": _FTP, "generic": "is no store; name the one that is meant"}
_ETAG_FIELDS = ("ETag", "etag", "e_tag", "md5Hash", "content_md5")
_MODIFIED_FIELDS = (
    "LastModified",
    "last_modified",
    "modified",
    "mtime",
    "updated",
    "created",
    "Last-Modified",
)
# The in-memory file system checks and writes in two steps, and is one per process: so is this lock.
_MEMORY_LOCK = threading.Lock()


class RemoteStorage:
    """`Storage` over an fsspec file system, configured by fsspec's own config files
    (`~/.config/fsspec/*.json`).

    The etag is the store's where it gives one, else `size-modified_us`. Only `memory://` is known to create
    atomically."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._scheme = uri_scheme(root)
        self.create_only_is_atomic = self._scheme == "memory"
        self._prepare()

    def _prepare(self) -> None:
        if is_chain(self.root):
            refuse_chain(self.root)
        if why := _UNSERVED.get(self._scheme):
            raise UsageError(f"{without_secrets(self.root)!r}: {self._scheme}:// {why}")
        try:
            kind = fsspec.get_filesystem_class(self._scheme)
            # The host of sftp://, the account of abfs://; nothing for most.
            self._files = kind(**kind._get_kwargs_from_urls(self.root))
        except ImportError as error:
            raise UsageError(f"{without_secrets(self.root)!r}: {error}") from error
        except ValueError as error:
            raise UsageError(
                f"{without_secrets(self.root)!r}: no store is known for the scheme {self._scheme!r}; install the "
                "fsspec package that brings it, or use file://, s3://, gs:// or https://"
            ) from error
        except TypeError as error:
            raise UsageError(
                f"{without_secrets(self.root)!r} does not say enough to reach its store, and neither do fsspec's "
                f"configuration files: {error}"
            ) from error
        except Exception as error:  # some connect at once
            raise self._failure("reach", self.root, error) from error
        self._digests = DigestCheck()
        self._moves = type(self._files).mv is not AbstractFileSystem.mv

    def __getstate__(self) -> dict[str, Any]:
        return {
            "root": self.root,
            "_scheme": self._scheme,
            "create_only_is_atomic": self.create_only_is_atomic,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._prepare()

    def get(self, uri: str) -> Blob:
        path = self._path(uri)
        attempts = self._digests.start()
        for attempt in range(_ATTEMPTS):
            last = attempt + 1 == _ATTEMPTS
            try:
                before = self._info(path)
                data = self._files.cat_file(path)
                after = self._info(path)
            except Exception as error:
                failure = self._failure("read", uri, error)
                if failure.kind != "fetch_failed" or last:
                    raise failure from error
                wait_before_retry(attempt)
                continue
            steady = before == after and before.size_bytes in (-1, len(data))
            if steady and attempts.accepts(data, before.etag):
                return Blob(data, before.etag, len(data), before.modified)
            wait_before_retry(attempt)
        raise failed(
            "read",
            uri,
            f"{_ATTEMPTS} fetches gave bytes that do not match the store's length or ETag",
            kind="fetch_failed",
        )

    def head(self, uri: str) -> ObjectInfo:
        path = self._path(uri)
        try:
            return self._info(path)
        except Exception as error:
            raise self._failure("look at", uri, error) from error

    def exists(self, uri: str) -> bool:
        try:
            self.head(uri)
        except StorageError as error:
            if error.kind == "missing":
                return False
            raise
        return True

    def list(self, prefix_uri: str, *, parallel: int = 8) -> Iterator[pa.RecordBatch]:
        """As `Storage.list`, by up to `parallel` threads. What fsspec says of one folder is held at a time, by each
        thread, and nothing of a folder before it."""
        root = self._path(prefix_uri).rstrip("/")
        try:
            if not self._files.isdir(root or "/"):
                if self._scheme == "memory":  # where a folder is there only while something is in it
                    return iter(())
                raise FileNotFoundError("no such folder")
        except Exception as error:
            raise self._failure("list", prefix_uri, error) from error
        read = partial(self._read_folders, prefix_uri.rstrip("/"), len(root))
        return spread(Jobs([root or "/"], readers=parallel), read, parallel=parallel)

    def _read_folders(self, base: str, root_length: int, jobs: Jobs[str]) -> Iterator[pa.RecordBatch]:
        uris: list[str] = []
        etags: list[str] = []
        sizes: list[int] = []
        modified_us: list[int | None] = []
        for folder in jobs:
            try:
                entries = self._files.ls(folder, detail=True)
                self._files.invalidate_cache(folder)  # it would keep the entries of every folder
            except Exception as error:
                raise self._failure("list", base + folder.rstrip("/")[root_length:], error) from error
            while entries:
                entry = entries.pop()
                name = entry["name"].rstrip("/")
                if name == folder.rstrip("/"):
                    continue
                if entry["type"] == "directory":
                    jobs.add(name)
                    continue
                info = _object_info(entry)
                uris.append(base + name[root_length:])
                etags.append(info.etag)
                sizes.append(info.size_bytes)
                modified_us.append(None if info.modified is None else round(info.modified.timestamp() * 1_000_000))
                if len(uris) >= _ROWS_PER_BATCH:
                    yield listing_batch(uris, etags, sizes, modified_us)
                    uris, etags, sizes, modified_us = [], [], [], []
        if uris:
            yield listing_batch(uris, etags, sizes, modified_us)

    def put_new(self, uri: str, data: bytes | memoryview) -> bool:
        """As `Storage.put_new`. What breaks off leaves nothing of that name: where files can be moved, as on SFTP,
        they are written in `<root>/_tmp/` first; elsewhere objects are whole or not there, which is checked."""
        path = self._writable_path(uri)
        content = bytes(data)
        try:
            if self._scheme == "memory":
                with _MEMORY_LOCK:
                    self._files.pipe_file(path, content, mode="create")
            elif not self._moves:
                self._files.pipe_file(path, content, mode="create")
            elif self.exists(uri):
                return False
            else:
                with self._written_aside(path, lambda aside: self._files.pipe_file(aside, content)) as aside:
                    if self.exists(uri):
                        return False
                    self._files.mv(aside, path)
                    if self._files.exists(aside):  # WebHDFS does not say that it did not move anything
                        return False
        except FileExistsError:
            return False
        except StorageError:
            raise
        except Exception as error:
            if self._scheme != "memory" and not self._moves and self._holds_another(uri, content):
                return False
            raise self._failure("write", uri, error) from error
        return True

    @contextlib.contextmanager
    def _written_aside(self, path: str, write: Callable[[str], object]) -> Iterator[str]:
        """The name of a temporary file beside what it is to become; it is removed at the end, if it was not moved."""
        root = self._path(self.root).rstrip("/")
        folder = root if path.startswith(root + "/") else self._files._parent(path)
        aside = f"{folder.rstrip('/')}/_tmp/{uuid.uuid4().hex}"
        for name in (aside, path):
            self._files.makedirs(self._files._parent(name), exist_ok=True)
        try:
            write(aside)
            yield aside
        finally:
            with contextlib.suppress(Exception):  # moved, or removed when it is a day old
                self._files.rm_file(aside)

    def _holds_another(self, uri: str, data: bytes) -> bool:
        """After a write that failed: whether there is an object, ours or somebody else's, that is whole. A piece of
        ours is removed."""
        try:
            there = self.get(uri).data
        except StorageError as error:
            if error.kind == "missing":
                return False
            raise
        if len(there) < len(data) and data.startswith(there):
            self.delete(uri)
            return False
        return True

    def put(self, uri: str, data: bytes | memoryview) -> None:
        content = bytes(data)
        self._put(uri, lambda name: self._files.pipe_file(name, content))

    def put_stream(self, uri: str, chunks: Callable[[], Iterable[bytes]]) -> None:
        """As `Storage.put_stream`: gathered in a temporary file, since many file systems keep what was begun."""
        self._writable_path(uri)
        with tempfile.NamedTemporaryFile() as file:
            file.writelines(chunks())
            file.flush()
            self._put(uri, lambda name: self._files.put_file(file.name, name))

    def _put(self, uri: str, write: Callable[[str], object]) -> None:
        """In one step where files can be moved over others, as on SFTP; elsewhere, as over SMB, what is there already
        is written in place."""
        path = self._writable_path(uri)
        try:
            if not self._moves:
                write(path)
                return
            with self._written_aside(path, write) as aside:
                refusal = None
                try:
                    self._files.mv(aside, path)
                except Exception as error:  # noqa: BLE001 - raised below, where nothing can be made of it
                    refusal = error
                if self._files.exists(aside) and self._files.exists(path):  # WebHDFS does not even say so
                    write(path)
                elif refusal is not None:
                    raise refusal
        except Exception as error:
            raise self._failure("write", uri, error) from error

    def replace(self, uri: str, data: bytes, *, etag: str) -> bool:
        """As `Storage.replace`. Checks first and writes after: no store here is known to do better."""
        try:
            if self.head(uri).etag != etag:
                return False
        except StorageError as error:
            if error.kind == "missing":
                return False
            raise
        self.put(uri, data)
        return True

    def delete(self, uri: str) -> None:
        path = self._path(uri)
        try:
            self._files.rm_file(path)
        except FileNotFoundError:
            return
        except Exception as error:  # not every file system says it in that way
            if not self.exists(uri):
                return
            raise self._failure("delete", uri, error) from error

    def check_create_only(self) -> bool:
        """As `Storage.check_create_only`. Two tries in a row cannot show a race: so False but for
        `memory://`. Also clears `<root>/_tmp/` of files that are more than a day old, which a killed process left.
        """
        self._sweep()
        probe = join_uri(self.root, "_tmp", f"probe-{uuid.uuid4().hex}")
        try:
            first, second = self.put_new(probe, b"1"), self.put_new(probe, b"2")
        finally:
            self.delete(probe)
        self.create_only_is_atomic = self._scheme == "memory" and first and not second
        return self.create_only_is_atomic

    def _sweep(self) -> None:
        if not self._moves:
            return
        oldest = datetime.now(UTC) - _STALE_TEMPORARY
        with contextlib.suppress(Exception):  # housekeeping only: what is wrong shows when something is written
            for entry in self._files.ls(self._path(join_uri(self.root, "_tmp")), detail=True):
                modified = _object_info(entry).modified
                if entry["type"] == "file" and modified is not None and modified < oldest:
                    self._files.rm_file(entry["name"])

    def filesystem(self, sizes: Mapping[str, int] | None = None) -> AbstractFileSystem:
        return self._files

    def _path(self, uri: str) -> str:
        """The file system's own name for `uri`."""
        if uri_scheme(uri) != self._scheme:
            raise UsageError(f"{without_secrets(uri)!r} is not of this store; expected {self._scheme}://...")
        if self._scheme in _READ_ONLY:
            check_web_address(uri)
        return str(self._files._strip_protocol(uri))

    def _writable_path(self, uri: str) -> str:
        path = self._path(uri)
        if self._scheme in _READ_ONLY:  # fsspec would try a POST
            raise failed("write", uri, f"{self._scheme}:// is read-only here", kind="denied")
        return path

    def _info(self, path: str) -> ObjectInfo:
        if self._scheme == "memory":  # its info() looks at every file there is
            found = self._files.store.get(path)
            if found is None:
                raise FileNotFoundError(path)
            return _object_info({"size": found.size, "created": found.created})
        entry = self._files.info(path)
        if entry.get("type") == "directory":
            raise IsADirectoryError(path)
        return _object_info(entry)

    def _failure(self, what: str, uri: str, error: Exception) -> StorageError:
        # Over HTTP, fsspec turns every refusal into FileNotFoundError; its cause tells what it was.
        cause = error if error.__cause__ is None else error.__cause__
        status = getattr(cause, "status", None)
        if isinstance(error, PermissionError) or status in (401, 403):
            return failed(what, uri, f"{failure_text(cause)}; check the credentials", kind="denied")
        absent = isinstance(cause, FileNotFoundError | IsADirectoryError | NotADirectoryError)
        if absent or status in (404, 410):
            return failed(what, uri, "no such object", kind="missing")
        return failed(what, uri, failure_text(cause), kind="fetch_failed")


def _object_info(entry: dict[str, Any]) -> ObjectInfo:
    """fsspec's info, whose fields differ from one file system to the next."""
    size_bytes = entry.get("size")
    modified = next((found for name in _MODIFIED_FIELDS if (found := _moment(entry.get(name))) is not None), None)
    etag = next((clean_etag(str(entry[name])) for name in _ETAG_FIELDS if entry.get(name)), "")
    if not etag and size_bytes is not None:
        etag = f"{size_bytes}-{round(modified.timestamp() * 1_000_000)}" if modified else str(size_bytes)
    return ObjectInfo(etag, -1 if size_bytes is None else int(size_bytes), modified)


def _moment(value: object) -> datetime | None:
    if isinstance(value, datetime):
        return value if value.tzinfo else value.replace(tzinfo=UTC)
    if isinstance(value, int | float):
        return datetime.fromtimestamp(value, UTC)
    if isinstance(value, str):
        try:
            return datetime.fromisoformat(value)
        except ValueError:
            try:
                return parsedate_to_datetime(value)
            except ValueError:
                return None
    return None
