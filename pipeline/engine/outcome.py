"""What a `segment` call tells its caller. Owns: the outcome, the estimate of a plan, the events on the way.
Must not know: how any of it came about.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from pipeline.engine.fleet import FleetProgress
from pipeline.engine.ledger import WorkCounts


class Estimate(BaseModel):
    """What a plan would cost. `basis` says where the figures come from."""

    model_config = ConfigDict(frozen=True)

    seconds: float | None
    output_bytes: int | None
    basis: str


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
    parts: int = 0
    parts_bytes: int = 0
    seconds: float = 0.0
    images_per_s: float = 0.0
    megapixels_per_s: float = 0.0
    model_busy_fraction: float = 0.0
    model_name: str = ""
    model_version: str = ""
    work: WorkCounts | None = None
    shards: int = 0
    estimate: Estimate | None = None

    @property
    def error_rate(self) -> float:
        """Share of errors among this call's rows."""
        return self.errors / max(1, self.ok + self.errors)


class Event(NamedTuple):
    """Something to tell people. `kind`: `note` (text), `warning` (text), `progress` (progress, total)."""

    kind: Literal["note", "warning", "progress"]
    text: str = ""
    progress: FleetProgress | None = None
    total: int = 0


Listener = Callable[[Event], None]
