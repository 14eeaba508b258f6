"""Which images must never be seen again. Owns: the lists of what was forgotten, and telling whether an image is on one.
Must not know: where images leave traces, how these are removed, planning.

    runs/_forgotten/<time>-<6 hex>.parquet    uri_sha256    create-only; the salt is in the file's metadata

A list holds no name: of each image the SHA-256 of the salt and its URI. Whoever can read DEST and guesses a URI can
still find out whether it is on a list; nobody can read the URIs off it.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import io
import secrets
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import InfrastructureError
from pipeline.storage import Storage, join_uri
from pipeline.table.catalog import files_below, sql_text
from pipeline.table.schema import SCHEMA_VERSION

FORGOTTEN = pa.schema([("uri_sha256", pa.string())])
_SALT_KEY = b"maskmill_salt"

#: What stands for a forgotten image in a run's frozen list, before its hash. No URI of an image begins so.
STAND_IN = "forgotten:"


class Forgotten:
    """Images by the salted SHA-256 of their URI, in hex. `hashes`: by salt; nearly always there is one salt."""

    def __init__(self, hashes: Mapping[str, frozenset[str]] | None = None) -> None:
        self._hashes = {salt: some for salt, some in (hashes or {}).items() if some}

    def __len__(self) -> int:
        return sum(map(len, self._hashes.values()))

    @property
    def salt(self) -> str:
        """For more hashes: the one in use, or a new one."""
        return min(self._hashes, default="") or secrets.token_hex(16)

    def also(self, salt: str, hashes: Iterable[str]) -> Forgotten:
        """These, and more."""
        return Forgotten(self._hashes | {salt: self._hashes.get(salt, frozenset()) | frozenset(hashes)})

    def stand_in(self, uri: str) -> str | None:
        """What takes the place of `uri` in lists; None where it is not forgotten."""
        for salt, hashes in self._hashes.items():
            digest = hashlib.sha256((salt + uri).encode()).hexdigest()
            if digest in hashes:
                return STAND_IN + digest
        return None

    def condition(self, connection: Any, column: str) -> str:
        """The same question in SQL, on a connection that is given the lists. `column` holds URIs."""
        pairs = [(salt, digest) for salt, hashes in self._hashes.items() for digest in hashes]
        salts, digests = zip(*pairs, strict=True) if pairs else ((), ())
        table = pa.table({"salt": pa.array(salts, pa.string()), "uri_sha256": pa.array(digests, pa.string())})
        connection.register("_forgotten_now", table)
        connection.execute("CREATE OR REPLACE TEMP TABLE _forgotten AS FROM _forgotten_now")
        connection.unregister("_forgotten_now")
        tests = [
            f"{hash_sql(salt, column)} IN (SELECT uri_sha256 FROM _forgotten WHERE salt = {sql_text(salt)})"
            for salt in self._hashes
        ]
        return f"({' OR '.join(tests) or 'false'})"


def hash_sql(salt: str, column: str) -> str:
    """The hash of a URI in SQL: hex of SHA-256 over the salt's text and the URI in UTF-8."""
    return f"sha256({sql_text(salt)} || {column})"


def read_forgotten(storage: Storage, dest: str) -> Forgotten:
    """Everything that was ever forgotten in DEST: one LIST, and one GET a list. Raises StorageError, and
    InfrastructureError for a list that is damaged: nothing may be planned without it."""
    found: dict[str, set[str]] = {}
    for uri in files_below(storage, join_uri(dest, "runs", "_forgotten")):
        if not uri.endswith(".parquet"):
            continue
        try:
            table = pq.read_table(pa.BufferReader(storage.get(uri).data))
            salt = table.schema.metadata[_SALT_KEY].decode()
            found.setdefault(salt, set()).update(table["uri_sha256"].to_pylist())
        except (pa.ArrowException, OSError, KeyError, TypeError) as error:
            raise InfrastructureError(
                f"{uri} lists images that are to stay forgotten, and cannot be read ({error}): restore it from a backup"
            ) from error
    return Forgotten({salt: frozenset(hashes) for salt, hashes in found.items()})


def write_forgotten(storage: Storage, dest: str, salt: str, hashes: Iterable[str]) -> str:
    """One more list; returns its URI. Raises StorageError. Safe to repeat: the same hashes twice do no harm."""
    metadata = {"maskmill_schema_version": SCHEMA_VERSION, _SALT_KEY: salt}
    table = pa.table({"uri_sha256": sorted(hashes)}, schema=FORGOTTEN.with_metadata(metadata))
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    name = f"{dt.datetime.now(dt.UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}.parquet"
    uri = join_uri(dest, "runs", "_forgotten", name)
    storage.put_new(uri, sink.getvalue())
    return uri
