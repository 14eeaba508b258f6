"""The fleet's decisions, with a crew at its seam whose workers die as told. Real processes die in test_kills."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pytest

from pipeline.engine import fleet as fleet_module
from pipeline.engine.crew import WorkerDiedError
from pipeline.engine.fleet import Fleet
from pipeline.engine.messages import Device, Receipt, ShardTask, StreamCounts
from pipeline.errors import DeviceLostError, InfrastructureError, StoppedError, StorageError, WorldFailingError
from pipeline.table.schema import WORK


class Diary:
    """What happened, seen from the workers."""

    def __init__(self) -> None:
        self.runs: list[tuple[int, list[str], bool]] = []
        self.commits: set[int] = set()
        self.crashed: dict[int, set[str]] = {}
        self.started = 0
        self.stopped = 0
        self.asked = 0


class ScriptedMember:
    """Dies, for good, when `deadly(uris)` says so."""

    def __init__(self, diary: Diary, deadly: Callable[[list[str]], bool], start_error: Exception | None) -> None:
        self._diary = diary
        self._deadly = deadly
        self._start_error = start_error
        self._dead = False
        self._rows = 0
        self._pool = ThreadPoolExecutor(4)
        diary.started += 1

    def call(self, method: str, *args: Any) -> Future[Any]:
        return self._pool.submit(self._answer, method, *args)

    def stop(self) -> None:
        self._diary.stopped += 1
        self._pool.shutdown(wait=False)

    def _answer(self, method: str, *args: Any) -> Any:
        if self._dead:
            raise WorkerDiedError("gone")
        if method == "describe":
            if self._start_error:
                raise self._start_error
            return Device("here", "cpu", "cpu", False, 1, {})
        if method == "load":
            return None
        if method == "logged":
            self._diary.asked += 1
            return []
        if method == "counts":
            return StreamCounts(self._rows, 0, 0.5, 1.0)
        (task,) = args
        uris = task.refs["uri"].to_pylist()
        alive = [uri for i, uri in enumerate(uris) if i not in task.killers]
        self._diary.runs.append((task.ordinal, alive, task.probe))
        time.sleep(0.001)
        if self._deadly(alive):
            self._dead = True
            raise WorkerDiedError("killed")
        if not task.probe and task.ordinal not in self._diary.commits:
            # Create-only, as Parts are: a second commit finds the first.
            self._diary.commits.add(task.ordinal)
            self._diary.crashed[task.ordinal] = {uris[i] for i in task.killers}
        self._rows += len(uris)
        return Receipt(task.ordinal, len(uris), 100, True, "here", StreamCounts(self._rows, 0, 0.5, 1.0))


class ScriptedCrew:
    label = "scripted"
    default_actors = 1
    threads = 1
    has_gpus = False

    def __init__(
        self,
        deadly: Callable[[list[str]], bool] = lambda uris: False,
        start_errors: list[Exception | None] | None = None,
    ) -> None:
        self.diary = Diary()
        self._deadly = deadly
        self._start_errors = start_errors or []

    def start(self) -> ScriptedMember:
        error = self._start_errors.pop(0) if self._start_errors else None
        return ScriptedMember(self.diary, self._deadly, error)

    def share(self, model: bytes) -> bytes:
        return model

    def close(self) -> None: ...


def shards(count: int, size: int) -> list[ShardTask]:
    tasks = []
    for ordinal in range(count):
        uris = [f"{ordinal}/{i}" for i in range(size)]
        columns = {
            "uri": uris,
            "etag": ["e"] * size,
            "size_bytes": [1] * size,
            "modified": [None] * size,
            "attempt": [1] * size,
        }
        tasks.append(ShardTask(ordinal, pa.table(columns, schema=WORK), f"part-{ordinal}"))
    return tasks


def finish(fleet: Fleet, tasks: list[ShardTask], receipts: list[Receipt] | None = None) -> None:
    on_receipt = receipts.append if receipts is not None else lambda receipt: None
    fleet.run(iter(tasks), shards=len(tasks), on_receipt=on_receipt, on_progress=lambda progress: None)


def run(
    crew: ScriptedCrew, tasks: list[ShardTask], *, actors: int = 2, stop: Callable[[], bool] = lambda: False
) -> list[Receipt]:
    receipts: list[Receipt] = []
    fleet = Fleet(crew, actors=actors, should_stop=stop, drain_timeout_s=5.0)
    fleet.load(None, b"")  # type: ignore[arg-type]
    try:
        finish(fleet, tasks, receipts)
    finally:
        fleet.close()
    return receipts


def test_many_workers_are_asked_less_often_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_module, "_POLL_S", 0.01)
    asked = {}
    for per_s in (1, 10_000):
        monkeypatch.setattr(fleet_module, "_ASKED_PER_S", per_s)
        crew = ScriptedCrew(lambda uris: time.sleep(0.05))  # type: ignore[func-returns-value]
        run(crew, shards(40, 1), actors=4)
        asked[per_s] = crew.diary.asked
    # Four workers at one a second: once at the start, and twice when all is done; else every hundredth of a second.
    assert asked[1] <= 3 * 4 < 6 * 4 < asked[10_000]


@pytest.mark.parametrize("actors", [1, 2, 5])
def test_every_shard_is_done_once(actors: int) -> None:
    crew = ScriptedCrew()
    receipts = run(crew, shards(17, 3), actors=actors)
    assert sorted(receipt.ordinal for receipt in receipts) == list(range(17))
    assert crew.diary.started == crew.diary.stopped <= actors


@pytest.mark.parametrize(("shard_count", "started"), [(0, 1), (1, 1), (3, 3), (8, 8)])
def test_no_more_workers_are_started_than_there_are_shards(shard_count: int, started: int) -> None:
    """500 for 8 shards were as many processes, most of which came up to find nothing."""
    crew = ScriptedCrew()
    assert len(run(crew, shards(shard_count, 2), actors=40)) == shard_count
    assert crew.diary.started == crew.diary.stopped == started


def test_workers_for_the_rest_come_up_during_the_canary_and_do_it() -> None:
    crew = ScriptedCrew()
    fleet = Fleet(crew, actors=40, should_stop=lambda: False)
    fleet.load(None, b"")  # type: ignore[arg-type]
    canary, rest = shards(5, 1)[:1], shards(5, 1)[1:]
    receipts: list[Receipt] = []
    fleet.run(iter(canary), shards=5, on_receipt=receipts.append, on_progress=lambda progress: None)
    assert crew.diary.started == 5
    finish(fleet, rest, receipts)
    fleet.load("another", b"")  # type: ignore[arg-type]
    finish(fleet, shards(9, 1), receipts)
    assert (len(receipts), crew.diary.started) == (14, 9)
    fleet.close()


def test_of_many_places_only_those_of_the_dead_are_filled_again() -> None:
    deaths = [True, True]
    crew = ScriptedCrew(lambda uris: uris[0] in ("1/0", "2/0") and bool(deaths) and deaths.pop())
    assert len(run(crew, shards(4, 2), actors=40)) == 4
    assert 4 <= crew.diary.started <= 6
    assert not any(crew.diary.crashed.values())


def test_a_lone_shard_that_kills_is_bisected_though_there_is_room_for_many() -> None:
    crew = ScriptedCrew(lambda uris: "0/2" in uris)
    assert len(run(crew, shards(1, 4), actors=40)) == 1
    assert crew.diary.crashed == {0: {"0/2"}}
    # Six die of it: two before it is set aside, one of it alone, three of a half, a quarter, and the quarter once more.
    assert crew.diary.started <= 7


def test_a_count_that_was_too_low_costs_workers_and_no_shard() -> None:
    crew = ScriptedCrew()
    fleet = Fleet(crew, actors=40, should_stop=lambda: False)
    fleet.load(None, b"")  # type: ignore[arg-type]
    receipts: list[Receipt] = []
    fleet.run(iter(shards(30, 1)), shards=2, on_receipt=receipts.append, on_progress=lambda progress: None)
    fleet.close()
    assert (len(receipts), crew.diary.started) == (30, 2)


def test_a_death_costs_only_what_was_not_committed() -> None:
    deaths = [True]

    def deadly(uris: list[str]) -> bool:
        return uris[0].startswith("5/") and bool(deaths) and deaths.pop()

    crew = ScriptedCrew(deadly)
    receipts = run(crew, shards(12, 2))
    assert sorted(receipt.ordinal for receipt in receipts) == list(range(12))
    assert crew.diary.started == 3
    assert not any(crew.diary.crashed.values())


@pytest.mark.parametrize("killers", [{"3/0"}, {"3/7"}, {"3/2", "3/5"}, {"3/1", "6/4"}])
def test_killers_are_found_and_cost_nobody_else(killers: set[str]) -> None:
    crew = ScriptedCrew(lambda uris: bool(killers & set(uris)))
    receipts = run(crew, shards(8, 8))
    assert sorted(receipt.ordinal for receipt in receipts) == list(range(8))
    assert set().union(*crew.diary.crashed.values()) == killers


def test_a_shard_set_aside_without_a_killer_is_committed_whole() -> None:
    deaths = [True, True]

    def deadly(uris: list[str]) -> bool:
        return uris[0] == "2/0" and bool(deaths) and deaths.pop()

    crew = ScriptedCrew(deadly)
    run(crew, shards(4, 4), actors=1)
    assert crew.diary.commits == {0, 1, 2, 3}
    assert not any(crew.diary.crashed.values())


def test_images_that_kill_only_together_end_as_crashed() -> None:
    crew = ScriptedCrew(lambda uris: {"1/0", "1/3"} <= set(uris))
    run(crew, shards(3, 4))
    assert crew.diary.commits == {0, 1, 2}
    assert crew.diary.crashed[1] == {"1/0", "1/1", "1/2", "1/3"}


def test_a_worker_that_dies_at_the_start_is_replaced() -> None:
    crew = ScriptedCrew(start_errors=[WorkerDiedError("no"), WorkerDiedError("no"), None])
    assert len(run(crew, shards(3, 1), actors=1)) == 3


def test_workers_that_never_come_up_are_the_worlds_failure() -> None:
    crew = ScriptedCrew(start_errors=[WorkerDiedError("out of memory")] * 50)
    with pytest.raises(InfrastructureError, match=r"died before they were ready.*out of memory"):
        run(crew, shards(3, 1), actors=1)


def test_a_refusal_at_the_start_is_not_retried() -> None:
    crew = ScriptedCrew(start_errors=[InfrastructureError("other code on this node")])
    with pytest.raises(InfrastructureError, match="other code on this node"):
        run(crew, shards(3, 1), actors=1)
    assert crew.diary.started == 1


def test_a_failed_commit_ends_the_run() -> None:
    def deadly(uris: list[str]) -> bool:
        if uris[0] == "1/0":
            raise StorageError("the disk is full", kind="fetch_failed")
        return False

    with pytest.raises(StorageError, match="disk is full"):
        run(ScriptedCrew(deadly), shards(3, 1))


def test_stopping_finishes_what_is_in_flight_and_starts_nothing_more() -> None:
    crew = ScriptedCrew()
    with pytest.raises(StoppedError):
        run(crew, shards(500, 1), stop=lambda: len(crew.diary.commits) >= 5)
    assert 5 <= len(crew.diary.commits) < 500
    assert len(crew.diary.runs) == len(crew.diary.commits), "a shard was begun and not finished"


def test_progress_counts_rows_and_says_who_is_busy() -> None:
    crew = ScriptedCrew()
    fleet = Fleet(crew, actors=2, should_stop=lambda: False)
    fleet.load(None, b"")  # type: ignore[arg-type]
    finish(fleet, shards(4, 3))
    progress = fleet.progress()
    assert progress.rows == 12
    assert progress.busy_s / progress.active_s == pytest.approx(0.5)
    fleet.close()


def test_a_worker_that_was_still_loading_for_one_run_loads_again_for_the_next() -> None:
    """The second worker comes up late: by then the fleet works on another run, whose stamp its rows must bear."""
    crew = ScriptedCrew()
    loaded: list[tuple[int, Any]] = []
    late = threading.Event()
    answer = ScriptedMember._answer

    def slow(self: ScriptedMember, method: str, *args: Any) -> Any:
        if method == "load":
            if self is not members[0] and not late.is_set():
                late.wait(20)
            loaded.append((members.index(self), args[0]))
        if method == "run":
            assert [spec for who, spec in loaded if who == members.index(self)][-1] == current[0]
        return answer(self, method, *args)

    members: list[ScriptedMember] = []
    start = crew.start

    def starting() -> ScriptedMember:
        members.append(start())
        return members[-1]

    crew.start = starting  # type: ignore[method-assign]
    current = ["first"]
    fleet = Fleet(crew, actors=2, should_stop=lambda: False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ScriptedMember, "_answer", slow)
        fleet.load("first", b"")  # type: ignore[arg-type]
        finish(fleet, shards(3, 1))
        assert len(members) == 2
        current[0] = "second"
        fleet.load("second", b"")  # type: ignore[arg-type]
        late.set()
        finish(fleet, shards(60, 1))
        fleet.close()
    assert (1, "second") in loaded


def test_a_lost_device_is_a_lost_worker() -> None:
    failures = [DeviceLostError("the device failed"), DeviceLostError("the device failed")]

    def deadly(uris: list[str]) -> bool:
        if failures:
            raise failures.pop()
        return False

    crew = ScriptedCrew(deadly)
    assert len(run(crew, shards(6, 2), actors=1)) == 6
    assert not any(crew.diary.crashed.values())
    assert crew.diary.started > 1


def test_nobody_coming_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_module, "_NOBODY_COMES_S", 0.01)
    said: list[str] = []
    fleet = Fleet(ScriptedCrew(), actors=1, should_stop=lambda: bool(said), say=said.append)
    monkeypatch.setattr(ScriptedMember, "call", lambda *_: Future())
    with pytest.raises(StoppedError):
        fleet.first_device(most=1000)
    assert "no worker has come up" in said[0]


def test_workers_come_up_together_and_the_first_to_come_answers() -> None:
    crew = ScriptedCrew(start_errors=[WorkerDiedError("killed"), None, None])
    fleet = Fleet(crew, actors=3, should_stop=lambda: False)
    assert fleet.first_device(most=1000).node == "here"
    assert crew.diary.started in (3, 4), "the dead one may have been seen, and replaced"
    fleet.load(None, b"")  # type: ignore[arg-type]
    fleet.first_loaded(shards=1000)
    fleet.close()
    assert crew.diary.stopped == crew.diary.started


@pytest.mark.parametrize(
    ("actors", "shard_count", "started"), [(1, 1000, 1), (3, 1000, 3), (1000, 1000, 8), (1000, 2, 2), (3, 0, 1)]
)
def test_of_many_workers_a_few_come_up_early(actors: int, shard_count: int, started: int) -> None:
    crew = ScriptedCrew()
    fleet = Fleet(crew, actors=actors, should_stop=lambda: False)
    fleet.first_device(most=1)
    assert crew.diary.started == 1
    fleet.load(None, b"")  # type: ignore[arg-type]
    fleet.first_loaded(shards=shard_count)
    assert crew.diary.started == started
    fleet.close()


@pytest.mark.parametrize(("actors", "deaths"), [(1, 5), (3, 15), (1000, 40)])
def test_workers_that_all_die_at_their_start_are_given_up(actors: int, deaths: int) -> None:
    """Five times each: those that come up together may die together, with their node."""
    crew = ScriptedCrew(start_errors=[WorkerDiedError("killed")] * (deaths + actors))
    fleet = Fleet(crew, actors=actors, should_stop=lambda: False)
    with pytest.raises(InfrastructureError, match=f"{deaths} workers in a row died before they were ready"):
        fleet.first_device(most=1000)
    fleet.close()


def test_a_worker_that_falls_silent_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_module, "_SILENT_S", 0.3)
    hung = threading.Event()

    def deadly(uris: list[str]) -> bool:
        if uris[0] == "1/0" and not hung.is_set():
            hung.set()
            time.sleep(3)
        return False

    crew = ScriptedCrew(deadly)
    receipts = run(crew, shards(4, 2), actors=1)
    assert sorted(receipt.ordinal for receipt in receipts) == [0, 1, 2, 3]
    assert crew.diary.started == 2
    assert not any(crew.diary.crashed.values())


class DoubtfulMember(ScriptedMember):
    """Says of shards which `failing` names that most of their images failed for the world's reasons."""

    failing: Callable[[ShardTask], bool]

    def _answer(self, method: str, *args: Any) -> Any:
        if method == "run" and self.failing(args[0]):
            (task,) = args
            self._diary.runs.append((task.ordinal, task.refs["uri"].to_pylist(), task.accept))
            if task.accept:
                self._diary.commits.add(task.ordinal)
            size, counts = len(task.refs), StreamCounts(0, 0, 0.5, 1.0)
            return Receipt(task.ordinal, size, 100, task.accept, "here", counts, size, not task.accept, "403")
        return super()._answer(method, *args)


