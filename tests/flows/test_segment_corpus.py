"""The flow `segment-corpus` as a plain function, and as a flow run of this process."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import SHAPE, Case, in_process, terminal_rows
from prefect_site import Site, client_of

pytest.importorskip("prefect")

from prefect import tags
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows import segment_corpus as module
from flows.segment_corpus import TooManyErrorsError, segment_corpus
from pipeline.engine import run
from pipeline.engine.crew import Crew, InlineCrew
from pipeline.errors import InfrastructureError, ModelError, UsageError

pytestmark = pytest.mark.prefect

IMAGES = 12


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("case"), IMAGES)


@pytest.fixture(autouse=True)
def server(site: Site) -> Iterator[None]:
    """Task runs of this process are told to the site's server."""
    with client_of(site), in_process():
        yield


def asked(case: Case, dest: Path | str, **changes: Any) -> dict[str, Any]:
    settings = {"source": str(case.images), "dest": str(dest), "model": str(case.model), "engine": "local"}
    return settings | SHAPE | changes


def test_a_plain_call_makes_the_table(case: Case, tmp_path: Path) -> None:
    outcome = segment_corpus.fn(**asked(case, tmp_path / "out", shard_size=5))
    assert outcome is not None and (outcome.state, outcome.ok, outcome.errors) == ("done", IMAGES, 0)
    assert terminal_rows(tmp_path / "out") == case.calm
    again = segment_corpus.fn(**asked(case, tmp_path / "out", shard_size=5))
    assert again is not None and again.runs == [] and again.skipped == IMAGES


def test_a_dry_run_only_plans(case: Case, tmp_path: Path) -> None:
    assert segment_corpus.fn(**asked(case, tmp_path / "out", dry_run=True)) is None
    assert not list(tmp_path.glob("out/segments/**/*.parquet")) and not list(tmp_path.glob("out/runs/*"))


def dead_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"model": "nobody"}, ModelError, "no model is called 'nobody'"),
        ({"source": "/no/such/folder"}, UsageError, "/no/such/folder"),
        ({"source": ""}, UsageError, "empty"),
        ({"source_profile": "nobody", "source": "s3://some-bucket/x"}, UsageError, "nobody"),
        ({"engine": "ray", "ray_address": "127.0.0.1:{port}"}, InfrastructureError, "no Ray cluster at '127.0.0.1:"),
        ({"ray_jobs_address": "http://127.0.0.1:{port}"}, InfrastructureError, "no Ray cluster at '127.0.0.1:"),
        ({"ray_jobs_address": "head:8265"}, UsageError, "http://HOST:8265, not 'head:8265'"),
    ],
)
@pytest.mark.timeout(30)
def test_what_cannot_work_fails_before_any_work(
    case: Case, tmp_path: Path, changes: dict[str, Any], kind: type[Exception], words: str
) -> None:
    changes = {name: value.format(port=dead_port()) for name, value in changes.items()}
    with pytest.raises(kind, match=words):
        segment_corpus.fn(**asked(case, tmp_path / "out", **changes))
    assert not list(tmp_path.glob("out/runs/*"))


@pytest.mark.timeout(60)
def test_a_server_that_is_away_is_said_before_any_work(case: Case, tmp_path: Path) -> None:
    address = f"http://127.0.0.1:{dead_port()}/api"
    with temporary_settings({PREFECT_API_URL: address}), pytest.raises(RuntimeError, match=f"reach API at {address}"):
        segment_corpus(**asked(case, tmp_path / "out"))
    assert not list(tmp_path.glob("out/runs/*"))


@pytest.mark.timeout(30)
def test_a_missing_bucket_fails_before_any_work(case: Case, tmp_path: Path, s3_environment: str) -> None:
    with pytest.raises(UsageError, match="no-such-bucket"):
        segment_corpus.fn(**asked(case, tmp_path / "out", source="s3://no-such-bucket/photos"))
    with pytest.raises(UsageError, match="no-such-bucket"):
        segment_corpus.fn(**asked(case, "s3://no-such-bucket/masks"))


def test_too_many_errors_fail_the_run_with_the_reason(case: Case, tmp_path: Path, site: Site) -> None:
    source = tmp_path / "photos"
    source.mkdir()
    for path in case.images.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    (source / "broken.png").write_bytes(b"no picture")
    dest = tmp_path / "out"
    with pytest.raises(TooManyErrorsError, match=r"1 of 13 images failed \(1 not_an_image\), more than"), tags("gate"):
        segment_corpus(**asked(case, dest, source=str(source), report=True))
    (run,) = site.api("flow_runs/filter", {"flow_runs": {"tags": {"all_": ["gate"]}}})
    assert run["state_type"] == "FAILED" and "1 not_an_image" in run["state"]["message"]
    assert len(terminal_rows(dest)) == IMAGES + 1
    shown = site.artifacts(run["id"])
    assert '"not_an_image"' in shown["segment-errors"]["data"]
    (report,) = dest.glob("runs/*/report.html")
    assert report.as_uri() in shown["segment-report"]["data"]
    outcome = segment_corpus.fn(**asked(case, dest, source=str(source)))
    assert outcome is not None and outcome.runs == []


def test_a_canary_that_fails_leaves_the_run_open(case: Case, tmp_path: Path) -> None:
    source = tmp_path / "photos"
    source.mkdir()
    for index, path in enumerate(sorted(case.images.iterdir())):
        (source / path.name).write_bytes(path.read_bytes() if index else b"no picture")
    with pytest.raises(TooManyErrorsError, match="after the canary"):
        segment_corpus.fn(**asked(case, tmp_path / "out", source=str(source), canary=2, shard_size=2))
    outcome = segment_corpus.fn(
        **asked(case, tmp_path / "out", source=str(source), canary=2, shard_size=2, max_error_rate=1)
    )
    assert outcome is not None and outcome.state == "done"
    assert len(terminal_rows(tmp_path / "out")) == IMAGES


@pytest.mark.parametrize(
    ("error", "tries"), [(InfrastructureError("the cluster is away"), 2), (UsageError("no such GPU"), 1)]
)
def test_only_what_the_world_did_is_tried_again(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, tries: int
) -> None:
    """The place of the workers fails at first, as a cluster does that is just restarting."""
    tried = 0

    def open_crew(*_: Any) -> Crew:
        nonlocal tried
        tried += 1
        if tried == 1:
            raise error
        return InlineCrew(actors=1, threads=1)

    monkeypatch.setattr(run, "open_crew", open_crew)
    monkeypatch.setattr(module, "segment", module.segment.with_options(retry_delay_seconds=0))
    if tries == 1:
        with pytest.raises(UsageError, match="no such GPU"):
            segment_corpus.fn(**asked(case, tmp_path / "out"))
    else:
        outcome = segment_corpus.fn(**asked(case, tmp_path / "out"))
        assert outcome is not None and outcome.ok == IMAGES
    assert tried == tries
