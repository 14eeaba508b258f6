"""What a `segment` command comes to, before any work. Owns: the question put to corpus and table, and the plan that
freezes its answer.
Must not know: how work is done, leases, how a run ends.
"""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from pipeline.config import Precision, SegmentConfig
from pipeline.corpus.manifest import Corpus
from pipeline.engine.ledger import Command, Ledger, Plan, WorkCounts, new_run_id
from pipeline.engine.messages import code_digest
from pipeline.engine.plan import Question, choose_shard_size, work_left
from pipeline.engine.precedent import Precedent
from pipeline.engine.settings import asked_of, digest_of, settings_of
from pipeline.registry import Model, resolve
from pipeline.storage import join_uri, recorded_uri
from pipeline.table.catalog import Current, part_sizes
from pipeline.table.forgotten import read_forgotten
from pipeline.table.removed import Changes, Coverage, find_changes, find_switch
from pipeline.table.schema import SCHEMA_VERSION
from pipeline.wording import counted

_LEAST_ROW_BYTES = 8 << 10


class Workplace(Protocol):
    """What planning asks of the place where the work will be done. Asking starts it."""

    def has_gpus(self) -> bool: ...
    def threads(self) -> int: ...
    def actors(self) -> int: ...
    def has_bf16(self) -> bool: ...


class Draft(NamedTuple):
    """A plan that is not frozen yet. `plan`: None where there is nothing to do or to record. `list_path`: its list."""

    plan: Plan | None
    counts: WorkCounts
    list_path: Path
    changes: Changes


class _Found(NamedTuple):
    """What a plan is made of."""

    sequence: int
    listed: bool
    signed: bool
    precision: Precision
    settings: dict[str, Any]
    counts: WorkCounts
    changes: Changes


