"""Runs as DEST remembers them. Owns `DEST/runs/`: frozen plans, the log that orders them, the record that closes a run.
Must not know: how a run's work is done.

    runs/_log/<n>.json            create-only; its existence makes plan n real (and orders all plans)
    runs/<run_id>/manifest.parquet    the frozen list, create-only
    runs/<run_id>/plan.json           the frozen settings, create-only
    runs/<run_id>/lease.json          who works on it now (overwritten)
    runs/<run_id>/progress.json       how far it is (overwritten, for people)
    runs/<run_id>/run.json            the outcome, create-only; its existence closes the run

Nothing that decides anything is ever overwritten, so a driver that wakes up late can neither reopen nor rewrite a run.
"""

from __future__ import annotations

import datetime as dt
import json
import logging
import re
import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.config import Precision, PrecisionChoice
from pipeline.engine.limits import RunLimits
from pipeline.errors import InfrastructureError, StorageError, UsageError
from pipeline.storage import Storage, join_uri
from pipeline.table.catalog import files_below
from pipeline.table.runs import PRUNED_NAME
from pipeline.table.schema import RUN_ID, PartPlace, parse_part_name, part_name, shard_bounds

log = logging.getLogger(__name__)

_T = TypeVar("_T", bound=BaseModel)
_GETS_AT_ONCE = 16
_LOG_NAME = re.compile(r"/(\d{8,})\.json\Z")


class Command(BaseModel):
    """What makes two commands the same command: an open run is continued by its own command only."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    model_version: str
    precision: PrecisionChoice
    suffixes: tuple[str, ...]
    max_pixels: int
    limit: int | None
    retry_errors: bool
    force: bool
    settings: dict[str, Any] = {}
    compile: bool = False


class WorkCounts(BaseModel):
    """How the images of SOURCE divide. `images` = `done` + `exhausted` + `held` + `left`; `left` = `new` + `changed` +
    `failed_before` + `repeated` (done before, and forced now).

    `planned` is `left` cut to the limit. `held_by` names the open runs that hold images back. `forgotten` lines of
    SOURCE are not among `images`: they are to stay forgotten.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    images: int = 0
    duplicates: int = 0
    forgotten: int = 0
    done: int = 0
    exhausted: int = 0
    held: int = 0
    held_by: dict[str, int] = {}
    left: int = 0
    new: int = 0
    changed: int = 0
    failed_before: int = 0
    repeated: int = 0
    planned: int = 0
    planned_bytes: int = 0


class Plan(BaseModel):
    """A run, frozen: everything that decides what its rows will be."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run_id: str
    sequence: int
    created_at: dt.datetime
    run_date: dt.date
    dest: str
    command: Command
    model_name: str
    model_version: str
    card: dict[str, Any]
    #: First 12 hex of the SHA-256 of the card's JSON; empty in runs of older releases.
    card_digest: str = ""
    settings: dict[str, Any]
    settings_digest: str
    precision: Precision
    batch_size: int
    batch_pixels: int
    threads: int
    shard_size: int
    canary: int
    counts: WorkCounts
    code_digest: str
    #: Of the Parts and of the frozen list.
    schema_version: str = "1"
    #: Whether the images were found by listing SOURCE, rather than named by somebody.
    listed: bool = True
    #: Whether images need a signed address to be read; such addresses are in SOURCE only.
    signed: bool = False
    #: All runs up to this sequence were closed when this one was planned: what it reads, it reads after them, whatever
    #: the clocks of their hosts say. None in runs of older releases.
    closed_before: int | None = None
    #: Images that this plan records as gone from SOURCE, and as back at bytes that were done before.
    removed: int = 0
    returned: int = 0

    @property
    def place(self) -> PartPlace:
        """Where this run's Parts lie."""
        return PartPlace(self.model_name, self.model_version, self.run_date)

    def bounds(self) -> list[tuple[int, int]]:
        """As `shard_bounds`."""
        return shard_bounds(self.counts.planned, shard_size=self.shard_size, canary=self.canary)

    def part_uri(self, ordinal: int) -> str:
        """The one place where shard `ordinal` can be committed."""
        return join_uri(self.dest, self.place.folder(), part_name(self.run_id, ordinal))


