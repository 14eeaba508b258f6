"""A run from question to closed record. Owns: the order of the steps of `segment`.
Must not know: how images are processed, how a terminal looks.

    open run of this command? ─▶ continue it ─▶ plan again ─▶ freeze ─▶ work ─▶ reconcile ─▶ close
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import json
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import duckdb

from pipeline.config import Precision, SegmentConfig
from pipeline.corpus.manifest import Corpus, read_source
from pipeline.engine.crew import Crew, InlineCrew, LocalCrew, gpu_count
from pipeline.engine.fleet import Fleet, FleetProgress
from pipeline.engine.lease import Lease, process_start, read_lease
from pipeline.engine.ledger import Command, Ledger, Plan, RunRecord, WorkCounts, new_run_id
from pipeline.engine.outcome import Estimate, Event, Listener, Outcome
from pipeline.engine.plan import Question, choose_shard_size, shard_lists, work_left
from pipeline.engine.reconciliation import Session, abandon, count_rows, reconcile
from pipeline.engine.stream import StreamConfig
from pipeline.engine.worker import Receipt, ShardTask, WorkerSpec, code_digest
from pipeline.errors import (
    HeldError,
    InfrastructureError,
    StoppedError,
    StorageError,
    SupersededError,
    UsageError,
)
from pipeline.registry import Model, resolve
from pipeline.storage import join_uri, normalize_uri, open_storage
from pipeline.table.catalog import part_sizes, unreadable

log = logging.getLogger(__name__)

_PLANNING_TRIES = 20
_SCRATCH = "maskmill-run-"
_DEAD_AFTER_S = 24 * 3600.0
_SAMPLE_IMAGES = 16
_REMOTE_FETCHES = 32
_PROGRESS_EVERY_S = 5.0
_LEAST_ROW_BYTES = 8 << 10


def segment(
    config: SegmentConfig, *, listen: Listener | None = None, should_stop: Callable[[], bool] | None = None
) -> Outcome:
    """Brings the table at `config.dest` up to date with `config.source`, and says what that came to.

    Guarantees: after state `done`, every image that was planned has exactly one row, counted from the Parts. Raises
    UsageError
    (nothing changed), InfrastructureError (what was committed is kept). Safe to call again, after anything: it
    continues.
    """
    _sweep_scratch()
    with tempfile.TemporaryDirectory(prefix=f"{_SCRATCH}{os.getpid()}-{process_start(os.getpid())}-") as scratch:
        return _Segmentation(
            config, Path(scratch), listen or (lambda event: None), should_stop or (lambda: False)
        ).run()


class _Memory(NamedTuple):
    """What earlier runs of a model version tell: the precision that `auto` came to (else any), and the last figures."""

    precision: Precision | None
    record: RunRecord | None


class _Segmentation:
    def __init__(self, config: SegmentConfig, scratch: Path, listen: Listener, should_stop: Callable[[], bool]) -> None:
        self._config = config
        self._scratch = scratch
        self._listen = listen
        self._should_stop = should_stop
        self._dest = normalize_uri(config.dest)
        self._source = normalize_uri(config.source)
        self._storage = open_storage(self._dest, profile=config.dest_profile)
        self._ledger = Ledger(self._storage, self._dest)
        self._crew: Crew | None = None
        self._fleet: Fleet | None = None
        self._superseded: threading.Event | None = None
        self._closed: list[RunRecord] = []
        self._memory: _Memory | None = None
        self._create_only = True

    def run(self) -> Outcome:
        model = resolve(self._config.model)
        try:
            return self._continue(model) or self._plan_and_work(model)
        except duckdb.Error as error:
            raise unreadable(self._dest, error) from error
        except StoppedError:
            # Before there was a run to drain: nothing is left behind.
            return self._outcome("interrupted", model, WorkCounts(), None)
        finally:
            if self._fleet:
                self._fleet.close()
            if self._crew:
                self._crew.close()

    def _continue(self, model: Model) -> Outcome | None:
        """Works on this command's own open runs. None where there is still something to plan."""
        config = self._config
        ours = self._settle_open_runs(model)
        if config.dry_run or not ours:
            return None
        self._check_dest()
        for plan in ours:
            self._note(f"continuing run {plan.run_id} ({plan.counts.planned} images)")
            state = self._work(plan, model)
            if state != "done":
                return self._outcome(state, model, plan.counts, plan)
        # What these ask for is a certain amount of work, and that is done now.
        if config.limit or config.force or config.retry_errors:
            return self._outcome("done", model, ours[-1].counts, ours[-1])
        return None

    # ── planning ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _settle_open_runs(self, model: Model) -> list[Plan]:
        """This command's own open runs. Runs whose lease has been dead for a day are abandoned on the way."""
        ours = []
        command = self._command(model)
        for plan in self._ledger.open_plans():
            if plan.command == command:
                ours.append(plan)
            elif not self._config.dry_run and self._is_long_dead(plan):
                with contextlib.suppress(HeldError):  # somebody has come back to it
                    abandon(self._ledger, plan, ttl_s=self._config.lease_ttl_s)
                    self._note(f"abandoned run {plan.run_id}: nobody had worked on it for a day")
        return ours

    def _is_long_dead(self, plan: Plan) -> bool:
        lease = read_lease(self._storage, self._ledger.uri(plan.run_id, "lease.json"))
        touched_s = lease.get("at") or self._ledger.progress(plan.run_id).get("at") or plan.created_at.timestamp()
        return time.time() - float(touched_s) > _DEAD_AFTER_S

    def _plan_and_work(self, model: Model) -> Outcome:
        corpus = read_source(
            self._config.source,
            scratch=self._scratch,
            suffixes=self._config.suffixes,
            profile=self._config.source_profile,
        )
        for _ in range(_PLANNING_TRIES):
            if self._should_stop():
                raise StoppedError("stopped before anything was planned")
            sequence = self._ledger.last_sequence() + 1
            plan, counts, list_path = self._plan(model, corpus, sequence)
            if self._config.dry_run:
                return self._planned(model, counts, plan, list_path)
            if plan is None:
                return self._outcome("done", model, counts, None)
            self._check_dest()
            # A model that does not load, or a precision that the device lacks, must not leave an open run behind.
            self._the_fleet().load(self._spec(plan), model.data)
            self._the_fleet().first_loaded()
            if self._ledger.freeze(plan, list_path.read_bytes()):
                self._note(f"run {plan.run_id}: {counts.planned} images in {len(plan.bounds())} shards")
                return self._outcome(self._work(plan, model), model, counts, plan)
            self._note("another command planned at the same moment; planning again")
            # It may have been this very command, started twice: then its run is held, or to be waited for.
            if (outcome := self._continue(model)) is not None:
                return outcome
        raise InfrastructureError(
            f"{_PLANNING_TRIES} other plans came first in {self._dest}: run the command again when it is quieter"
        )

    def _plan(self, model: Model, corpus: Corpus, sequence: int) -> tuple[Plan | None, WorkCounts, Path]:
        """Order matters: open runs are read before rows, so a run that closes in between is counted by its rows."""
        config = self._config
        open_plans = self._ledger.open_plans()
        precision = self._resolved_precision(model)
        settings: dict[str, Any] = {
            "precision": precision,
            "max_pixels": config.max_pixels,
            "postprocessing": model.card.postprocessing.model_dump(mode="json"),
        }
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
        held: dict[str, Path] = {}
        for other in open_plans:
            if other.model_version == model.version and other.settings_digest == digest:
                held[other.run_id] = self._frozen_list(other)
        folder = f"segments/model={model.card.name}/version={model.version}"
        question = Question(
            corpus_path=corpus.path,
            corpus_is_distinct=corpus.full_listing,
            part_sizes=part_sizes(self._storage, join_uri(self._dest, folder)),
            held=held,
            settings_digest=digest,
            limit=config.limit,
            retry_errors=config.retry_errors,
            force=config.force,
        )
        list_path = self._scratch / f"work-{sequence}.parquet"
        counts = work_left(question, self._storage, scratch=self._scratch, list_path=list_path)
        for run_id, images in counts.held_by.items():
            self._note(
                f"{images} images are left to open run {run_id}: its own command continues it, "
                f"`maskmill runs abandon {config.dest} {run_id}` gives it up"
            )
        if not counts.planned:
            return None, counts, list_path
        past = self._past(model)
        row_bytes = past.parts_bytes / max(1, past.ok + past.errors) if past else _guessed_row_bytes(counts)
        # Measured: on a CPU larger batches leave the cache, and many image sizes pad them besides.
        batch_size = config.batch_size or (32 if self._the_crew().has_gpus else 2)
        now = dt.datetime.now(dt.UTC)
        plan = Plan(
            run_id=new_run_id(now),
            sequence=sequence,
            created_at=now,
            run_date=config.run_date or now.date(),
            dest=self._dest,
            command=self._command(model),
            model_name=model.card.name,
            model_version=model.version,
            card=model.card.model_dump(mode="json"),
            settings=settings,
            settings_digest=digest,
            precision=precision,
            batch_size=batch_size,
            batch_pixels=max(batch_size * 512 * 512, 4 << 20),
            threads=config.threads or self._the_crew().threads,
            shard_size=config.shard_size
            or choose_shard_size(counts.planned, actors=self._wanted_actors(), row_bytes=row_bytes),
            canary=min(config.canary or 0, counts.planned),
            counts=counts,
            code_digest=code_digest(),
        )
        return plan, counts, list_path

    def _resolved_precision(self, model: Model) -> Precision:
        """`auto` keeps what this version ran with before in DEST, so that another device does not redo the corpus."""
        if self._config.precision != "auto":
            return self._config.precision
        before = self._recall(model).precision
        if before is not None:
            return before
        return "bf16" if self._the_fleet().first_device().bf16 else "fp32"

    def _past(self, model: Model) -> RunRecord | None:
        """The newest finished run of this model version that made rows with masks."""
        return self._recall(model).record

    def _recall(self, model: Model) -> _Memory:
        """What DEST remembers of this model version. Asked once: later runs of this very call add nothing to it."""
        if self._memory is None:
            auto: Precision | None = None
            given: Precision | None = None
            record: RunRecord | None = None
            for plan, closed in self._ledger.history(model.version):
                if plan.command.precision == "auto":
                    auto = auto or plan.precision
                given = given or plan.precision
                if closed is not None and closed.state == "done" and closed.ok:
                    record = record or closed
                if auto and record:
                    break
            self._memory = _Memory(auto or given, record)
        return self._memory

    def _command(self, model: Model) -> Command:
        config = self._config
        return Command(
            source=self._source if self._source.endswith("://") else self._source.rstrip("/"),
            model_version=model.version,
            precision=config.precision,
            suffixes=config.suffixes,
            max_pixels=config.max_pixels,
            limit=config.limit,
            retry_errors=config.retry_errors,
            force=config.force,
        )

    def _check_dest(self) -> None:
        """An unwritable DEST is found before any work; a store without conditional writes is named."""
        try:
            self._create_only = self._storage.check_create_only()
            if not self._create_only:
                self._listen(
                    Event(
                        "warning",
                        f"{self._dest} does not honour create-only writes: two drivers at once could repeat rows",
                    )
                )
        except StorageError as error:
            raise UsageError(f"DEST cannot be written: {error}") from error

    def _frozen_list(self, plan: Plan) -> Path:
        path = self._scratch / f"{plan.run_id}.parquet"
        if not path.exists():
            path.write_bytes(self._storage.get(self._ledger.uri(plan.run_id, "manifest.parquet")).data)
        return path

    def _planned(self, model: Model, counts: WorkCounts, plan: Plan | None, list_path: Path) -> Outcome:
        """The answer of `--dry-run`: nothing was written."""
        outcome = self._outcome("planned", model, counts, None)
        if plan is None:
            return outcome
        estimate = self._estimate(model, plan, list_path)
        return outcome.model_copy(update={"shards": len(plan.bounds()), "estimate": estimate})

    def _estimate(self, model: Model, plan: Plan, list_path: Path) -> Estimate:
        past = self._past(model)
        if past and past.images_per_s > 0:
            rows = max(1, past.ok + past.errors)
            return Estimate(
                seconds=plan.counts.planned / past.images_per_s,
                output_bytes=int(plan.counts.planned * past.parts_bytes / rows),
                basis=f"run {past.plan.run_id}",
            )
        _, sample = next(shard_lists(plan, list_path, without=set()))
        sample = sample.slice(0, _SAMPLE_IMAGES)
        fleet = self._the_fleet()
        fleet.load(self._spec(plan), model.data)
        receipts: list[Receipt] = []
        task = ShardTask(0, sample, plan.part_uri(0), probe=True)
        fleet.run(iter([task]), on_receipt=receipts.append, on_progress=lambda progress: None)
        rate = len(sample) / max(receipts[0].counts.active_s, 1e-6) * self._wanted_actors()
        return Estimate(
            seconds=plan.counts.planned / rate,
            output_bytes=receipts[0].size_bytes * plan.counts.planned // len(sample),
            basis=f"a sample of {len(sample)} images",
        )

    # ── work ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _work(self, plan: Plan, model: Model) -> Literal["done", "interrupted", "canary_failed"]:
        """Works on a frozen run until it is closed. Raises as `segment` does; the run then stays open."""
        if plan.code_digest != code_digest():
            self._note(
                f"run {plan.run_id} was planned by other Maskmill code ({plan.code_digest}); going on with this one"
            )
        lease_uri = self._ledger.uri(plan.run_id, "lease.json")
        with Lease(
            self._storage,
            lease_uri,
            ttl_s=self._config.lease_ttl_s,
            wait=self._config.wait,
            should_stop=self._should_stop,
        ) as lease:
            closed = self._ledger.record(plan.run_id)
            if closed is not None and closed.state == "abandoned":
                raise InfrastructureError(f"run {plan.run_id} was abandoned by somebody: the same command plans again")
            if closed is not None:
                return "done"
            self._superseded = lease.superseded
            session = Session(0.0, FleetProgress(0, 0, 0, 0.0, 0.0), [])
            if len(self._ledger.committed(plan)) < len(plan.bounds()):
                began_s = time.monotonic()
                fleet = self._the_fleet()
                fleet.load(self._spec(plan), model.data)
                try:
                    if not self._run_shards(plan, fleet):
                        return "canary_failed"
                except StoppedError:
                    if lease.superseded.is_set():
                        raise SupersededError(
                            f"run {plan.run_id} was taken over by another driver, which goes on with it"
                        ) from None
                    return "interrupted"
                session = Session(time.monotonic() - began_s, fleet.progress(), fleet.devices)
            record = reconcile(self._ledger, plan, session)
            self._ledger.close(record)
            self._closed.append(record)
            return "done"

    def _run_shards(self, plan: Plan, fleet: Fleet) -> bool:
        """False where the canary's error rate is too high."""
        committed = set(self._ledger.committed(plan))
        bounds = plan.bounds()
        already = sum(bounds[ordinal][1] - bounds[ordinal][0] for ordinal in committed if ordinal < len(bounds))
        tasks = (
            ShardTask(ordinal, refs, plan.part_uri(ordinal))
            for ordinal, refs in shard_lists(plan, self._frozen_list(plan), without=committed)
        )
        told_s = [0.0]

        def on_progress(progress: FleetProgress) -> None:
            progress = progress._replace(rows=progress.rows + already)
            self._listen(Event("progress", progress=progress, total=plan.counts.planned))
            if time.monotonic() - told_s[0] > _PROGRESS_EVERY_S:
                told_s[0] = time.monotonic()
                self._save_progress(plan, progress)

        def run(some: Iterator[ShardTask]) -> None:
            fleet.run(some, on_receipt=lambda receipt: None, on_progress=on_progress)

        canary_shards = sum(1 for _, stop in bounds if stop <= plan.canary)
        if canary_shards:
            first: list[ShardTask] = []
            rest: list[ShardTask] = []
            for task in tasks:
                (first if task.ordinal < canary_shards else rest).append(task)
                if task.ordinal >= canary_shards:
                    break
            run(iter(first))
            ok, kinds = count_rows(self._ledger, plan, set(range(canary_shards)))
            errors = sum(kinds.values())
            if errors > self._config.max_error_rate * (ok + errors):
                self._listen(
                    Event(
                        "warning",
                        f"{errors} of the first {ok + errors} images failed, more than --max-error-rate "
                        f"{self._config.max_error_rate}: run {plan.run_id} stays open. Give the command a higher "
                        f"--max-error-rate to go on, or `maskmill runs abandon {self._config.dest} {plan.run_id}`",
                    )
                )
                return False
            self._note(f"canary fine: {errors} errors in {ok + errors} images")
            run(_chain(rest, tasks))
        else:
            run(tasks)
        return True

    def _save_progress(self, plan: Plan, progress: FleetProgress) -> None:
        body = progress._asdict() | {"at": time.time(), "total": plan.counts.planned}
        try:
            self._storage.put(self._ledger.uri(plan.run_id, "progress.json"), json.dumps(body).encode())
        except StorageError as error:
            log.warning("progress could not be saved: %s", error)

    def _spec(self, plan: Plan) -> WorkerSpec:
        local = self._source.startswith("file:") and not self._source.endswith(
            (".parquet", ".csv", ".jsonl", ".txt", ".json")
        )
        threads = self._the_crew().threads
        return WorkerSpec(
            code_digest=code_digest(),
            dest=self._dest,
            create_only=self._create_only,
            source_profile=self._config.source_profile,
            dest_profile=self._config.dest_profile,
            model_name=plan.model_name,
            model_version=plan.model_version,
            settings_digest=plan.settings_digest,
            run_id=plan.run_id,
            precision=plan.precision,
            threads=plan.threads,
            stream=StreamConfig(
                batch_size=plan.batch_size,
                batch_pixels=plan.batch_pixels,
                memory_bytes=self._config.memory_bytes,
                threads=threads,
                fetch_threads=0 if local else _REMOTE_FETCHES,
                max_pixels=plan.command.max_pixels,
            ),
        )

    # ── workers ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _the_crew(self) -> Crew:
        if self._crew is None:
            engine, why = choose_engine(self._config, self._source, self._dest)
            self._crew = open_crew(self._config, engine, self._source, self._dest)
            self._note(f"engine {engine} ({why}), {self._wanted_actors()} actors at most")
        return self._crew

    def _the_fleet(self) -> Fleet:
        if self._fleet is None:
            self._fleet = Fleet(
                self._the_crew(),
                actors=self._wanted_actors(),
                should_stop=lambda: self._should_stop() or (self._superseded is not None and self._superseded.is_set()),
                say=lambda text: self._listen(Event("warning", text)),
                drain_timeout_s=self._config.drain_timeout_s,
            )
        return self._fleet

    def _wanted_actors(self) -> int:
        return self._config.actors or self._the_crew().default_actors

    def _note(self, text: str) -> None:
        log.info("%s", text)
        self._listen(Event("note", text))

    def _outcome(
        self,
        state: Literal["done", "planned", "interrupted", "canary_failed"],
        model: Model,
        counts: WorkCounts,
        plan: Plan | None,
    ) -> Outcome:
        """Sums over the runs that this call closed; for one that stays open, what its Parts hold so far."""
        closed = self._closed
        progress = self._fleet.progress() if self._fleet else FleetProgress(0, 0, 0, 0.0, 0.0)
        kinds: dict[str, int] = {}
        for record in closed:
            for kind, number in record.errors_by_kind.items():
                kinds[kind] = kinds.get(kind, 0) + number
        ok, errors = sum(r.ok for r in closed), sum(r.errors for r in closed)
        parts, parts_bytes = sum(r.parts for r in closed), sum(r.parts_bytes for r in closed)
        if state in ("interrupted", "canary_failed") and plan is not None:
            committed = self._ledger.committed(plan)
            some_ok, some_kinds = count_rows(self._ledger, plan, set(committed))
            for kind, number in some_kinds.items():
                kinds[kind] = kinds.get(kind, 0) + number
            ok, errors = ok + some_ok, sum(kinds.values())
            parts, parts_bytes = parts + len(committed), parts_bytes + sum(committed.values())
        # Rows of runs that were continued before this plan was made: done for the plan, but by this very call.
        continued = sum(r.ok + r.errors for r in closed if plan is None or r.plan.run_id != plan.run_id)
        seconds = sum(r.seconds for r in closed)
        ids = [r.plan.run_id for r in closed]
        if plan is not None and plan.run_id not in ids:
            ids.append(plan.run_id)
        return Outcome(
            state=state,
            run_id=ids[-1] if ids else None,
            runs=ids,
            engine=self._crew.label if self._crew else "",
            images=counts.images,
            duplicates=counts.duplicates,
            planned=counts.planned + continued,
            skipped=max(0, counts.done + counts.exhausted - continued),
            held=counts.held,
            held_by=counts.held_by,
            ok=ok,
            errors=errors,
            errors_by_kind=kinds,
            instances=sum(r.instances for r in closed),
            parts=parts,
            parts_bytes=parts_bytes,
            seconds=seconds,
            images_per_s=sum(r.images_per_s * r.seconds for r in closed) / seconds if seconds else 0.0,
            megapixels_per_s=sum(r.megapixels_per_s * r.seconds for r in closed) / seconds if seconds else 0.0,
            model_busy_fraction=progress.busy_s / progress.active_s if progress.active_s else 0.0,
            model_name=model.card.name,
            model_version=model.version,
            work=counts,
        )


