"""S3 Inventory reports in Parquet: a bucket's listing that the store itself wrote.
Must not know: other manifests, HEAD requests, or what becomes of the rows.

Source: Amazon S3 User Guide, "Locating your inventory list" and "Amazon S3 Inventory list". Keys in Parquet
parts are raw; only CSV reports encode them.

There are two ways to read one. `read_parts` says what it means, row by row, and what is wrong. `query_parts` says the
same of parts such as the store writes them, many times faster, and of all others nothing.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.corpus.entries import as_listing, columns_of
from pipeline.errors import UsageError
from pipeline.json_text import read_json
from pipeline.storage import (
    Storage,
    duckdb_path,
    file_uri,
    join_uri,
    local_path,
    open_storage,
    sql_text,
    uri_scheme,
    without_secrets,
)

_CHUNK_BYTES = 4 << 20
_COLUMNS = ("bucket", "key", "is_latest", "is_delete_marker", "size", "e_tag", "last_modified_date")
_DIGEST_THREADS = 8
_ROWS_PER_BATCH = 1_000_000
_TEXTS = (pa.string(), pa.large_string())
_NO_PART = (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)
#: Columns as the store writes them, which DuckDB reads as Arrow does. It would write out bytes as `\\x00`, for example.
_PLAIN_TYPES: dict[str, tuple[pa.DataType, ...]] = {
    "bucket": _TEXTS,
    "key": _TEXTS,
    "e_tag": _TEXTS,
    "is_latest": (pa.bool_(),),
    "is_delete_marker": (pa.bool_(),),
    "size": (pa.int64(), pa.int32()),
    "last_modified_date": (pa.timestamp("ms", "UTC"), pa.timestamp("us", "UTC")),
}


class Part(NamedTuple):
    """One file of an inventory. `uri`: where the manifest says that it is. `path`: where it is on this machine. `md5`:
    what the manifest says of its bytes, if it does."""

    uri: str
    path: str
    md5: str | None


class Query(NamedTuple):
    """The rows of an inventory without a copy. `sql`: what stands after FROM, with the columns of LISTING_SCHEMA; it
    reads the parts where they lie. `rows`: how many there are. `distinct`: whether no two have the same URI."""

    sql: str
    rows: int
    distinct: bool


def find_parts(uri: str, storage: Storage, *, folder: Path, profile: str | None = None) -> list[Part]:
    """The parts of the inventory with this manifest: those on a disk where they lie, others copied into `folder`, which
    is made if it is needed.

    The parts of a manifest on S3 are read from its destination bucket; those of a copied one lie below the
    manifest's folder, under their whole keys. Raises UsageError for a file that is no such manifest, and for a
    report in another format than Parquet; StorageError for a part that cannot be fetched.
    """
    manifest = _manifest(uri, storage)
    on_s3 = uri_scheme(uri) == "s3"
    bucket = str(manifest.get("destinationBucket", "")).rpartition(":")[2]
    parts = []
    for number, listed in enumerate(manifest["files"]):
        at = join_uri(f"s3://{bucket}" if on_s3 else uri.rpartition("/")[0], listed["key"])
        if uri_scheme(at) == "file":
            path = local_path(at)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            path = str(folder / f"{number}.parquet")
            Path(path).write_bytes(open_storage(at, profile=profile).get(at).data)
        md5 = listed.get("MD5checksum")
        parts.append(Part(at, path, md5 if isinstance(md5, str) and md5 else None))
    return parts


def read_parts(parts: Sequence[Part]) -> Iterator[pa.RecordBatch]:
    """The objects of an inventory, as batches of LISTING_SCHEMA in its order: latest versions only, no delete markers.

    Raises UsageError for a part that is damaged or not the one that the manifest lists (by its MD5, where it gives
    one).
    """
    for part in parts:
        shown = without_secrets(part.uri)
        try:
            if (digest := _wrong_digest(part)) is not None:
                raise UsageError(
                    f"the inventory part {shown!r} has the MD5 {digest}, its manifest says {part.md5}: fetch both again"
                )
            with pa.OSFile(os.fsencode(part.path), "rb") as stream:
                file = pq.ParquetFile(stream)
                present = [name for name in _COLUMNS if name in file.schema_arrow.names]
                if not {"bucket", "key"} <= set(present):
                    raise UsageError(f"the inventory part {shown!r} has no columns bucket and key")
                for batch in file.iter_batches(50_000, columns=present):
                    yield _rows(columns_of(batch))
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            # Arrow says so of damaged files, with no errno. The others are of names that no file has.
            if isinstance(error, OSError) and error.errno not in _NO_PART:
                raise
            text = str(error).partition("\n")[0]
            raise UsageError(f"the inventory part {shown!r} cannot be read: {text}") from error


def query_parts(parts: Sequence[Part], *, where: str) -> Query | None:
    """What `read_parts` gives of these parts, as far as the SQL condition `where` on `uri` holds. Every byte that it
    needs is read once.

    None where the parts are not as the store writes them, or do not give every etag, without quotes: ask `read_parts`.
    So too without their MD5: DuckDB believes a part's statistics, which damage can turn into lies.
    Memory: 8 bytes a row, and what DuckDB needs to read a few row groups.
    """
    if any(part.md5 is None for part in parts):
        return None
    try:
        with ThreadPoolExecutor(_DIGEST_THREADS, "digest") as pool:
            if any(pool.map(_wrong_digest, parts)):
                return None
        most_rows, selects = 0, []
        for schema, group in groupby(map(_head, parts), lambda head: head.schema):
            if not _is_plain(schema):
                return None
            heads = list(group)
            most_rows += sum(head.rows for head in heads)
            selects.append(_select([head.path for head in heads], set(schema.names)))
        if not selects:
            return None
        return _examine(f"(SELECT * FROM ({' UNION ALL '.join(selects)}) WHERE {where})", most_rows)
    except (duckdb.Error, pa.ArrowException, OSError, UsageError):
        return None
    except (MemoryError, ValueError):  # the number of rows that a part says it has is not that of its rows
        return None


def _examine(sql: str, most_rows: int) -> Query | None:
    """None where an etag is not known, or is in quotes."""
    keys, rows = np.empty(most_rows, np.uint64), 0
    # Quotes elsewhere than at an end belong to the etag.
    odd = "coalesce(etag, '') = '' OR prefix(etag, '\"') OR suffix(etag, '\"') OR prefix(etag, 'W/')"
    # Sizes and times are asked for so that they are read: what is damaged must be found now.
    wanted = f"hash(uri) AS key, {odd} OR hash(size_bytes, modified) = 0 AS odd"
    with duckdb.connect() as connection:
        connection.execute("SET enable_progress_bar = false")
        connection.execute("SET preserve_insertion_order = false")
        for batch in connection.sql(f"SELECT {wanted} FROM {sql}").to_arrow_reader(_ROWS_PER_BATCH):
            if pc.any(batch.column(1)).as_py():
                return None
            keys[rows : rows + len(batch)] = batch.column(0).to_numpy()
            rows += len(batch)
        keys = keys[:rows]
        keys.sort()
        twice = np.unique(keys[1:][keys[1:] == keys[:-1]])
        distinct = True
        if len(twice):
            # DuckDB's hash is quick, not good: of 100 million names that differ in some digits 19,178 shared one.
            connection.register("twice", pa.table({"key": twice}))
            alike = f"(SELECT uri FROM {sql}) l SEMI JOIN twice t ON hash(l.uri) = t.key"
            ((distinct,),) = connection.execute(f"SELECT count(*) = count(DISTINCT uri) FROM {alike}").fetchall()
    return Query(sql, rows, distinct)


class _Head(NamedTuple):
    path: str
    schema: pa.Schema
    rows: int


def _head(part: Part) -> _Head:
    with pa.OSFile(os.fsencode(part.path), "rb") as stream:
        file = pq.ParquetFile(stream)
        return _Head(duckdb_path(file_uri(part.path)), file.schema_arrow.remove_metadata(), file.metadata.num_rows)


def _is_plain(schema: pa.Schema) -> bool:
    """Whether DuckDB understands all columns that are read as Arrow does."""
    names = set(schema.names)
    return (
        len({name.lower() for name in names}) == len(schema.names)
        and {"bucket", "key", "e_tag"} <= names
        and all(schema.field(name).type in kinds for name, kinds in _PLAIN_TYPES.items() if name in names)
    )


def _select(paths: list[str], names: set[str]) -> str:
    size = "size::BIGINT" if "size" in names else "NULL::BIGINT"
    modified = "last_modified_date::TIMESTAMPTZ" if "last_modified_date" in names else "NULL::TIMESTAMPTZ"
    kept = ["coalesce(is_latest, true)"] if "is_latest" in names else []
    kept += ["NOT coalesce(is_delete_marker, false)"] if "is_delete_marker" in names else []
    listed = ", ".join(map(sql_text, paths))
    return (
        f"SELECT coalesce('s3://' || bucket || '/' || key, '') AS uri, e_tag AS etag, {size} AS size_bytes, "
        f"{modified} AS modified FROM read_parquet([{listed}], hive_partitioning = false) "
        f"WHERE {' AND '.join(kept) or 'true'}"
    )


def _wrong_digest(part: Part) -> str | None:
    """The MD5 of the part's bytes, if the manifest gives another one."""
    if part.md5 is None:
        return None
    with pa.OSFile(os.fsencode(part.path), "rb") as stream:
        digest = hashlib.md5(usedforsecurity=False)
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return None if digest.hexdigest() == part.md5.lower() else digest.hexdigest()


