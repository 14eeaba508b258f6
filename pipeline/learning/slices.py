"""A table of evaluations in pieces, and what a model is worth on each. Owns: what may be sliced by, and how numbers are
grouped. Must not know: where tables are kept, how they are shown.
"""

from __future__ import annotations

import math
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from pipeline.errors import UsageError
from pipeline.learning.scores import Scores, score
from pipeline.table.evaluations import MEASURES

#: Numbers of more different values are cut into quarters of the images.
_VALUES_AS_THEY_ARE = 8
#: Pieces at most, those with most images.
MAX_SLICES = 24


class Slice(BaseModel):
    """The images of which something is the same, and their scores; None where none of them was measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: str
    images: int
    failed: int
    scores: Scores | None


def slices_of(table: pa.Table, by: str, **settings: Any) -> tuple[Slice, ...]:
    """The pieces of a table by `by`, a column or an SQL expression over the columns, by ascending value.

    Beside the columns of EVALUATIONS there are `size` (pixels, width x height) and `prefix` (the folder of the image's
    name). Numbers of many values are cut at their quartiles. Of more than MAX_SLICES pieces the largest are given.
    `settings` are those of `score`. Raises UsageError for an expression that cannot be evaluated.
    """
    values = _values(table, by)
    labels = _labels(values)
    groups: dict[str, list[int]] = {}
    for number in sorted(range(len(values)), key=lambda number: _place(values[number])):
        groups.setdefault(labels[number], []).append(number)
    if len(groups) > MAX_SLICES:
        largest = sorted(groups, key=lambda label: -len(groups[label]))[:MAX_SLICES]
        groups = {label: rows for label, rows in groups.items() if label in largest}
    found = []
    for label, rows in groups.items():
        piece = table.take(pa.array(rows, pa.int64()))
        ok = pc.sum(pc.equal(piece["status"], "ok")).as_py() or 0
        scores = score(piece, **settings) if ok else None
        found.append(Slice(value=label, images=ok, failed=len(rows) - ok, scores=scores))
    return tuple(found)


def _values(table: pa.Table, by: str) -> list[Any]:
    """The value of each row, in their order."""
    flat = table.select([name for name in table.column_names if name not in MEASURES.names or name == "truth_crc32"])
    flat = flat.append_column("_number", pa.array(np.arange(table.num_rows), pa.int64()))
    with duckdb.connect(config={"enable_external_access": "false"}) as connection:
        connection.execute("SET TimeZone = 'UTC'")
        connection.register("flat", flat)
        try:
            rows = connection.execute(
                f"SELECT ({by}) FROM (SELECT *, width::BIGINT * height AS size, "
                "coalesce(regexp_extract(image_name, '^(.*)/', 1), '') AS prefix FROM flat) ORDER BY _number"
            ).fetchall()
        except duckdb.Error as error:
            raise UsageError(
                f"the slice {by!r} cannot be evaluated: {str(error).splitlines()[0]}; give a column of the evaluations "
                "(size, prefix, stratum, brightness ...) or an SQL expression over them"
            ) from error
    if len(rows) != table.num_rows:
        raise UsageError(f"the slice {by!r} must give one value for each image")
    return [value for (value,) in rows]


def _place(value: Any) -> tuple[int, float, str]:
    """Numbers by size, then texts, then what is no value."""
    if isinstance(value, int | float) and math.isfinite(value):
        return 0, float(value), ""
    return (2, 0.0, "") if value is None else (1, 0.0, str(value))


def _labels(values: list[Any]) -> list[str]:
    """A name for the piece that each value belongs to."""
    places = [_place(value) for value in values]
    numbers = np.array([place[1] for place in places if place[0] == 0], dtype=np.float64)
    if len(numbers) and len(set(numbers.tolist())) > _VALUES_AS_THEY_ARE:
        edges = np.unique(np.quantile(numbers, (0, 0.25, 0.5, 0.75, 1)))
        return [_quarter(value, edges) for value in values]
    return ["null" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value) for value in values]


def _quarter(value: Any, edges: NDArray[np.float64]) -> str:
    if value is None or not math.isfinite(value):
        return "null"
    index = min(int(np.searchsorted(edges, value, side="right")) - 1, len(edges) - 2)
    return f"{edges[index]:.4g} to {edges[index + 1]:.4g}"
