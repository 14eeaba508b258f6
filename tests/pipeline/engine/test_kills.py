"""kill -9, once each: the driver, a worker, a Ray actor, a Ray node. Afterwards the same command leaves one row per
image."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from harness import (
    SHAPE,
    SHAPE_FLAGS,
    Case,
    Command,
    actors_on,
    file_digests,
    kill_all,
    own_processes,
    part_count,
    ray_actors,
    runs,
    terminal_rows,
    wait_until,
)

import pipeline
from pipeline.errors import UsageError

IMAGES = 48
FLAGS = (*SHAPE_FLAGS, "--shard-size", "1", "--lease-ttl", "4")


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("case"), IMAGES)


def test_kill_the_driver(case: Case, tmp_path: Path) -> None:
    dest = tmp_path / "out"
    first = Command(case.images, dest, "--model", case.model, "--engine", "local", *FLAGS)
    wait_until(lambda: part_count(dest) >= 3, what="three Parts")
    first.kill(family=False)
    assert part_count(dest) < IMAGES, "the driver was to die in the middle"
    outcome = Command(case.images, dest, "--model", case.model, "--engine", "local", *FLAGS).outcome()
    assert outcome["ok"] == IMAGES and outcome["errors"] == 0
    assert terminal_rows(dest) == case.calm


def test_kill_a_worker_process(case: Case, tmp_path: Path) -> None:
    dest = tmp_path / "out"
    command = Command(case.images, dest, "--model", case.model, "--engine", "local", *FLAGS)
    wait_until(lambda: part_count(dest) >= 3, what="three Parts")
    workers = [child for child in command.family() if runs(child, "pipeline.engine.crew")]
    assert workers and part_count(dest) < IMAGES
    kill_all(workers)
    assert command.outcome()["ok"] == IMAGES
    assert terminal_rows(dest) == case.calm


#: Of a run's files, those that each of its drivers may write over at any time: they decide nothing once it is closed.
_PASSING = {"lease.json", "progress.json"}


def lasting_files(dest: Path) -> dict[str, tuple[int, str]]:
    """Time and digest of all Parts and of all that lasts of the runs."""
    files = file_digests(dest)
    # What it was writing when it was paused was nobody's yet, and is taken away when it goes on.
    return {
        path: file for path, file in files.items() if Path(path).name not in _PASSING and not path.startswith("_tmp/")
    }


def test_a_paused_driver_that_wakes_up_adds_and_changes_nothing(case: Case, tmp_path: Path) -> None:
    dest = tmp_path / "out"
    first = Command(case.images, dest, "--model", case.model, "--engine", "local", *FLAGS)
    wait_until(lambda: part_count(dest) >= 2, what="two Parts")
    everyone = [psutil.Process(first.pid), *first.family()]
    for process in everyone:
        process.send_signal(signal.SIGSTOP)
    try:
        assert part_count(dest) < IMAGES
        second = Command(case.images, dest, "--model", case.model, "--engine", "local", *FLAGS)
        assert second.outcome()["ok"] == IMAGES
        before = lasting_files(dest)
        assert sum(path.startswith("segments/") for path in before) == IMAGES
        assert {Path(path).name for path in before if path.startswith("runs/")} > {"run.json", "manifest.parquet"}
    finally:
        for process in everyone:
            process.send_signal(signal.SIGCONT)
    _, err = first.process.communicate(timeout=60)
    assert first.process.returncode in (0, 1), err
    assert lasting_files(dest) == before
    assert terminal_rows(dest) == case.calm


def test_an_image_that_kills_its_process_is_one_row(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The killer is real: a sitecustomize in the workers' path makes the decoder of one image end the process by
    SIGKILL."""
    poison = tmp_path / "site"
    poison.mkdir()
    victim = sorted(path.name for path in case.images.iterdir())[11]
    size = (case.images / victim).stat().st_size
    (poison / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "if 'pipeline.engine.crew' in ' '.join(sys.orig_argv):\n"
        "    import pipeline.engine.intake as intake\n"
        "    peek = intake.peek\n"
        "    def deadly(data):\n"
        f"        if len(data) == {size}: os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return peek(data)\n"
        "    intake.peek = deadly\n"
    )
    others = {path.name for path in case.images.iterdir() if path.stat().st_size == size} - {victim}
    assert not others, "the victim must be recognisable by its size"
    dest = tmp_path / "out"
    monkeypatch.setenv("PYTHONPATH", f"{poison}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    flags = [flag if flag != "1" or FLAGS[i - 1] != "--shard-size" else "8" for i, flag in enumerate(FLAGS)]
    outcome = Command(case.images, dest, "--model", case.model, "--engine", "local", *flags).outcome()
    assert outcome["errors_by_kind"] == {"crashed_worker": 1}
    rows = terminal_rows(dest)
    assert rows.pop(victim).error_kind == "crashed_worker"
    assert rows == {name: answer for name, answer in case.calm.items() if name != victim}


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[Any]:
    """A mark for its processes, the cluster, and its two nodes with a pretend GPU each, beside a head without any."""
    import ray
    from ray.cluster_utils import Cluster

    with own_processes() as mark:
        head = {"num_cpus": 1, "num_gpus": 0, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            yield mark, cluster, [cluster.add_node(num_cpus=1, num_gpus=1) for _ in range(2)]
        finally:
            ray.shutdown()
            cluster.shutdown()


@pytest.mark.ray
def test_local_paths_are_refused_on_a_cluster_of_several_nodes(case: Case, tmp_path: Path, ray_cluster: Any) -> None:
    _, cluster, _ = ray_cluster
    with pytest.raises(UsageError, match=r"local disk.*3 nodes.*--shared-filesystem"):
        pipeline.segment(
            source=str(case.images),
            dest=str(tmp_path / "out"),
            model=str(case.model),
            ray_address=cluster.address,
            **SHAPE,
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_kill_an_actor_and_then_a_node(case: Case, tmp_path: Path, ray_cluster: Any) -> None:
    mark, cluster, nodes = ray_cluster
    dest = tmp_path / "out"
    result: dict[str, Any] = {}

    def work() -> None:
        result["outcome"] = pipeline.segment(
            source=str(case.images), dest=str(dest), model=str(case.model), engine="ray", ray_address=cluster.address,
            shared_filesystem=True, shard_size=1, max_error_rate=0.0, **SHAPE,
        )  # fmt: skip

    thread = threading.Thread(target=work)
    thread.start()
    wait_until(lambda: part_count(dest) >= 2 or not thread.is_alive(), what="two Parts")
    actors = ray_actors(mark)
    assert actors and part_count(dest) < IMAGES
    kill_all(actors[:1])
    wait_until(lambda: any(actors_on(node, mark) for node in nodes) or not thread.is_alive(), what="an actor on a node")
    doomed = next(node for node in nodes if actors_on(node, mark))
    lost = actors_on(doomed, mark)
    cluster.remove_node(doomed, allow_graceful=False)
    assert part_count(dest) < IMAGES, "the node was to die in the middle"
    wait_until(lambda: not any(actor.is_running() for actor in lost), what="the end of the node's actors")
    thread.join(timeout=200)
    assert not thread.is_alive()
    assert result["outcome"].ok == IMAGES
    assert terminal_rows(dest) == case.calm


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_kill_the_driver_of_a_ray_run(case: Case, tmp_path: Path) -> None:
    dest = tmp_path / "out"
    first = Command(case.images, dest, "--model", case.model, "--engine", "ray", *FLAGS)
    wait_until(lambda: part_count(dest) >= 2, what="two Parts")
    leftovers = first.family()
    first.kill(family=False)
    try:
        assert part_count(dest) < IMAGES
        # The cluster that the dead driver leaves behind must not be in the way.
        outcome = Command(case.images, dest, "--model", case.model, "--engine", "ray", *FLAGS).outcome()
    finally:
        kill_all(leftovers)
    assert outcome["ok"] == IMAGES
    assert terminal_rows(dest) == case.calm