class Planner:
    """Plans for one command, as often as it takes: nothing here changes DEST."""

    def __init__(
        self,
        config: SegmentConfig,
        scratch: Path,
        ledger: Ledger,
        *,
        source: str,
        workplace: Workplace,
        note: Callable[[str], None],
    ) -> None:
        """Raises UsageError where the model, or what is to be changed of it, does not exist."""
        self._config = config
        self._scratch = scratch
        self._ledger = ledger
        self._workplace = workplace
        self._note = note
        self._precedent: Precedent | None = None
        self._oldest_open: int | None = None
        #: Of the rows that were last asked for; "" before that.
        self.settings_digest = ""
        shipped = resolve(config.model, registry=config.registry, profile=config.registry_profile)
        #: The model with its card as this command wants it.
        self.model: Model = asked_of(shipped, config.settings)
        self._shipped_card = shipped.card
        self.command = Command(
            source=recorded_uri(source if source.endswith("://") else source.rstrip("/")),
            model_version=self.model.version,
            precision=config.precision,
            suffixes=config.suffixes,
            max_pixels=config.max_pixels,
            limit=config.limit,
            retry_errors=config.retry_errors,
            force=config.force,
            settings=config.settings,
            compile=config.compile,
        )

    def draft(self, corpus: Corpus, sequence: int) -> Draft:
        """The plan with this number in the log. Raises as `work_left` and `find_changes` do."""
        list_path = self._scratch / f"work-{sequence}.parquet"
        precision = self._resolved_precision()
        settings = self._settings(precision)
        unmatched_path = self._scratch / f"unmatched-{sequence}.parquet" if self._looks_for_changes(corpus) else None
        counts = self._count(corpus, settings, list_path, unmatched_path)
        for run_id, images in counts.held_by.items():
            self._note(
                f"{counted(images, 'image')} left to open run {run_id}: its own command continues it, "
                f"`maskmill runs abandon {self._config.dest} {run_id}` gives it up"
            )
        if counts.forgotten:
            self._note(f"{counted(counts.forgotten, 'image')} of SOURCE left out, which DEST was told to forget")
        changes = self._changes(corpus, counts, settings, unmatched_path)
        signed = corpus.signed_path is not None
        found = _Found(sequence, corpus.full_listing, signed, precision, settings, counts, changes)
        plan = None
        if counts.planned:
            plan = self._plan(found)
        elif changes.worth_a_run and not counts.held:
            plan = self._plan_of_nothing(found)
        return Draft(plan, counts, list_path, changes)

    def preview(self, corpus: Corpus) -> WorkCounts:
        """Counts alone; starts nothing."""
        # Where this version has no earlier run here, it has no rows either, and every precision counts the same.
        return self._count(corpus, self._settings(self._known_precision() or "fp32"), None, None)

    def precedent(self) -> Precedent:
        """What DEST remembers of this model version. Asked once: later runs of this very call add nothing to it."""
        if self._precedent is None:
            self._precedent = Precedent.of(self._ledger, self.model.version)
        return self._precedent

    def frozen_list(self, plan: Plan) -> Path:
        """A local copy of the list of a frozen run."""
        path = self._scratch / f"{plan.run_id}.parquet"
        if not path.exists():
            path.write_bytes(self._ledger.storage.get(self._ledger.uri(plan.run_id, "manifest.parquet")).data)
        return path

    def _plan(self, found: _Found) -> Plan:
        config, workplace, counts = self._config, self._workplace, found.counts
        # Before anything is known of this model: a mask rarely takes more than a quarter of its image's bytes.
        guessed = max(_LEAST_ROW_BYTES, counts.planned_bytes / counts.planned / 4)
        # Measured: on a CPU larger batches leave the cache, and many image sizes pad them besides.
        batch_size = config.batch_size or (32 if workplace.has_gpus() else 2)
        return self._plan_of_nothing(found).model_copy(
            update={
                "batch_size": batch_size,
                "batch_pixels": max(batch_size * 512 * 512, 4 << 20 if workplace.has_gpus() else 1),
                "threads": config.threads or workplace.threads(),
                "shard_size": config.shard_size
                or choose_shard_size(
                    counts.planned, actors=workplace.actors(), row_bytes=self.precedent().row_bytes or guessed
                ),
                "canary": min(config.canary or 0, counts.planned),
            }
        )

    def _plan_of_nothing(self, found: _Found) -> Plan:
        """A run of no images needs no workers, and none are asked."""
        config, model = self._config, self.model
        now = dt.datetime.now(dt.UTC)
        return Plan(
            schema_version=SCHEMA_VERSION,
            run_id=new_run_id(now),
            sequence=found.sequence,
            created_at=now,
            run_date=config.run_date or now.date(),
            dest=self._ledger.dest,
            command=self.command,
            model_name=model.card.name,
            model_version=model.version,
            card=model.card.model_dump(mode="json"),
            card_digest=hashlib.sha256(model.card.model_dump_json().encode()).hexdigest()[:12],
            settings=found.settings,
            settings_digest=digest_of(found.settings),
            precision=found.precision,
            batch_size=1,
            batch_pixels=1,
            threads=1,
            shard_size=1,
            canary=0,
            counts=found.counts,
            code_digest=code_digest(),
            listed=found.listed,
            signed=found.signed,
            closed_before=(self._oldest_open or found.sequence) - 1,
            removed=found.changes.removed,
            returned=found.changes.returned,
        )

    def _settings(self, precision: Precision) -> dict[str, Any]:
        config = self._config
        return settings_of(
            self._shipped_card, self.model.card,
            precision=precision, max_pixels=config.max_pixels, compile=config.compile,
        )  # fmt: skip

    def _count(
        self, corpus: Corpus, settings: dict[str, Any], list_path: Path | None, unmatched_path: Path | None
    ) -> WorkCounts:
        """The work left under these settings, which is listed in `list_path`.

        Order matters: open runs are read before rows, so a run that closes in between is counted by its rows.
        """
        config, model = self._config, self.model
        digest = self.settings_digest = digest_of(settings)
        others = self._ledger.open_plans()
        self._oldest_open = min((other.sequence for other in others), default=None)
        held = {
            other.run_id: self.frozen_list(other)
            for other in others
            if other.model_version == model.version and other.settings_digest == digest
        }
        folder = f"segments/model={model.card.name}/version={model.version}"
        question = Question(
            corpus=corpus.sql,
            corpus_rows=corpus.rows,
            corpus_is_distinct=corpus.distinct,
            part_sizes=part_sizes(self._ledger.storage, join_uri(self._ledger.dest, folder)),
            held=held,
            settings_digest=digest,
            limit=config.limit,
            retry_errors=config.retry_errors,
            force=config.force,
            unmatched_path=unmatched_path,
            forgotten=read_forgotten(self._ledger.storage, self._ledger.dest),
        )
        return work_left(question, self._ledger.storage, scratch=self._scratch, list_path=list_path)

    def _looks_for_changes(self, corpus: Corpus) -> bool:
        """With a limit, most of SOURCE is not this run's business."""
        return corpus.full_listing and not self._config.dry_run and not self._config.limit

    def _changes(
        self, corpus: Corpus, counts: WorkCounts, settings: dict[str, Any], unmatched_path: Path | None
    ) -> Changes:
        storage, dest = self._ledger.storage, self._ledger.dest
        current = Current(self.model.card.name, self.model.version, digest_of(settings))
        if unmatched_path is not None and corpus.span is not None:
            return find_changes(
                storage,
                dest,
                listing=corpus.sql,
                coverage=Coverage(*corpus.span),
                current=current,
                scratch=self._scratch,
                unmatched_path=unmatched_path,
            )
        if self._config.dry_run or counts.planned or counts.held:
            return Changes()
        return find_switch(storage, dest, current)

    def _resolved_precision(self) -> Precision:
        """`auto` keeps what this version ran with before in DEST, so that another device does not redo the corpus."""
        known = self._known_precision()
        if known is not None:
            return known
        return "bf16" if self._workplace.has_bf16() else "fp32"

    def _known_precision(self) -> Precision | None:
        return self.precedent().precision if self._config.precision == "auto" else self._config.precision
