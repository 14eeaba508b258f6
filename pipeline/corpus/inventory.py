"""S3 Inventory reports in Parquet: a bucket's listing that the store itself wrote.
Must not know: other manifests, HEAD requests, or what becomes of the rows.

Source: Amazon S3 User Guide, "Locating your inventory list" and "Amazon S3 Inventory list". Keys in Parquet
parts are raw; only CSV reports encode them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.corpus.entries import as_listing, columns_of, open_bytes
from pipeline.errors import UsageError
from pipeline.storage import Storage, join_uri, open_storage, uri_scheme, without_secrets

_CHUNK_BYTES = 4 << 20
_COLUMNS = ("bucket", "key", "is_latest", "is_delete_marker", "size", "e_tag", "last_modified_date")


def read_inventory(uri: str, storage: Storage, *, profile: str | None = None) -> Iterator[pa.RecordBatch]:
    """The objects of an S3 Inventory, as batches of LISTING_SCHEMA: latest versions only, no delete markers.

    The parts of a manifest on S3 are read from its destination bucket; those of a copied one lie below the
    manifest's folder, under their whole keys. Raises UsageError for a file that is no such manifest, for a
    report in another format than Parquet, and for a part that is damaged or not the one that the manifest lists
    (by its MD5, where it gives one); StorageError for a part that cannot be fetched.
    """
    manifest = _manifest(uri, storage)
    on_s3 = uri_scheme(uri) == "s3"
    bucket = str(manifest.get("destinationBucket", "")).rpartition(":")[2]
    for part in manifest["files"]:
        at = join_uri(f"s3://{bucket}" if on_s3 else uri.rpartition("/")[0], part["key"])
        try:
            with open_bytes(at, open_storage(at, profile=profile)) as stream:
                _check_digest(at, stream, part.get("MD5checksum"))
                file = pq.ParquetFile(stream)
                present = [name for name in _COLUMNS if name in file.schema_arrow.names]
                if not {"bucket", "key"} <= set(present):
                    raise UsageError(f"the inventory part {without_secrets(at)!r} has no columns bucket and key")
                for batch in file.iter_batches(50_000, columns=present):
                    yield _rows(columns_of(batch))
        except (pa.ArrowException, FileNotFoundError) as error:
            text = str(error).partition("\n")[0]
            raise UsageError(f"the inventory part {without_secrets(at)!r} cannot be read: {text}") from error


def _check_digest(uri: str, stream: pa.NativeFile, wanted: object) -> None:
    """Raises UsageError where the part's bytes are not those that the manifest speaks of."""
    if not isinstance(wanted, str) or not wanted:
        return
    digest = hashlib.md5(usedforsecurity=False)
    while chunk := stream.read(_CHUNK_BYTES):
        digest.update(chunk)
    stream.seek(0)
    if digest.hexdigest() != wanted.lower():
        raise UsageError(
            f"the inventory part {without_secrets(uri)!r} has the MD5 {digest.hexdigest()}, its manifest says {wanted}"
            ": fetch both again"
        )


def _manifest(uri: str, storage: Storage) -> dict[str, Any]:
    try:
        manifest = json.loads(storage.get(uri).data)
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
