"""A `segment` call as a job of a Ray cluster: followed, found again, stopped; and what its actors export meanwhile."""

from __future__ import annotations

import logging
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from harness import SHAPE, Case, part_count, terminal_rows, wait_until
from ray_site import RaySite, ray_site

from pipeline.config import SegmentConfig
from pipeline.engine import jobs
from pipeline.engine.fleet import FleetProgress
from pipeline.engine.jobs import (
    _client,
    _Following,
    check_jobs_address,
    error_line,
    event_line,
    job_prefix,
    outcome_line,
    segment,
)
from pipeline.engine.outcome import Event, Outcome
from pipeline.errors import InfrastructureError, MaskmillError, ModelError, StorageError, UsageError

__all__ = ["ray_site"]

IMAGES = 30


@pytest.fixture
def heard() -> list[Event]:
    return []


def asked(**changes: Any) -> SegmentConfig:
    return SegmentConfig(**({"source": "s3://b/photos", "dest": "s3://b/masks", "model": "m"} | changes))


def test_a_job_is_named_after_its_command_not_after_its_night() -> None:
    assert job_prefix(asked(run_date="2026-01-01")) == job_prefix(asked(run_date="2026-01-02", wait=True))
    others = {job_prefix(asked(**change)) for change in ({}, {"dest": "s3://b/other"}, {"limit": 3}, {"force": True})}
    assert len(others) == 4


def test_what_a_job_prints_is_what_is_heard(heard: list[Event]) -> None:
    following = _Following(None, "job", heard.append, lambda: False)
    events = [
        Event("note", "a\nb"),
        Event("log", "line", level=logging.ERROR),
        Event("progress", progress=FleetProgress(3, 1, 2, 0.5, 1.0), total=9),
    ]
    for event in events:
        line = event_line(event)
        assert "\n" not in line
        following._take(line)
    assert heard == events
    following._take("Traceback of somebody")
    assert heard[-1] == Event("log", "job: Traceback of somebody", level=logging.INFO)
    outcome = Outcome(state="done", ok=3, runs=["r"])
    following._take(outcome_line(outcome))
    assert following._outcome == outcome


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ModelError("no model"), ModelError),
        (StorageError("away", kind="denied"), InfrastructureError),
        (ZeroDivisionError("oh"), MaskmillError),
    ],
)
def test_an_error_in_a_job_is_raised_here(error: Exception, kind: type[MaskmillError]) -> None:
    following = _Following(None, "job", lambda event: None, lambda: False)
    following._take(error_line(error))
    assert type(following._error) is kind and str(error) in str(following._error)


@pytest.mark.timeout(30)
def test_an_address_where_nobody_answers_is_said_at_once() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        with pytest.raises(InfrastructureError, match="no Ray cluster"):
            check_jobs_address(f"http://127.0.0.1:{silent.getsockname()[1]}")
    for address in ("127.0.0.1:8265", "ray://head:10001", "http://"):
        with pytest.raises(UsageError, match="http://HOST:8265"):
            check_jobs_address(address)


