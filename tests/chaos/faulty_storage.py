"""Stores that fail on purpose. Owns: a layer around every Storage that the product opens, on which each call can be
killed, fail, stall, tear, or succeed and lose its answer. Must not know: what the calls are for.

`Stage` puts the layer where the product opens stores (`pipeline.storage.open_storage` looks the three classes up there
by name), counts the calls and asks a script about each. A call is told apart by what it does, to which object, and for
the how manieth time: so a script means the same call again in the next run, whatever the threads do meanwhile.
"""

from __future__ import annotations

import hashlib
import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pytest
from dying_storage import KilledError
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.errors import StorageError
from pipeline.storage import Blob, ObjectInfo, Storage, bucket, disk, join_uri, local_path, remote
from pipeline.storage.bucket_files import BucketFiles, Reads

#: `kill`: the process dies before the call. `fail`: the store gave up after its own retries. `deny`: it refuses for
#: good. `stall`: it answers late. `tear`: half of it is done, and then it fails: some batches of a listing; of a write
#: what a store leaves behind, invisible where it writes in one step and half a file where it does not. `lose`: it is
#: done, and the caller hears of a failure. `deaf`: as `lose`, and the store's own repetition then finds it done.
Fault = Literal["kill", "fail", "deny", "stall", "tear", "lose", "deaf"]

#: What changes a store.
CHANGES = frozenset({"put_new", "put", "put_stream", "replace", "delete"})
_STALL_S = 0.05
_PASSING = [
    (re.compile(r"\d{8}T\d{6}Z-[0-9a-f]{6}"), "RUN"),
    (re.compile(r"\b[0-9a-f]{32}\b"), "HEX"),
    (re.compile(r"/[0-9a-f]{12}\.safetensors\b"), "/VERSION.safetensors"),  # which says how long training took
    (re.compile(r"/evaluation=[0-9a-f]{12}\b"), "/evaluation=ID"),  # of the Parts' names
    (re.compile(r"/maskmill-run-[^/]+/"), "/SCRATCH/"),
    (re.compile(r"\b\d{19,20}\b"), "NS"),
]


class Call(NamedTuple):
    """One call of a Storage, as it can be found again: the `number`th `method` of `name`, from 1."""

    method: str
    name: str
    number: int

    def __str__(self) -> str:
        return f"{self.method} {self.name} #{self.number}"


#: The changes that a command has made, and the one that it has half done.
State = tuple[str, ...]
#: What is to happen at a call: a fault, or something that is done while the process stands still before it.
Event = Fault | Callable[[], object] | None
Script = Callable[[Call], Event]


def nothing(call: Call) -> Event:
    """Disturbs nobody."""


class Once:
    """One event at one call. `struck` says whether the call came."""

    def __init__(self, call: Call, event: Event) -> None:
        self._call = call
        self._event = event
        self.struck = False

    def __call__(self, call: Call) -> Event:
        if call != self._call or self.struck:
            return None
        self.struck = True
        return self._event


class Seeded:
    """Faults by chance, `rate` of all calls: which ones, and which faults, follows from `seed` and the call alone."""

    def __init__(self, seed: int, rate: float, faults: Iterable[Fault], *, limit: int = 1 << 30) -> None:
        self._seed = seed
        self._rate = rate
        self._faults = tuple(faults)
        self._left = limit
        self.struck: list[tuple[Call, Fault]] = []

    def __call__(self, call: Call) -> Event:
        digest = hashlib.sha256(f"{self._seed} {call}".encode()).digest()
        if not self._left or int.from_bytes(digest[:4], "big") >= self._rate * 2**32:
            return None
        self._left -= 1
        fault = self._faults[digest[4] % len(self._faults)]
        self.struck.append((call, fault))
        return fault


