"""The event of a promotion: told of every one, once, whatever is killed or away."""

from __future__ import annotations

import logging
import queue
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from harness import in_process, terminal_rows, write_tiny_model
from prefect_site import ROOT, Site, client_of

pytest.importorskip("prefect")

from prefect.automations import Automation
from prefect.events.actions import SendNotification
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.variables import Variable

import pipeline
from flows import promotions
from flows.automations import _save_block
from flows.promotions import announce_promotions
from flows.refresh_model import refresh_model
from pipeline.config import SegmentConfig
from pipeline.learning.configuration import TrainConfig
from pipeline.learning.promotion import Gate

sys.path.insert(0, str(Path(__file__).parents[1] / "pipeline" / "learning"))
from tiny_nuclei import write_dataset

pytestmark = pytest.mark.prefect

log = logging.getLogger("test")


@pytest.fixture(autouse=True)
def server(site: Site, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("MASKMILL_REGISTRY", raising=False)
    with client_of(site):
        yield


@pytest.fixture
def told(site: Site, hook: tuple[str, queue.Queue[str]]) -> Iterator[queue.Queue[str]]:
    """What an automation says of promotions."""
    url, said = hook
    made = Automation(
        name="of these tests: a promotion is told",
        trigger=EventTrigger(
            expect={"maskmill.model.promoted"}, posture=Posture.Reactive, threshold=1, within=timedelta(0)
        ),
        actions=[
            SendNotification(
                block_document_id=_save_block(url),
                subject="New",
                body="{{ event.payload.name }} {{ event.payload.version }}",
            )
        ],
    ).create()
    yield said
    made.delete()


def promote(registry: str, folder: Path, seed: int) -> str:
    """A person makes a model the champion."""
    path = write_tiny_model(folder / f"{seed}.safetensors", seed=seed)
    pushed = pipeline.push_model(str(path), registry)
    done = pipeline.promote_model(model=f"tiny@{pushed.version}", registry=registry, force=True, reason="a test")
    assert done.state == "promoted"
    return pushed.version


def events(site: Site, version: str) -> list[dict[str, Any]]:
    found = site.api("events/filter", {"filter": {"event": {"name": ["maskmill.model.promoted"]}}})["events"]
    return [event for event in found if event["payload"]["version"] == version]


def test_each_is_told_once(
    site: Site,
    tmp_path: Path,
    told: queue.Queue[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registry = str(tmp_path / "models")
    first = promote(registry, tmp_path, 1)
    assert announce_promotions("tiny", registry, log) == 0, "what was before it is old"
    second, third = promote(registry, tmp_path, 2), promote(registry, tmp_path, 3)
    with socket.socket() as silent, monkeypatch.context() as patch:
        silent.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/api"
        patch.setattr(promotions, "_ARRIVAL_TIMEOUT_S", 0.5)
        with temporary_settings({PREFECT_API_URL: address, PREFECT_CLIENT_MAX_RETRIES: 0}):
            assert announce_promotions("tiny", registry, log) == 0
    assert "promotions of tiny could not be told, the next run tells them" in caplog.text
    assert announce_promotions("tiny", registry, log) == 2
    assert [told.get(timeout=60) for _ in range(2)] == [f"New: tiny {version}" for version in (second, third)]
    assert announce_promotions("tiny", registry, log) == 0
    # As after a kill between the event and the note of it.
    variable = promotions._variable("tiny", registry)
    Variable.set(variable, Variable.get(variable) - 1, overwrite=True)
    assert announce_promotions("tiny", registry, log) == 1
    (event,) = events(site, third)
    assert event["occurred"][:19] == pipeline.model_history("tiny", registry)[-1].at.isoformat()[:19]
    assert event["payload"]["champion_before"] == second and events(site, first) == []
    # A newest entry that was lost is deleted, and its number is taken again.
    (newest,) = Path(registry).glob("tiny/_history/*6.json")
    newest.unlink()
    assert announce_promotions("tiny", registry, log) == 0
    pipeline.promote_model(model=f"tiny@{first}", registry=registry, force=True, reason="a test")
    assert announce_promotions("tiny", registry, log) == 1
    assert told.get(timeout=60) == f"New: tiny {first}" and told.empty()


KILLED = """
import os, signal, sys
from flows.refresh_model import refresh_model
from pipeline.config import SegmentConfig
from pipeline.learning import promotion
from pipeline.learning.configuration import TrainConfig
write = promotion.change_champion
def change_champion(*arguments, **fields):
    write(*arguments, **fields)
    os.kill(os.getpid(), signal.SIGKILL)
promotion.change_champion = change_champion
models = zip((TrainConfig, promotion.Gate, SegmentConfig), sys.argv[1:])
refresh_model.fn(*(model.model_validate_json(text) for model, text in models))
"""


@pytest.mark.slow
@pytest.mark.timeout(300, func_only=True)
def test_a_kill_right_after_the_registry_was_written(site: Site, tmp_path: Path, told: queue.Queue[str]) -> None:
    """The same flow again tells of the promotion and segments."""
    dataset, registry = write_dataset(tmp_path / "discs"), tmp_path / "models"
    training = TrainConfig(
        dataset=str(dataset), registry=str(registry), name="discs", arch="unet", batch_size=2, precision="fp32",
        args={"encoder_depth": 3, "decoder_channels": [16, 8, 8]}, augmentation={"crop_px": 32}, use_gpu=False,
        threads=1, steps=2, seed=1,
    )  # fmt: skip
    quick = {"engine": "local", "threads": 1, "precision": "fp32"}
    segmentation = SegmentConfig(
        source=str(dataset / "images"), dest=str(tmp_path / "out"), model="discs@champion", **quick
    )
    asked = (training, Gate(evaluation=quick), segmentation)
    command = [sys.executable, "-c", KILLED, *(one.model_dump_json(exclude_unset=True) for one in asked)]
    died = subprocess.run(command, env=site.environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr
    (promoted,) = (entry for entry in pipeline.model_history("discs", str(registry)) if entry.action == "promote")
    assert events(site, promoted.version) == [] and not (tmp_path / "out").exists()
    for _ in range(2):
        with in_process():
            done = refresh_model.fn(*asked)
        assert (done.state, done.version) == ("unchanged", promoted.version)
        assert len(events(site, promoted.version)) == 1
        assert len(terminal_rows(tmp_path / "out")) == 6
    assert told.get(timeout=60) == f"New: discs {promoted.version}" and told.empty()
