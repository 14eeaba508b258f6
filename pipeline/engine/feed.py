"""Lists of references as the stream takes them up. Owns: what is known of a list under way, and the pieces that one
thread takes at a time. Must not know: threads, decoding, models, batches.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

from pipeline.engine.rows import Ref
from pipeline.storage import Blob

_CHUNK_IMAGES = 16
_CHUNK_BYTES = 32 << 20


class Work(NamedTuple):
    """One submitted list: its columns, where its rows go, and its promise."""

    uris: list[str]
    etags: list[str]
    attempts: list[int]
    sizes_bytes: list[int]
    add_rows: Callable[[Sequence[Mapping[str, Any]]], None]
    lock: threading.Lock
    left: list[int]
    done: Future[None]
    watched: bool
    addresses: list[str | None] | None = None

    def address(self, row: int) -> str:
        """What to read it by: a signed address where it has one, else its URI."""
        return (self.addresses[row] if self.addresses else None) or self.uris[row]

    def ref(self, row: int) -> Ref:
        """One of its images."""
        return Ref(self.uris[row], self.etags[row], self.attempts[row], self.sizes_bytes[row])


#: An image by its place in its list, and its bytes where other threads fetch them.
Fetched = tuple[Work, int, Future[Blob] | None]


def mean_bytes(chunk: Sequence[tuple[Work, int, Any]]) -> float:
    """Of its images as they were listed; infinite where that is not known of all."""
    sizes_bytes = [work.sizes_bytes[index] for work, index, _ in chunk]
    return sum(math.inf if size is None else size for size in sizes_bytes) / len(chunk)


def chunks(sizes_bytes: Sequence[int | None]) -> Iterator[list[int]]:
    """Positions in pieces of a few images or a few megabytes: what one thread takes up at a time."""
    chunk: list[int] = []
    chunk_bytes = 0
    for index, size_bytes in enumerate(sizes_bytes):
        chunk.append(index)
        chunk_bytes += size_bytes or 0
        if len(chunk) >= _CHUNK_IMAGES or chunk_bytes >= _CHUNK_BYTES:
            yield chunk
            chunk, chunk_bytes = [], 0
    if chunk:
        yield chunk
