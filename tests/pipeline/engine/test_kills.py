"""kill -9, once each: the driver, a worker, a Ray actor, a Ray node. Afterwards the same command leaves one row per
image."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from harness import Answer, Command, kill_all, part_count, terminal_rows, wait_until, write_images, write_tiny_model

import pipeline
from pipeline.errors import UsageError

IMAGES = 48
#: The frozen batch shape and thread count under which masks must be equal bit for bit.
SHAPE: dict[str, Any] = {"batch_size": 4, "threads": 1, "precision": "fp32"}
FLAGS = ("--batch-size", "4", "--threads", "1", "--precision", "fp32", "--shard-size", "1", "--lease-ttl", "4")


class Case:
    """One corpus, one model, and what an undisturbed run makes of them."""

    def __init__(self, folder: Path) -> None:
        self.source = write_images(folder / "images", IMAGES)
        self.model = write_tiny_model(folder / "tiny.safetensors", task="instance")
        pipeline.segment(
            source=str(self.source),
            dest=str(folder / "calm"),
            model=str(self.model),
            engine="local",
            shard_size=7,
            **SHAPE,
        )
        self.calm: dict[str, Answer] = terminal_rows(folder / "calm")


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    case = Case(tmp_path_factory.mktemp("case"))
    assert len(case.calm) == IMAGES
    assert len({answer.crc32 for answer in case.calm.values()}) > 1, (
        "a model that gives one mask for all proves nothing"
    )
    return case


def test_kill_the_driver(case: Case, tmp_path: Path) -> None:
    dest = tmp_path / "out"
    first = Command(case.source, dest, "--model", case.model, "--engine", "local", *FLAGS)
    wait_until(lambda: part_count(dest) >= 3, what="three Parts")
    first.kill(family=False)
    assert part_count(dest) < IMAGES, "the driver was to die in the middle"
    outcome = Command(case.source, dest, "--model", case.model, "--engine", "local", *FLAGS).outcome()
    assert outcome["ok"] == IMAGES and outcome["errors"] == 0
    assert terminal_rows(dest) == case.calm


def test_kill_a_worker_process(case: Case, tmp_path: Path) -> None:
    dest = tmp_path / "out"
    command = Command(case.source, dest, "--model", case.model, "--engine", "local", *FLAGS)
    wait_until(lambda: part_count(dest) >= 3, what="three Parts")
    workers = [child for child in command.family() if "pipeline.engine.crew" in " ".join(child.cmdline())]
    assert workers and part_count(dest) < IMAGES
    kill_all(workers)
    assert command.outcome()["ok"] == IMAGES
    assert terminal_rows(dest) == case.calm


def test_a_paused_driver_that_wakes_up_adds_nothing(case: Case, tmp_path: Path) -> None:
    dest = tmp_path / "out"
    first = Command(case.source, dest, "--model", case.model, "--engine", "local", *FLAGS)
    wait_until(lambda: part_count(dest) >= 2, what="two Parts")
    everyone = [psutil.Process(first.pid), *first.family()]
    for process in everyone:
        process.send_signal(signal.SIGSTOP)
    try:
        assert part_count(dest) < IMAGES
        second = Command(case.source, dest, "--model", case.model, "--engine", "local", *FLAGS)
        assert second.outcome()["ok"] == IMAGES
        before = part_count(dest)
    finally:
        for process in everyone:
            process.send_signal(signal.SIGCONT)
    _, err = first.process.communicate(timeout=60)
    assert first.process.returncode in (0, 1), err
    assert part_count(dest) == before
    assert terminal_rows(dest) == case.calm


def test_an_image_that_kills_its_process_is_one_row(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The killer is real: a sitecustomize in the workers' path makes the decoder of one image end the process by
    SIGKILL."""
    poison = tmp_path / "site"
    poison.mkdir()
    victim = sorted(path.name for path in case.source.iterdir())[11]
    size = (case.source / victim).stat().st_size
    (poison / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "if 'pipeline.engine.crew' in ' '.join(sys.orig_argv):\n"
        "    import pipeline.engine.stream as stream\n"
        "    peek = stream.peek\n"
        "    def deadly(data):\n"
        f"        if len(data) == {size}: os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return peek(data)\n"
        "    stream.peek = deadly\n"
    )
    others = {path.name for path in case.source.iterdir() if path.stat().st_size == size} - {victim}
    assert not others, "the victim must be recognisable by its size"
    dest = tmp_path / "out"
    monkeypatch.setenv("PYTHONPATH", f"{poison}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    flags = [flag if flag != "1" or FLAGS[i - 1] != "--shard-size" else "8" for i, flag in enumerate(FLAGS)]
    outcome = Command(case.source, dest, "--model", case.model, "--engine", "local", *flags).outcome()
    assert outcome["errors_by_kind"] == {"crashed_worker": 1}
    rows = terminal_rows(dest)
    assert rows.pop(victim).error_kind == "crashed_worker"
    assert rows == {name: answer for name, answer in case.calm.items() if name != victim}


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[Any]:
    """Three nodes with a pretend GPU each; whatever it leaves behind is killed by process id."""
    import ray
    from ray.cluster_utils import Cluster

    before = {process.pid for process in psutil.process_iter()}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 1, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1, num_gpus=1) for _ in range(2)]
    try:
        yield cluster, nodes
    finally:
        ray.shutdown()
        cluster.shutdown()
        mine = [p for p in psutil.process_iter() if p.pid not in before and "ray" in " ".join(_cmdline(p))]
        kill_all(mine)


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _actors() -> list[psutil.Process]:
    return [p for p in psutil.process_iter() if any("ray::Host" in part for part in _cmdline(p))]


