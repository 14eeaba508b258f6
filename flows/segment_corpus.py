"""The flow `segment-corpus`: plan → segment → report. Owns: their order, the gate, what is tried again.
Must not know: how images become rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run

import pipeline
from flows import artifacts
from flows.driving import Place, drive
from flows.parameters import with_fields_of
from flows.retries import worth_another_try
from pipeline.config import SegmentConfig
from pipeline.corpus.manifest import Corpus
from pipeline.engine.jobs import check_jobs_address
from pipeline.engine.outcome import Outcome, Preview
from pipeline.errors import MaskmillError
from pipeline.table.scratch import scratch_folder


class TooManyErrorsError(MaskmillError):
    """The run is done, or stopped after its canary, and more images failed than `max_error_rate` allows."""


@flow(name="segment-corpus")
@with_fields_of(SegmentConfig, Place)
def segment_corpus(**settings: Any) -> Outcome | None:
    """Brings the table at DEST up to date with SOURCE, as `maskmill segment` does with the same settings.

    The run files under the date (UTC) of the flow run's scheduled start. Another run with the same settings, or a retry
    of this one, continues what this one leaves. None after a dry run.
    """
    place = Place(**{name: settings.pop(name) for name in Place.model_fields if name in settings})
    config = SegmentConfig(**settings)
    if config.run_date is None:
        config = config.model_copy(update={"run_date": flow_run.scheduled_start_time.date()})
    with scratch_folder() as scratch:
        found = plan(config, scratch, place)
        if config.dry_run:
            return None
        outcome = segment(config, found.corpus, place)
    report(config, outcome)
    _check(outcome, config.max_error_rate)
    return outcome


@task(name="plan", cache_policy=NO_CACHE)
def plan(config: SegmentConfig, scratch: Path, place: Place) -> Preview:
    """What there is to do. Fails here, before any work, where the model, SOURCE, DEST or the cluster cannot be had."""
    if place.ray_jobs_address:
        check_jobs_address(place.ray_jobs_address)
        config = config.model_copy(update={"engine": "local"})  # no other cluster is asked whether it is there
    found = pipeline.plan(config, scratch=scratch)
    work = found.work
    get_run_logger().info(
        "%s %s: %d images, %d done before, %d left to do, %d of open runs (%s)",
        found.model_name, found.model_version, work.images, work.done, work.planned, work.held,
        ", ".join(found.open_runs) or "none to continue",
    )  # fmt: skip
    artifacts.show_plan(found)
    return found


@task(
    name="segment",
    cache_policy=NO_CACHE,
    retries=2,
    retry_delay_seconds=[10, 60],
    retry_condition_fn=worth_another_try,
)
def segment(config: SegmentConfig, corpus: Corpus, place: Place) -> Outcome:
    """Drives the fleet through the open and the new runs of these settings, and reconciles them."""
    progress = artifacts.LiveProgress()
    outcome = drive(config, corpus, get_run_logger(), progress, place)
    progress.finish()
    return outcome


@task(name="report", cache_policy=NO_CACHE)
def report(config: SegmentConfig, outcome: Outcome) -> None:
    """Tables, a contact sheet, a link to the report, events."""
    artifacts.show_outcome(outcome, config.dest)
    artifacts.show_sheet(config, outcome.model_name)
    artifacts.show_report(config, outcome)
    artifacts.show_drift(config, outcome)
    artifacts.announce(outcome, config.dest)


def _check(outcome: Outcome, max_error_rate: float) -> None:
    """The gate of the error rate; that of reconciliation is the pipeline's own."""
    if outcome.state != "canary_failed" and outcome.error_rate <= max_error_rate:
        return
    kinds = ", ".join(f"{number} {kind}" for kind, number in outcome.errors_by_kind.items())
    stopped = "; stopped after the canary, the run stays open" if outcome.state == "canary_failed" else ""
    raise TooManyErrorsError(
        f"{outcome.errors} of {outcome.ok + outcome.errors} images failed ({kinds}), "
        f"more than max_error_rate {max_error_rate:g} allows{stopped}"
    )
