"""What a `segment` call tells its caller. Owns: the outcome and its sums, the estimate of a plan, the events on the
way.
Must not know: how any of it came about.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from pipeline.corpus.manifest import Corpus
from pipeline.engine.fleet import FleetProgress
from pipeline.engine.ledger import Plan, RunRecord, WorkCounts
from pipeline.engine.reconciliation import RowSums, Session


class Estimate(BaseModel):
    """What a plan would cost. `basis` says where the figures come from."""

    model_config = ConfigDict(frozen=True)

    seconds: float | None
    output_bytes: int | None
    basis: str


class Preview(NamedTuple):
    """What a `segment` call would find to do. `open_runs`: those of this very command, which it continues first;
    `work` counts their images as held. `corpus`: what was read of SOURCE."""

    model_name: str
    model_version: str
    work: WorkCounts
    open_runs: list[str]
    corpus: Corpus


class Outcome(BaseModel):
    """What a `segment` call came to. `run_id` is None where there was nothing to do."""

    model_config = ConfigDict(frozen=True)

    state: Literal["done", "planned", "interrupted", "canary_failed"]
    run_id: str | None = None
    runs: list[str] = []
    engine: str = ""
    images: int = 0
    duplicates: int = 0
    planned: int = 0
    skipped: int = 0
    held: int = 0
    held_by: dict[str, int] = {}
    ok: int = 0
    errors: int = 0
    errors_by_kind: dict[str, int] = {}
    instances: int = 0
    #: Images that were recorded as gone from SOURCE, and as back there at bytes that were done before.
    removed: int = 0
    returned: int = 0
    parts: int = 0
    parts_bytes: int = 0
    seconds: float = 0.0
    images_per_s: float = 0.0
    megapixels_per_s: float = 0.0
    model_busy_fraction: float = 0.0
    model_name: str = ""
    model_version: str = ""
    #: Of the rows that this call asked for, whether it made them or found them done.
    settings_digest: str = ""
    work: WorkCounts | None = None
    shards: int = 0
    estimate: Estimate | None = None

    @property
    def error_rate(self) -> float:
        """Share of errors among this call's rows."""
        return self.errors / max(1, self.ok + self.errors)


class SoFar(NamedTuple):
    """What the Parts of a run that stays open hold, and how long this call has worked on it."""

    sums: RowSums
    parts: int
    parts_bytes: int
    session: Session


def tally(
    state: Literal["done", "planned", "interrupted", "canary_failed"],
    closed: Sequence[RunRecord],
    counts: WorkCounts,
    *,
    plan: Plan | None,
    so_far: SoFar | None,
    progress: FleetProgress,
) -> Outcome:
    """Sums over the runs that one call closed, and over the one that it leaves open. Engine and model are not filled
    in."""
    kinds: dict[str, int] = dict(so_far.sums.errors_by_kind) if so_far else {}
    for record in closed:
        for kind, number in record.errors_by_kind.items():
            kinds[kind] = kinds.get(kind, 0) + number
    # Rows of runs that were continued before this plan was made: done for the plan, but by this very call.
    continued = sum(r.ok + r.errors for r in closed if plan is None or r.plan.run_id != plan.run_id)
    # Of each run: seconds, images/s, Mpixel/s.
    speeds = [(r.seconds, r.images_per_s, r.megapixels_per_s) for r in closed]
    if so_far:
        rate = so_far.session.images_per_s
        speeds.append((so_far.session.seconds, rate, rate * so_far.sums.megapixels / max(1, so_far.sums.rows)))
    seconds = sum(speed[0] for speed in speeds)
    ids = [r.plan.run_id for r in closed]
    plans = [r.plan for r in closed] + [one for one in (plan,) if one is not None and one.run_id not in ids]
    if plan is not None and plan.run_id not in ids:
        ids.append(plan.run_id)
    return Outcome(
        state=state,
        run_id=ids[-1] if ids else None,
        runs=ids,
        images=counts.images,
        duplicates=counts.duplicates,
        planned=counts.planned + continued,
        skipped=max(0, counts.done + counts.exhausted - continued),
        held=counts.held,
        held_by=counts.held_by,
        ok=sum(r.ok for r in closed) + (so_far.sums.ok if so_far else 0),
        errors=sum(kinds.values()),
        errors_by_kind=kinds,
        instances=sum(r.instances for r in closed) + (so_far.sums.instances if so_far else 0),
        removed=sum(one.removed for one in plans),
        returned=sum(one.returned for one in plans),
        parts=sum(r.parts for r in closed) + (so_far.parts if so_far else 0),
        parts_bytes=sum(r.parts_bytes for r in closed) + (so_far.parts_bytes if so_far else 0),
        seconds=seconds,
        images_per_s=sum(speed[0] * speed[1] for speed in speeds) / seconds if seconds else 0.0,
        megapixels_per_s=sum(speed[0] * speed[2] for speed in speeds) / seconds if seconds else 0.0,
        model_busy_fraction=progress.busy_s / progress.active_s if progress.active_s else 0.0,
        work=counts,
    )


class Event(NamedTuple):
    """Something to tell people. `kind`: `note` (text), `warning` (text), `progress` (progress, total), `log` (what a
    worker logged: text, level)."""

    kind: Literal["note", "warning", "progress", "log"]
    text: str = ""
    progress: FleetProgress | None = None
    total: int = 0
    level: int = 0


Listener = Callable[[Event], None]
