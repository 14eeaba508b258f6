"""How a run ends. Owns: counting its rows from its Parts, closing it, giving it up.
Must not know: workers, planning, the command that started it.
"""

from __future__ import annotations

import datetime as dt
import tempfile
from pathlib import Path
from typing import NamedTuple

from pipeline.engine.fleet import FleetProgress
from pipeline.engine.lease import Lease
from pipeline.engine.ledger import Ledger, Plan, RunRecord
from pipeline.engine.worker import Device
from pipeline.errors import ReconciliationError
from pipeline.table.catalog import open_duckdb, read_parts_sql, sql_text
from pipeline.table.parts import commit_empty

_MEMORY_BYTES = 3 << 30


class Session(NamedTuple):
    """One driver's share of a run: what it took, what its workers did, and what they ran on."""

    seconds: float
    progress: FleetProgress
    devices: list[Device]


def reconcile(ledger: Ledger, plan: Plan, session: Session) -> RunRecord:
    """Checks from the Parts themselves that every listed (uri, etag) of `plan` has its row, and sums them up.

    Raises ReconciliationError where a row is missing or there is one too many; the run then stays open.
    """
    sizes = ledger.committed(plan)
    shards = len(plan.bounds())
    if set(sizes) != set(range(shards)):
        raise ReconciliationError(
            f"run {plan.run_id}: {len(set(range(shards)) - set(sizes))} of {shards} Parts are not there; "
            "the same command continues"
        )
    known = {plan.part_uri(ordinal): size for ordinal, size in sizes.items()}
    with tempfile.TemporaryDirectory(prefix="maskmill-") as folder:
        connection = open_duckdb(ledger.storage, sizes=known, memory_bytes=_MEMORY_BYTES, temp_path=folder)
        try:
            rows = read_parts_sql([plan.part_uri(ordinal) for ordinal in range(shards)])
            path = Path(folder, "manifest.parquet")
            path.write_bytes(ledger.storage.get(ledger.uri(plan.run_id, "manifest.parquet")).data)
            listed = f"read_parquet({sql_text(str(path))})"
            without_row = f"{listed} m ANTI JOIN {rows} r ON m.uri = r.image_uri AND m.etag = r.listed_etag"
            missing, example_uri = connection.execute(f"SELECT count(*), min(m.uri) FROM {without_row}").fetchone()
            ok, errors, strangers, instances, megapixels, fetch, decode, infer, encode = connection.execute(
                "SELECT count(*) FILTER (status = 'ok'), count(*) FILTER (status = 'error'), "
                f"count(*) FILTER (run_id IS DISTINCT FROM {sql_text(plan.run_id)}), "
                "coalesce(sum(len(instances)), 0), coalesce(sum(width::DOUBLE * height), 0) / 1e6, "
                "coalesce(sum(fetch_ms), 0), coalesce(sum(decode_ms), 0), coalesce(sum(infer_ms), 0), "
                "coalesce(sum(encode_ms), 0) "
                f"FROM {rows}"
            ).fetchone()
            kinds = dict(
                connection.execute(
                    f"SELECT error_kind, count(*) FROM {rows} WHERE status = 'error' GROUP BY 1 ORDER BY 2 DESC, 1"
                ).fetchall()
            )
        finally:
            connection.close()
    if strangers:
        raise ReconciliationError(f"run {plan.run_id}: {strangers} rows in its Parts name another run")
    if missing or ok + errors != plan.counts.planned:
        example = f"{missing} have none, for example {example_uri!r}" if missing else "some images have more than one"
        raise ReconciliationError(
            f"run {plan.run_id}: {ok + errors} rows for {plan.counts.planned} listed images; {example}"
        )
    seconds, progress = session.seconds, session.progress
    images_per_s = progress.rows / seconds if seconds else 0.0
    return RunRecord(
        state="done",
        closed_at=dt.datetime.now(dt.UTC),
        plan=plan,
        ok=ok,
        errors=errors,
        errors_by_kind=kinds,
        parts=shards,
        parts_bytes=sum(sizes.values()),
        instances=instances,
        megapixels=megapixels,
        stage_ms={"fetch": fetch, "decode": decode, "infer": infer, "encode": encode},
        seconds=seconds,
        images_per_s=images_per_s,
        megapixels_per_s=images_per_s * megapixels / max(1, ok + errors),
        model_busy_fraction=progress.busy_s / progress.active_s if progress.active_s else 0.0,
        workers=[device._asdict() for device in session.devices],
    )


def abandon(ledger: Ledger, plan: Plan, *, ttl_s: float) -> RunRecord:
    """Gives a run up for good: takes every name that is still free, so that late workers find it taken, then closes it.

    Raises HeldError where a live driver holds it. What was committed stays.
    """
    # What a driver that slept through the end of its run has written beside it must not hold anybody up.
    if (over := ledger.record(plan.run_id)) is not None:
        return over
    with Lease(ledger.storage, ledger.uri(plan.run_id, "lease.json"), ttl_s=ttl_s):
        closed = ledger.record(plan.run_id)
        if closed is not None:
            return closed
        for ordinal in sorted(set(range(len(plan.bounds()))) - set(ledger.committed(plan))):
            commit_empty(ledger.storage, plan.part_uri(ordinal))
        ok, kinds = count_rows(ledger, plan, set(range(len(plan.bounds()))))
        sizes = ledger.committed(plan)
        record = RunRecord(
            state="abandoned", closed_at=dt.datetime.now(dt.UTC), plan=plan, ok=ok, errors=sum(kinds.values()),
            errors_by_kind=kinds, parts=len(sizes), parts_bytes=sum(sizes.values()), instances=0, megapixels=0.0,
            stage_ms={}, seconds=0.0, images_per_s=0.0, megapixels_per_s=0.0, model_busy_fraction=0.0, workers=[],
        )  # fmt: skip
        ledger.close(record)
        return record


def count_rows(ledger: Ledger, plan: Plan, ordinals: set[int]) -> tuple[int, dict[str, int]]:
    """(rows that are ok, errors by kind) in these Parts of a run, which must be there."""
    if not ordinals:
        return 0, {}
    rows = read_parts_sql([plan.part_uri(ordinal) for ordinal in sorted(ordinals)])
    connection = open_duckdb(ledger.storage, memory_bytes=_MEMORY_BYTES)
    try:
        counted = connection.execute(
            f"SELECT error_kind, count(*) FROM {rows} GROUP BY 1 ORDER BY 2 DESC, 1"
        ).fetchall()
    finally:
        connection.close()
    by_kind = {kind: int(number) for kind, number in counted}
    return by_kind.pop(None, 0), by_kind
