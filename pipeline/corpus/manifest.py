"""What a run is asked to process: SOURCE to one Parquet file of image references.
Must not know: pixels, models, runs, or which images are done already.

Rows flow from the listing or the manifest file to the Parquet file in Arrow batches; memory does not grow
with the corpus.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, takewhile
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.config import DEFAULT_SUFFIXES
from pipeline.corpus.entries import ENTRY_SUFFIXES, file_name, read_entries
from pipeline.corpus.etags import HEAD_THREADS, EtagFiller
from pipeline.corpus.inventory import Query, find_parts, query_parts, read_parts
from pipeline.corpus.signatures import ADDRESSES, split_signatures
from pipeline.errors import StorageError, UsageError
from pipeline.storage import (
    LISTING_SCHEMA,
    ObjectInfo,
    Storage,
    check_web_address,
    file_uri,
    local_path,
    normalize_uri,
    open_storage,
    path_text,
    sql_text,
    uri_scheme,
    without_secrets,
)

MANIFEST_SCHEMA = LISTING_SCHEMA

_ROWS_PER_GROUP = 100_000
_COPIES = "inventory"
#: So many images named, and not one of them there: the place is wrong, and rows that say so help nobody.
_SURELY_WRONG = 1000
_GLOB = re.compile(r"[*?\[]")
_WEB = ("http", "https")


class Span(NamedTuple):
    """Which names a full listing would have shown, had they been there.

    `prefix_uri`: the folder that was listed. `suffixes`: lower case; none for all. `name_regex`: of RE2, for the name
    below the folder, where SOURCE was a glob. `hidden`: whether names with a part that begins with a dot were listed.
    """

    prefix_uri: str
    suffixes: tuple[str, ...]
    name_regex: str | None
    hidden: bool


class Corpus(NamedTuple):
    """The corpus at one moment.

    `sql`: what stands after FROM in DuckDB, with the columns of MANIFEST_SCHEMA and `rows` rows: a local Parquet file,
    or the parts of an inventory, which are read each time. `distinct`: whether it is known that no URI is repeated.
    `full_listing`: whether it holds all that SOURCE held just then (a folder, a prefix, a glob), rather than what
    somebody wrote down (a manifest, an inventory, one file). `source`: SOURCE as an absolute URI. `span`: of a full
    listing, what it covers. `signed_path`: a local Parquet file of `signatures.ADDRESSES`, for the images that can be
    read by a signed address only; in `sql` they stand without the signature. None where there are none. `in_place`:
    whether `sql` reads an inventory where it lies, so that it may fail as any reading of SOURCE may.
    """

    sql: str
    rows: int
    distinct: bool
    full_listing: bool
    source: str
    span: Span | None = None
    signed_path: Path | None = None
    in_place: bool = False


def read_source(
    source: str,
    *,
    scratch: Path,
    suffixes: Sequence[str] = DEFAULT_SUFFIXES,
    profile: str | None = None,
    head_threads: int = HEAD_THREADS,
) -> Corpus:
    """List or read SOURCE, into the folder `scratch` if a copy is needed, which is made where it is missing. The
    parts of an S3 Inventory on a disk are not copied: they must stay as long as the corpus is used.

    SOURCE is a folder or URL prefix (recursive), a glob (`*`, `?`, `[a-z]`, and `**` for any number of
    folders), one file, a manifest of URIs (.parquet, .csv, .jsonl, .txt), or the manifest.json of an S3
    Inventory. What exists under the literal name wins over a glob. Listings, globs and inventories give names
    that end in one of `suffixes` (whatever the case; a glob that ends in a suffix of its own gives those) and
    in which no part below the folder begins with a dot. A URI that a manifest names always has its row.

    Rows for which no etag is known are filled by a HEAD each, `head_threads` at a time; where the image is
    missing or denied, its store does not answer, or no store can have it (an unknown scheme, no host), the
    etag is "" and the size null: the run will say which.

    An address that is signed (`pipeline.corpus.signatures`) is known by what is left without its signature.

    Raises UsageError where SOURCE does not exist, cannot be understood, gives no rows, or names a thousand images or
    more of which not one is there; StorageError where the store fails. Changes nothing but `scratch`; safe to retry.
    """
    if not source.strip():
        raise UsageError("SOURCE is empty: give a folder, a URL, a glob, or a manifest of URIs")
    uri = normalize_uri(source)
    if uri_scheme(uri) == "file":
        uri = normalize_uri(local_path(uri))
    if uri_scheme(uri) in _WEB:
        _check_page(uri)
    storage = open_storage(uri, profile=profile)
    folder = scratch / f"corpus-{uuid.uuid4().hex}"
    folder.mkdir(parents=True)
    try:
        found = _rows_of(uri, storage, tuple(s.lower() for s in suffixes), profile, folder)
        if found.query is not None:
            if found.query.rows == 0:
                raise UsageError(found.hint)
            query = found.query
            # Parts in a store were copied.
            return Corpus(query.sql, query.rows, query.distinct, False, uri, in_place=uri_scheme(uri) == "file")
        path, signed_path = folder / "corpus.parquet", folder / "signed.parquet"
        with _Addresses(signed_path) as addresses, EtagFiller(profile, head_threads) as filler:
            rows = _write(path, (addresses.split(filler.fill(batch)) for batch in found.batches))
        if rows == 0:
            raise UsageError(found.hint)
        if filler.missing == rows >= _SURELY_WRONG:
            raise UsageError(
                f"not one of the {rows:,} images that {without_secrets(uri)!r} names is there, for example "
                f"{without_secrets(filler.example)!r}: is the bucket or folder right, and the disk mounted?"
            )
        shutil.rmtree(folder / _COPIES, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        # Arrow says so of damaged files, with no errno; a full disk has one.
        if isinstance(error, OSError) and error.errno is None:
            raise UsageError(f"{without_secrets(uri)} could not be read: {error}") from error
        raise
    sql = f"read_parquet({sql_text(str(path))}, hive_partitioning = false)"
    is_full = found.span is not None
    return Corpus(sql, rows, is_full, is_full, uri, found.span, signed_path if addresses.any else None)


class _Found(NamedTuple):
    """What SOURCE holds. `span`: what that is a full listing of. `hint`: what to say if it is nothing. `query`: the
    same rows as `batches`, where they need not be copied."""

    batches: Iterable[pa.RecordBatch]
    span: Span | None
    hint: str
    query: Query | None = None


def _rows_of(uri: str, storage: Storage, suffixes: tuple[str, ...], profile: str | None, folder: Path) -> _Found:
    shown = without_secrets(uri)
    empty = f"the manifest {shown!r} names no images"
    no_images = f"no images in {shown!r}: no name in it ends in {' '.join(suffixes)}"
    found = _find(uri, storage)
    if found == "folder":
        return _Found(_listing(uri, storage, None, suffixes), Span(uri, suffixes, None, False), no_images)
    if found is not None:
        if file_name(uri).endswith(ENTRY_SUFFIXES):
            return _Found(read_entries(uri, storage), None, empty)
        if file_name(uri).endswith(".json"):
            parts = find_parts(uri, storage, folder=folder / _COPIES, profile=profile)
            rows = (_images(batch, "", suffixes) for batch in read_parts(parts))
            return _Found(rows, None, empty, query_parts(parts, where=_images_sql(suffixes)))
        return _Found([_one_row(uri, found)], None, empty)
    if _GLOB.search(uri) and not (uri_scheme(uri) in _WEB and "?" in uri):  # there it begins a query
        base, pattern = _split_glob(uri)
        if re.search(r"\.\w+\Z", pattern):
            suffixes = ()
        folders, rest = _glob_folders(base, pattern)
        listings = (_listing(folder, storage, rest, suffixes) for folder in folders)
        span = Span(base, suffixes, _regex(pattern), _names_hidden(pattern))
        return _Found(chain.from_iterable(listings), span, f"no images match {shown!r}")
    raise UsageError(f"{shown!r} does not exist, or holds nothing")


def _check_page(uri: str) -> None:
    """Raises UsageError where a web address cannot be that of one file."""
    check_web_address(uri)
    if not uri.partition("?")[0].partition("://")[2].partition("/")[2].strip("/"):
        raise UsageError(
            f"{without_secrets(uri)!r} names no file: a web server cannot be listed; give the URL of one image or of a "
            "manifest (.parquet, .csv, .jsonl, .txt)"
        )


def _find(uri: str, storage: Storage) -> ObjectInfo | str | None:
    """What has this literal name: an object's info, "folder", or None."""
    if uri_scheme(uri) == "file":
        if os.path.isdir(local_path(uri)):
            return "folder"
        return _head(uri, storage)
    has_key = "/" in uri.partition("://")[2].rstrip("/")
    if has_key and not uri.endswith("/") and (info := _head(uri, storage)) is not None:
        return info
    if uri_scheme(uri) in _WEB:
        return None
    try:
        return "folder" if next(iter(storage.list(uri, parallel=1)), None) is not None else None
    except StorageError as error:
        if error.kind != "missing":
            raise
        return None


