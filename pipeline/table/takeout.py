"""Taking forgotten images out of one file. Owns: what each kind of file is without them.
Must not know: which files these are, runs, why an image is forgotten.

    Part, evaluation     without their rows; with no row left it stays, so that its name stays taken
    frozen list          each line becomes `forgotten:<hash>`, so that lines keep their numbers and shards their images
    removed, returned    without their lines; with none left the file goes
    plan, run            a SOURCE that was one such image becomes `forgotten:<hash>`
    pages                go
"""

from __future__ import annotations

import json
from collections.abc import Callable

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import InfrastructureError, StorageError
from pipeline.storage import Storage
from pipeline.table.forgotten import Forgotten
from pipeline.table.inspection import UNREADABLE, reason
from pipeline.table.parts import part_writer
from pipeline.table.traces import Trace

_TRIES = 20


def take_out(storage: Storage, trace: Trace, forgotten: Forgotten) -> None:
    """Takes every forgotten image out of the file of `trace`, in one atomic step; a file that is gone is fine.

    Raises StorageError, InfrastructureError where the file is damaged or changes all the time. Safe to repeat. Memory:
    the file twice.
    """
    if trace.kind == "page":
        storage.delete(trace.uri)
        return
    change: dict[str, Callable[[bytes, Forgotten], bytes | None]] = {
        "part": _without_rows,
        "evaluation": _without_rows,
        "event": _without_lines,
        "list": _with_stand_ins,
        "record": _without_source,
    }
    for _ in range(_TRIES):
        try:
            blob = storage.get(trace.uri)
        except StorageError as error:
            if error.kind == "missing":
                return
            raise
        try:
            rest = change[trace.kind](blob.data, forgotten)
        except UNREADABLE as error:
            raise InfrastructureError(
                f"{trace.uri}: {reason(error)}. `maskmill verify` says how to mend it; then forget again"
            ) from error
        if rest is None:
            storage.delete(trace.uri)
            return
        if rest == blob.data or storage.replace(trace.uri, rest, etag=blob.etag):
            return
    raise InfrastructureError(f"{trace.uri} was changed by somebody else each time: forget again when it is quiet")


def _without_rows(data: bytes, forgotten: Forgotten) -> bytes:
    """Row groups, schema, metadata and encodings stay."""
    file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
    sink, changed = pa.BufferOutputStream(), False
    with part_writer(sink, file.schema_arrow) as writer:
        for index in range(file.num_row_groups):
            rows = file.read_row_group(index)
            kept = rows.filter(_kept(rows["image_uri"], forgotten))
            changed |= len(kept) < len(rows)
            if len(kept):
                writer.write_table(kept, row_group_size=len(kept))
    return sink.getvalue().to_pybytes() if changed else data


def _without_lines(data: bytes, forgotten: Forgotten) -> bytes | None:
    table = pq.read_table(pa.BufferReader(data))
    kept = table.filter(_kept(table["image_uri"], forgotten))
    if len(kept) == len(table):
        return data
    return _written(kept) if len(kept) else None


def _with_stand_ins(data: bytes, forgotten: Forgotten) -> bytes:
    """What is known of the image besides its name goes, too: its etag may be a digest of it."""
    file = pq.ParquetFile(pa.BufferReader(data))
    # DuckDB declares columns in which it found no NULL as required.
    schema = pa.schema([field.with_nullable(True) for field in file.schema_arrow], file.schema_arrow.metadata)
    sink, changed = pa.BufferOutputStream(), False
    with pq.ParquetWriter(sink, schema, compression="zstd", write_page_checksum=True) as writer:
        for index in range(file.num_row_groups):
            lines = file.read_row_group(index)
            columns = {name: lines[name] for name in lines.column_names}
            stand_ins = pa.array([forgotten.stand_in(uri) for uri in lines["uri"].to_pylist()], pa.string())
            gone = pc.is_valid(stand_ins)
            changed |= pc.any(gone).as_py() or False
            columns["uri"] = pc.coalesce(stand_ins, columns["uri"])
            columns["etag"] = pc.if_else(gone, "", columns["etag"])
            for name in ("size_bytes", "modified"):
                columns[name] = pc.if_else(gone, pa.scalar(None, schema.field(name).type), columns[name])
            writer.write_table(pa.table(columns, schema=schema))
    return sink.getvalue().to_pybytes() if changed else data


def _without_source(data: bytes, forgotten: Forgotten) -> bytes:
    body = json.loads(data)
    plan = body.get("plan", body)
    stand_in = forgotten.stand_in(plan["command"]["source"])
    if stand_in is None:
        return data
    plan["command"]["source"] = stand_in
    return json.dumps(body, indent=1).encode()


def _kept(uris: pa.ChunkedArray, forgotten: Forgotten) -> pa.Array:
    return pa.array([forgotten.stand_in(uri) is None for uri in uris.to_pylist()], pa.bool_())


def _written(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue().to_pybytes()
