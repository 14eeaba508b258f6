"""Work done side by side that finds more work. Owns: the threads and the bounded queue of a parallel listing.
Must not know: what is listed.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

J = TypeVar("J")
T = TypeVar("T")


class Jobs(Generic[J]):
    """Jobs that several readers share. Each reader iterates over this object once, and may add jobs while it does one.

    Iterating waits while another reader may still add something, and ends when every job is done. The newest job
    comes first, so a tree is walked depth first and few jobs wait.
    """

    def __init__(self, first: Iterable[J], *, readers: int) -> None:
        """`readers`: how many there may be for now; `widen` allows more."""
        self._waiting = list(first)
        self._allowed = readers
        self._working = self._idle = self._readers = 0
        self._ended = False
        self._changed = threading.Condition()
        self._start_reader: Callable[[], None] | None = None

    def add(self, *jobs: J) -> None:
        """More to do."""
        with self._changed:
            self._waiting.extend(jobs)
            self._changed.notify(len(jobs))
            self._grow()

    def widen(self, readers: int) -> None:
        """Allows so many readers; jobs that wait begin at once."""
        if readers > self._allowed:
            with self._changed:
                self._allowed = readers
                self._grow()

    def hungry(self) -> bool:
        """Whether a reader has, or could have, nothing to do: then a large job is worth being cut up."""
        with self._changed:
            could_start = self._start_reader is not None and self._readers < self._allowed
            return not self._waiting and (self._idle > 0 or could_start)

    def __iter__(self) -> Iterator[J]:
        while True:
            with self._changed:
                self._idle += 1
                while not self._waiting and self._working and not self._ended:
                    self._changed.wait()
                self._idle -= 1
                if self._ended or not self._waiting:
                    self._changed.notify_all()
                    return
                job = self._waiting.pop()
                self._working += 1
            yield job
            with self._changed:
                self._working -= 1

    def _grow(self) -> None:
        if self._start_reader is None:
            return
        while self._readers < self._allowed and self._readers - self._working < len(self._waiting):
            self._readers += 1
            self._start_reader()

    def _end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()


class _Done:
    """A reader has come to its end."""


class _Failed(Generic[T]):
    def __init__(self, error: Exception) -> None:
        self.error = error


def spread(jobs: Jobs[J], read: Callable[[Jobs[J]], Iterator[T]], *, parallel: int) -> Iterator[T]:
    """The items of all jobs in no order. `read` is called in every one of up to `parallel` threads, which stay at most
    `2 * parallel` items ahead; with `parallel` 1 it is called here, without a thread.

    The first error of any reader is raised here, and ends the others. Closing the iterator early ends the threads
    too.
    """
    if parallel <= 1:
        yield from read(jobs)
        return
    items: queue.Queue[T | _Done | _Failed[T]] = queue.Queue(maxsize=2 * parallel)
    stop = threading.Event()

    def hand_over(item: T | _Done | _Failed[T]) -> bool:
        while not stop.is_set():
            try:
                items.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in read(jobs):
                if not hand_over(item):
                    return
        except Exception as error:  # noqa: BLE001 - raised again by whoever iterates
            hand_over(_Failed(error))
            return
        hand_over(_Done())

    def start_reader() -> None:
        threading.Thread(target=work, name=f"list-{jobs._readers - 1}", daemon=True).start()

    with jobs._changed:
        jobs._start_reader = start_reader
        jobs._grow()
    try:
        done = 0
        # A reader is only ever started by one that has not come to its end.
        while done < jobs._readers:
            item = items.get()
            if isinstance(item, _Failed):
                raise item.error
            if isinstance(item, _Done):
                done += 1
                continue
            yield item
    finally:
        stop.set()
        jobs._end()
