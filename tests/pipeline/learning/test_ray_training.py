from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from pipeline.learning.loop import EpochEvent, StepEvent
from pipeline.learning.training import train

sys.path.insert(0, str(Path(__file__).parent))
from tiny_nuclei import write_dataset
from tiny_training import NORMLESS, equal, tiny, weights

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "discs")


@pytest.fixture(autouse=True)
def _threads_as_they_were() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def kill_a_worker() -> None:
    """kill -9 of one process that trains."""
    for process in psutil.Process().children(recursive=True):
        if "RayTrainWorker" in process.name() or "RayTrainWorker" in " ".join(process.cmdline()):
            os.kill(process.pid, signal.SIGKILL)
            return
    raise AssertionError("no worker is there to be killed")


def test_a_worker_is_killed_and_the_weights_are_those_of_an_undisturbed_run(folder: Path, tmp_path: Path) -> None:
    undisturbed = train(tiny(folder, tmp_path / "local", epochs=30, val_split=None))
    killed = threading.Event()
    steps: list[int] = []

    def listen(event: Any) -> None:
        if isinstance(event, StepEvent):
            steps.append(event.step)
        if isinstance(event, EpochEvent) and not killed.is_set():
            killed.set()
            kill_a_worker()

    outcome = train(tiny(folder, tmp_path / "ray", epochs=30, val_split=None, engine="ray"), listen=listen)
    assert killed.is_set()
    assert outcome.resumed_step > 0
    assert equal(weights(outcome.uri), weights(undisturbed.uri))


@pytest.mark.slow
def test_two_workers_lose_as_one(folder: Path, tmp_path: Path) -> None:
    losses: dict[int, list[float]] = {}
    for workers in (1, 2):
        rows: list[dict[str, Any]] = []
        config = tiny(
            folder, tmp_path / str(workers), workers=workers, engine="ray", steps=20, batch_size=4, epoch_images=4,
            val_split=None, ema_decay=0, **NORMLESS,
        )  # fmt: skip
        train(config, listen=lambda event, rows=rows: rows.append(event.row) if isinstance(event, EpochEvent) else None)
        losses[workers] = [row["loss"] for row in rows]
    assert len(losses[1]) == len(losses[2]) == 20
    assert losses[2] == pytest.approx(losses[1], rel=1e-3)
    assert losses[1][-1] < losses[1][0]
