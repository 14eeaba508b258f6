"""A DEST written by hand, run by run, as runs leave it: frozen lists, Parts, records whose counts are right."""

from __future__ import annotations

import datetime as dt
import io
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from handmade import CREATED_AT, make_part, make_plan, make_record, make_row

from models.masks import encode_mask_png, encode_rle, mask_crc32
from pipeline.engine.ledger import Ledger, Plan, WorkCounts
from pipeline.storage import open_storage
from pipeline.table.catalog import connect
from pipeline.table.schema import WORK, shard_bounds

HOUR = dt.timedelta(hours=1)
PALETTE = [(0, 0, 0), (255, 0, 0)]


class Table:
    """A DEST that is written run by run."""

    def __init__(self, dest: str) -> None:
        self.ledger = Ledger(open_storage(dest), dest)
        self.dest = dest
        self.runs = 0

    def run(
        self, *rows: dict[str, Any], state: str = "done", changed: int = 0, record: dict[str, Any] | None = None,
        at: dt.datetime | None = None, **changes: Any,
    ) -> Plan:  # fmt: skip
        """A run of these rows, an hour after the last; `state` `open` leaves it open. `changes` are fields of the plan,
        `force` and `limit` of its command; `record` those of its record."""
        self.runs += 1
        at = at or CREATED_AT + self.runs * HOUR
        counts = WorkCounts(images=len(rows), left=len(rows), changed=changed, planned=len(rows))
        command = {name: changes.pop(name) for name in ("force", "limit", "source") if name in changes}
        plan = make_plan(
            self.dest, run_id=f"{at:%Y%m%dT%H%M%SZ}-{self.runs:06x}", sequence=self.runs, created_at=at, counts=counts,
            shard_size=100, run_date=at.date(),
        )  # fmt: skip
        plan = plan.model_copy(update=changes | {"command": plan.command.model_copy(update=command)})
        stamp = {
            "run_id": plan.run_id, "model_version": plan.model_version, "settings_digest": plan.settings_digest,
        }  # fmt: skip
        rows_here = [{"processed_at": at} | _without(row, "processed_at") | stamp for row in rows]
        assert self.ledger.freeze(plan, make_work(rows_here))
        for ordinal, (start, stop) in enumerate(shard_bounds(len(rows), shard_size=plan.shard_size)):
            data = make_part(rows_here[start:stop], model_name=plan.model_name)
            self.ledger.storage.put_new(plan.part_uri(ordinal), data)
        if state != "open":
            self.close(plan, rows_here, state, record or {})
        return plan

    def close(self, plan: Plan, rows: list[dict[str, Any]], state: str, changes: dict[str, Any]) -> None:
        sizes = self.ledger.committed(plan)
        kinds = Counter(row["error_kind"] for row in rows if row["status"] == "error")
        fields = {
            "state": state, "closed_at": plan.created_at + HOUR / 2, "ok": len(rows) - kinds.total(),
            "errors": kinds.total(), "errors_by_kind": dict(kinds), "parts": len(sizes),
            "parts_bytes": sum(sizes.values()), "instances": sum(len(row.get("instances") or ()) for row in rows),
        }  # fmt: skip
        self.ledger.close(make_record(plan, **(fields | changes)))

    def ask(self, sql: str) -> list[tuple[Any, ...]]:
        return list(connect(self.dest).sql(sql).fetchall())


def make_work(rows: list[dict[str, Any]]) -> bytes:
    """The frozen list that these rows answer."""
    listed = [
        {"uri": row["image_uri"], "etag": row["listed_etag"], "size_bytes": 10, "modified": CREATED_AT, "attempt": 1}
        for row in rows
    ]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(listed, WORK), sink)
    return sink.getvalue()


def _without(row: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != name or value != CREATED_AT}


def whole_row(uri: str, seed: int = 0, etag: str = "e1", **changes: Any) -> dict[str, Any]:
    """A row of an image of 40 × 30 as a worker would write it; noise, so that the PNG hardly compresses."""
    class_ids = np.random.default_rng(seed).integers(0, 2, (30, 40)).astype(np.uint8)
    counts = np.bincount(class_ids.ravel(), minlength=2)
    rle = encode_rle(class_ids == 1)
    classes = [
        {"class_id": index, "name": name, "pixels": int(counts[index]), "fraction": float(counts[index] / 1200),
         "mean_confidence": 0.5, "regions": 1}
        for index, name in enumerate(("background", "cell"))
    ]  # fmt: skip
    instance = {"class_id": 1, "name": "cell", "score": 0.5, "bbox": [0.0, 0.0, 1.0, 1.0], "area": 1, "rle": rle}
    return make_row(uri, etag, width=40, height=30, classes=classes, instances=[instance], mask_crc32=mask_crc32(
        class_ids, [rle]), mask={"bytes": encode_mask_png(class_ids, PALETTE), "path": None}, **changes)  # fmt: skip
