"""How a training run went, epoch by epoch. Owns: the columns of the trace, and its file of one epoch. Must not know:
losses' formulas, where files lie.

Columns: `epoch` (from 1), `step` (steps done), `elapsed_s`, `learning_rate` (of the last step), `loss` (mean over the
epoch's steps), `loss_<part>` (its parts, weighted), `gradient_norm` (mean, before clipping), `images_per_s` (while
training, over all workers), `data_wait` (share of that time spent waiting for images), `val_<metric>` (null where the
epoch was not measured), `val_s`.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

_INTEGERS = frozenset({"epoch", "step"})


def trace_name(epoch: int) -> str:
    """The file of one epoch, below the run's folder."""
    return f"trace/{epoch:05d}.parquet"


def trace_parquet(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Rows as one Parquet file: whole numbers int64, all others float64."""
    rows = list(rows)
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {
        name: pa.array([row.get(name) for row in rows], pa.int64() if name in _INTEGERS else pa.float64())
        for name in names
    }
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


def finite(values: Mapping[str, float]) -> dict[str, float | None]:
    """JSON knows no NaN: what is not a number is not known."""
    return {name: float(value) if math.isfinite(value) else None for name, value in values.items()}


class EpochTally:
    """Sums over the steps of one epoch."""

    def __init__(self) -> None:
        self.steps = 0
        self.images = 0
        self.train_s = 0.0
        self.wait_s = 0.0
        self._sums: dict[str, float] = {}

    def add(self, values: Mapping[str, float]) -> None:
        """The figures of one step."""
        self.steps += 1
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def means(self) -> dict[str, float]:
        """By name; {} where there was no step."""
        return {name: total / self.steps for name, total in self._sums.items()}

    @property
    def images_per_s(self) -> float:
        return self.images / self.train_s if self.train_s else 0.0