def doubtful_fleet(failing: Callable[[ShardTask], bool], *, breaker_images: int) -> tuple[Fleet, Diary]:
    crew = ScriptedCrew()

    def start() -> ScriptedMember:
        member = DoubtfulMember(crew.diary, lambda uris: False, None)
        member.failing = failing
        return member

    crew.start = start  # type: ignore[method-assign]
    return Fleet(crew, actors=2, should_stop=lambda: False, breaker_images=breaker_images), crew.diary


def test_workers_together_see_that_the_world_fails() -> None:
    """No worker alone sees enough outcomes, and no shard is large enough."""
    fleet, diary = doubtful_fleet(lambda task: task.ordinal >= 3, breaker_images=50)
    fleet.load(None, b"")  # type: ignore[arg-type]
    with pytest.raises(WorldFailingError, match="such as: 403"):
        finish(fleet, shards(40, 5))
    fleet.close()
    assert diary.commits <= {0, 1, 2}
    assert len(diary.runs) < 40


def test_a_doubtful_shard_gets_a_second_try_at_the_end_and_is_committed_then() -> None:
    fleet, diary = doubtful_fleet(lambda task: task.ordinal in (1, 4), breaker_images=50)
    fleet.load(None, b"")  # type: ignore[arg-type]
    receipts: list[Receipt] = []
    finish(fleet, shards(20, 5), receipts)
    fleet.close()
    assert sorted(receipt.ordinal for receipt in receipts) == list(range(20)) and diary.commits == set(range(20))
    assert sorted(ordinal for ordinal, _, accept in diary.runs[-2:] if accept) == [1, 4]


def test_a_driver_needs_no_torch() -> None:
    """Its import takes longer than all else that a driver does before its workers are up."""
    modules = "pipeline.entry, pipeline.commands.segment, pipeline.engine.run, pipeline.engine.placement"
    code = f"import sys, {modules}, pipeline.engine.ray_crew; assert not {{'torch', 'scipy', 'ray'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