def choose_engine(config: SegmentConfig, source: str, dest: str) -> tuple[Literal["local", "ray"], str]:
    """(`local` or `ray`, why)."""
    if config.engine != "auto":
        return config.engine, "as asked"
    if config.gpus_per_actor:
        return "ray", "--gpus-per-actor is for Ray"
    if config.ray_address or os.environ.get("RAY_ADDRESS"):
        return "ray", "a Ray address is given"
    if gpu_count() > 1:
        return "ray", f"{gpu_count()} GPUs"
    return "local", "no Ray address, and one GPU at most"


def open_crew(config: SegmentConfig, engine: Literal["local", "ray"], source: str, dest: str) -> Crew:
    """The place where this command's workers will live. Raises UsageError, InfrastructureError."""
    if engine == "ray":
        from pipeline.engine.ray_crew import RayCrew, ray_address

        if source.startswith("memory:") or dest.startswith("memory:"):
            raise UsageError("memory:// exists in this process only: use --engine local")
        return RayCrew(
            address=ray_address(config.ray_address),
            actors=config.actors,
            gpus_per_actor=config.gpus_per_actor,
            threads=config.threads,
            local_paths=not config.shared_filesystem and (source.startswith("file:") or dest.startswith("file:")),
        )
    if source.startswith("memory:") or dest.startswith("memory:"):
        return InlineCrew(actors=config.actors or 1, threads=config.threads)
    return LocalCrew(actors=config.actors, threads=config.threads)


def _sweep_scratch() -> None:
    """Removes what killed commands of this machine have left: lists of millions of images are large."""
    for path in Path(tempfile.gettempdir()).glob(f"{_SCRATCH}*"):
        pid, _, rest = path.name.removeprefix(_SCRATCH).partition("-")
        if pid.isdigit() and process_start(int(pid)) != rest.partition("-")[0]:
            shutil.rmtree(path, ignore_errors=True)


def _guessed_row_bytes(counts: WorkCounts) -> float:
    """Before anything is known of this model: a mask rarely takes more than a quarter of its image's bytes."""
    return max(_LEAST_ROW_BYTES, counts.planned_bytes / counts.planned / 4)


def _chain(first: list[ShardTask], then: Iterator[ShardTask]) -> Iterator[ShardTask]:
    yield from first
    yield from then
