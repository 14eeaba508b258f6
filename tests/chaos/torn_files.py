"""File systems of fsspec over a line that breaks. Owns: a server where files can be moved, as on SFTP, and a store
where they cannot, as in most object stores, both on this disk; and how the line breaks while something is written.
Must not know: what is written.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import fsspec
from chaos.faulty_storage import Call, lasting
from dying_storage import KilledError
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

#: `half`: half of the bytes arrive (of a move nothing), and then it fails. `whole`: all of it is done, and it fails.
#: `kill`: as `half`, and the process dies.
Break = Literal["half", "whole", "kill"]
KINDS = ("moves", "cannot move")


class Line:
    """What all file systems of a kind are reached over. `breaks` is asked about each write, but those of a lease's
    heartbeat, whose number is of time; its `calls` are those that it was asked about.
    """

    def __init__(self, root: str, breaks: Callable[[Call], Break | None]) -> None:
        self._root = root
        self._breaks = breaks
        self._numbers: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()
        self.calls: list[Call] = []
        self.killed = False

    def write(self, method: str, path: str, half: Callable[[], object], whole: Callable[[], object]) -> None:
        with self._lock:
            self.alive()
            found = None
            if threading.current_thread().name != "lease":
                name = lasting(str(path).replace(self._root, "HERE"))
                self._numbers[method, name] += 1
                self.calls.append(Call(method, name, self._numbers[method, name]))
                found = self._breaks(self.calls[-1])
            self.killed = found == "kill"
        (whole if found in (None, "whole") else half)()
        if found == "kill":
            raise KilledError
        if found:
            raise OSError("the connection was reset")

    def alive(self) -> None:
        if self.killed:
            raise KilledError


class _Torn:
    """What both have in common."""

    protocol = "torn"
    cachable = False
    line: ClassVar[Line | None] = None

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return LocalFileSystem._strip_protocol(path.replace("torn://", "file://") if isinstance(path, str) else path)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        if mode == "create" and Path(path).exists():
            raise FileExistsError(path)
        self._write("pipe_file", path, value)

    def put_file(self, lpath: str, rpath: str, callback: Any = None, **options: Any) -> None:
        self._write("put_file", rpath, Path(lpath).read_bytes())

    def _write(self, method: str, path: str, data: bytes) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        half, whole = (lambda some=some: Path(path).write_bytes(some) for some in (data[: len(data) // 2], data))
        _line().write(method, path, half, whole)


def _line() -> Line:
    assert _Torn.line is not None
    return _Torn.line


def _while_alive(name: str) -> Callable[..., Any]:
    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        _line().alive()
        return getattr(LocalFileSystem, name)(self, *arguments, **options)

    return call


for _name in ("_open", "cat_file", "info", "ls", "isdir", "makedirs", "rm_file"):
    setattr(_Torn, _name, _while_alive(_name))


class _Server(_Torn, LocalFileSystem):  # type: ignore[misc]
    def mv(self, path1: str, path2: str, **options: Any) -> None:
        _line().write("mv", path2, lambda: None, lambda: LocalFileSystem.mv(self, path1, path2))


class _Objects(_Torn, LocalFileSystem):  # type: ignore[misc]
    mv = AbstractFileSystem.mv


@contextmanager
def torn_line(kind: str, root: str, breaks: Callable[[Call], Break | None] = lambda call: None) -> Iterator[Line]:
    """`torn://` is a file system of this kind, over a line that breaks so. `root`: a path whose name is left out of
    what calls are called."""
    fsspec.register_implementation("torn", _Server if kind == "moves" else _Objects, clobber=True)
    before, _Torn.line = _Torn.line, Line(root, breaks)
    try:
        yield _Torn.line
    finally:
        _Torn.line = before
