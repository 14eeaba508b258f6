from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from harness import own_processes, wait_until

from pipeline.errors import UsageError
from pipeline.learning.loop import EpochEvent, StepEvent
from pipeline.learning.training import train

sys.path.insert(0, str(Path(__file__).parent))
from tiny_nuclei import write_dataset
from tiny_training import NORMLESS, equal, tiny, weights

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


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


def test_a_worker_is_killed_and_the_weights_are_those_of_an_undisturbed_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With relative paths: workers have another working folder."""
    monkeypatch.chdir(tmp_path)
    folder = Path(os.path.relpath(folder))
    undisturbed = train(tiny(folder, Path("local"), epochs=30, val_split=None))
    killed = threading.Event()
    steps: list[int] = []

    def listen(event: Any) -> None:
        if isinstance(event, StepEvent):
            steps.append(event.step)
        if isinstance(event, EpochEvent) and not killed.is_set():
            killed.set()
            kill_a_worker()

    outcome = train(tiny(folder, Path("ray"), epochs=30, val_split=None, engine="ray"), listen=listen)
    assert killed.is_set()
    assert outcome.resumed_step > 0
    assert equal(weights(outcome.uri), weights(undisturbed.uri))


@pytest.mark.slow
def test_the_driver_is_killed_and_the_same_call_continues(folder: Path, tmp_path: Path) -> None:
    undisturbed = train(tiny(folder, tmp_path / "local", epochs=60, val_split=None))
    config = tiny(folder, tmp_path / "ray", epochs=60, val_split=None, engine="ray")
    recipe = tmp_path / "recipe.json"
    recipe.write_text(config.model_dump_json(exclude={"dataset"}))
    command = [sys.executable, "-m", "pipeline.cli", "train", str(folder), "--recipe", str(recipe), "--json"]
    with own_processes():
        driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        found = tmp_path / "ray" / "_training"
        wait_until(
            lambda: bool(list(found.glob("*/checkpoint-*"))) or driver.poll() is not None,
            what="a checkpoint",
            timeout_s=600,
        )
        driver.kill()
        driver.wait()
        assert not list(found.glob("*/outcome.json")), "the driver was to die in the middle"
        # The cluster and the worker that the dead driver leaves behind must not be in the way.
        outcome = train(config)
    assert outcome.state == "trained"
    assert outcome.resumed_step >= 2
    assert equal(weights(outcome.uri), weights(undisturbed.uri))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A Ray cluster: a head without CPUs, and two nodes with one each."""
    import ray
    from ray.cluster_utils import Cluster

    with own_processes():
        head = {"num_cpus": 0, "include_dashboard": False}
        made = Cluster(initialize_head=True, head_node_args=head)
        try:
            for _ in range(2):
                made.add_node(num_cpus=1)
            yield made
        finally:
            ray.shutdown()
            made.shutdown()


def test_a_cluster_that_is_there_does_the_work(folder: Path, tmp_path: Path, cluster: Any) -> None:
    there: dict[str, Any] = {"ray_address": cluster.address, "val_split": None}
    with pytest.raises(UsageError, match=r"local disk.*3 nodes.*--shared-filesystem"):
        train(tiny(folder, tmp_path / "away", **there))
    assert not (tmp_path / "away").exists()
    outcome = train(tiny(folder, tmp_path / "there", shared_filesystem=True, **there))
    assert outcome.steps == 4
    assert equal(weights(outcome.uri), weights(train(tiny(folder, tmp_path / "here", val_split=None)).uri))


@pytest.mark.slow
def test_a_node_dies_and_the_run_goes_on_from_its_last_checkpoint(folder: Path, tmp_path: Path, cluster: Any) -> None:
    """Two workers on two nodes: one node goes for good, and another comes."""
    lost = threading.Event()

    def listen(event: Any) -> None:
        if isinstance(event, EpochEvent) and event.row["epoch"] >= 2 and not lost.is_set():
            lost.set()
            cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
            cluster.add_node(num_cpus=1)

    config = tiny(
        folder, tmp_path, epochs=100, workers=2, ray_address=cluster.address, shared_filesystem=True, val_split=None,
        threads=1,
    )  # fmt: skip
    outcome = train(config, listen=listen)
    assert lost.is_set()
    assert (outcome.steps, outcome.epochs) == (200, 100)
    assert outcome.resumed_step >= 4
    assert len(list(tmp_path.glob("_training/*/trace/*.parquet"))) == 100


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