@pytest.mark.timeout(30)
def test_a_server_that_is_no_ray_cluster_is_said_at_once(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # Ray would go there instead
    with pytest.raises(InfrastructureError, match="no Ray Jobs API"):
        check_jobs_address(s3_server)


class _Young:
    """Ray's client of a cluster whose agents are not up yet: it takes the third job that it is handed."""

    def __init__(self) -> None:
        self.handed: list[str] = []

    def list_jobs(self) -> list[Any]:
        return []

    def submit_job(self, *, submission_id: str, **_: Any) -> None:
        self.handed.append(submission_id)
        if len(self.handed) < 3:
            raise RuntimeError("status code 500: No available agent to submit job, please try again later..")


def test_a_cluster_that_has_just_come_up_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_POLL_S", 0.01)
    young = _Young()
    name, is_new = jobs._submit_or_find(young, asked())
    assert is_new and young.handed == [name] * 3
    monkeypatch.setattr(jobs, "_AGENT_TIMEOUT_S", 0.0)
    with pytest.raises(InfrastructureError, match="No available agent"):
        jobs._submit_or_find(_Young(), asked())


@pytest.fixture
def access(ray_site: RaySite, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ray_site.access.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")


def jobs_of(ray_site: RaySite, config: SegmentConfig) -> list[str]:
    names = (job.submission_id or "" for job in _client(ray_site.jobs_address).list_jobs())
    return sorted(name for name in names if name.startswith(job_prefix(config)))


@pytest.mark.ray
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("access")
def test_a_job_outlives_who_followed_it_and_is_found_and_stopped(
    ray_site: RaySite, tmp_path: Path, heard: list[Event]
) -> None:
    """And on the way its actors' metrics are at Ray's metrics ports. What it leaves, the next run does."""
    case = Case(tmp_path / "case", IMAGES)
    (case.images / "0000-broken.png").write_bytes(b"no picture")
    dest = tmp_path / "out"
    config = SegmentConfig(
        source=str(case.images), dest=str(dest), model=str(case.model), shard_size=1, shared_filesystem=True,
        max_error_rate=0.5, actors=1, **SHAPE,
    )  # fmt: skip
    script = (
        "import sys; from pipeline.engine.jobs import segment; from pipeline.config import SegmentConfig\n"
        "segment(SegmentConfig.model_validate_json(sys.argv[1]), sys.argv[2], listen=print)"
    )
    with ray_site.paced():
        first = subprocess.Popen([sys.executable, "-c", script, config.model_dump_json(), ray_site.jobs_address])
        wait_until(
            lambda: part_count(dest) >= 3 or first.poll() is not None, timeout_s=240, what="three Parts", poll_s=0.05
        )
        first.send_signal(signal.SIGKILL)
        first.wait()
        kept = part_count(dest)
        assert 3 <= kept < IMAGES
        # Each is sent when its next turn comes: those of one image may come one after the other.
        for metric in ("maskmill_errors", "maskmill_model_busy_fraction", 'stage="infer"', 'stage="encode"'):
            wait_until(lambda: metric in ray_site.metrics(), timeout_s=60, what=metric, poll_s=0.3)  # noqa: B023
        text = ray_site.metrics()

        outcome = segment(
            config, ray_site.jobs_address, listen=heard.append, should_stop=lambda: part_count(dest) >= kept + 3
        )
    assert outcome.state == "interrupted"
    assert heard[0].text.startswith("following the running job")
    assert any(event.kind == "progress" for event in heard)
    assert kept + 3 <= part_count(dest) <= IMAGES
    assert not list(dest.glob("runs/*/lease.json")), "it was drained, not killed"
    assert jobs_of(ray_site, config) == [f"{job_prefix(config)}1"]

    model = f'model="tiny@{outcome.model_version}"'
    for metric in ("images_total", "errors_total", "read_bytes_total", "stage_seconds_total", "queue_images"):
        assert re.search(rf"^ray_maskmill_{metric}{{.*{model}.*}} [0-9.]+", text, re.M), f"{metric} in {text}"
    assert re.search(r'^ray_maskmill_errors_total{.*kind="not_an_image".*} 1', text, re.M)
    stages = set(re.findall(r'^ray_maskmill_stage_seconds_total{.*stage="([a-z]+)"', text, re.M))
    assert stages == {"fetch", "decode", "infer", "encode"}

    assert case.segment(case.images, dest, max_error_rate=0.5).runs == outcome.runs
    rows = terminal_rows(dest)
    assert rows.pop("0000-broken.png").error_kind == "not_an_image"
    assert rows == case.calm


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("access")
def test_jobs_of_one_command_one_after_the_other(ray_site: RaySite, tmp_path: Path) -> None:
    case = Case(tmp_path / "case", 6)
    config = SegmentConfig(
        source=str(case.images), dest=str(tmp_path / "out"), model=str(case.model), shared_filesystem=True, **SHAPE
    )
    first = segment(config, ray_site.jobs_address, listen=lambda event: None)
    assert (first.state, first.ok) == ("done", 6) and terminal_rows(tmp_path / "out") == case.calm
    second = segment(config, ray_site.jobs_address, listen=lambda event: None)
    assert (second.runs, second.skipped) == ([], 6)
    assert jobs_of(ray_site, config) == [f"{job_prefix(config)}1", f"{job_prefix(config)}2"]
    with pytest.raises(ModelError, match="nobody"):
        segment(config.model_copy(update={"model": "nobody"}), ray_site.jobs_address, listen=lambda event: None)