@pytest.mark.ray
def test_local_paths_are_refused_on_a_cluster_of_several_nodes(case: Case, tmp_path: Path, ray_cluster: Any) -> None:
    cluster, _ = ray_cluster
    with pytest.raises(UsageError, match=r"local disk.*3 nodes.*--shared-filesystem"):
        pipeline.segment(
            source=str(case.source),
            dest=str(tmp_path / "out"),
            model=str(case.model),
            ray_address=cluster.address,
            **SHAPE,
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_kill_an_actor_and_then_a_node(case: Case, tmp_path: Path, ray_cluster: Any) -> None:
    cluster, nodes = ray_cluster
    dest = tmp_path / "out"
    result: dict[str, Any] = {}

    def work() -> None:
        result["outcome"] = pipeline.segment(
            source=str(case.source), dest=str(dest), model=str(case.model), engine="ray", ray_address=cluster.address,
            shared_filesystem=True, shard_size=1, max_error_rate=0.0, **SHAPE,
        )  # fmt: skip

    thread = threading.Thread(target=work)
    thread.start()
    wait_until(lambda: part_count(dest) >= 2 or not thread.is_alive(), what="two Parts")
    actors = _actors()
    assert actors and part_count(dest) < IMAGES
    kill_all(actors[:1])
    cluster.remove_node(nodes[0], allow_graceful=False)
    time.sleep(0.1)
    thread.join(timeout=200)
    assert not thread.is_alive()
    assert result["outcome"].ok == IMAGES
    assert terminal_rows(dest) == case.calm


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_kill_the_driver_of_a_ray_run(case: Case, tmp_path: Path) -> None:
    dest = tmp_path / "out"
    first = Command(case.source, dest, "--model", case.model, "--engine", "ray", *FLAGS)
    wait_until(lambda: part_count(dest) >= 2, what="two Parts")
    leftovers = first.family()
    first.kill(family=False)
    try:
        assert part_count(dest) < IMAGES
        # The cluster that the dead driver leaves behind must not be in the way.
        outcome = Command(case.source, dest, "--model", case.model, "--engine", "ray", *FLAGS).outcome()
    finally:
        kill_all(leftovers)
    assert outcome["ok"] == IMAGES
    assert terminal_rows(dest) == case.calm