def _head(uri: str, storage: Storage) -> ObjectInfo | None:
    """None for what is missing, and for what S3 calls denied because the name may not be listed."""
    try:
        return storage.head(uri)
    except StorageError as error:
        if error.kind == "missing" or (error.kind == "denied" and uri_scheme(uri) == "s3"):
            return None
        raise


def _listing(folder: str, storage: Storage, pattern: str | None, suffixes: tuple[str, ...]) -> Iterator[pa.RecordBatch]:
    prefix = folder if folder.endswith("/") else folder + "/"
    try:
        for batch in storage.list(folder):
            yield _images(batch, prefix, suffixes, pattern)
    except StorageError as error:
        if error.kind != "missing":
            raise
        raise UsageError(f"the folder {without_secrets(folder)!r} does not exist") from error


def _images(
    batch: pa.RecordBatch, prefix: str, suffixes: tuple[str, ...], pattern: str | None = None
) -> pa.RecordBatch:
    """The rows whose name counts as an image's, is not hidden below `prefix`, and matches the glob
    `pattern`."""
    uris = batch.column("uri")
    names = pc.utf8_slice_codeunits(uris, len(prefix))
    keep = pc.starts_with(uris, prefix)
    if suffixes:
        keep = pc.and_(keep, pc.match_substring_regex(uris, _ending(suffixes), ignore_case=True))
    if pattern is not None:
        keep = pc.and_(keep, pc.match_substring_regex(names, _regex(pattern)))
    may_hide = pc.any(pc.or_(pc.match_substring(names, "/."), pc.starts_with(names, "."))).as_py()
    if may_hide and (pattern is None or not _names_hidden(pattern)):
        keep = pc.and_(keep, pc.invert(pc.match_substring_regex(names, r"(?:\A|/)\.")))
    return batch if pc.all(keep).as_py() else batch.filter(keep)


