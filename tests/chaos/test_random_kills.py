"""kill -9 at random moments, again and again, over one corpus: the driver, its workers, Ray actors, whole Ray nodes.

Whatever was killed, the same command is run again until it ends by itself. Afterwards each image has exactly one
terminal row, masks equal those of an undisturbed run bit for bit, and no process is left behind. `MASKMILL_CHAOS_SEED`
repeats a sequence of choices (moments are as exact as the machine's scheduling).
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from harness import (
    MARK,
    Answer,
    Command,
    in_process,
    kill_all,
    marked,
    part_count,
    terminal_rows,
    wait_until,
    write_images,
    write_tiny_model,
)

import pipeline

pytestmark = pytest.mark.slow

IMAGES = 360
SHARD_SIZE = 2
SHARDS = IMAGES // SHARD_SIZE
LOCAL_KILLS = 14
RAY_KILLS = 10
SHAPE: dict[str, Any] = {"batch_size": 4, "threads": 1, "precision": "fp32"}
FLAGS = (
    "--batch-size", "4", "--threads", "1", "--precision", "fp32", "--shard-size", str(SHARD_SIZE), "--lease-ttl", "4",
)  # fmt: skip
#: An image in whose sole company a worker dies twice is taken for the killer: in one driver's life strike fewer times.
KILLS_PER_LIFE = 2


class Case:
    """One corpus, one model, and what an undisturbed run makes of them."""

    def __init__(self, folder: Path) -> None:
        self.source = write_images(folder / "images", IMAGES)
        self.model = write_tiny_model(folder / "tiny.safetensors", task="instance")
        calm = folder / "calm"
        with in_process():
            pipeline.segment(
                source=str(self.source), dest=str(calm), model=str(self.model), engine="local", shard_size=50, **SHAPE
            )
        self.calm: dict[str, Answer] = terminal_rows(calm)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    case = Case(tmp_path_factory.mktemp("case"))
    assert len(case.calm) == IMAGES
    assert len({answer.crc32 for answer in case.calm.values()}) > IMAGES // 2, "few masks for all prove little"
    return case


@pytest.fixture
def chance() -> random.Random:
    seed = int(os.environ.get("MASKMILL_CHAOS_SEED") or random.SystemRandom().randrange(1 << 32))
    print(f"\nMASKMILL_CHAOS_SEED={seed}")
    return random.Random(seed)


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """In the environment of all processes that the test starts, with a folder for what killed ones cannot remove."""
    mark = uuid.uuid4().hex
    scratch = tempfile.mkdtemp(prefix="chaos-")  # not pytest's: Ray's sockets need a short path
    monkeypatch.setenv(MARK, mark)
    monkeypatch.setenv("TMPDIR", scratch)
    try:
        yield mark
    finally:
        kill_all(marked(mark))
        shutil.rmtree(scratch, ignore_errors=True)


class Moments:
    """Random moments that leave enough of the corpus for the kills still to come."""

    def __init__(self, chance: random.Random, dest: Path, kills: int) -> None:
        self._chance = chance
        self._dest = dest
        self.kills_left = kills
        self.kills: Counter[str] = Counter()
        self.parts_at: list[int] = []

    def wait(self, command: Command) -> bool:
        """Waits for a random moment, in the start of a command or between two Parts; False where it ended before."""
        parts = part_count(self._dest)
        budget = max(1, (SHARDS - 1 - parts) // (self.kills_left + 1))
        until_parts = parts + self._chance.randint(1, budget)
        until_s = time.monotonic() + (self._chance.uniform(0.0, 8.0) if self._chance.random() < 0.3 else 120.0)
        wait_until(
            lambda: (
                command.process.poll() is not None
                or time.monotonic() > until_s
                or part_count(self._dest) >= until_parts
            ),
            what="a moment to kill",
            timeout_s=200,
        )
        time.sleep(self._chance.uniform(0.0, 0.02))
        return command.process.poll() is None

    def struck(self, victim: str) -> None:
        self.kills[victim] += 1
        self.kills_left -= 1
        self.parts_at.append(part_count(self._dest))


def _report(moments: Moments, dest: Path, began_s: float, lives: int) -> None:
    print(
        f"{sum(moments.kills.values())} kills {dict(moments.kills)} at {moments.parts_at} of {SHARDS} Parts, "
        f"{lives} commands, {len(terminal_rows(dest))} rows, {time.monotonic() - began_s:.0f} s"
    )


def _end(command: Command) -> None:
    """The command has ended well, or does so now."""
    assert command.outcome(timeout_s=200)["errors"] == 0


@pytest.mark.timeout(900)
def test_drivers_and_workers(case: Case, tmp_path: Path, chance: random.Random, mark: str) -> None:
    dest, began_s, lives = tmp_path / "out", time.monotonic(), 0
    moments = Moments(chance, dest, LOCAL_KILLS)
    while moments.kills_left:
        command = Command(case.source, dest, "--model", case.model, "--engine", "local", *FLAGS)
        lives += 1
        worker_kills = 0
        while moments.kills_left and moments.wait(command):
            workers = [p for p in command.family() if _is(p, "pipeline.engine.crew")]
            if workers and worker_kills < KILLS_PER_LIFE and chance.random() < 0.4:
                kill_all(workers)
                worker_kills += 1
                moments.struck("worker")
                continue
            command.process.kill()
            command.process.communicate()
            moments.struck("driver")
            wait_until(lambda: not marked(mark), what="the end of a dead driver's workers", poll_s=0.05)
            break
        if command.process.returncode != -signal.SIGKILL:
            _end(command)
    final = Command(case.source, dest, "--model", case.model, "--engine", "local", *FLAGS)
    _end(final)
    _report(moments, dest, began_s, lives + 1)
    assert sum(moments.kills.values()) == LOCAL_KILLS and moments.kills["driver"] and moments.kills["worker"]
    assert terminal_rows(dest) == case.calm
    wait_until(lambda: not marked(mark), what="the end of all processes", poll_s=0.05)


def _is(process: psutil.Process, name: str) -> bool:
    try:
        return any(name in part for part in process.cmdline())
    except psutil.Error:
        return False


@pytest.fixture
def cluster(mark: str) -> Iterator[Any]:
    """Three Ray nodes with a pretend GPU each."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 1, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(num_cpus=1, num_gpus=1)
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_ray_drivers_actors_and_nodes(
    case: Case, tmp_path: Path, chance: random.Random, cluster: Any, mark: str
) -> None:
    dest, began_s, lives = tmp_path / "out", time.monotonic(), 0
    moments = Moments(chance, dest, RAY_KILLS)
    flags = (*FLAGS, "--engine", "ray", "--ray-address", cluster.address, "--shared-filesystem")

    def actors() -> list[psutil.Process]:
        return [process for process in marked(mark) if _is(process, "ray::Host")]

    softer = itertools.cycle(chance.sample(["actor", "node"], 2))
    while moments.kills_left:
        command = Command(case.source, dest, "--model", case.model, *flags)
        lives += 1
        victims = [*itertools.islice(softer, chance.randint(1, KILLS_PER_LIFE)), "driver"]
        while victims and moments.kills_left and moments.wait(command):
            victim = victims.pop(0)
            if victim == "actor":
                wait_until(
                    lambda command=command: bool(actors()) or command.process.poll() is not None,  # type: ignore[misc]
                    what="an actor",
                    poll_s=0.1,
                )
                if command.process.poll() is not None:  # it had nothing left to do
                    break
                kill_all(chance.sample(actors(), 1))
            elif victim == "node":
                workers = [node for node in cluster.list_all_nodes() if node is not cluster.head_node]
                cluster.remove_node(chance.choice(workers), allow_graceful=False)
                cluster.add_node(num_cpus=1, num_gpus=1, wait=False)
            else:
                command.process.kill()
                command.process.communicate()
            moments.struck(victim)
        if command.process.returncode != -signal.SIGKILL:
            _end(command)
    _end(Command(case.source, dest, "--model", case.model, *flags))
    _report(moments, dest, began_s, lives + 1)
    assert sum(moments.kills.values()) == RAY_KILLS and set(moments.kills) == {"driver", "actor", "node"}
    assert terminal_rows(dest) == case.calm
    wait_until(lambda: not actors(), what="the end of all actors", poll_s=0.2)
