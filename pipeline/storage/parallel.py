"""Several streams read side by side. Owns: the threads and the bounded queue of a parallel listing.
Must not know: what is listed.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")


class _Done:
    """A worker has no more streams."""


class _Failed(Generic[T]):
    def __init__(self, error: Exception) -> None:
        self.error = error


def merge(streams: Sequence[Callable[[], Iterator[T]]], *, parallel: int) -> Iterator[T]:
    """The items of all `streams` in no order, read by up to `parallel` threads that stay at most `2 *
    parallel` items ahead.

    The first error of any stream is raised here, and ends the others. Closing the iterator early ends the
    threads too."""
    waiting: queue.SimpleQueue[Callable[[], Iterator[T]]] = queue.SimpleQueue()
    for stream in streams:
        waiting.put(stream)
    workers = min(parallel, len(streams))
    items: queue.Queue[T | _Done | _Failed[T]] = queue.Queue(maxsize=2 * max(1, parallel))
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
            while not stop.is_set():
                try:
                    stream = waiting.get_nowait()
                except queue.Empty:
                    break
                for item in stream():
                    if not hand_over(item):
                        return
        except Exception as error:  # noqa: BLE001 - raised again by the reader
            hand_over(_Failed(error))
            return
        hand_over(_Done())

    threads = [threading.Thread(target=work, name=f"list-{n}", daemon=True) for n in range(workers)]
    for thread in threads:
        thread.start()
    try:
        running = workers
        while running:
            item = items.get()
            if isinstance(item, _Failed):
                raise item.error
            if isinstance(item, _Done):
                running -= 1
                continue
            yield item
    finally:
        stop.set()