def _images_sql(suffixes: tuple[str, ...]) -> str:
    """Which rows `_images` keeps of those with a scheme, in SQL."""
    if not suffixes:
        return "NOT contains(uri, '/.')"
    # Nearly all names have their suffix in lower case, which is told for a third of what the expression costs.
    plain = " OR ".join(f"suffix(uri, {sql_text(suffix)})" for suffix in suffixes)
    return f"({plain} OR regexp_matches(uri, {sql_text(_ending(suffixes))}, 'i')) AND NOT contains(uri, '/.')"


def _ending(suffixes: tuple[str, ...]) -> str:
    return "(?:" + "|".join(re.escape(suffix) for suffix in suffixes) + r")\z"


def _names_hidden(pattern: str) -> bool:
    return re.search(r"(?:\A|/)\.", pattern) is not None


def _split_glob(uri: str) -> tuple[str, str]:
    """The folder above the first wild card, and the pattern below it."""
    match = _GLOB.search(uri)
    at = uri.rfind("/", 0, match.start() if match else None)
    base = uri[:at]
    if base.endswith("/") or base.endswith(":"):
        if uri_scheme(uri) != "file":
            raise UsageError(f"{without_secrets(uri)!r} has a wild card in the name of the bucket: name one bucket")
        base = "file:///"
    return base, uri[at + 1 :]


