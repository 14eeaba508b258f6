"""The result of a query, as people and pipes see it. Owns: what a value looks like in each format. Must not know:
options, where rows come from.
"""

from __future__ import annotations

import base64
import json
import math
import sys
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from rich.table import Table
from rich.text import Text

from pipeline.screen import plain, stdout
from pipeline.wording import counted

_BATCH_ROWS = 2048
_DATES = frozenset({"date", "timestamp", "timestamp_s", "timestamp_ms", "timestamp_ns", "timestamp with time zone"})
_NESTED = frozenset({"list", "array", "map", "struct", "union", "tuple"})
# Python and Arrow cannot write DuckDB's other dates: before our era, after the year 9999, infinite.
_PLAIN_DATE = "isfinite(#{0}) AND year(#{0}) BETWEEN 1 AND 9999"


def print_rows(relation: Any) -> None:
    limit = 1000
    spelled, paired = _spelled(relation.limit(limit + 1))
    rows = [tuple(_whole_row(row, paired)) for row in spelled.fetchall()]
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in relation.columns:
        table.add_column(Text(plain(column)), overflow="fold")
    for row in rows[:limit]:
        table.add_row(*(Text(_cell(value)) for value in row))
    console = stdout()
    if not console.is_terminal:
        # A reader at the other end of a pipe wants a row per line.
        console.width = 100_000
    console.print(table)
    shown = f"the first {limit} rows; --format csv gives all" if len(rows) > limit else counted(len(rows), "row")
    console.print(Text(f"({shown})", style="dim"))


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = "" if value is None else plain(str(_without_bytes(value)))
    return text if len(text) <= 200 else text[:199] + "…"


class _Size(int):
    """A number of bytes, in place of the bytes themselves."""

    def __repr__(self) -> str:
        return f"<{int(self)} bytes>"

    __str__ = __repr__


def _without_bytes(value: object) -> object:
    if isinstance(value, bytes):
        return _Size(len(value))
    if isinstance(value, dict):
        return {key: _without_bytes(one) for key, one in value.items()}
    return [_without_bytes(one) for one in value] if isinstance(value, list) else value


def write_rows(relation: Any, output: str) -> None:
    """All rows, batch by batch: the result need not fit into memory."""
    out = sys.stdout.buffer
    if output == "parquet":
        reader = relation.to_arrow_reader(_BATCH_ROWS)
        with pq.ParquetWriter(out, reader.schema, compression="zstd") as writer:
            for batch in reader:
                writer.write_batch(batch)
        return
    names = list(relation.columns)
    spelled, paired = _spelled(relation)
    reader = spelled.to_arrow_reader(_BATCH_ROWS)
    if output == "csv":
        # CSV knows text and numbers only: bytes become base64, lists and structs JSON.
        _write_csv(pa.table([pa.array([], pa.string())] * len(names), names), out, header=True)
        for batch in reader:
            columns = [_flat(column) for column in _whole_columns(batch, paired, as_csv=True)]
            _write_csv(pa.record_batch(columns, names), out, header=False)
    else:
        separator = b"["
        # A result may repeat a name, and an object may not.
        unique = [f"{name}_{before}" if (before := names[:at].count(name)) else name for at, name in enumerate(names)]
        for batch in reader:
            for row in pa.record_batch(list(_whole_columns(batch, paired)), unique).to_pylist():
                out.write(separator + json.dumps(_json_value(row), allow_nan=False).encode())
                separator = b",\n"
        out.write(b"]\n" if separator != b"[" else b"[]\n")


def _write_csv(rows: Any, out: Any, *, header: bool) -> None:
    pa.csv.write_csv(rows, out, pa.csv.WriteOptions(include_header=header))


def _spelled(relation: Any) -> tuple[Any, list[bool]]:
    """`relation` with no date that Python and Arrow cannot write, and which of its columns are two now: such dates, as
    DuckDB writes them, are in the second, where the first is NULL. In lists and the like all dates become text."""
    shown, paired = [], [kind.id in _DATES for kind in relation.types]
    for number, kind in enumerate(relation.types, 1):
        if kind.id in _DATES:
            plain_date = _PLAIN_DATE.format(number)
            shown.append(f"CASE WHEN {plain_date} THEN #{number} END")
            shown.append(f"CASE WHEN NOT ({plain_date}) THEN #{number}::VARCHAR END")
        else:
            shown.append(f"#{number}::{_without_dates(kind)}" if _has_dates(kind) else f"#{number}")
    return relation.project(", ".join(shown)) if any(map(_has_dates, relation.types)) else relation, paired


def _has_dates(kind: Any) -> bool:
    return kind.id in _DATES or any(_has_dates(inner) for _, inner in _inner(kind))


def _inner(kind: Any) -> list[tuple[str, Any]]:
    return [(name, one) for name, one in kind.children if not isinstance(one, int)] if kind.id in _NESTED else []


def _without_dates(kind: Any) -> str:
    """The SQL of a type of DuckDB's, with text in place of dates."""
    if kind.id in _DATES:
        return "VARCHAR"
    if not _has_dates(kind):
        return str(kind)
    inner = [(name, _without_dates(one)) for name, one in _inner(kind)]
    if kind.id == "list":
        return f"{inner[0][1]}[]"
    if kind.id == "array":
        return f"{inner[0][1]}[{dict(kind.children)['size']}]"
    if kind.id == "map":
        return f"MAP({inner[0][1]}, {inner[1][1]})"
    fields = ['"' + name.replace('"', '""') + f'" {text}' for name, text in inner if name]
    return f"{kind.id}({', '.join(fields)})" if fields else "VARCHAR"  # without names it has no type to be written


def _whole_row(row: tuple[Any, ...], paired: list[bool]) -> Iterator[Any]:
    values = iter(row)
    for is_pair in paired:
        value = next(values)
        text = next(values) if is_pair else None
        yield value if text is None else text


def _whole_columns(batch: pa.RecordBatch, paired: list[bool], *, as_csv: bool = False) -> Iterator[pa.Array]:
    """`as_csv`: dates beside those that are text are written as Arrow does where there are no such."""
    columns = iter(batch.columns)
    for is_pair in paired:
        column = next(columns)
        texts = next(columns) if is_pair else None
        if texts is None or texts.null_count == len(texts):
            yield column
        else:
            plain_dates = column.cast(pa.string()) if as_csv else [_text(value) for value in column.to_pylist()]
            yield pc.coalesce(texts, pa.array(plain_dates, pa.string()))


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _is_deep(kind: pa.DataType) -> bool:
    return pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_interval(kind)


def _flat(column: pa.Array) -> pa.Array:
    if not _is_deep(column.type):
        return column
    values = (_json_value(value) for value in column.to_pylist())
    texts = (value if value is None or isinstance(value, str) else json.dumps(value) for value in values)
    return pa.array(texts, pa.string())


def _json_value(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _json_value(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(inner) for inner in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Decimal):  # what DuckDB makes of a sum
        return int(value) if value == value.to_integral_value() else float(value)
    return value if value is None or isinstance(value, str | int) else str(value)
