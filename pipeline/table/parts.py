"""A Part: the one Parquet file that a shard becomes. Owns: writing rows into it and committing it once.
Must not know: where rows come from, runs, Ray.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.storage import Storage
from pipeline.table.schema import SCHEMA_VERSION, SEGMENTS

#: Rows per row group: small enough to stream through, large enough for statistics to be worth reading.
ROW_GROUP_ROWS = 512

_DICTIONARY = [
    "model_version", "settings_digest", "run_id", "node", "task", "image_format", "status", "error_kind",
    "classes.list.element.name", "instances.list.element.name",
]  # fmt: skip


#: Binary payloads get no statistics: minima of PNG bytes help nobody and cost footer.
_STATISTICS = [
    field.name for field in SEGMENTS if not pa.types.is_nested(field.type)
]  # fmt: skip


class Part(NamedTuple):
    """A finished Part, not yet committed."""

    data: pa.Buffer
    rows: int


class PartBuilder:
    """Rows in, one Parquet file in memory out.

    Every row is a mapping with keys of `SEGMENTS`; absent keys become null. Not thread safe: the caller holds a lock.
    Memory: the compressed Part plus at most `ROW_GROUP_ROWS` rows.
    """

    def __init__(self, *, model_name: str, card_json: str) -> None:
        metadata = {
            "maskmill_schema_version": SCHEMA_VERSION,
            "maskmill_model": model_name,
            "maskmill_card": card_json,
        }
        self._schema = SEGMENTS.with_metadata(metadata)
        self._sink = pa.BufferOutputStream()
        self._writer = pq.ParquetWriter(
            self._sink, self._schema, compression="zstd", compression_level=1,
            use_dictionary=_DICTIONARY, write_statistics=_STATISTICS,
        )  # fmt: skip
        self._pending: list[Mapping[str, Any]] = []
        self._rows = 0

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Adds rows; writes a row group whenever enough have come together."""
        self._pending.extend(rows)
        while len(self._pending) >= ROW_GROUP_ROWS:
            self._write(self._pending[:ROW_GROUP_ROWS])
            del self._pending[:ROW_GROUP_ROWS]

    def finish(self) -> Part:
        """Closes the file. The builder is spent afterwards."""
        if self._pending:
            self._write(self._pending)
            self._pending = []
        self._writer.close()
        return Part(self._sink.getvalue(), self._rows)

    def _write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        columns = [pa.array([row.get(field.name) for row in rows], type=field.type) for field in self._schema]
        self._writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=self._schema), row_group_size=len(rows))
        self._rows += len(rows)


def commit(storage: Storage, uri: str, part: Part) -> bool:
    """Puts `part` at `uri`, create-only. True: it is ours; False: it was there already, which is success too.

    Raises StorageError. Safe to retry: a Part is never replaced.
    """
    return storage.put_new(uri, part.data.to_pybytes())


def commit_empty(storage: Storage, uri: str) -> bool:
    """Takes the name `uri` with a Part of zero rows, so that a late worker finds it taken."""
    builder = PartBuilder(model_name="", card_json="{}")
    return commit(storage, uri, builder.finish())
