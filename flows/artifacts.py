"""What Prefect's UI shows of a run. Owns: artifacts and events. Must not know: how a run is made."""

from __future__ import annotations

import base64
import logging
import time
from typing import Any, cast
from uuid import UUID

import httpx
from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.events import emit_event
from prefect.exceptions import PrefectException
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from pipeline.config import SegmentConfig
from pipeline.engine.outcome import Event, Outcome, Preview
from pipeline.errors import BYTES_KINDS, MaskmillError, UsageError
from pipeline.insight.aftermath import has_report, report_uri
from pipeline.insight.contact_sheet import SheetConfig, draw_contact_sheet
from pipeline.insight.drift import drift
from pipeline.table.scratch import scratch_folder

log = logging.getLogger(__name__)

_EVERY_S = 5.0
#: What goes wrong where the server is away.
_AWAY = (httpx.HTTPError, PrefectException, OSError, RuntimeError)
_SHEET = {"columns": 4, "limit": 12, "tile_px": 200}


class LiveProgress:
    """A progress bar in the UI that follows `now`. A server that is away costs the bar, never the run."""

    def __init__(self, *, every_s: float = _EVERY_S) -> None:
        self.now: Event | None = None
        self._every_s = every_s
        self._began: tuple[float, int] | None = None
        self._told_s = 0.0
        self._id: UUID | None = None

    def publish(self) -> None:
        """Sends `now`, if it is time."""
        if self.now is not None and time.monotonic() - self._told_s > self._every_s:
            self._told_s = time.monotonic()
            self._send(self.now)

    def finish(self) -> None:
        """Sends the last of `now`."""
        if self.now is not None:
            self._send(self.now)

    def _send(self, event: Event) -> None:
        progress = event.progress
        assert progress is not None
        self._began = self._began or (time.monotonic(), progress.rows)
        elapsed_s = time.monotonic() - self._began[0]
        speed = f"{(progress.rows - self._began[1]) / elapsed_s:.1f} images/s, " if elapsed_s > 1 else ""
        text = (
            f"{progress.rows:,} of {event.total:,} images, {speed}{progress.errors:,} errors, {progress.actors} workers"
        )
        percent = min(100.0, 100.0 * progress.rows / max(1, event.total))
        try:
            with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):  # by itself Prefect tries for a minute
                if self._id is None:
                    self._id = cast(UUID, create_progress_artifact(percent, key="segment-progress", description=text))
                else:
                    update_progress_artifact(self._id, percent, description=text)
        except _AWAY as error:
            self._every_s *= 2
            log.warning("the progress bar could not be updated: %s", error)


def show_plan(found: Preview) -> None:
    """A table of the work there is."""
    rows = [{"figure": name, "value": str(value)} for name, value in found.work.model_dump(exclude={"held_by"}).items()]
    rows += [{"figure": "open run to continue", "value": run_id} for run_id in found.open_runs]
    model = f"{found.model_name} {found.model_version}"
    create_table_artifact(rows, key="segment-plan", description=f"Work left for model {model}")


def show_outcome(outcome: Outcome, dest: str) -> None:
    """A table of counts and throughput, and one of errors by kind."""
    figures: dict[str, Any] = {
        "runs": ", ".join(outcome.runs) or "none: nothing to do",
        "state": outcome.state,
        "model": f"{outcome.model_name} {outcome.model_version}",
        "engine": outcome.engine or "none was needed",
        "images listed": outcome.images,
        "images done before": outcome.skipped,
        "images held by other runs": outcome.held,
        "images planned": outcome.planned,
        "rows ok": outcome.ok,
        "rows with errors": outcome.errors,
        "instances": outcome.instances,
        "Parts": outcome.parts,
        "Parts, MB": round(outcome.parts_bytes / 1e6, 3),
        "seconds": round(outcome.seconds, 2),
        "images/s": round(outcome.images_per_s, 2),
        "Mpixel/s": round(outcome.megapixels_per_s, 2),
        "model busy": f"{outcome.model_busy_fraction:.0%}",
    }
    rows = [{"figure": name, "value": str(value)} for name, value in figures.items()]
    create_table_artifact(rows, key="segment-counts", description=f"What was done in {dest}")
    errors = [
        {"kind": kind, "images": number, "about": "the image" if kind in BYTES_KINDS else "the world: tried again"}
        for kind, number in outcome.errors_by_kind.items()
    ]
    create_table_artifact(errors, key="segment-errors", description="Errors by kind")


def show_sheet(config: SegmentConfig, model_name: str) -> int:
    """A contact sheet as a picture in the page itself; returns its tiles, 0 where there is nothing to draw."""
    sheet = SheetConfig(
        **_SHEET, model=model_name, source_profile=config.source_profile, dest_profile=config.dest_profile
    )
    with scratch_folder() as folder:
        path = folder / "sheet.png"
        try:
            tiles = draw_contact_sheet(config.dest, path, sheet)
        except UsageError:
            return 0
        except MaskmillError as error:
            log.warning("no contact sheet: %s", error)
            return 0
        url = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    create_image_artifact(url, key="segment-sheet", description=f"{tiles} images of {config.dest}, with their masks")
    return tiles


def show_report(config: SegmentConfig, outcome: Outcome) -> None:
    """A link to the report of each run that has one."""
    for run_id in outcome.runs:
        try:
            if has_report(config.dest, run_id, profile=config.dest_profile):
                uri = report_uri(config.dest, run_id)
                create_link_artifact(uri, link_text=uri, key="segment-report", description=f"Report of run {run_id}")
        except MaskmillError as error:
            log.warning("no link to a report: %s", error)


def show_drift(config: SegmentConfig, outcome: Outcome) -> None:
    """Where the run can be compared with those before it: a table of how, and, where it has drifted, the event
    `maskmill.drift`."""
    if outcome.state != "done" or not outcome.run_id:
        return
    try:
        found = drift(config.dest, outcome.run_id, config.drift, profile=config.dest_profile)
    except MaskmillError as error:
        log.warning("no comparison with earlier runs: %s", error)
        return
    if found.state != "compared":
        return
    rows = [shift.model_dump(mode="json") for shift in found.shifts]
    about = f"Run {found.run_id} beside {len(found.earlier_runs)} before it"
    create_table_artifact(rows, key="segment-drift", description=about)
    if found.drifted:
        moved = [f"{one.measure} {one.mean_before:.3g} → {one.mean_now:.3g}" for one in found.shifts if one.drifted]
        payload = found.model_dump(mode="json") | {"dest": config.dest, "text": f"{about}: {', '.join(moved)}"}
        emit_event("maskmill.drift", resource=_resource(found.run_id), payload=payload)


def announce(outcome: Outcome, dest: str) -> None:
    """The event `maskmill.run.finished`, one for each run that this call closed or left."""
    payload = outcome.model_dump(mode="json", exclude={"work", "estimate", "shards"}) | {"dest": dest}
    for run_id in outcome.runs:
        emit_event("maskmill.run.finished", resource=_resource(run_id), payload=payload)


def _resource(run_id: str) -> dict[str, str]:
    return {"prefect.resource.id": f"maskmill.run.{run_id}", "prefect.resource.name": run_id}
