"""Runs as people ask about them, from any shell, while they run too. Owns: `list`, `show`, `abandon` as plain calls.
Must not know: how they are printed.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from operator import itemgetter
from typing import Any

import duckdb

from pipeline.engine.lease import process_start, read_lease, this_host
from pipeline.engine.ledger import Ledger, Plan, RunEntry, RunRecord
from pipeline.engine.reconciliation import abandon
from pipeline.errors import UsageError
from pipeline.storage import normalize_uri, open_storage
from pipeline.table.catalog import unreadable
from pipeline.table.runs import PRUNED_NAME

_LEASE_TTL_S = 30.0
_GETS_AT_ONCE = 16


def list_runs(dest: str, *, profile: str | None = None) -> list[dict[str, Any]]:
    """One mapping a run, newest first. Raises UsageError where DEST has none."""
    ledger = _ledger(dest, profile)
    entries = ledger.entries()
    if not entries:
        raise UsageError(f"{dest} holds no runs: give the DEST of an earlier `maskmill segment`")
    with ThreadPoolExecutor(_GETS_AT_ONCE) as pool:
        listed = [one for one in pool.map(partial(_listed, ledger), entries) if one is not None]
    return [row for _, row in sorted(listed, key=itemgetter(0), reverse=True)]


def _listed(ledger: Ledger, entry: RunEntry) -> tuple[int, dict[str, Any]] | None:
    """Sequence and summary of a run, which may have ended since it was listed; None for a plan that lost its race."""
    record = ledger.record(entry.run_id) if entry.closed else None
    plan = record.plan if record else ledger.begun(entry.run_id)
    if plan is None:
        return None
    row = _summary(ledger, plan, record or ledger.record(entry.run_id))
    return plan.sequence, (row | {"state": "pruned"} if entry.pruned else row)


def show_run(dest: str, run_id: str, *, profile: str | None = None) -> dict[str, Any]:
    """The summary and, below it, the whole plan or record, and as `drift` how it compared with the runs before it, None
    where nobody looked. Raises UsageError where there is no such run."""
    ledger = _ledger(dest, profile)
    plan = ledger.plan(run_id)
    record = ledger.record(run_id)
    body: dict[str, Any] = record.model_dump(mode="json") if record else {"plan": plan.model_dump(mode="json")}
    if ledger.read_json(run_id, PRUNED_NAME):
        body["state"] = "pruned"
    return _summary(ledger, plan, record) | body | {"drift": ledger.read_json(run_id, "drift.json")}


def abandon_run(dest: str, run_id: str, *, profile: str | None = None) -> dict[str, Any]:
    """Raises UsageError where there is no such run, HeldError where a live driver holds it, InfrastructureError where
    its Parts cannot be read. Twice is fine."""
    ledger = _ledger(dest, profile)
    plan = ledger.plan(run_id)
    try:
        record = abandon(ledger, plan, ttl_s=_LEASE_TTL_S)
    except duckdb.Error as error:
        raise unreadable(dest, error) from error
    return _summary(ledger, plan, record)


def _summary(ledger: Ledger, plan: Plan, record: RunRecord | None) -> dict[str, Any]:
    common = {
        "run_id": plan.run_id,
        "model": plan.model_name,
        "model_version": plan.model_version,
        "source": plan.command.source,
        "created_at": plan.created_at.isoformat(timespec="seconds"),
        "planned": plan.counts.planned,
        "removed": plan.removed,
        "returned": plan.returned,
    }
    if record is not None:
        return common | {
            "state": record.state,
            "rows": record.ok + record.errors,
            "errors": record.errors,
            "images_per_s": round(record.images_per_s, 2),
            "holder": None,
        }
    lease = read_lease(ledger.storage, ledger.uri(plan.run_id, "lease.json"))
    progress = ledger.progress(plan.run_id)
    bounds = plan.bounds()
    rows = sum(bounds[ordinal][1] - bounds[ordinal][0] for ordinal in ledger.committed(plan) if ordinal < len(bounds))
    return common | {
        "state": "running" if _seems_alive(lease) else "open",
        "rows": rows,
        "errors": int(progress.get("errors", 0)),
        "images_per_s": None,
        "holder": f"{str(lease.get('host')).split('/')[0]}:{lease.get('pid')}" if lease else None,
    }


def _seems_alive(lease: dict[str, Any]) -> bool:
    """For people only: compares wall clocks, which a decision must never do."""
    if not lease:
        return False
    if lease.get("host") == this_host():
        return process_start(int(lease.get("pid", -1))) == lease.get("started")
    return time.time() - float(lease.get("at", 0)) < 2 * float(lease.get("ttl_s", _LEASE_TTL_S))


def _ledger(dest: str, profile: str | None) -> Ledger:
    uri = normalize_uri(dest)
    return Ledger(open_storage(uri, profile=profile), uri)
