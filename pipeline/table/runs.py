"""Runs as SQL shows them. Owns: reading the records under DEST/runs, and the columns of the view `runs`.
Must not know: how runs are planned or closed; DuckDB.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pyarrow as pa

from pipeline.errors import InfrastructureError, StorageError
from pipeline.storage import Storage, join_uri
from pipeline.table.schema import RUN_ID

_GETS_AT_ONCE = 16

#: A file of a run whose existence says that its Parts and its list are deleted. See `pipeline.table.prune`.
PRUNED_NAME = "pruned.json"

#: Columns of the view `runs`. `removed`, `returned`: images that its plan found gone from SOURCE, or back. `workers`:
#: the machines' part of the record, one entry per worker. `closed_before`: all runs up to this sequence were closed
#: when it was planned.
RUNS = pa.schema(
    [
        ("run_id", pa.string()),
        ("sequence", pa.int64()),
        ("state", pa.string()),
        ("model", pa.string()),
        ("model_version", pa.string()),
        ("settings_digest", pa.string()),
        ("precision", pa.string()),
        ("source", pa.string()),
        ("run_date", pa.date32()),
        ("created_at", pa.timestamp("us", "UTC")),
        ("closed_at", pa.timestamp("us", "UTC")),
        ("planned", pa.int64()),
        ("removed", pa.int64()),
        ("returned", pa.int64()),
        ("ok", pa.int64()),
        ("errors", pa.int64()),
        ("parts", pa.int64()),
        ("parts_bytes", pa.int64()),
        ("instances", pa.int64()),
        ("megapixels", pa.float64()),
        ("seconds", pa.float64()),
        ("images_per_s", pa.float64()),
        ("model_busy_fraction", pa.float64()),
        ("workers", pa.list_(pa.struct([("node", pa.string()), ("device", pa.string()), ("name", pa.string())]))),
        ("repeats", pa.int64()),
        ("closed_before", pa.int64()),
    ]
)


class RunFiles(NamedTuple):
    """A run as its files say. `names`: of the files in its folder. `outcome`: `run.json`, None while it is open.
    `damage`: why a record could not be read; then `plan` may be empty."""

    run_id: str
    names: frozenset[str]
    plan: dict[str, Any]
    outcome: dict[str, Any] | None
    damage: str = ""

    @property
    def pruned(self) -> bool:
        """Whether its Parts and its list were deleted, or are to be."""
        return PRUNED_NAME in self.names

    @property
    def again(self) -> bool:
        """Whether it was asked to process images once more that were done already."""
        return bool(self.plan["command"]["force"] or self.plan["command"]["retry_errors"])

    @property
    def schema_version(self) -> str:
        """Of the Parts of this run. Plans say it from version 2 on."""
        return str(self.plan.get("schema_version", "1"))


def read_runs(storage: Storage, dest: str) -> list[RunFiles]:
    """Every run of DEST, by run id; plans that lost their race are left out. Raises StorageError.

    One LIST, then one GET a run, two for those that are open. Damaged records are reported, not raised.
    """
    prefix = join_uri(dest, "runs") + "/"
    names: set[str] = set()
    try:
        for batch in storage.list(prefix.rstrip("/")):
            names.update(uri.removeprefix(prefix) for uri in batch["uri"].to_pylist())
    except StorageError as error:
        if error.kind != "missing":
            raise
    own: dict[str, set[str]] = {}
    for name in names:
        run_id, _, file_name = name.partition("/")
        own.setdefault(run_id, set()).add(file_name)

    def read(run_id: str) -> RunFiles | None:
        files = frozenset(own[run_id])
        closed = "run.json" in files
        name = "run.json" if closed else "plan.json"
        try:
            body = json.loads(storage.get(f"{prefix}{run_id}/{name}").data)
            plan = body["plan"] if closed else body
            if plan["run_id"] != run_id:
                raise KeyError(f"it is of run {plan['run_id']}")
            _row(RunFiles(run_id, files, plan, body if closed else None))
            if not closed and not _began(storage, prefix, plan, names):
                return None
        except StorageError as error:
            if error.kind == "missing":  # a plan that lost its race, taken away since it was listed
                return None
            raise
        except (ValueError, KeyError, TypeError) as error:
            return RunFiles(run_id, files, {}, None, f"{prefix}{run_id}/{name} cannot be read ({error!r})")
        return RunFiles(run_id, files, plan, body if closed else None)

    with ThreadPoolExecutor(_GETS_AT_ONCE) as pool:
        runs = sorted(run_id for run_id, files in own.items() if "plan.json" in files and RUN_ID.fullmatch(run_id))
        return [found for found in pool.map(read, runs) if found]


def _began(storage: Storage, prefix: str, plan: dict[str, Any], names: set[str]) -> bool:
    entry = f"_log/{plan['sequence']:08d}.json"
    return entry in names and json.loads(storage.get(prefix + entry).data)["run_id"] == plan["run_id"]


def runs_table(runs: Sequence[RunFiles]) -> pa.Table:
    """The rows of the view `runs`. Raises InfrastructureError for a damaged record, and says which."""
    for run in runs:
        if run.damage:
            raise InfrastructureError(f"{run.damage}: restore it from a backup, or move the run's folder away")
    return pa.Table.from_pylist([_row(run) for run in runs], schema=RUNS)


def _row(run: RunFiles) -> dict[str, Any]:
    plan, outcome = run.plan, run.outcome or {}
    counts = plan["counts"]
    found = {
        "run_id": run.run_id,
        "sequence": plan["sequence"],
        "state": "pruned" if run.pruned else outcome["state"] if outcome else "open",
        "model": plan["model_name"],
        "model_version": plan["model_version"],
        "settings_digest": plan["settings_digest"],
        "precision": plan["precision"],
        "source": plan["command"]["source"],
        "run_date": dt.date.fromisoformat(plan["run_date"]),
        "created_at": dt.datetime.fromisoformat(plan["created_at"]),
        "closed_at": dt.datetime.fromisoformat(outcome["closed_at"]) if outcome else None,
        "planned": counts["planned"],
        "removed": plan.get("removed", 0),
        "returned": plan.get("returned", 0),
        "closed_before": plan.get("closed_before"),
        "repeats": counts["changed"] + (counts["planned"] if run.again else 0),
    }
    results = (
        "ok", "errors", "parts", "parts_bytes", "instances", "megapixels", "seconds", "images_per_s",
        "model_busy_fraction", "workers",
    )  # fmt: skip
    return found | {key: outcome.get(key) for key in results}
