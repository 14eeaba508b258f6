"""What a store answers. Owns: the values that storage calls return, the protocol of a Storage, the digest
check and the backoff. Must not know: which stores exist.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import pyarrow as pa

from pipeline.errors import StorageError, UsageError
from pipeline.storage.uris import hide_secrets, without_secrets

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

#: Columns of every batch that `Storage.list` yields.
LISTING_SCHEMA = pa.schema(
    [
        ("uri", pa.string()),
        ("etag", pa.string()),
        ("size_bytes", pa.int64()),
        ("modified", pa.timestamp("us", "UTC")),
    ]
)

DEFAULT_TIMEOUT_S = 60.0
_ACCEPTED_BEFORE_OFF = 3
_MD5_HEX = re.compile(r"[0-9a-f]{32}\Z")


class Blob(NamedTuple):
    """The bytes of one object, with what the store said of those very bytes."""

    data: bytes
    etag: str
    size_bytes: int
    modified: datetime | None


class ObjectInfo(NamedTuple):
    """One object without its bytes."""

    etag: str
    size_bytes: int
    modified: datetime | None


class Storage(Protocol):
    """One store, opened for one root. All methods are thread safe and take absolute URIs. A memoryview is one of bytes.

    Every failure is a StorageError whose `kind` is `missing`, `denied` or `fetch_failed`, raised after the
    store's own retries. Pickles without credentials: the copy finds its own in its own environment."""

    root: str
    #: False once known that `put_new` cannot rely on the store: then it checks first and writes after,
    #: which can race.
    create_only_is_atomic: bool

    def get(self, uri: str) -> Blob:
        """The whole object. Its length is checked always, its MD5 where the ETag is one; on a mismatch it
        is fetched again.
        """
        ...

    def head(self, uri: str) -> ObjectInfo:
        """What `get` would say, without the bytes."""
        ...

    def exists(self, uri: str) -> bool:
        """Whether `uri` is an object (a folder is not)."""
        ...

    def list(self, prefix_uri: str, *, parallel: int = 8) -> Iterator[pa.RecordBatch]:
        """Every object under the folder `prefix_uri`, recursively, in no order, as batches of LISTING_SCHEMA.

        `s3://b/photos` lists `photos/...`, never `photos2/...`. Memory stays flat. An etag that the listing
        does not give is `""`. An empty folder gives no batches; a missing bucket or local folder raises
        StorageError(kind="missing"). Errors come while iterating."""
        ...

    def put_new(self, uri: str, data: bytes | memoryview) -> bool:
        """Create `uri` in one atomic step. True: created. False: it was there already, whoever wrote it;
        nothing was changed.

        Never multipart. Safe to retry: after a failure whose outcome is unknown the object may be there,
        and then a retry says False."""
        ...

    def put(self, uri: str, data: bytes | memoryview) -> None:
        """Write or replace `uri` in one atomic step. Safe to retry."""
        ...

    def put_stream(self, uri: str, chunks: Callable[[], Iterable[bytes]]) -> None:
        """`put` of bytes that come in chunks, of which a few megabytes are held at a time. Where `chunks` raises,
        nothing is written. It is called anew for every attempt. Multipart where there is such a thing, so not for what
        must be created once.
        """
        ...

    def replace(self, uri: str, data: bytes, *, etag: str) -> bool:
        """Replace `uri` in one atomic step if its etag is still `etag`, as `get` said. True: it holds `data`.
        False: it was changed or removed meanwhile; nothing was changed.

        Never multipart. Safe to retry. Where `create_only_is_atomic` is False it checks first and writes after, which
        can race."""
        ...

    def delete(self, uri: str) -> None:
        """Remove `uri`; a missing one is fine. Safe to retry."""
        ...

    def check_create_only(self) -> bool:
        """Find out by trying, under `<root>/_tmp/`, whether this store has an atomic create; sets
        `create_only_is_atomic`.
        """
        ...

    def filesystem(self, sizes: Mapping[str, int] | None = None) -> AbstractFileSystem | None:
        """An fsspec filesystem to register with DuckDB, or None where DuckDB needs none (local disk). `sizes`: bytes by
        URI of files that are known to be there.
        """
        ...


