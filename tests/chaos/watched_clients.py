"""Whether the layer of `faulty_storage` sees all that is done with a store. Owns: watching the clients below the
stores. Must not know: which commands use them.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import types
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import obstore
import pytest
from botocore.client import BaseClient
from chaos import faulty_storage
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.storage.bucket import BucketStorage
from pipeline.storage.disk import DiskStorage
from pipeline.storage.remote import RemoteStorage

#: What moves or shows bytes or names in a file system of fsspec.
_FILE_METHODS = (
    "_open", "open", "ls", "info", "find", "glob", "walk", "exists", "isdir", "isfile", "cat", "cat_file", "cat_ranges",
    "pipe", "pipe_file", "put_file", "get_file", "cp_file", "mv", "rm", "rm_file", "rmdir", "mkdir", "makedirs",
    "created", "modified",
)  # fmt: skip


@contextmanager
def nothing_passes_by() -> Iterator[Counter[str]]:
    """Gives how often each function of the stores' clients (obstore, boto3, fsspec's memory), and of the stores
    themselves, was called meanwhile. Fails at the end where one was called other than below a call of FaultyStorage.
    """
    seen: Counter[str] = Counter()
    strangers: Counter[str] = Counter()

    def watched(what: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def wrapper(*arguments: Any, **options: Any) -> Any:
            (seen if _is_below_a_call() else strangers)[what] += 1
            return call(*arguments, **options)

        return wrapper

    places: list[tuple[Any, list[str]]] = [
        (obstore, [name for name in dir(obstore) if inspect.isroutine(getattr(obstore, name))]),
        (BaseClient, ["_make_api_call"]),
        (MemoryFileSystem, list(_FILE_METHODS)),
    ]
    for kind in (DiskStorage, BucketStorage, RemoteStorage):
        places.append((kind, ["__init__", *(name for name in vars(kind) if not name.startswith("_"))]))
    with pytest.MonkeyPatch.context() as patch:
        for owner, names in places:
            for name in names:
                patch.setattr(owner, name, watched(f"{owner.__name__}.{name}", getattr(owner, name)))
        yield seen
    assert not strangers, f"done with a store and not seen by the layer: {dict(strangers)}"


def _is_below_a_call() -> bool:
    """In this thread, or in one that helps a listing, whose beginning is looked at."""
    if threading.current_thread().name.startswith("list-"):
        return True
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == faulty_storage.__file__:
            return True
        frame = frame.f_back
    return False
