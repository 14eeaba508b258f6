"""What a finished run leaves for people: `drift.json` and `report.html` beside its record, each made once.
Must not know: how a run is made, what is on the page.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from pipeline.errors import StorageError
from pipeline.insight.report import ReportConfig, make_report
from pipeline.storage import join_uri, normalize_uri, open_storage

log = logging.getLogger(__name__)

REPORT_NAME = "report.html"
DRIFT_NAME = "drift.json"


def report_uri(dest: str, run_id: str) -> str:
    """Where the report of a run lies, if it was made."""
    return join_uri(normalize_uri(dest), "runs", run_id, REPORT_NAME)


def has_report(dest: str, run_id: str, *, profile: str | None = None) -> bool:
    """Whether it was. Raises StorageError."""
    return open_storage(normalize_uri(dest), profile=profile).exists(report_uri(dest, run_id))


def leave_behind(
    dest: str, run_ids: Sequence[str], config: ReportConfig, *, warn: Callable[[str], None] | None = None
) -> list[str]:
    """Makes both files for those of these runs that are closed and have them not yet; returns the reports' URIs.

    Never raises: what goes wrong is told to `warn` (default: the log), since it is no reason for a run to fail. Both
    files are create-only: the first one stands, and the same call again does nothing.
    """
    left = []
    for run_id in run_ids:
        try:
            if (uri := _leave(dest, run_id, config)) is not None:
                left.append(uri)
        except Exception as error:  # noqa: BLE001 - the run is done, whatever becomes of its report
            why = str(error) if isinstance(error, StorageError) else f"{type(error).__name__}: {error}"
            (warn or log.warning)(f"run {run_id} is done, but has no report ({why}): `maskmill report` makes one")
    return left


def _leave(dest: str, run_id: str, config: ReportConfig) -> str | None:
    dest = normalize_uri(dest)
    storage = open_storage(dest, profile=config.dest_profile)
    uri = report_uri(dest, run_id)
    if not storage.exists(join_uri(dest, "runs", run_id, "run.json")) or storage.exists(uri):
        return None
    report = make_report(dest, run_id, config)
    if report.drift is not None:
        storage.put_new(join_uri(dest, "runs", run_id, DRIFT_NAME), report.drift.model_dump_json(indent=1).encode())
    storage.put_new(uri, report.html.encode())
    return uri
