"""Object stores: S3, everything that speaks S3, and Google Cloud Storage. Owns: the obstore clients, their
retries, and the keys that obstore cannot name. Must not know: other stores, or what the objects hold.

obstore names keys as they are, except those with an empty, `.` or `..` segment or a control character,
which it refuses, and it fails a whole listing that contains one. Such keys, and such listings, go through
boto3 here (S3 only).

Longer than most modules: every call goes either way, and all of them share what is tried again."""

from __future__ import annotations

import json
import math
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import obstore
import pyarrow as pa
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    InvalidPathError,
    NotSupportedError,
    PreconditionError,
)
from obstore.store import GCSStore, S3Store

from pipeline.errors import StorageError, UsageError
from pipeline.storage.aws import AwsAccess
from pipeline.storage.blob import (
    Blob,
    DigestCheck,
    ObjectInfo,
    failed,
    failure_text,
    wait_before_retry,
)
from pipeline.storage.bucket_files import BucketFiles, Folder, Reads
from pipeline.storage.bucket_listing import NOT_FOR_OBSTORE, BucketListing, KeyRange
from pipeline.storage.failures import failure, is_cut_off, is_refusal, kind_of, may_be_expired
from pipeline.storage.parallel import Jobs, spread
from pipeline.storage.uris import clean_etag, join_uri, without_secrets

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

T = TypeVar("T")

_ATTEMPTS = 5
_RETRIES_PER_REQUEST = 8
_STREAM_CHUNK_BYTES = 16 << 20  # S3 takes 10,000 of them: 160 GB
_STREAM_AT_ONCE = 2
_UPLOAD_BYTES_PER_S = 500_000  # slower uploads than this count as stalled
_RENEW_EVERY_S = 10.0


