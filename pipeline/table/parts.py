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

#: Rows per row group at most. With groups of 512 a scan of 10 million rows without masks takes several times as long.
ROW_GROUP_ROWS = 32_768
#: Masks make shorter row groups: what is pending, and what a reader of masks holds, stays bounded in bytes.
ROW_GROUP_BYTES = 32 << 20
#: So many rows are held as Python objects, which take several times their bytes.
_BATCH_ROWS = 512

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


def part_writer(sink: Any, schema: pa.Schema) -> pq.ParquetWriter:
    """A writer of Parquet as Parts have it: encodings, compression, statistics, a checksum for every page."""
    return pq.ParquetWriter(
        sink, schema, compression="zstd", compression_level=2,
        use_dictionary=_DICTIONARY, write_statistics=_STATISTICS, write_page_checksum=True,
    )  # fmt: skip


class PartBuilder:
    """Rows in, one Parquet file in memory out.

    Every row is a mapping with keys of `SEGMENTS`; absent keys become null. Not thread safe: the caller holds a lock.
    Memory: the compressed Part, and at most a row group.
    """

    def __init__(self, *, model_name: str, card_json: str) -> None:
        metadata = {
            "maskmill_schema_version": SCHEMA_VERSION,
            "maskmill_model": model_name,
            "maskmill_card": card_json,
        }
        self._schema = SEGMENTS.with_metadata(metadata)
        self._columns = [(field.name, field.type) for field in SEGMENTS]
        self._sink = pa.BufferOutputStream()
        self._writer = part_writer(self._sink, self._schema)
        self._pending: list[Mapping[str, Any]] = []
        self._pending_bytes = 0
        self._batches: list[pa.RecordBatch] = []
        self._batches_bytes = 0
        self._rows = 0

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Adds rows; writes a row group whenever enough have come together, by number or by size."""
        for row in rows:
            self._pending.append(row)
            self._pending_bytes += _payload_bytes(row)
            self._rows += 1
            full = self._batches_bytes + self._pending_bytes >= ROW_GROUP_BYTES
            if full or len(self._pending) >= _BATCH_ROWS:
                self._to_arrow()
            if full or self._rows % ROW_GROUP_ROWS == 0:
                self._flush()

    def finish(self) -> Part:
        """Closes the file. The builder is spent afterwards."""
        self._to_arrow()
        self._flush()
        self._writer.close()
        return Part(self._sink.getvalue(), self._rows)

    def _to_arrow(self) -> None:
        rows, self._pending, self._pending_bytes = self._pending, [], 0
        if rows:
            columns = [pa.array([row.get(name) for row in rows], type=kind) for name, kind in self._columns]
            self._batches.append(pa.RecordBatch.from_arrays(columns, schema=self._schema))
            self._batches_bytes += self._batches[-1].nbytes

    def _flush(self) -> None:
        batches, self._batches, self._batches_bytes = self._batches, [], 0
        if batches:
            table = pa.Table.from_batches(batches)
            self._writer.write_table(table, row_group_size=len(table))


def _payload_bytes(row: Mapping[str, Any]) -> int:
    mask = row.get("mask")
    return (len(mask["bytes"]) if mask else 0) + sum(len(one["rle"]["counts"]) for one in row.get("instances") or ())


def commit(storage: Storage, uri: str, part: Part) -> bool:
    """Puts `part` at `uri`, create-only. True: it is ours; False: it was there already, which is success too.

    Raises StorageError. Safe to retry: a Part is never replaced.
    """
    return storage.put_new(uri, part.data.to_pybytes())


def commit_empty(storage: Storage, uri: str) -> bool:
    """Takes the name `uri` with a Part of zero rows, so that a late worker finds it taken."""
    builder = PartBuilder(model_name="", card_json="{}")
    return commit(storage, uri, builder.finish())
