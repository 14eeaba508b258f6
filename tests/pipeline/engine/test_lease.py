"""Who may work on a run: the living hold, the dead are replaced, and the replaced hear of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.engine.lease import Lease, process_start, read_lease, this_host
from pipeline.errors import HeldError, StorageError
from pipeline.storage import Storage, join_uri, normalize_uri, open_storage


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(normalize_uri(str(tmp_path)))


@pytest.fixture
def uri(storage: Storage) -> str:
    return join_uri(storage.root, "runs/20260102T030405Z-abcdef/lease.json")


def write(storage: Storage, uri: str, **changes: Any) -> None:
    """Somebody's lease: of a live process of this host where `changes` do not say otherwise."""
    body = {"holder": "somebody", "beat": 1, "host": this_host(), "pid": os.getpid(),
            "started": process_start(os.getpid()), "at": 0.0, "ttl_s": 30.0} | changes  # fmt: skip
    storage.put(uri, json.dumps(body).encode())


def until(condition: Callable[[], bool]) -> None:
    """Waits for something that must come; the test's own time limit is the only clock."""
    while not condition():
        time.sleep(0.01)


def dead_pid() -> int:
    """An id that was a process's and is nobody's now."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_lease_is_there_while_held_and_gone_after(storage: Storage, uri: str) -> None:
    with Lease(storage, uri, ttl_s=5) as lease:
        held = read_lease(storage, uri)
        assert (held["pid"], held["host"]) == (os.getpid(), this_host())
        assert not lease.superseded.is_set()
    assert read_lease(storage, uri) == {}


def test_a_lease_is_given_back_after_an_error(storage: Storage, uri: str) -> None:
    with pytest.raises(ZeroDivisionError), Lease(storage, uri, ttl_s=5):
        _ = 1 / 0
    assert read_lease(storage, uri) == {}


def test_a_lease_is_kept_alive(storage: Storage, uri: str) -> None:
    with Lease(storage, uri, ttl_s=0.2):
        first = read_lease(storage, uri)["beat"]
        until(lambda: read_lease(storage, uri)["beat"] > first + 2)


def test_a_live_holder_is_respected_and_named(storage: Storage, uri: str) -> None:
    with Lease(storage, uri, ttl_s=0.5) as first:
        with pytest.raises(HeldError, match=str(os.getpid())), Lease(storage, uri, ttl_s=60):
            pytest.fail("two hold one lease")
        assert not first.superseded.is_set()
        assert read_lease(storage, uri)["pid"] == os.getpid()


def test_waiting_for_a_live_holder(storage: Storage, uri: str) -> None:
    order: list[str] = []
    trying = threading.Event()

    def second() -> None:
        trying.set()
        with Lease(storage, uri, ttl_s=60, wait=True):
            order.append("second")

    with Lease(storage, uri, ttl_s=0.4):
        thread = threading.Thread(target=second)
        thread.start()
        trying.wait()
        first = read_lease(storage, uri)["beat"]
        until(lambda: read_lease(storage, uri)["beat"] > first + 5)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_where_nobody_holds_it_nobody_is_waited_for(
    storage: Storage, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr("pipeline.engine.lease.time.sleep", slept.append)
    with Lease(storage, uri, ttl_s=60):
        assert not slept
    storage.create_only_is_atomic = False
    with Lease(storage, uri, ttl_s=60):
        assert slept == [0.2]


def test_of_many_who_begin_at_once_one_holds_it(storage: Storage, uri: str) -> None:
    barrier, held, refused = threading.Barrier(8), [], []

    def begin() -> None:
        barrier.wait()
        try:
            with Lease(storage, uri, ttl_s=0.4):
                held.append(1)
                until(lambda: len(refused) == 7)
        except HeldError:
            refused.append(1)

    threads = [threading.Thread(target=begin) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(held), len(refused)) == (1, 7)


def test_a_lease_whose_answer_was_lost_is_ours(storage: Storage, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put_new = storage.put_new
    monkeypatch.setattr(storage, "put_new", lambda uri, data: put_new(uri, data) and False)
    with Lease(storage, uri, ttl_s=100_000):
        assert read_lease(storage, uri)["pid"] == os.getpid()


def test_a_damaged_lease_is_replaced(storage: Storage, uri: str) -> None:
    storage.put(uri, b"{")
    with Lease(storage, uri, ttl_s=5):
        assert read_lease(storage, uri)["pid"] == os.getpid()


def test_a_dead_process_of_this_host_is_replaced_at_once(storage: Storage, uri: str) -> None:
    write(storage, uri, pid=dead_pid(), started="1")
    with Lease(storage, uri, ttl_s=100_000):  # waiting for it would outlast the test
        assert read_lease(storage, uri)["pid"] == os.getpid()


def test_a_reused_process_id_is_not_the_holder(storage: Storage, uri: str) -> None:
    write(storage, uri, pid=os.getpid(), started="1")
    with Lease(storage, uri, ttl_s=100_000):
        assert read_lease(storage, uri)["holder"] != "somebody"


def test_a_zombie_is_dead(storage: Storage, uri: str) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = process_start(process.pid)
    assert started is not None
    write(storage, uri, pid=process.pid, started=started)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert process_start(process.pid) is None
    with Lease(storage, uri, ttl_s=100_000):
        pass
    process.wait()


def test_the_same_process_id_on_another_host_says_nothing(storage: Storage, uri: str) -> None:
    """It looks dead here, but this is not its process table: only standing still for a whole TTL counts."""
    write(storage, uri, host="elsewhere/boot/pid:[1]", pid=dead_pid(), started="1")
    stop = threading.Event()

    def beat() -> None:
        number = 1
        while not stop.wait(0.05):
            number += 1
            write(storage, uri, host="elsewhere/boot/pid:[1]", beat=number)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(HeldError, match="on elsewhere"), Lease(storage, uri, ttl_s=60):
            pytest.fail("a live holder was replaced")
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("at", [0.0, 4e9], ids=["clock-behind", "clock-ahead"])
def test_a_lease_that_stands_still_is_superseded_after_a_ttl_of_our_own_clock(
    storage: Storage, uri: str, at: float
) -> None:
    write(storage, uri, host="elsewhere/boot/pid:[1]", at=at, ttl_s=1e9)
    began_s = time.monotonic()
    with Lease(storage, uri, ttl_s=0.5):
        assert time.monotonic() - began_s > 0.5
        assert read_lease(storage, uri)["holder"] != "somebody"


def test_the_superseded_hear_of_it_and_leave_the_new_lease_alone(storage: Storage, uri: str) -> None:
    with Lease(storage, uri, ttl_s=0.2) as lease:
        write(storage, uri, beat=99)
        assert lease.superseded.wait(60)
    assert read_lease(storage, uri)["holder"] == "somebody"


def test_a_lease_that_vanished_is_written_again(storage: Storage, uri: str) -> None:
    with Lease(storage, uri, ttl_s=0.2) as lease:
        storage.delete(uri)
        until(lambda: read_lease(storage, uri) != {})
        assert not lease.superseded.is_set()


def test_the_lease_of_a_run_that_is_over_is_not_written_again(storage: Storage, uri: str) -> None:
    """As for a driver that was paused while another one took the run over and ended it."""
    with Lease(storage, uri, ttl_s=0.2, is_over=lambda: True) as lease:
        storage.delete(uri)
        assert lease.superseded.wait(60)
        assert read_lease(storage, uri) == {}


def test_a_store_that_fails_for_a_moment_does_not_end_the_lease(
    storage: Storage, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Lease(storage, uri, ttl_s=0.2) as lease:
        asked = threading.Event()

        def fails(uri: str) -> Any:
            asked.set()
            raise StorageError("503", kind="fetch_failed")

        with monkeypatch.context() as broken:
            broken.setattr(storage, "get", fails)
            assert asked.wait(60)
        beat = read_lease(storage, uri)["beat"]
        until(lambda: read_lease(storage, uri)["beat"] > beat)
        assert not lease.superseded.is_set()


@pytest.mark.parametrize("ttl_s", [3600.0, float("inf")])
def test_a_lease_of_a_long_ttl_is_alive_to_whoever_has_a_short_one(
    storage: Storage, uri: str, ttl_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.engine.lease._BEAT_S", 0.05)
    with Lease(storage, uri, ttl_s=ttl_s) as lease:
        with pytest.raises(HeldError), Lease(storage, uri, ttl_s=5.0):
            pass
        assert not lease.superseded.is_set() and lease.failure is None


def test_what_goes_wrong_for_a_moment_does_not_end_the_lease(
    storage: Storage, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, failures = storage.put, [MemoryError("no room"), RuntimeError("no thread"), ValueError("a bug")]

    def fails(uri: str, data: bytes) -> None:
        if failures:
            raise failures.pop()
        put(uri, data)

    with Lease(storage, uri, ttl_s=0.2) as lease:
        beat = read_lease(storage, uri)["beat"]
        monkeypatch.setattr(storage, "put", fails)
        until(lambda: read_lease(storage, uri)["beat"] > beat)
        assert not failures and not lease.superseded.is_set() and lease.failure is None


def test_what_is_wrong_with_the_lease_does_not_hide_what_the_run_says(
    storage: Storage, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> dict[str, object]:
        raise RuntimeError("a bug")

    with pytest.raises(StopIteration), Lease(storage, uri, ttl_s=0.2) as lease:
        monkeypatch.setattr("pipeline.engine.lease.read_lease", fails)
        assert lease.superseded.wait(60)
        raise StopIteration


def test_a_lease_that_could_not_be_renewed_for_a_ttl_is_lost(
    storage: Storage, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(uri: str, data: bytes) -> None:
        raise ValueError("a bug")

    with Lease(storage, uri, ttl_s=0.2) as lease:
        monkeypatch.setattr(storage, "put", fails)
        assert lease.superseded.wait(60)
        assert str(lease.failure) == "a bug"


def test_a_damaged_lease_is_nobodys(storage: Storage, uri: str) -> None:
    for damaged in (b"", b"{", b"[]", b"null", b'{"holder": 1}', b'{"host": 3, "pid": "x"}'):
        storage.put(uri, damaged)
        with Lease(storage, uri, ttl_s=0.3):
            assert read_lease(storage, uri)["pid"] == os.getpid()


def test_process_start_of_nobody() -> None:
    assert process_start(dead_pid()) is None
    assert process_start(os.getpid()) == process_start(os.getpid()) is not None