class Stage:
    """All stores of a process, and the script that they play by.

    `places`: folders by the names that their calls are to have. Calls that a lease's heartbeat makes are not counted,
    since time decides how many there are; after a kill they die as all others do. While the process stands still all
    its threads wait at their next call.
    """

    def __init__(
        self, script: Script = nothing, *, places: Mapping[str, str] | None = None,
        last_words: Callable[[State | None], object] | None = None, tears_show: bool = False,
    ) -> None:  # fmt: skip
        """With `last_words` a kill is a SIGKILL to this process, after these are said of what it leaves; else it is a
        KilledError from this call and all later ones.
        `tears_show`: a torn write leaves half of its bytes under the object's name."""
        self._script = script
        self._places = [(uri.rstrip("/"), name) for name, uri in (places or {}).items()]
        self._last_words = last_words
        self._lock = threading.Lock()
        self._numbers: Counter[tuple[str, str]] = Counter()
        self.tears_show = tears_show
        places_of_kinds = ((disk, "DiskStorage"), (bucket, "BucketStorage"), (remote, "RemoteStorage"))
        self._kinds = {(module, name): getattr(module, name) for module, name in places_of_kinds}
        self._moving = threading.Event()
        self._moving.set()
        self.calls: list[Call] = []
        self.killed = False
        self._done: list[str] = []
        self._under_way = 0
        self._struck: tuple[int, str] | None = None

    @property
    def left(self) -> State | None:
        """By which changes this command has left what is there now: where they are equal, all of it is, but for ids and
        times. None where they do not say it: something was written after a fault, and may tell of it, or still is.
        """
        if self._struck is None or self._under_way:
            return None
        before, half_done = self._struck
        if any(not change.startswith("delete ") for change in self._done[before:]):
            return None
        return (*sorted(self._done), half_done)

    def ended(self, method: str, uri: str, *, done: bool) -> None:
        """A change that `fault` was asked about has ended."""
        with self._lock:
            if threading.current_thread().name != "lease":
                self._under_way -= 1
                self._done += [f"{method} {self._name(uri)}"] * done

    @contextmanager
    def set(self) -> Iterator[Stage]:
        """Every Storage that is opened meanwhile plays by the script."""
        with pytest.MonkeyPatch.context() as patch:
            for (module, name), kind in self._kinds.items():
                patch.setattr(module, name, self._opener(kind))
            yield self

    def _opener(self, kind: Callable[..., Storage]) -> Callable[..., FaultyStorage]:
        return lambda *arguments, **options: FaultyStorage(kind(*arguments, **options), self)

    def fault(self, method: str, uri: str) -> Fault | None:
        """What is to happen to this call. Kills by itself."""
        self._moving.wait()
        with self._lock:
            if self.killed:
                raise KilledError
            if threading.current_thread().name == "lease":
                return None
            name = self._name(uri)
            self._numbers[method, name] += 1
            call = Call(method, name, self._numbers[method, name])
            self.calls.append(call)
            event = self._script(call)
            if event is not None:
                self._struck = len(self._done), str(call) if event == "tear" and method in CHANGES else ""
            if event == "kill":
                if self._last_words is not None:
                    self._last_words(self.left)
                    os.kill(os.getpid(), signal.SIGKILL)
                self.killed = True
                raise KilledError
            self._under_way += method in CHANGES
        if not callable(event):
            return event
        self._moving.clear()
        try:
            with pytest.MonkeyPatch.context() as patch:
                for (module, name), kind in self._kinds.items():  # others work with stores as they are
                    patch.setattr(module, name, kind)
                event()
        finally:
            self._moving.set()
        return None

    def _name(self, uri: str) -> str:
        for place, name in self._places:
            if uri == place or uri.startswith(place + "/"):
                uri = name + uri[len(place) :]
                break
        return lasting(uri)


def lasting(uri: str) -> str:
    """Without what differs between two runs of the same command."""
    for pattern, text in _PASSING:
        uri = pattern.sub(text, uri)
    return uri


