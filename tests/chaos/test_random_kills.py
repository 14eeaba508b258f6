"""kill -9 at random moments, again and again, over one corpus: the driver, its workers, Ray actors, whole Ray nodes.

Each kill strikes in the middle of the work: some Parts are there, others are not, and, but for drivers killed early in
their life, one was committed since the kill before. The same command is run after each death of its driver. Afterwards
each image has exactly one terminal row, masks equal those of an undisturbed run bit for bit, and no process is left
behind. `MASKMILL_CHAOS_SEED` repeats a sequence of choices (moments are as exact as the machine's scheduling).
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from chaos.machines import Machines
from harness import (
    SHAPE_FLAGS,
    Case,
    Command,
    kill_all,
    marked,
    own_processes,
    part_count,
    ray_actors,
    runs,
    seeded_chance,
    terminal_rows,
    wait_until,
)

pytestmark = pytest.mark.slow

#: Large enough for a run to last: two cores commit a few Parts a second.
IMAGES = 200
SIDE_PX = 320
SHARD_SIZE = 2
SHARDS = IMAGES // SHARD_SIZE
#: The last kill is due here. What is left then is more than all workers can have under way.
LAST_KILL_AT = int(SHARDS * 0.85)
KILLS = 12
FLAGS = (*SHAPE_FLAGS, "--shard-size", str(SHARD_SIZE), "--lease-ttl", "4")
#: An image in whose sole company a worker dies twice is taken for the killer: in one driver's life strike fewer times.
KILLS_PER_LIFE = 2
EARLY_SHARE = 0.25
EARLY_S = 8.0


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("case"), IMAGES, side_px=SIDE_PX)


@pytest.fixture
def chance() -> random.Random:
    return seeded_chance()


@pytest.fixture
def mark() -> Iterator[str]:
    with own_processes() as mark:
        yield mark


class Moments:
    """Random moments, one in each of `KILLS` equal stretches of the work."""

    def __init__(self, chance: random.Random, dest: Path) -> None:
        self._chance = chance
        self._dest = dest
        self.kills: Counter[str] = Counter()
        self.parts_at: list[int] = []
        self.early = 0

    def wait(self, command: Command, *, may_be_early: bool = False) -> None:
        """Waits for the next moment: so many Parts, and one more than at the kill before. An early one, which now and
        then takes its place, is any time within the first seconds of a command: while it starts, plans, or loads.
        """
        struck = len(self.parts_at)
        stretch = (LAST_KILL_AT - 1) / KILLS
        due_at = int(self._chance.uniform(1 + struck * stretch, 1 + (struck + 1) * stretch))
        due_at = max(due_at, 1 + (self.parts_at[-1] if struck else 0))
        early = may_be_early and struck > 0 and self._chance.random() < EARLY_SHARE
        due_s = command.started_s + (self._chance.uniform(0.0, EARLY_S) if early else 1e9)
        command.until(
            lambda: part_count(self._dest) >= due_at or time.monotonic() > due_s, what=f"{due_at} of {SHARDS} Parts"
        )
        self.early += part_count(self._dest) < due_at
        time.sleep(self._chance.uniform(0.0, 0.02))

    def struck(self, victim: str) -> None:
        """Counts a kill, just after it. Fails where it came before the work or after it."""
        parts = part_count(self._dest)
        assert 0 < parts < SHARDS, f"killed a {victim} at {parts} of {SHARDS} Parts: not in the middle"
        self.kills[victim] += 1
        self.parts_at.append(parts)


def victims_by_life(chance: random.Random) -> Iterator[list[str]]:
    """`KILLS` victims: in each life of a driver some that it survives, and at last, where kills are left, itself."""
    left, least = KILLS, KILLS_PER_LIFE
    while left:
        soft = min(left, chance.randint(least, KILLS_PER_LIFE))
        life = ["soft"] * soft + ["driver"] * (left > soft)
        yield life
        left, least = left - len(life), 0


def kill_driver(command: Command) -> None:
    assert command.process.poll() is None, "the driver was to be killed, and has ended by itself"
    command.process.kill()
    command.process.communicate()


def finish(case: Case, dest: Path, moments: Moments, flags: tuple[str, ...], last: Command | None) -> None:
    """Runs the command to its end, and once more; then all must be as if nothing had happened."""
    last = last or Command(case.images, dest, "--model", case.model, *flags)
    assert last.outcome(timeout_s=300)["errors"] == 0
    assert part_count(dest) == SHARDS
    assert Command(case.images, dest, "--model", case.model, *flags).outcome()["planned"] == 0
    rows = terminal_rows(dest)
    print(
        f"{sum(moments.kills.values())} kills {dict(moments.kills)} at {moments.parts_at} of {SHARDS} Parts, "
        f"{moments.early} early, {moments.kills['driver'] + 2} commands, {len(rows)} rows"
    )
    assert sum(moments.kills.values()) == KILLS
    assert rows == case.calm


@pytest.mark.timeout(900)
def test_drivers_and_workers(case: Case, tmp_path: Path, chance: random.Random, mark: str) -> None:
    dest = tmp_path / "out"
    moments = Moments(chance, dest)
    flags = (*FLAGS, "--engine", "local")
    command: Command | None = None

    def workers() -> list[psutil.Process]:
        return [process for process in marked(mark) if runs(process, "pipeline.engine.crew")]

    for life in victims_by_life(chance):
        command = Command(case.images, dest, "--model", case.model, *flags)
        for victim in life:
            moments.wait(command, may_be_early=victim == "driver")
            if victim == "driver":
                kill_driver(command)
                command = None
                moments.struck("driver")
                wait_until(lambda: not marked(mark), what="the end of a dead driver's workers", poll_s=0.05)
            else:
                there = workers()
                assert there, "Parts were committed, but nobody is at work"
                kill_all(chance.sample(there, chance.randint(1, len(there))))
                moments.struck("worker")
    finish(case, dest, moments, flags, command)
    assert set(moments.kills) == {"driver", "worker"}
    wait_until(lambda: not marked(mark), what="the end of all processes", poll_s=0.05)


@pytest.fixture
def machines(mark: str) -> Iterator[Machines]:
    machines = Machines(mark)
    try:
        yield machines
    finally:
        machines.close()


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_ray_drivers_actors_and_nodes(
    case: Case, tmp_path: Path, chance: random.Random, machines: Machines, mark: str
) -> None:
    dest = tmp_path / "out"
    moments = Moments(chance, dest)
    flags = (*FLAGS, "--engine", "ray", "--ray-address", machines.address, "--shared-filesystem")
    command: Command | None = None

    for life in victims_by_life(chance):
        command = Command(case.images, dest, "--model", case.model, *flags)
        for victim in life:
            moments.wait(command, may_be_early=victim == "driver")
            if victim == "driver":
                kill_driver(command)
                command = None
                moments.struck("driver")
            elif moments.kills["node"] < moments.kills["actor"] or (
                moments.kills["node"] == moments.kills["actor"] and chance.random() < 0.5
            ):
                nodes = machines.at_work()
                assert nodes, "Parts were committed, but no node hosts an actor"
                machines.kill(chance.choice(nodes))
                moments.struck("node")
            else:
                actors = ray_actors(mark)
                assert actors, "Parts were committed, but nobody is at work"
                kill_all(chance.sample(actors, 1))
                moments.struck("actor")
    finish(case, dest, moments, flags, command)
    assert set(moments.kills) == {"driver", "actor", "node"}
    wait_until(lambda: not ray_actors(mark), what="the end of all actors", poll_s=0.2)
