"""One recursive listing of a bucket. Owns: how a key space is cut up so that several requests list it side by side, and
what happens where a listing breaks off. Must not know: clients, credentials, what the objects are.

A page of keys comes sorted. Where a whole page lies in one folder and a reader has nothing to do, the listing is cut:
the rest of that folder, and of each folder around it, become listings of their own, each from a key onwards
(`start-after`, which S3 and the XML API of Google Cloud Storage both have). Of a folder around it the names of the
folders are asked for, and cut it into pieces of about as many folders each. That is given up after some seconds, since
nothing bounds how much lies there: what is held is at most what a store says in that time. So memory stays flat, small
folders share their requests, and all of it is listed side by side but for the files of one folder: a page has no other
address than the key before it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator
from itertools import takewhile
from typing import Any, Literal, NamedTuple

import obstore
import pyarrow as pa
import pyarrow.compute as pc
from obstore.exceptions import BaseError, InvalidPathError

from pipeline.storage.blob import LISTING_SCHEMA, wait_before_retry
from pipeline.storage.failures import failure, is_cut_off, kind_of
from pipeline.storage.parallel import Jobs

#: Keys that obstore refuses, and with them the whole listing that they are in.
NOT_FOR_OBSTORE = re.compile(r"(?:^|/)\.{0,2}(?:/|$)|[\x00-\x1f\x7f]")
_ATTEMPTS = 5
_PAGE_ROWS = 1000  # what the stores answer to one request
_LAST_NAME = "\U0010ffff"  # sorts behind nearly all names
_LEVEL_TIMEOUT_S = 5.0
_PIECES = 32


class KeyRange(NamedTuple):
    """The keys that begin with `prefix` (empty, or ending in `/`), from `start` up to and without `stop` (empty: all).

    `level`: whether the folders right below `prefix` are likely to be large, so that it is worth asking for their
    names, or were asked for already, or are known to be one."""

    prefix: str
    start: str = ""
    stop: str = ""
    level: Literal["unknown", "wanted", "known", "one"] = "unknown"


class BucketListing(NamedTuple):
    """How to list a bucket. `base`: `scheme://bucket/`. `store`: gives the obstore client, or raises StorageError.
    `odd`: lists (prefix, from behind a key) where obstore cannot. `is_object`: whether a URI is an object. `renewed`:
    whether an error was about credentials that are renewed now."""

    base: str
    store: Callable[[], Any]
    odd: Callable[[str, str], Iterator[pa.RecordBatch]]
    is_object: Callable[[str], bool]
    renewed: Callable[[BaseException], bool] = lambda error: False

    def read(self, jobs: Jobs[KeyRange]) -> Iterator[pa.RecordBatch]:
        """Batches of LISTING_SCHEMA with the objects of `jobs`, to which it adds. Folder markers are left out. Raises
        StorageError."""
        for keys in jobs:
            if keys.level == "wanted" and len(pieces := self._pieces(keys)) > 1:
                jobs.add(*pieces)
            else:
                yield from self._read_range(keys, jobs)

    def _read_range(self, keys: KeyRange, jobs: Jobs[KeyRange]) -> Iterator[pa.RecordBatch]:
        """obstore repeats requests, but not one whose body breaks off: then the listing goes on after its last key."""
        prefix, after = keys.prefix, _before(keys.start)
        failures = 0
        while not prefix or NOT_FOR_OBSTORE.search(prefix.removesuffix("/")) is None:
            try:
                stream = obstore.list(
                    self.store(),
                    prefix.removesuffix("/") or None,
                    offset=after or None,
                    chunk_size=_PAGE_ROWS,
                    return_arrow=True,
                )
                for chunk in stream:
                    page = pa.record_batch(chunk)
                    # A marker comes again behind its own name, which has no slash here.
                    inside = _inside(page, "path", keys._replace(start=max(keys.start, _behind(after))))
                    after, failures = max(after, page["path"][-1].as_py()), 0
                    batch = self._without_markers(_listing_of(inside, self.base))
                    if batch.num_rows:
                        yield batch
                    if keys.stop and after >= keys.stop:
                        return
                    if inside.num_rows == _PAGE_ROWS and jobs.hungry():
                        rest = _cut(keys, inside["path"][0].as_py(), after)
                        if len(rest) > (2 if keys.level == "one" else 1):
                            jobs.add(*rest)
                            return
                return
            except (InvalidPathError, ValueError):
                break
            except (BaseError, OSError) as error:
                failures += 1
                if failures < _ATTEMPTS and self.renewed(error):
                    continue
                if failures == _ATTEMPTS or kind_of(error) != "fetch_failed" or not is_cut_off(error):
                    raise failure("list", self.base + prefix, error) from error
                wait_before_retry(failures)
        left = KeyRange(prefix, self.base + max(keys.start, _behind(after)), keys.stop and self.base + keys.stop)
        try:
            for batch in self.odd(prefix, after):
                inside = _inside(batch, "uri", left)
                if inside.num_rows:
                    yield inside
                if keys.stop and batch["uri"][-1].as_py() >= left.stop:
                    return
        except OSError as error:
            raise failure("list", self.base + prefix, error) from error

    def _pieces(self, keys: KeyRange) -> list[KeyRange]:
        """`keys`, cut between the folders right below its prefix; whole where these cannot be had at once."""

        async def level() -> Any:
            found = obstore.list_with_delimiter_async(
                self.store(), keys.prefix.removesuffix("/") or None, return_arrow=True
            )
            return await asyncio.wait_for(found, _LEVEL_TIMEOUT_S)

        try:
            names = asyncio.run(level())["common_prefixes"]
        except (TimeoutError, BaseError, OSError, ValueError):
            return [keys]  # listing it will say what is wrong
        starts = [f"{name}/" for name in names if keys.start < f"{name}/" and (not keys.stop or f"{name}/" < keys.stop)]
        step = -(-len(starts) // _PIECES) or 1
        starts = sorted(starts)[::step]
        ends = zip([keys.start, *starts], [*starts, keys.stop], strict=True)
        return [KeyRange(keys.prefix, start, stop, "one" if step == 1 else "known") for start, stop in ends]

    def _without_markers(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Without the empty objects that turn out to be folder markers: obstore lists `photos/` as
        `photos`.
        """
        empty = pc.equal(batch.column("size_bytes"), 0)
        if not pc.any(empty).as_py():
            return batch
        keep = [
            not is_empty or self.is_object(uri.as_py())
            for is_empty, uri in zip(empty.to_pylist(), batch.column("uri"), strict=True)
        ]
        return batch.filter(pa.array(keep))


