"""A run from question to closed record. Owns: the order of the steps of `segment`, and the workers that it opens.
Must not know: how images are processed, what there is to do, how a terminal looks.

    open run of this command? ─▶ continue it ─▶ plan again ─▶ freeze ─▶ work ─▶ reconcile ─▶ close

Longer than most modules: the steps share what the command has opened, and their order is the module's point.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import duckdb

from pipeline.config import SegmentConfig
from pipeline.corpus.entries import ENTRY_SUFFIXES, file_name
from pipeline.corpus.manifest import Corpus, read_source
from pipeline.engine.crew import Crew
from pipeline.engine.fleet import Fleet, FleetProgress
from pipeline.engine.lease import Lease, read_lease
from pipeline.engine.ledger import Ledger, Plan, RunRecord, WorkCounts
from pipeline.engine.limits import read_ceilings
from pipeline.engine.messages import Receipt, ShardTask, StreamConfig, WorkerSpec, code_digest
from pipeline.engine.outcome import Estimate, Event, Listener, Outcome, Preview, SoFar, tally
from pipeline.engine.placement import check_actors, check_place, choose_engine, open_crew
from pipeline.engine.plan import add_addresses, shard_lists
from pipeline.engine.planning import Draft, Planner
from pipeline.engine.reconciliation import Session, Terms, abandon, reconcile, sum_parts
from pipeline.errors import (
    HeldError,
    InfrastructureError,
    StoppedError,
    StorageError,
    SupersededError,
)
from pipeline.storage import hide_secrets, normalize_uri, open_storage
from pipeline.table.catalog import unreadable
from pipeline.table.removed import withdraw_changes, write_changes
from pipeline.table.scratch import scratch_folder
from pipeline.wording import counted

log = logging.getLogger(__name__)

_PLANNING_TRIES = 20
_DEAD_AFTER_S = 24 * 3600.0
_SAMPLE_IMAGES = 16
_REMOTE_FETCHES = 32
_PROGRESS_EVERY_S = 5.0
_NO_PROGRESS = FleetProgress(0, 0, 0, 0.0, 0.0)


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
        self._terms = Terms(ceilings=read_ceilings(config.limits))
        self._session = Session(0.0, _NO_PROGRESS, [])
        self._closed: list[RunRecord] = []
        self._create_only = True
        self._dest_is_checked = False
        self._planner = Planner(
            config, scratch, self._ledger, source=self._source, workplace=_Workplace(self), note=self._note
        )

    def run(self) -> Outcome:
        check_actors(self._config, self._source, self._dest)
        try:
            return self._continue() or self._plan_and_work()
        except duckdb.Error as error:
            raise self._unreadable(error) from error
        except StoppedError:
            # Before there was a run to drain: nothing is left behind.
            return self._outcome("interrupted", WorkCounts(), None)
        finally:
            if self._fleet:
                self._fleet.close()
            if self._crew:
                self._crew.close()

    def preview(self) -> Preview:
        """What `plan` answers."""
        check_place(self._config, self._source, self._dest)
        self._check_dest()
        corpus = self._read_source()
        try:
            counts = self._planner.preview(corpus)
            ours = [plan for plan in self._ledger.open_plans() if plan.command == self._planner.command]
        except duckdb.Error as error:
            raise self._unreadable(error) from error
        model = self._planner.model
        return Preview(model.card.name, model.version, counts, [plan.run_id for plan in ours], corpus)

    def _continue(self) -> Outcome | None:
        """Works on this command's own open runs. None where there is still something to plan."""
        config = self._config
        ours = self._settle_open_runs()
        if config.dry_run or not ours:
            return None
        self._check_dest()
        for plan in ours:
            self._note(f"continuing run {plan.run_id} ({counted(plan.counts.planned, 'image')})")
            state = self._work(plan)
            if state != "done":
                return self._outcome(state, plan.counts, plan)
        # What these ask for is a certain amount of work, and that is done now.
        if config.limit or config.force or config.retry_errors:
            return self._outcome("done", ours[-1].counts, ours[-1])
        return None

    # ── planning ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _settle_open_runs(self) -> list[Plan]:
        """This command's own open runs. Runs whose lease has been dead for a day are abandoned on the way."""
        ours = []
        for plan in self._ledger.open_plans():
            if plan.command == self._planner.command:
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

    def _plan_and_work(self) -> Outcome:
        corpus = self._read_source()
        for _ in range(_PLANNING_TRIES):
            if self._should_stop():
                raise StoppedError("stopped before anything was planned")
            draft = self._planner.draft(corpus, self._ledger.last_sequence() + 1)
            plan = draft.plan
            if self._config.dry_run:
                return self._planned(draft)
            if plan is None:
                return self._outcome("done", draft.counts, None)
            self._check_dest()
            if plan.counts.planned:
                # A model that does not load, or a precision that the device lacks, must not leave an open run behind.
                self._load(plan)
                self._the_fleet().first_loaded(shards=len(plan.bounds()))
            write_changes(self._storage, self._dest, plan.run_id, draft.changes)
            if self._ledger.freeze(plan, draft.list_path.read_bytes()):
                self._tell_plan(plan)
                return self._outcome(self._work(plan, last=True), draft.counts, plan)
            withdraw_changes(self._storage, self._dest, plan.run_id, draft.changes)
            self._note("another command planned at the same moment; planning again")
            # It may have been this very command, started twice: then its run is held, or to be waited for.
            if (outcome := self._continue()) is not None:
                return outcome
        raise InfrastructureError(
            f"{_PLANNING_TRIES} other plans came first in {self._dest}: run the command again when it is quieter"
        )

    def _tell_plan(self, plan: Plan) -> None:
        if plan.counts.planned:
            images, shards = counted(plan.counts.planned, "image"), counted(len(plan.bounds()), "shard")
            self._note(f"run {plan.run_id}: {images} in {shards}")
        if plan.removed:
            self._note(f"{counted(plan.removed, 'image')} no longer in SOURCE, which the view `images` leaves out")
        if plan.returned:
            self._note(f"{counted(plan.returned, 'image')} back in SOURCE as done before, which `images` shows again")

    def _read_source(self) -> Corpus:
        if self._corpus is None:
            began_s = time.monotonic()
            self._corpus = read_source(
                self._config.source,
                scratch=self._scratch,
                suffixes=self._config.suffixes,
                profile=self._config.source_profile,
            )
            if self._corpus.full_listing:
                self._terms = self._terms._replace(listed=self._corpus.rows, listing_s=time.monotonic() - began_s)
        return self._corpus

    def _unreadable(self, error: duckdb.Error) -> InfrastructureError:
        in_place = self._corpus is not None and self._corpus.in_place
        return unreadable(self._dest, error, or_else=f"the inventory {self._source}" if in_place else "")

    def _check_dest(self) -> None:
        """An unwritable DEST is found before any work; a store without conditional writes is named. Asks once."""
        if self._dest_is_checked:
            return
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
            raise error.told(f"DEST cannot be written: {error}") from error
        self._dest_is_checked = True

    def _planned(self, draft: Draft) -> Outcome:
        """The answer of `--dry-run`: nothing was written."""
        outcome = self._outcome("planned", draft.counts, None)
        if draft.plan is None:
            return outcome
        estimate = self._estimate(draft.plan, draft.list_path)
        return outcome.model_copy(update={"shards": len(draft.plan.bounds()), "estimate": estimate})

    def _estimate(self, plan: Plan, list_path: Path) -> Estimate:
        past = self._planner.precedent().record
        if past and past.images_per_s > 0:
            rows = max(1, past.ok + past.errors)
            return Estimate(
                seconds=plan.counts.planned / past.images_per_s,
                output_bytes=int(plan.counts.planned * past.parts_bytes / rows),
                basis=f"run {past.plan.run_id}",
            )
        _, sample = next(shard_lists(plan, self._with_addresses(plan, list_path), without=set()))
        sample = sample.slice(0, _SAMPLE_IMAGES)
        self._load(plan)
        receipts: list[Receipt] = []
        task = ShardTask(0, sample, plan.part_uri(0), probe=True)
        self._the_fleet().run(iter([task]), shards=1, on_receipt=receipts.append, on_progress=lambda progress: None)
        rate = len(sample) / max(receipts[0].counts.active_s, 1e-6) * self._wanted_actors()
        return Estimate(
            seconds=plan.counts.planned / rate,
            output_bytes=receipts[0].size_bytes * plan.counts.planned // len(sample),
            basis=f"a sample of {counted(len(sample), 'image')}",
        )

    def _with_addresses(self, plan: Plan, list_path: Path) -> Path:
        """The list of `plan` with the signed addresses of its images beside them, where they need any. DEST never has
        these: they are read from SOURCE each time."""
        if not plan.signed:
            return list_path
        return add_addresses(
            list_path, self._read_source().signed_path, self._scratch / f"{plan.run_id}-signed.parquet"
        )

    # ── work ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _work(self, plan: Plan, *, last: bool = False) -> Literal["done", "interrupted", "canary_failed"]:
        """Works on a frozen run until it is closed. Raises as `segment` does; the run then stays open. `last`: workers
        have nothing to do after it."""
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
            is_over=lambda: self._ledger.is_closed(plan.run_id),
        ) as lease:
            closed = self._ledger.record(plan.run_id)
            if closed is not None and closed.state == "abandoned":
                raise InfrastructureError(f"run {plan.run_id} was abandoned by somebody: the same command plans again")
            if closed is not None:
                return "done"
            self._superseded = lease.superseded
            self._session = Session(0.0, _NO_PROGRESS, [])
            if len(self._ledger.committed(plan)) < len(plan.bounds()):
                began_s = time.monotonic()
                self._load(plan)
                fleet = self._the_fleet()
                try:
                    if not self._run_shards(plan, fleet):
                        return "canary_failed"
                except StoppedError:
                    if lease.failure is not None:
                        why = hide_secrets(f"{type(lease.failure).__name__}: {lease.failure}")
                        raise InfrastructureError(
                            f"the lease of run {plan.run_id} could not be renewed, so that its work stopped "
                            f"({why}): what was committed is kept, and the "
                            "same command continues"
                        ) from lease.failure
                    if lease.superseded.is_set():
                        raise SupersededError(
                            f"run {plan.run_id} was taken over by another driver, which goes on with it"
                        ) from None
                    return "interrupted"
                finally:
                    terms = self._terms._replace(threads=self._the_crew().threads)
                    self._session = Session(time.monotonic() - began_s, fleet.progress(), fleet.devices, terms)
                if last:
                    fleet.close()  # they end while rows are counted
            record = reconcile(self._ledger, plan, self._session)
            self._ledger.close(record)
            self._closed.append(record)
            return "done"

    def _run_shards(self, plan: Plan, fleet: Fleet) -> bool:
        """False where the canary's error rate is too high."""
        committed = set(self._ledger.committed(plan))
        bounds = plan.bounds()
        left = sum(1 for ordinal in range(len(bounds)) if ordinal not in committed)
        already = sum(bounds[ordinal][1] - bounds[ordinal][0] for ordinal in committed if ordinal < len(bounds))
        list_path = self._with_addresses(plan, self._planner.frozen_list(plan))
        tasks = (
            ShardTask(ordinal, refs, plan.part_uri(ordinal))
            for ordinal, refs in shard_lists(plan, list_path, without=committed)
        )
        told_s = [0.0]

        def on_progress(progress: FleetProgress) -> None:
            progress = progress._replace(rows=progress.rows + already)
            self._listen(Event("progress", progress=progress, total=plan.counts.planned))
            if time.monotonic() - told_s[0] > _PROGRESS_EVERY_S:
                told_s[0] = time.monotonic()
                self._save_progress(plan, progress)

        def run(some: Iterator[ShardTask], shards: int) -> None:
            fleet.run(some, shards=shards, on_receipt=lambda receipt: None, on_progress=on_progress)

        canary_shards = sum(1 for _, stop in bounds if stop <= plan.canary)
        if canary_shards:
            first: list[ShardTask] = []
            rest: list[ShardTask] = []
            for task in tasks:
                (first if task.ordinal < canary_shards else rest).append(task)
                if task.ordinal >= canary_shards:
                    break
            run(iter(first), left)  # workers for the rest come up meanwhile
            tried = sum_parts(self._ledger, plan, set(range(canary_shards)))
            if tried.errors > self._config.max_error_rate * tried.rows:
                self._listen(
                    Event(
                        "warning",
                        f"{tried.errors:,} of the first {counted(tried.rows, 'image')} failed, more than "
                        f"--max-error-rate {self._config.max_error_rate}: run {plan.run_id} stays open. Give the "
                        "command a higher --max-error-rate to go on, or "
                        f"`maskmill runs abandon {self._config.dest} {plan.run_id}`",
                    )
                )
                return False
            self._note(f"canary fine: {counted(tried.errors, 'error')} in {counted(tried.rows, 'image')}")
            run(_chain(rest, tasks), left - len(first))
        else:
            run(tasks, left)
        return True

    def _load(self, plan: Plan) -> None:
        """Has the workers load the model for this run."""
        self._the_fleet().load(self._spec(plan), self._planner.model.data)

    def _save_progress(self, plan: Plan, progress: FleetProgress) -> None:
        # A driver that slept through the end of its run has nothing to say of it.
        if self._superseded is None or self._superseded.is_set() or self._ledger.is_closed(plan.run_id):
            return
        body = progress._asdict() | {"at": time.time(), "total": plan.counts.planned}
        try:
            self._storage.put(self._ledger.uri(plan.run_id, "progress.json"), json.dumps(body).encode())
        except StorageError as error:
            log.warning("progress could not be saved: %s", error)

    def _spec(self, plan: Plan) -> WorkerSpec:
        is_list = file_name(self._source).endswith((*ENTRY_SUFFIXES, ".json"))
        local = self._source.startswith("file:") and not is_list
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
                listed=plan.listed,
            ),
        )

    # ── workers ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _the_crew(self) -> Crew:
        if self._crew is None:
            engine, why = choose_engine(self._config, self._source, self._dest)
            self._crew = open_crew(self._config, engine, self._source, self._dest)
            if not self._config.dry_run:
                self._check_dest()  # workers take longer to come than this
            self._note(f"engine {engine} ({why}), {counted(self._wanted_actors(), 'actor')} at most")
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
        counts: WorkCounts,
        plan: Plan | None,
    ) -> Outcome:
        """Sums over the runs that this call closed; for one that stays open, what its Parts hold so far."""
        open_so_far = None
        if state in ("interrupted", "canary_failed") and plan is not None:
            committed = self._ledger.committed(plan)
            open_so_far = SoFar(
                sum_parts(self._ledger, plan, set(committed)), len(committed), sum(committed.values()), self._session
            )
        return tally(
            state,
            self._closed,
            counts,
            plan=plan,
            so_far=open_so_far,
            progress=self._fleet.progress() if self._fleet else _NO_PROGRESS,
        ).model_copy(
            update={
                "engine": self._crew.label if self._crew else "",
                "model_name": self._planner.model.card.name,
                "model_version": self._planner.model.version,
                "settings_digest": plan.settings_digest if plan else self._planner.settings_digest,
            }
        )


class _Workplace:
    """The workers of one segmentation, as its planner asks about them."""

    def __init__(self, owner: _Segmentation) -> None:
        self._owner = owner

    def has_gpus(self) -> bool:
        return self._owner._the_crew().has_gpus

    def threads(self) -> int:
        return self._owner._the_crew().threads

    def actors(self) -> int:
        return self._owner._wanted_actors()

    def has_bf16(self) -> bool:
        owner = self._owner
        images = owner._read_source().rows
        most = 1 if owner._config.dry_run else min(images, owner._config.limit or images)
        return owner._the_fleet().first_device(most=most).bf16


def _chain(first: list[ShardTask], then: Iterator[ShardTask]) -> Iterator[ShardTask]:
    yield from first
    yield from then