class RunRecord(BaseModel):
    """`run.json`: the plan and what became of it. Counts come from the Parts themselves."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    state: Literal["done", "abandoned"]
    closed_at: dt.datetime
    plan: Plan
    ok: int
    errors: int
    errors_by_kind: dict[str, int]
    parts: int
    parts_bytes: int
    instances: int
    megapixels: float
    stage_ms: dict[str, float]
    seconds: float
    images_per_s: float
    megapixels_per_s: float
    model_busy_fraction: float
    workers: list[dict[str, Any]]
    #: How near it came to its limits; None where nothing was done, and in runs of older releases.
    limits: RunLimits | None = None


class RunEntry(NamedTuple):
    """A run as a listing of DEST/runs shows it. `pruned`: its Parts were deleted."""

    run_id: str
    closed: bool
    pruned: bool = False


def new_run_id(now: dt.datetime) -> str:
    """Sortable by time, unique by 24 random bits besides."""
    return f"{now.astimezone(dt.UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"


class Ledger:
    """DEST/runs. All methods raise StorageError where the store does."""

    def __init__(self, storage: Storage, dest: str) -> None:
        self.storage = storage
        self.dest = dest

    def uri(self, run_id: str, name: str) -> str:
        """A file of a run."""
        return join_uri(self.dest, "runs", run_id, name)

    def entries(self) -> list[RunEntry]:
        """Every run that has a plan, oldest first: one LIST."""
        files: dict[str, set[str]] = {}
        for uri in files_below(self.storage, join_uri(self.dest, "runs")):
            run_id, _, name = uri.rpartition("/")
            files.setdefault(run_id.rpartition("/")[2], set()).add(name)
        return [
            RunEntry(run_id, "run.json" in names, PRUNED_NAME in names)
            for run_id, names in sorted(files.items())
            if "plan.json" in names and RUN_ID.fullmatch(run_id)
        ]

    def open_plans(self) -> list[Plan]:
        """The plans of all open runs, oldest first. One whose log entry names another run never began."""
        plans = (self.begun(entry.run_id) for entry in self.entries() if not entry.closed)
        return [plan for plan in plans if plan is not None]

    def begun(self, run_id: str) -> Plan | None:
        """The plan of a run. None where it lost its race: its driver takes it away, perhaps since it was listed."""
        uri = self.uri(run_id, "plan.json")
        if (data := self._get(uri)) is None:
            return None
        plan = _parse(Plan, data, uri)
        return plan if self._logged(plan.sequence) == run_id else None

    def plan(self, run_id: str) -> Plan:
        """Raises UsageError where there is no such run."""
        try:
            data = self.storage.get(self.uri(run_id, "plan.json")).data
        except StorageError as error:
            if error.kind == "missing":
                raise UsageError(f"no run {run_id!r} in {self.dest}: see `maskmill runs list {self.dest}`") from error
            raise
        return _parse(Plan, data, self.uri(run_id, "plan.json"))

    def is_closed(self, run_id: str) -> bool:
        """Whether the run has its record."""
        return self._get(self.uri(run_id, "run.json")) is not None

    def record(self, run_id: str) -> RunRecord | None:
        """The outcome of a closed run, None while it is open."""
        data = self._get(self.uri(run_id, "run.json"))
        return None if data is None else _parse(RunRecord, data, self.uri(run_id, "run.json"))

    def history(self, model_version: str) -> Iterator[tuple[Plan, RunRecord | None]]:
        """Runs of a model version, newest first, each with its outcome if it is closed. Read as they are asked for; one
        that cannot be read is left out with a warning, so that old debris does not stop new work.
        """
        entries = self.entries()[::-1]
        with ThreadPoolExecutor(_GETS_AT_ONCE) as pool:
            for start in range(0, len(entries), _GETS_AT_ONCE):
                some = [one for one in pool.map(self._remembered, entries[start : start + _GETS_AT_ONCE]) if one]
                # Two runs of one second are ordered by the log, not by their ids.
                some.sort(key=lambda one: one[0].sequence, reverse=True)
                yield from (one for one in some if one[0].model_version == model_version)

    def _remembered(self, entry: RunEntry) -> tuple[Plan, RunRecord | None] | None:
        try:
            if not entry.closed:
                return self.plan(entry.run_id), None
            record = self.record(entry.run_id)
            return (record.plan, record) if record else None
        except (InfrastructureError, UsageError) as error:
            log.warning("run %s is left out: %s", entry.run_id, error)
            return None

    def progress(self, run_id: str) -> dict[str, Any]:
        """The last progress a driver wrote, or nothing."""
        return self.read_json(run_id, "progress.json") or {}

    def read_json(self, run_id: str, name: str) -> dict[str, Any] | None:
        """What a file of a run says, None where there is none."""
        data = self._get(self.uri(run_id, name))
        return json.loads(data) if data else None

    def last_sequence(self) -> int:
        """The number of the newest plan; 0 in a new DEST."""
        found = (_LOG_NAME.search(uri) for uri in files_below(self.storage, join_uri(self.dest, "runs", "_log")))
        return max((int(name[1]) for name in found if name), default=0)

    def freeze(self, plan: Plan, manifest: bytes) -> bool:
        """Makes `plan` real, or returns False where somebody else's plan came first (then plan again: theirs counts).

        The log entry is the one step that decides; a crash before it leaves debris that no reader looks at.
        """
        for name, data in (
            ("manifest.parquet", manifest),
            ("plan.json", plan.model_dump_json(indent=1).encode()),
        ):
            uri = self.uri(plan.run_id, name)
            # After an answer that was lost on its way, "already there" may be our own file.
            if not self.storage.put_new(uri, data) and self.storage.get(uri).data != data:
                raise InfrastructureError(f"run id {plan.run_id} is taken in {self.dest}: run the command again")
        entry = json.dumps({"run_id": plan.run_id}).encode()
        created = self.storage.put_new(self._log_uri(plan.sequence), entry)
        if created or self._logged(plan.sequence) == plan.run_id:
            return True
        for name in ("plan.json", "manifest.parquet"):
            self.storage.delete(self.uri(plan.run_id, name))
        return False

    def close(self, record: RunRecord) -> None:
        """Closes a run for good. Twice is fine: the first record stands."""
        self.storage.put_new(self.uri(record.plan.run_id, "run.json"), record.model_dump_json(indent=1).encode())

    def committed(self, plan: Plan) -> dict[int, int]:
        """Ordinals of the Parts that `plan` has, with their size in bytes."""
        found: dict[int, int] = {}
        for uri, size_bytes in files_below(self.storage, join_uri(self.dest, plan.place.folder())).items():
            parsed = parse_part_name(uri.rpartition("/")[2])
            if parsed and parsed[0] == plan.run_id:
                found[parsed[1]] = size_bytes
        return found

    def _logged(self, sequence: int) -> str | None:
        data = self._get(self._log_uri(sequence))
        return json.loads(data)["run_id"] if data else None

    def _log_uri(self, sequence: int) -> str:
        return join_uri(self.dest, "runs", "_log", f"{sequence:08d}.json")

    def _get(self, uri: str) -> bytes | None:
        try:
            return bytes(self.storage.get(uri).data)
        except StorageError as error:
            if error.kind == "missing":
                return None
            raise


def _parse(kind: type[_T], data: bytes, uri: str) -> _T:
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise InfrastructureError(
            f"{uri} was written by another version of Maskmill or is damaged: {error.errors()[0]['msg']}"
        ) from error