def _cut(keys: KeyRange, first: str, last: str) -> list[KeyRange]:
    """What is left of `keys` behind `last`, as one range for each folder that holds all from `first` to `last`."""
    ranges: list[KeyRange] = []
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    folder = first[: sum(1 for _ in alike)].rpartition("/")[0] + "/"
    start = _behind(last)
    while len(folder) > len(keys.prefix) and folder != "/":
        ranges.append(KeyRange(folder, start, level="wanted" if ranges else "unknown"))
        start = folder[:-1] + chr(ord("/") + 1)
        folder = folder[:-1].rpartition("/")[0] + "/"
    level: Literal["wanted", "known"] = "known" if keys.level in ("known", "one") else "wanted"
    return [*ranges, KeyRange(keys.prefix, start, keys.stop, level)]


def _behind(key: str) -> str:
    """The first key there can be behind `key`."""
    return key and key + "\0"


def _before(key: str) -> str:
    """A key before `key`, with next to nothing in between, that a store can be given."""
    if not key or key.endswith("\0"):
        return key[:-1]
    return key[:-1] + chr(ord(key[-1]) - 1) + _LAST_NAME


def _inside(batch: pa.RecordBatch, column: str, keys: KeyRange) -> pa.RecordBatch:
    """The rows of a sorted batch that lie between the ends of `keys`."""
    names = batch[column]
    if batch.num_rows and keys.start and names[0].as_py() < keys.start:
        batch = batch.filter(pc.greater_equal(names.cast(pa.string()), keys.start))
        names = batch[column]
    if batch.num_rows and keys.stop and names[-1].as_py() >= keys.stop:
        batch = batch.filter(pc.less(names.cast(pa.string()), keys.stop))
    return batch


def _listing_of(batch: pa.RecordBatch, base: str) -> pa.RecordBatch:
    """obstore's listing columns as LISTING_SCHEMA."""
    etag = pc.utf8_trim(pc.replace_substring_regex(pc.fill_null(batch.column("e_tag"), ""), "^W/", ""), '"')
    columns = [
        pc.binary_join_element_wise(base, batch.column("path").cast(pa.string()), ""),
        etag.cast(pa.string()),
        batch.column("size").cast(pa.int64()),
        batch.column("last_modified").cast(pa.timestamp("us", "UTC")),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=LISTING_SCHEMA)