def _manifest(uri: str, storage: Storage) -> dict[str, Any]:
    try:
        manifest = read_json(storage.get(uri).data)
        parts = manifest["files"]
        valid = isinstance(parts, list) and all(isinstance(part["key"], str) for part in parts)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(
            f"{without_secrets(uri)!r} is no manifest of an S3 Inventory; lists of URIs end in .jsonl"
        ) from error
    if not valid:
        raise UsageError(
            f"{without_secrets(uri)!r} is no manifest of an S3 Inventory: its `files` are not a list of keys"
        )
    if manifest.get("fileFormat") != "Parquet":
        raise UsageError(
            f"the S3 Inventory {without_secrets(uri)!r} is in {manifest.get('fileFormat')!r}: configure it to write "
            "Parquet"
        )
    return manifest


def _rows(columns: dict[str, pa.Array]) -> pa.RecordBatch:
    keep = pa.scalar(True)
    if "is_latest" in columns:
        keep = pc.and_(keep, pc.fill_null(columns["is_latest"], True))
    if "is_delete_marker" in columns:
        keep = pc.and_(keep, pc.invert(pc.fill_null(columns["is_delete_marker"], False)))
    bucket, key = columns["bucket"].cast(pa.string()), columns["key"].cast(pa.string())
    uris = pc.binary_join_element_wise("s3://", bucket, "/", key, "")
    rows = as_listing(uris, columns.get("e_tag"), columns.get("size"), columns.get("last_modified_date"))
    return rows if pc.all(keep).as_py() else rows.filter(keep)