class FaultyStorage:
    """`storage`, as a `stage` has it."""

    def __init__(self, storage: Storage, stage: Stage) -> None:
        self._storage = storage
        self._stage = stage

    @property
    def root(self) -> str:
        return self._storage.root

    @property
    def create_only_is_atomic(self) -> bool:
        return self._storage.create_only_is_atomic

    @create_only_is_atomic.setter
    def create_only_is_atomic(self, value: bool) -> None:
        self._storage.create_only_is_atomic = value

    # -- reading

    def get(self, uri: str) -> Blob:
        return self._read("get", uri, lambda: self._storage.get(uri))

    def head(self, uri: str) -> ObjectInfo:
        return self._read("head", uri, lambda: self._storage.head(uri))

    def exists(self, uri: str) -> bool:
        return self._read("exists", uri, lambda: self._storage.exists(uri))

    def list(self, prefix_uri: str, *, parallel: int = 8) -> Iterator[pa.RecordBatch]:
        fault = self._stage.fault("list", prefix_uri)
        self._before(fault, "list", prefix_uri)
        if fault not in ("tear", "lose", "deaf"):
            return _iterated(self._storage.list(prefix_uri, parallel=parallel))
        return self._torn(prefix_uri, parallel)

    def _torn(self, prefix_uri: str, parallel: int) -> Iterator[pa.RecordBatch]:
        """The first half of what there is, and then a failure."""
        found = [batch for batch in self._storage.list(prefix_uri, parallel=parallel)]
        rows = sum(len(batch) for batch in found)
        for batch in found:
            yield batch.slice(0, max(1, len(batch) // 2)) if rows > 1 else batch
            break
        raise _failed("list", prefix_uri)

    # -- writing

    def put_new(self, uri: str, data: bytes) -> bool:
        found = self._write("put_new", uri, data, lambda: self._storage.put_new(uri, data))
        return False if found is None else bool(found)

    def put(self, uri: str, data: bytes) -> None:
        self._write("put", uri, data, lambda: self._storage.put(uri, data))

    def put_stream(self, uri: str, chunks: Callable[[], Iterable[bytes]]) -> None:
        self._write("put_stream", uri, b"a torn stream", lambda: self._storage.put_stream(uri, chunks))

    def replace(self, uri: str, data: bytes, *, etag: str) -> bool:
        found = self._write("replace", uri, data, lambda: self._storage.replace(uri, data, etag=etag))
        return True if found is None else bool(found)

    def delete(self, uri: str) -> None:
        self._write("delete", uri, None, lambda: self._storage.delete(uri))

    def check_create_only(self) -> bool:
        """Its own writes are calls like any others, and have names that never come again."""
        return self._read("check_create_only", self.root, self._storage.check_create_only)

    # -- for others

    def filesystem(self, sizes: Mapping[str, int] | None = None) -> Any:
        files = self._storage.filesystem(sizes)
        if isinstance(files, BucketFiles):
            files._reads = Reads(
                *(self._watched(f"file_{name}", read) for name, read in files._reads._asdict().items())
            )
        elif isinstance(files, MemoryFileSystem):
            return _FaultyMemory(lambda name, uri: self._read(name, uri, lambda: None))
        return files

    def _watched(self, name: str, read: Callable[..., Any]) -> Callable[..., Any]:
        def watched(uri: str, *rest: Any) -> Any:
            return self._read(name, uri, lambda: read(uri, *rest))

        return watched

    # -- faults

    def _read(self, method: str, uri: str, call: Callable[[], Any]) -> Any:
        fault = self._stage.fault(method, uri)
        self._before(fault, method, uri)
        answer = call()
        if fault in ("tear", "lose", "deaf"):
            raise _failed(method, uri)
        return answer

    def _write(self, method: str, uri: str, data: bytes | None, call: Callable[[], Any]) -> Any:
        fault = self._stage.fault(method, uri)
        done = False
        try:
            self._before(fault, method, uri)
            if fault == "tear":
                if data is not None:
                    self._tear(uri, data[: len(data) // 2])
                raise _failed(method, uri)
            answer = call()
            done = True
        finally:
            self._stage.ended(method, uri, done=done)
        if fault == "lose":
            raise _failed(method, uri)
        return None if fault == "deaf" else answer

    def _before(self, fault: Fault | None, method: str, uri: str) -> None:
        if fault == "stall":
            time.sleep(_STALL_S)
        elif fault == "fail":
            raise _failed(method, uri)
        elif fault == "deny":
            raise StorageError(f"could not {method} {uri!r}: access denied on purpose", kind="denied")

    def _tear(self, uri: str, half: bytes) -> None:
        if self._stage.tears_show:
            self._storage.put(uri, half)
        elif uri.startswith("file:"):  # as a process leaves it that died while it wrote
            folder = Path(local_path(join_uri(self.root, "_tmp")))
            folder.mkdir(parents=True, exist_ok=True)
            (folder / hashlib.sha256(f"{uri} {time.monotonic_ns()}".encode()).hexdigest()[:32]).write_bytes(half)


class _FaultyMemory(MemoryFileSystem):  # type: ignore[misc]
    """fsspec's memory, whose methods are told first when others call them. What it holds is the class's."""

    cachable = False
    _tell: Callable[[str, str], None] | None = None

    def __init__(self, tell: Callable[[str, str], None]) -> None:
        super().__init__()
        self._inside = threading.local()
        self._tell = tell

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name.startswith("_") or name == "unstrip_protocol" or not callable(found) or self._tell is None:
            return found

        def told(path: Any = "", *arguments: Any, **options: Any) -> Any:
            if getattr(self._inside, "already", False):
                return found(path, *arguments, **options)
            self._inside.already = True
            try:
                self._tell(f"file_{name}", "memory:/" + self._strip_protocol(path))
                return found(path, *arguments, **options)
            finally:
                self._inside.already = False

        return told


def _iterated(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """In a frame of this module, by which `watched_clients` knows whose requests they are."""
    yield from batches


def _failed(method: str, uri: str) -> StorageError:
    return StorageError(f"could not {method} {uri!r}: failed on purpose", kind="fetch_failed")
