"""Streams that are read side by side."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from pipeline.errors import StorageError
from pipeline.storage.parallel import Jobs, spread


def merge(streams: list[Callable[[], Iterator[int]]], *, parallel: int) -> Iterator[int]:
    def read(jobs: Jobs[Callable[[], Iterator[int]]]) -> Iterator[int]:
        for stream in jobs:
            yield from stream()

    return spread(Jobs(streams, readers=parallel), read, parallel=parallel)


class TestSpread:
    def test_everything_arrives(self) -> None:
        streams = [lambda n=n: iter(range(n * 100, n * 100 + 100)) for n in range(20)]
        assert sorted(merge(streams, parallel=4)) == list(range(2000))

    def test_nothing_to_merge(self) -> None:
        assert list(merge([], parallel=4)) == []

    def test_an_error_is_raised_to_the_reader(self) -> None:
        def broken() -> Iterator[int]:
            yield 1
            raise StorageError("broken", kind="denied")

        with pytest.raises(StorageError, match="broken"):
            list(merge([broken, lambda: iter([2])], parallel=2))

    def test_closing_early_ends_the_threads(self) -> None:
        read = []

        def endless() -> Iterator[int]:
            while True:
                read.append(1)
                yield 1

        stream = merge([endless, endless], parallel=2)
        next(stream)
        stream.close()
        names = {"list-0", "list-1"}
        for thread in threading.enumerate():
            if thread.name in names:
                thread.join(5)
        assert not names & {thread.name for thread in threading.enumerate()}
        assert len(read) < 20  # they never ran far ahead

    def test_jobs_are_found_while_others_are_done(self) -> None:
        """A tree of numbers: n leads to 10 n ... 10 n + 9, below 10,000."""

        def read(jobs: Jobs[int]) -> Iterator[int]:
            for n in jobs:
                yield n
                if n < 1000:
                    jobs.add(*(10 * n + digit for digit in range(10) if n or digit))

        for parallel in (1, 2, 8):
            assert sorted(spread(Jobs([0], readers=parallel), read, parallel=parallel)) == list(range(10_000))

    def test_readers_flush_at_their_end(self) -> None:
        def read(jobs: Jobs[int]) -> Iterator[list[int]]:
            kept = []
            for n in jobs:
                kept.append(n)
                time.sleep(random.random() / 1000)
                if n < 100:
                    jobs.add(n + 100, n + 200)
            yield kept

        found = [n for some in spread(Jobs(range(100), readers=4), read, parallel=4) for n in some]
        assert sorted(found) == list(range(300))

    def test_more_readers_come_when_they_are_allowed(self) -> None:
        both = threading.Barrier(2, timeout=10)

        def read(jobs: Jobs[str]) -> Iterator[str]:
            for job in jobs:
                if job == "first":
                    assert not jobs.hungry()
                    jobs.add("other")
                    jobs.widen(2)
                both.wait()
                yield job

        assert sorted(spread(Jobs(["first"], readers=1), read, parallel=2)) == ["first", "other"]

    def test_an_error_ends_readers_that_wait(self) -> None:
        def read(jobs: Jobs[int]) -> Iterator[int]:
            for n in jobs:
                if n == 0:
                    time.sleep(0.1)
                    raise StorageError("broken", kind="denied")
                yield n

        with pytest.raises(StorageError, match="broken"):
            list(spread(Jobs([0, 1, 2], readers=3), read, parallel=3))
        for thread in threading.enumerate():
            if thread.name.startswith("list-"):
                thread.join(5)
                assert not thread.is_alive()
