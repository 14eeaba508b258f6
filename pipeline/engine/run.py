"""A run from question to closed record. Owns: the order of the steps of `segment`.
Must not know: how images are processed, how a terminal looks.

    open run of this command? ─▶ continue it ─▶ plan again ─▶ freeze ─▶ work ─▶ reconcile ─▶ close

Longer than most modules: the steps share what the command has opened, and their order is the module's point.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import duckdb

from models.overrides import with_settings
from pipeline.config import Precision, SegmentConfig
from pipeline.corpus.manifest import Corpus, read_source
from pipeline.engine.crew import Crew
from pipeline.engine.fleet import Fleet, FleetProgress
from pipeline.engine.lease import Lease, read_lease
from pipeline.engine.ledger import Command, Ledger, Plan, RunRecord, WorkCounts, new_run_id
from pipeline.engine.outcome import Estimate, Event, Listener, Outcome, Preview, SoFar, counted, tally
from pipeline.engine.placement import check_place, choose_engine, open_crew
from pipeline.engine.plan import Question, choose_shard_size, shard_lists, work_left
from pipeline.engine.precedent import Precedent
from pipeline.engine.reconciliation import Session, abandon, count_rows, reconcile
from pipeline.engine.scratch import scratch_folder
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
from pipeline.storage import join_uri, normalize_uri, open_storage, recorded_uri
from pipeline.table.catalog import part_sizes, unreadable

log = logging.getLogger(__name__)

_PLANNING_TRIES = 20
_DEAD_AFTER_S = 24 * 3600.0
_SAMPLE_IMAGES = 16
_REMOTE_FETCHES = 32
_PROGRESS_EVERY_S = 5.0
_LEAST_ROW_BYTES = 8 << 10


def segment(
    config: SegmentConfig,
    *,
    listen: Listener | None = None,
    should_stop: Callable[[], bool] | None = None,
    corpus: Corpus | None = None,
) -> Outcome:
    """Brings the table at `config.dest` up to date with `config.source`, and says what that came to.

    `corpus` is what `plan` has just read of SOURCE, so that it need not be read again. Guarantees: after state `done`,
    every image that was planned has exactly one row, counted from the Parts. Raises UsageError (nothing changed),
    InfrastructureError (what was committed is kept). Safe to call again, after anything: it continues.
    """
    with scratch_folder() as scratch:
        return _Segmentation(
            config, scratch, listen or (lambda event: None), should_stop or (lambda: False), corpus
        ).run()


def plan(config: SegmentConfig, *, scratch: Path) -> Preview:
    """Says what `segment` would find to do, before any worker is started, and keeps what it read of SOURCE in the
    folder `scratch`.

    Raises UsageError or InfrastructureError where the model, SOURCE, DEST or the Ray cluster cannot be reached.
    Changes nothing; safe to retry.
    """
    return _Segmentation(config, scratch, lambda event: None, lambda: False).preview()


class _Segmentation:
    def __init__(
        self,
        config: SegmentConfig,
        scratch: Path,
        listen: Listener,
        should_stop: Callable[[], bool],
        corpus: Corpus | None = None,
    ) -> None:
        self._config = config
        self._scratch = scratch
        self._corpus = corpus
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
        self._precedent: Precedent | None = None
        self._create_only = True
        #: Fields of the card that this command changes; naming one with the card's own value is no other question.
        self._changed: list[str] = []
        self._settings_digest = ""

    def run(self) -> Outcome:
        model = self._model()
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

    def preview(self) -> Preview:
        """What `plan` answers."""
        model = self._model()
        check_place(self._config, self._source, self._dest)
        self._check_dest()
        corpus = self._read_source()
        # Where this version has no earlier run here, it has no rows either, and every precision counts the same.
        precision = self._known_precision(model) or "fp32"
        try:
            _, counts = self._count(model, corpus, precision, None)
            ours = [plan for plan in self._ledger.open_plans() if plan.command == self._command(model)]
        except duckdb.Error as error:
            raise unreadable(self._dest, error) from error
        return Preview(model.card.name, model.version, counts, [plan.run_id for plan in ours], corpus)

    def _continue(self, model: Model) -> Outcome | None:
        """Works on this command's own open runs. None where there is still something to plan."""
        config = self._config
        ours = self._settle_open_runs(model)
        if config.dry_run or not ours:
            return None
        self._check_dest()
        for plan in ours:
            self._note(f"continuing run {plan.run_id} ({counted(plan.counts.planned, 'image')})")
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
        corpus = self._corpus or self._read_source()
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
                images, shards = counted(counts.planned, "image"), counted(len(plan.bounds()), "shard")
                self._note(f"run {plan.run_id}: {images} in {shards}")
                return self._outcome(self._work(plan, model), model, counts, plan)
            self._note("another command planned at the same moment; planning again")
            # It may have been this very command, started twice: then its run is held, or to be waited for.
            if (outcome := self._continue(model)) is not None:
                return outcome
        raise InfrastructureError(
            f"{_PLANNING_TRIES} other plans came first in {self._dest}: run the command again when it is quieter"
        )

    def _read_source(self) -> Corpus:
        return read_source(
            self._config.source,
            scratch=self._scratch,
            suffixes=self._config.suffixes,
            profile=self._config.source_profile,
        )

    def _plan(self, model: Model, corpus: Corpus, sequence: int) -> tuple[Plan | None, WorkCounts, Path]:
        config = self._config
        precision = self._resolved_precision(model)
        list_path = self._scratch / f"work-{sequence}.parquet"
        settings, counts = self._count(model, corpus, precision, list_path)
        for run_id, images in counts.held_by.items():
            self._note(
                f"{counted(images, 'image')} left to open run {run_id}: its own command continues it, "
                f"`maskmill runs abandon {config.dest} {run_id}` gives it up"
            )
        if not counts.planned:
            return None, counts, list_path
        row_bytes = self._recall(model).row_bytes or _guessed_row_bytes(counts)
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
            card_digest=hashlib.sha256(model.card.model_dump_json().encode()).hexdigest()[:12],
            settings=settings,
            settings_digest=_digest(settings),
            precision=precision,
            batch_size=batch_size,
            batch_pixels=max(batch_size * 512 * 512, 4 << 20 if self._the_crew().has_gpus else 1),
            threads=config.threads or self._the_crew().threads,
            shard_size=config.shard_size
            or choose_shard_size(counts.planned, actors=self._wanted_actors(), row_bytes=row_bytes),
            canary=min(config.canary or 0, counts.planned),
            counts=counts,
            code_digest=code_digest(),
        )
        return plan, counts, list_path

    def _count(
        self, model: Model, corpus: Corpus, precision: Precision, list_path: Path | None
    ) -> tuple[dict[str, Any], WorkCounts]:
        """(the settings to freeze, the work left under them), which is listed in `list_path`.

        Order matters: open runs are read before rows, so a run that closes in between is counted by its rows.
        """
        config = self._config
        open_plans = self._ledger.open_plans()
        settings: dict[str, Any] = {
            "precision": precision,
            "max_pixels": config.max_pixels,
            "tile_above_pixels": model.card.tile_above_pixels,
            "postprocessing": model.card.postprocessing.model_dump(mode="json"),
        }
        card = model.card.model_dump(mode="json")
        settings |= {name: card[name] for name in self._changed}
        if config.compile:
            settings["compile"] = True
        digest = self._settings_digest = _digest(settings)
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
        return settings, work_left(question, self._storage, scratch=self._scratch, list_path=list_path)

    def _model(self) -> Model:
        """The model with its card as this command wants it."""
        shipped = resolve(self._config.model, registry=self._config.registry)
        model = _as_asked(shipped, self._config)
        as_shipped, as_asked = shipped.card.model_dump(), model.card.model_dump()
        self._changed = [name for name in sorted(as_asked) if as_asked[name] != as_shipped[name]]
        return model

    def _resolved_precision(self, model: Model) -> Precision:
        """`auto` keeps what this version ran with before in DEST, so that another device does not redo the corpus."""
        known = self._known_precision(model)
        if known is not None:
            return known
        return "bf16" if self._the_fleet().first_device().bf16 else "fp32"

    def _known_precision(self, model: Model) -> Precision | None:
        return self._recall(model).precision if self._config.precision == "auto" else self._config.precision

    def _recall(self, model: Model) -> Precedent:
        """Asked once: later runs of this very call add nothing to it."""
        if self._precedent is None:
            self._precedent = Precedent.of(self._ledger, model.version)
        return self._precedent

    def _command(self, model: Model) -> Command:
        config = self._config
        return Command(
            source=recorded_uri(self._source if self._source.endswith("://") else self._source.rstrip("/")),
            model_version=model.version,
            precision=config.precision,
            suffixes=config.suffixes,
            max_pixels=config.max_pixels,
            limit=config.limit,
            retry_errors=config.retry_errors,
            force=config.force,
            settings=config.settings,
            compile=config.compile,
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
        past = self._recall(model).record
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
            card_settings=plan.command.settings,
            compile=plan.command.compile,
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
                relay=lambda device, line: self._listen(Event("log", f"{device.node}: {line.text}", level=line.level)),
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
        open_so_far = None
        if state in ("interrupted", "canary_failed") and plan is not None:
            committed = self._ledger.committed(plan)
            open_so_far = SoFar(
                *count_rows(self._ledger, plan, set(committed)), len(committed), sum(committed.values())
            )
        return tally(
            state,
            self._closed,
            counts,
            plan=plan,
            so_far=open_so_far,
            progress=self._fleet.progress() if self._fleet else FleetProgress(0, 0, 0, 0.0, 0.0),
        ).model_copy(
            update={
                "engine": self._crew.label if self._crew else "",
                "model_name": model.card.name,
                "model_version": model.version,
                "settings_digest": plan.settings_digest if plan else self._settings_digest,
            }
        )


def _as_asked(model: Model, config: SegmentConfig) -> Model:
    """The model with its card as this command wants it. Raises UsageError."""
    try:
        return model._replace(card=with_settings(model.card, config.settings))
    except ValueError as error:
        raise UsageError(f"--set: {error}") from error


def _digest(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def _guessed_row_bytes(counts: WorkCounts) -> float:
    """Before anything is known of this model: a mask rarely takes more than a quarter of its image's bytes."""
    return max(_LEAST_ROW_BYTES, counts.planned_bytes / counts.planned / 4)


def _chain(first: list[ShardTask], then: Iterator[ShardTask]) -> Iterator[ShardTask]:
    yield from first
    yield from then