class BucketStorage:
    """`Storage` for `s3://` and `gs://`.

    Retries: each request up to 8 times inside obstore (5xx, refused and reset connections, and stalls of
    `timeout_s` for reads), the rest of a body from where it broke off; above that up to 5 attempts for
    digests that do not match, for listings and error answers that break off, and for writes whose outcome is unknown.

    Keys that end in `/` are folder markers: they can be read by name, but are not listed. (One that is not
    empty is listed by obstore without its slash, and is then `missing`.)
    """

    def __init__(self, root: str, *, profile: str | None, timeout_s: float) -> None:
        self.root = root
        self.create_only_is_atomic = True
        self._profile = profile
        self._timeout_s = timeout_s
        self._scheme, _, _ = root.partition("://")
        self._prepare()

    def _prepare(self) -> None:
        self._access = AwsAccess(profile=self._profile, timeout_s=self._timeout_s) if self._scheme == "s3" else None
        self._stores: dict[tuple[str, int], Any] = {}
        self._digests = DigestCheck()
        self._lock = threading.Lock()
        self._renewals = 0
        self._renewed_s = -math.inf

    def __getstate__(self) -> dict[str, Any]:
        kept = ("root", "create_only_is_atomic", "_profile", "_timeout_s", "_scheme")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._prepare()

    # -- reading

    def get(self, uri: str) -> Blob:
        bucket, key = self._split(uri)
        attempts = self._digests.start()
        for attempt in range(_ATTEMPTS):
            try:
                blob = self._call(
                    "read", uri, key, lambda: self._get(bucket, key), lambda: self._aws(uri).get(bucket, key)
                )
            except StorageError as error:
                if error.kind != "fetch_failed" or attempt + 1 == _ATTEMPTS or not is_cut_off(error.__cause__):
                    raise
            else:
                if len(blob.data) == blob.size_bytes and attempts.accepts(blob.data, blob.etag):
                    return blob
            wait_before_retry(attempt)
        raise failed(
            "read",
            uri,
            f"{_ATTEMPTS} fetches gave bytes that do not match the store's length or ETag",
            kind="fetch_failed",
        )

    def _get(self, bucket: str, key: str) -> Blob:
        answer = obstore.get(self._store(bucket), key)
        meta = answer.meta
        return Blob(bytes(answer.bytes()), clean_etag(meta["e_tag"]), meta["size"], meta["last_modified"])

    def head(self, uri: str) -> ObjectInfo:
        bucket, key = self._split(uri)
        return self._reread(
            "look at", uri, key, lambda: self._head(bucket, key), lambda: self._aws(uri).head(bucket, key)
        )

    def _head(self, bucket: str, key: str) -> ObjectInfo:
        meta = obstore.head(self._store(bucket), key)
        return ObjectInfo(clean_etag(meta["e_tag"]), meta["size"], meta["last_modified"])

    def exists(self, uri: str) -> bool:
        try:
            self.head(uri)
        except StorageError as error:
            if error.kind == "missing":
                return False
            raise
        return True

    # -- writing

    def put_new(self, uri: str, data: bytes | memoryview) -> bool:
        """As `Storage.put_new`: one PUT with `If-None-Match: *`. "Already exists" is confirmed by a HEAD,
        because AWS answers 409 also to a write that collided with one that then fails.
        """
        bucket, key = self._split(uri)
        if not self.create_only_is_atomic:
            if self.exists(uri):
                return False
            self.put(uri, data)
            return True
        for attempt in range(_ATTEMPTS):
            renewals = self._renewals
            try:
                if NOT_FOR_OBSTORE.search(key):
                    self._aws(uri).put(bucket, key, data, new=True)
                else:
                    store = self._store(bucket, upload_bytes=len(data))
                    obstore.put(store, key, data, mode="create", use_multipart=False)
                return True
            except (BaseError, OSError, ValueError) as error:
                if attempt + 1 < _ATTEMPTS and self._renew(error, renewals):
                    continue
                kind = kind_of(error)
                if kind != "fetch_failed" or isinstance(error, NotSupportedError):
                    raise failure("write", uri, error) from error
                # Whatever went wrong (a reset after the work was done, Ceph's odd answers): an object there
                # settles it.
                if self.exists(uri):
                    return False
                collided = isinstance(error, AlreadyExistsError | PreconditionError)
                if attempt + 1 == _ATTEMPTS or (is_refusal(error) and not collided):
                    raise failure("write", uri, error) from error
                wait_before_retry(attempt)
        raise AssertionError("unreachable")

    def put(self, uri: str, data: bytes | memoryview) -> None:
        bucket, key = self._split(uri)

        def write() -> None:
            obstore.put(self._store(bucket, upload_bytes=len(data)), key, data, use_multipart=False)

        self._rewrite("write", uri, key, write, lambda: self._aws(uri).put(bucket, key, data, new=False))

    def put_stream(self, uri: str, chunks: Callable[[], Iterable[bytes]]) -> None:
        """As `Storage.put_stream`. A key that obstore cannot name has its bytes gathered first."""
        bucket, key = self._split(uri)

        def write() -> None:
            store = self._store(bucket, upload_bytes=_STREAM_CHUNK_BYTES * _STREAM_AT_ONCE)
            own: list[Exception] = []

            def watched() -> Iterator[bytes]:
                try:
                    yield from chunks()
                except Exception as error:
                    own.append(error)
                    raise

            try:
                obstore.put(
                    store, key, watched(), use_multipart=True,
                    chunk_size=_STREAM_CHUNK_BYTES, max_concurrency=_STREAM_AT_ONCE,
                )  # fmt: skip
            except Exception:
                if own:  # obstore hands on its text only
                    raise own[0] from None
                raise

        def odd() -> None:
            self._aws(uri).put(bucket, key, b"".join(chunks()), new=False)

        self._rewrite("write", uri, key, write, odd)

    def replace(self, uri: str, data: bytes, *, etag: str) -> bool:
        """As `Storage.replace`: one PUT with `If-Match`, on GCS with the generation that has this etag."""
        bucket, key = self._split(uri)
        for attempt in range(_ATTEMPTS):
            try:
                version = self._reread(
                    "look at", uri, key, lambda: self._version(bucket, key), lambda: self._odd_version(uri, bucket, key)
                )
                if clean_etag(version["e_tag"]) != etag:
                    # It may be our own, where the answer to it was lost.
                    return attempt > 0 and self.get(uri).data == data
            except StorageError as error:
                if error.kind == "missing":
                    return False
                raise
            if NOT_FOR_OBSTORE.search(key) or not self.create_only_is_atomic:
                self.put(uri, data)
                return True
            if self._scheme == "s3" and attempt % 2 == 0:
                version["e_tag"] = etag  # Ceph wants it bare, others take it both ways
            renewals = self._renewals
            try:
                obstore.put(self._store(bucket, upload_bytes=len(data)), key, data, mode=version, use_multipart=False)
                return True
            except (BaseError, OSError, ValueError) as error:
                if attempt + 1 < _ATTEMPTS and self._renew(error, renewals):
                    continue
                collided = isinstance(error, AlreadyExistsError | PreconditionError)
                if kind_of(error) == "denied" or (is_refusal(error) and not collided) or attempt + 1 == _ATTEMPTS:
                    raise failure("replace", uri, error) from error
            wait_before_retry(attempt)
        raise AssertionError("unreachable")

    def _version(self, bucket: str, key: str) -> Any:
        meta = obstore.head(self._store(bucket), key)
        return {name: meta[name] for name in ("e_tag", "version") if meta.get(name)}

    def _odd_version(self, uri: str, bucket: str, key: str) -> Any:
        return {"e_tag": self._aws(uri).head(bucket, key).etag}

    def delete(self, uri: str) -> None:
        bucket, key = self._split(uri)

        def remove() -> None:
            obstore.delete(self._store(bucket), key)

        try:
            self._rewrite("delete", uri, key, remove, lambda: self._aws(uri).delete(bucket, key))
        except StorageError as error:
            if error.kind != "missing":
                raise

    def check_create_only(self) -> bool:
        probe = join_uri(self.root, "_tmp", f"probe-{uuid.uuid4().hex}")
        self.create_only_is_atomic = True
        try:
            self.put_new(probe, b"1")
            self.create_only_is_atomic = not self.put_new(probe, b"2")
        except StorageError as error:
            if not isinstance(error.__cause__, NotSupportedError) and "NotImplemented" not in str(error):
                raise
            self.create_only_is_atomic = False
        finally:
            self.delete(probe)
        return self.create_only_is_atomic

    # -- listing

    def list(self, prefix_uri: str, *, parallel: int = 8) -> Iterator[pa.RecordBatch]:
        """As `Storage.list`: folders of more than a page are listed side by side, by up to `parallel` threads."""
        bucket, key = self._split(prefix_uri, folder=True)
        prefix = key.rstrip("/") + "/" if key else ""

        def odd(prefix: str, after: str) -> Iterator[pa.RecordBatch]:
            return self._aws(f"{self._scheme}://{bucket}/{prefix}").list(bucket, prefix, start_after=after)

        listing = BucketListing(
            f"{self._scheme}://{bucket}/", partial(self._store, bucket), odd, self.exists, self._renewing
        )
        return spread(Jobs([KeyRange(prefix)], readers=parallel), listing.read, parallel=parallel)

    # -- access for others

    def filesystem(self, sizes: Mapping[str, int] | None = None) -> AbstractFileSystem:
        """As `Storage.filesystem`: read-only, with the retries of this store, and the digest check for small files."""
        reads = Reads(self.head, lambda uri: self.get(uri).data, self._get_part, self._level)
        return BucketFiles(self._scheme, reads, sizes)

    def _get_part(self, uri: str, start: int, stop: int) -> bytes:
        bucket, key = self._split(uri)

        def read() -> bytes:
            return bytes(obstore.get_range(self._store(bucket), key, start=start, end=stop))

        return self._reread("read", uri, key, read, lambda: self._aws(uri).get(bucket, key).data[start:stop])

    def _level(self, prefix_uri: str) -> Folder:
        """Files with their sizes, and folders, right below `prefix_uri`."""
        bucket, prefix = self._split(prefix_uri, folder=True)
        folder = prefix.rstrip("/") or None

        def read() -> Any:
            return obstore.list_with_delimiter(self._store(bucket), folder)

        found = self._reread("list", prefix_uri, "", read, read)
        base = f"{self._scheme}://{bucket}/"
        files = [(base + one["path"], one["size"]) for one in found["objects"]]
        return Folder(files, [base + folder for folder in found["common_prefixes"]])

    # -- plumbing

    def _split(self, uri: str, *, folder: bool = False) -> tuple[str, str]:
        scheme, _, rest = uri.partition("://")
        bucket, _, key = rest.partition("/")
        if scheme != self._scheme or not bucket or not (key or folder):
            shown = without_secrets(uri)
            raise UsageError(f"{shown!r} is not an object of this store; expected {self._scheme}://bucket/key")
        return bucket, key

    def _aws(self, uri: str) -> AwsAccess:
        if self._access is None:
            raise failed(
                "name",
                uri,
                "keys with empty, '.' or '..' segments or control characters work on S3 only",
                kind="fetch_failed",
            )
        return self._access

    def _call(self, what: str, uri: str, key: str, first: Callable[[], T], odd: Callable[[], T]) -> T:
        """`first` through obstore, or `odd` through boto3 for a key that obstore cannot name; errors
        mapped. Once more where credentials had expired and were looked up anew.
        """
        while True:
            renewals = self._renewals
            try:
                if NOT_FOR_OBSTORE.search(key) is None:
                    try:
                        return first()
                    except (ValueError, InvalidPathError) as error:
                        if isinstance(error, UsageError):
                            raise
                return odd()
            except (BaseError, OSError) as error:
                if not self._renew(error, renewals):
                    raise failure(what, uri, error) from error

    def _reread(self, what: str, uri: str, key: str, first: Callable[[], T], odd: Callable[[], T]) -> T:
        """`_call`, again where obstore does not repeat a read that broke off."""
        return self._repeat(what, uri, key, first, odd, worthwhile=is_cut_off)

    def _rewrite(self, what: str, uri: str, key: str, first: Callable[[], None], odd: Callable[[], None]) -> None:
        """`_call`, again in any case: obstore does not repeat a PUT or DELETE whose outcome is unknown, since it cannot
        know that these are safe to repeat.
        """
        self._repeat(what, uri, key, first, odd, worthwhile=lambda error: not is_refusal(error))

    def _repeat(
        self,
        what: str,
        uri: str,
        key: str,
        first: Callable[[], T],
        odd: Callable[[], T],
        *,
        worthwhile: Callable[[BaseException | None], bool],
    ) -> T:
        for attempt in range(_ATTEMPTS):
            try:
                return self._call(what, uri, key, first, odd)
            except StorageError as error:
                last = attempt + 1 == _ATTEMPTS
                if error.kind != "fetch_failed" or last or not worthwhile(error.__cause__):
                    raise
            wait_before_retry(attempt)
        raise AssertionError("unreachable")

    def _renew(self, error: BaseException, renewals: int) -> bool:
        """Whether to ask again, with credentials that were looked up anew since the call began at `renewals`: where
        `error` says that those of then have expired. What a profile, its process or an attached role gives may be good
        again; so it is looked up at most every ten seconds, for all threads together.
        """
        if self._access is None or not may_be_expired(error):
            return False
        with self._lock:
            if renewals == self._renewals:
                if time.monotonic() - self._renewed_s < _RENEW_EVERY_S:
                    return False
                self._renewals, self._renewed_s = renewals + 1, time.monotonic()
                self._access = AwsAccess(profile=self._profile, timeout_s=self._timeout_s)
                self._stores = {}
            return True

    def _renewing(self, error: BaseException) -> bool:
        """`_renew`, for a listing, which goes on after its last key and has few pages to lose."""
        return self._renew(error, self._renewals)

    def _store(self, bucket: str, *, upload_bytes: int = 0) -> Any:
        """The client for a bucket. Uploads get clients of their own: the read timeout also runs while a
        body is being sent.
        """
        upload_s = 0
        if upload_bytes:
            upload_s = 1 << int(self._timeout_s + upload_bytes / _UPLOAD_BYTES_PER_S).bit_length()
        stores, access = self._stores, self._access  # both of them are replaced where credentials are renewed
        found = stores.get((bucket, upload_s))
        if found is not None:
            return found
        client: Any = {"connect_timeout": timedelta(seconds=5)}
        if upload_s:
            client["timeout"] = timedelta(seconds=upload_s)
        else:
            client |= {"timeout": timedelta(hours=1), "read_timeout": timedelta(seconds=self._timeout_s)}
        retry: Any = {
            "max_retries": _RETRIES_PER_REQUEST,
            "retry_timeout": timedelta(seconds=max(180, 3 * self._timeout_s)),
            "backoff": {
                "init_backoff": timedelta(milliseconds=50),
                "max_backoff": timedelta(seconds=5),
                "base": 2,
            },
        }
        started_s = time.monotonic()
        try:
            if access is None:
                emulator = _gcs_emulator()
                client["allow_http"] = bool(emulator)
                store: Any = GCSStore(bucket, client_options=client, retry_config=retry, **emulator)
            else:
                arguments = access.store_arguments(bucket)
                client["allow_http"] = arguments.pop("allow_http")
                # Bulk deletion needs another right and is not everywhere; what is deleted here is single.
                arguments["disable_bulk_delete"] = True
                store = S3Store(bucket, client_options=client, retry_config=retry, **arguments)
        except BaseError as error:
            why = f"{failure_text(error)} (after {time.monotonic() - started_s:.0f} s)"
            raise failed("open", f"{self._scheme}://{bucket}", why, kind=kind_of(error)) from error
        return stores.setdefault((bucket, upload_s), store)


def _gcs_emulator() -> dict[str, Any]:
    """Arguments for a GCSStore that talks, without credentials, to the server that `STORAGE_EMULATOR_HOST` names, as
    Google's own libraries do; none where it is not set."""
    host = os.environ.get("STORAGE_EMULATOR_HOST", "").rstrip("/")
    if not host:
        return {}
    account = dict.fromkeys(("client_email", "private_key", "private_key_id"), "")
    url = host if "://" in host else f"http://{host}"
    return {"service_account_key": json.dumps(account | {"gcs_base_url": url, "disable_oauth": True})}