class DigestCheck:
    """Compares bytes with an ETag that looks like their MD5. One per store object; thread safe.

    The ETag of an object written in one part is its MD5, unless it is encrypted with a KMS or customer key.
    So a mismatch is either damage on the way or such a key: a second fetch with the same bytes tells them
    apart. After several such accepted objects in a row the check is switched off for this store object.
    (AWS S3 User Guide, "Checking object integrity"; x-amz-checksum-* headers are not exposed by obstore
    0.12.)"""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._accepted_in_a_row = 0
        self.enabled = True

    def start(self) -> DigestAttempts:
        """Begin with one object."""
        return DigestAttempts(self)

    def _settle(self, *, matched: bool) -> None:
        with self._lock:
            self._accepted_in_a_row = 0 if matched else self._accepted_in_a_row + 1
            if self._accepted_in_a_row >= _ACCEPTED_BEFORE_OFF:
                self.enabled = False


class DigestAttempts:
    """The fetches of one object. Not shared between threads."""

    def __init__(self, check: DigestCheck) -> None:
        self._check = check
        self._seen: set[tuple[str, str]] = set()

    def accepts(self, data: bytes, etag: str) -> bool:
        """Whether `data` can be trusted; on False, fetch again and ask again."""
        check = self._check
        if not check.enabled or not _MD5_HEX.match(etag):
            return True
        digest = hashlib.md5(data, usedforsecurity=False).hexdigest()
        if digest == etag:
            if check._accepted_in_a_row:
                check._settle(matched=True)
            return True
        if (digest, etag) in self._seen:
            check._settle(matched=False)
            return True
        self._seen.add((digest, etag))
        return False


def backoff_s(attempt: int, *, first_s: float = 0.05, limit_s: float = 5.0) -> float:
    """Exponential backoff with full jitter (AWS Architecture Blog, "Exponential Backoff And Jitter").
    `attempt` from 0.
    """
    return random.uniform(0.3, 1.0) * min(limit_s, first_s * 2**attempt)


def wait_before_retry(attempt: int) -> None:
    """Sleep for `backoff_s(attempt)` seconds."""
    time.sleep(backoff_s(attempt))


def default_timeout_s() -> float:
    """Seconds without a byte after which a request counts as stalled: `MASKMILL_STORAGE_TIMEOUT_S`, or 60.

    Raises UsageError where that is no positive number."""
    text = os.environ.get("MASKMILL_STORAGE_TIMEOUT_S") or str(DEFAULT_TIMEOUT_S)
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise UsageError(f"MASKMILL_STORAGE_TIMEOUT_S is {text!r}: give a number of seconds above 0")
    return seconds


def failure_text(error: BaseException) -> str:
    """The gist of a client's error in one short line, without query strings, user info or debug dumps."""
    text = str(error) or type(error).__name__
    answer = re.search(r"<Code>([^<]*)</Code>(?:\s*<Message>([^<]*)</Message>)?", text)
    if answer:
        return f"{answer[1]}: {answer[2] or ''}".rstrip(": ")[:300]
    return hide_secrets(text.partition("\n")[0].partition("<?xml")[0]).strip()[:300]


def listing_batch(uris: list[str], etags: list[str], sizes: list[int], modified_us: list[int | None]) -> pa.RecordBatch:
    """One batch of LISTING_SCHEMA from columns; `modified_us` are microseconds since 1970 UTC."""
    columns: list[Any] = [
        pa.array(uris, pa.string()),
        pa.array(etags, pa.string()),
        pa.array(sizes, pa.int64()),
        pa.array(modified_us, pa.int64()).cast(pa.timestamp("us", "UTC")),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=LISTING_SCHEMA)


def failed(what: str, uri: str, why: str, *, kind: str) -> StorageError:
    """A StorageError in the house's wording."""
    return StorageError(f"could not {what} {without_secrets(uri)!r}: {why}", kind=kind)
