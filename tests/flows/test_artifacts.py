"""What the UI shows, and what becomes of a run whose server is away."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

pytest.importorskip("prefect")

from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

from flows.artifacts import LiveProgress
from pipeline.engine.fleet import FleetProgress
from pipeline.engine.outcome import Event


@pytest.mark.filterwarnings("ignore:Artifact creation outside")
def test_a_server_that_is_away_costs_the_bar_and_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/api"
    progress = LiveProgress(every_s=0)
    progress.now = Event("progress", progress=FleetProgress(3, 0, 1, 0.0, 0.0), total=10)
    with temporary_settings({PREFECT_API_URL: url, PREFECT_HOME: tmp_path}):
        progress.publish()
    assert "the progress bar could not be updated" in caplog.text
