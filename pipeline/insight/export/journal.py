"""What is done of an export, kept beside its files so that a kill loses little. Owns: `OUT/_export` and
`OUT/export.json`, and putting index files together. Must not know: tables, formats, what a line means.

    _export/plan.json             what was asked, and which list was frozen: create-only
    _export/<list>.parquet        that list
    _export/<piece>.<stream>      lines of a piece for an index file
    _export/<piece>.json          its receipt, last: all of the piece is there
    export.json                   the export is whole; `_export` is then taken away

Everything is named by a digest of what it holds, or replaced by equal bytes, so that two processes may do the same
export. The one that is done first takes `_export` away; the other may then fail, and finds it done when it begins anew.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from pipeline.errors import StorageError, UsageError
from pipeline.insight.export.shape import Index, Stream
from pipeline.storage import Storage, join_uri, local_path

_AT_ONCE = 8
_FRAGMENTS_AT_ONCE = 4
_OWN_FOLDERS = ("_export/", "_tmp/")


class Asked(BaseModel):
    """What an export is of: the same for the same command."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dest: str
    format: str
    where: str | None
    images: bool
    edge_px: int
    piece_images: int


class ExportPlan(BaseModel):
    """A frozen export."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    asked: Asked
    list_digest: str
    #: Rows of the list.
    chosen: int
    error_rows: int
    model: str
    version: str
    task: str
    #: Whose plan has the card.
    run_id: str


class Receipt(BaseModel):
    """A piece that is done."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    images: int
    annotations: int
    #: By reason.
    skipped: dict[str, int]
    #: Which streams it has lines of.
    streams: tuple[str, ...]


class Journal:
    """The state of the export in OUT."""

    def __init__(self, storage: Storage, out: str) -> None:
        self._storage = storage
        self._out = out.rstrip("/")

    def uri(self, *names: str) -> str:
        """Of a file below OUT."""
        return join_uri(self._out, *names)

    def finished(self) -> dict[str, Any] | None:
        """What `export.json` says, None while there is none."""
        found = self._read(self.uri("export.json"))
        return None if found is None else dict(json.loads(found))

    def open_plan(self) -> ExportPlan | None:
        """What was frozen here and is not finished."""
        found = self._read(self._own("plan.json"))
        return None if found is None else ExportPlan.model_validate_json(found)

    def check_empty(self) -> None:
        """Raises UsageError where OUT holds files that no export left."""
        for uri in self._listed():
            name = uri.removeprefix(self._out + "/")
            if not name.startswith(_OWN_FOLDERS):
                raise UsageError(f"{self._out} is not empty (it has {name!r}): give a new or empty --out")

    def freeze(self, plan: ExportPlan, list_path: Path) -> ExportPlan:
        """Keeps the list and the plan. Gives the plan that is there: another process may have been first."""
        self._storage.put_stream(self._own(f"{plan.list_digest}.parquet"), lambda: _chunks(list_path))
        self._storage.put_new(self._own("plan.json"), _json(plan))
        return self.open_plan() or plan

    def fetch_list(self, plan: ExportPlan, list_path: Path) -> None:
        """The frozen list as a local file."""
        list_path.write_bytes(self._storage.get(self._own(f"{plan.list_digest}.parquet")).data)

    def done(self) -> set[str]:
        """Digests of the pieces that have their receipts."""
        names = (uri.rpartition("/")[2] for uri in self._listed("_export"))
        return {name.removesuffix(".json") for name in names if name.endswith(".json")} - {"plan"}

    def put(self, path: str, data: bytes) -> None:
        """A file of the export."""
        self._storage.put(self.uri(path), data)

    def finish_piece(self, digest: str, lines: Mapping[str, Sequence[bytes]], receipt: Receipt) -> None:
        """Keeps a piece's lines, and then says that it is done."""
        for stream, some in lines.items():
            self._storage.put(self._own(f"{digest}.{stream}"), b"\n".join(some))
        self._storage.put(self._own(f"{digest}.json"), _json(receipt))

    def receipts(self, digests: Iterable[str]) -> Iterator[tuple[str, Receipt]]:
        """Of pieces that are done, in the order asked for."""

        def read(digest: str) -> tuple[str, Receipt]:
            return digest, Receipt.model_validate_json(self._storage.get(self._own(f"{digest}.json")).data)

        return _in_order(read, digests)

    def write_index(self, index: Index, having: Callable[[str], Iterable[str]]) -> None:
        """Puts an index file together. `having` gives the digests of the pieces with lines of a stream, in order.
        Memory: the lines of some pieces."""
        if all(isinstance(part, bytes) for part in index.parts):
            self.put(index.path, b"".join(part for part in index.parts if isinstance(part, bytes)))
            return

        def chunks() -> Iterator[bytes]:
            for part in index.parts:
                if isinstance(part, bytes):
                    yield part
                else:
                    yield from self._lines(part, having(part.name))

        self._storage.put_stream(self.uri(index.path), chunks)

    def finish(self, body: Mapping[str, Any]) -> None:
        """The export is whole: says so, and takes away what only its making needed."""
        self._storage.put(self.uri("export.json"), json.dumps(body, indent=1, ensure_ascii=False).encode() + b"\n")
        self.clear()

    def clear(self) -> None:
        """Takes away what only the making of a finished export needed, and what a kill left half written. The plan goes
        last."""
        uris = [uri for name in _OWN_FOLDERS for uri in self._listed(name)]
        plan = self._own("plan.json")
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for _ in pool.map(self._storage.delete, [uri for uri in uris if uri != plan]):
                pass
        self._storage.delete(plan)
        if self._out.startswith("file://"):
            for name in _OWN_FOLDERS:
                with contextlib.suppress(OSError):  # not empty: it is somebody's
                    os.rmdir(local_path(self.uri(name)))

    def _lines(self, stream: Stream, digests: Iterable[str]) -> Iterator[bytes]:
        def read(digest: str) -> bytes:
            return self._storage.get(self._own(f"{digest}.{stream.name}")).data

        number = 0
        for data in _in_order(read, digests, _FRAGMENTS_AT_ONCE):
            some = data.split(b"\n")
            if stream.is_numbered:
                some = [b'{"id":%d,' % (number + index) + line[1:] for index, line in enumerate(some, start=1)]
            yield (stream.separator if number else b"") + stream.separator.join(some)
            number += len(some)
        if number:
            yield stream.end

    def _listed(self, *names: str) -> Iterator[str]:
        """URIs below a folder of OUT, or below OUT; none where it is not there."""
        try:
            for batch in self._storage.list(self.uri(*names)):
                yield from batch["uri"].to_pylist()
        except StorageError as error:
            if error.kind != "missing":
                raise

    def _own(self, name: str) -> str:
        return self.uri("_export", name)

    def _read(self, uri: str) -> bytes | None:
        try:
            return self._storage.get(uri).data
        except StorageError as error:
            if error.kind == "missing":
                return None
            raise


def _in_order(function: Callable[[str], Any], items: Iterable[str], at_once: int = _AT_ONCE) -> Iterator[Any]:
    """`function` of each, so many at a time."""
    with ThreadPoolExecutor(at_once) as pool:
        window: list[str] = []
        for item in items:
            window.append(item)
            if len(window) == at_once:
                yield from pool.map(function, window)
                window = []
        yield from pool.map(function, window)


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while data := file.read(1 << 20):
            yield data


def _json(model: BaseModel) -> bytes:
    return model.model_dump_json(indent=1).encode()