def _glob_folders(base: str, pattern: str) -> tuple[Iterable[str], str]:
    """The folders to list, and the pattern below each. On a disk the leading folders of the pattern are
    matched first, so that `/data/2024-*/*.jpg` does not walk all of `/data`."""
    segments = pattern.split("/")
    lead = list(takewhile(lambda segment: "**" not in segment, segments[:-1]))
    if uri_scheme(base) != "file" or not lead:
        return [base], pattern
    found = glob.iglob(os.path.join(glob.escape(local_path(base)), *map(path_text, lead), ""))
    return (file_uri(path.rstrip("/")) for path in found), "/".join(segments[len(lead) :])


def _regex(pattern: str) -> str:
    """A glob as an RE2 expression for the whole name. `*` and `?` stop at a slash; `**/` is any folders, or
    none."""
    out, at = r"(?s)\A", 0
    while at < len(pattern):
        if pattern.startswith("**/", at) and (at == 0 or pattern[at - 1] == "/"):
            out, at = out + "(?:.*/)?", at + 3
            continue
        if pattern.startswith("**", at):
            out, at = out + ".*", at + 2
            continue
        character = pattern[at]
        close = pattern.find("]", at + 2) if character == "[" else -1
        if close > 0:
            inside = pattern[at + 1 : close].replace("\\", r"\\").replace("[", r"\[").replace("]", r"\]")
            inside = "^/" + inside[1:] if inside[0] in "!^" else inside
            out, at = out + f"[{inside}]", close + 1
            continue
        out += {"*": "[^/]*", "?": "[^/]"}.get(character) or re.escape(character)
        at += 1
    return out + r"\z"


def _one_row(uri: str, info: ObjectInfo | str) -> pa.RecordBatch:
    assert isinstance(info, ObjectInfo)
    size = info.size_bytes if info.size_bytes >= 0 else None
    columns = {"uri": [uri], "etag": [info.etag], "size_bytes": [size], "modified": [info.modified]}
    return pa.RecordBatch.from_pydict(columns, schema=MANIFEST_SCHEMA)


def _write(path: Path, batches: Iterable[pa.RecordBatch]) -> int:
    rows, waiting, waiting_rows = 0, [], 0
    # URIs and etags do not repeat: a dictionary of them would be tried for every group, and given up. One thread writes
    # while the next rows are read.
    writer = pq.ParquetWriter(path, MANIFEST_SCHEMA, compression="zstd", use_dictionary=False)
    with writer, ThreadPoolExecutor(1, "manifest") as pool:
        writing = pool.submit(int)
        for batch in batches:
            waiting.append(batch)
            waiting_rows += batch.num_rows
            if waiting_rows >= _ROWS_PER_GROUP:
                writing.result()
                writing = pool.submit(writer.write_table, pa.Table.from_batches(waiting, MANIFEST_SCHEMA))
                rows, waiting, waiting_rows = rows + waiting_rows, [], 0
        writing.result()
        if waiting_rows:
            writer.write_table(pa.Table.from_batches(waiting, MANIFEST_SCHEMA))
    return rows + waiting_rows


class _Addresses:
    """The file of the signed addresses, where there are any. A context manager. Not thread safe."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer: pq.ParquetWriter | None = None

    def __enter__(self) -> _Addresses:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()

    @property
    def any(self) -> bool:
        return self._writer is not None

    def split(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """The batch without signatures, which are written down."""
        batch, signed = split_signatures(batch)
        if signed is not None:
            if self._writer is None:
                self._writer = pq.ParquetWriter(self._path, ADDRESSES, compression="zstd")
            self._writer.write_batch(signed)
        return batch
