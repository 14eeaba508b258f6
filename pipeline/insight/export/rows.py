"""Rows of a table by their places. Owns: cutting the frozen list into pieces, and reading the rows of a piece.
Must not know: SQL, formats, what is done with rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.errors import InfrastructureError, StorageError, UsageError
from pipeline.storage import Storage, join_uri
from pipeline.table.inspection import UNREADABLE, open_parquet

_BATCH_ROWS = 65_536


class Piece(NamedTuple):
    """Consecutive rows of the frozen list that lie in one Part: the unit of work and of what is done again."""

    #: 32 hexadecimal digits over what is asked, where the rows lie, and their numbers.
    digest: str
    #: Below DEST.
    part: str
    #: int64 [n]: places in the Part, ascending.
    rows: NDArray[np.int64]
    #: That of the first row; the others follow.
    first_image_id: int


def list_digest(list_path: Path) -> str:
    """SHA-256 over which rows the list has, in its order: 64 hexadecimal digits."""
    sha256 = hashlib.sha256()
    last = ""
    for part, rows, _ in _runs(list_path):
        if part != last:
            sha256.update(part.encode() + b"\n")
            last = part
        sha256.update(rows.tobytes())
    return sha256.hexdigest()


def pieces(list_path: Path, asked: str, *, images: int, size_bytes: int) -> Iterator[Piece]:
    """The list cut into pieces of at most `images` rows and, a single row apart, `size_bytes` bytes of images. The same
    for the same list and arguments. `asked` says what is made of the rows."""
    waiting: tuple[str, NDArray[np.int64], NDArray[np.int64]] | None = None
    image_id = 1

    def piece(part: str, rows: NDArray[np.int64]) -> Piece:
        text = f"{asked}\n{part}\n{image_id}\n".encode()
        return Piece(hashlib.sha256(text + rows.tobytes()).hexdigest()[:32], part, rows, image_id)

    for part, some_rows, some_sizes in _runs(list_path):
        rows, sizes = some_rows, some_sizes
        if waiting and waiting[0] == part:
            rows, sizes = np.concatenate([waiting[1], rows]), np.concatenate([waiting[2], sizes])
        elif waiting:
            yield piece(*waiting[:2])
            image_id += len(waiting[1])
        while cut := _cut(sizes, images, size_bytes):
            yield piece(part, rows[:cut])
            image_id += cut
            rows, sizes = rows[cut:], sizes[cut:]
        waiting = (part, rows, sizes) if len(rows) else None
    if waiting:
        yield piece(*waiting[:2])


def _cut(sizes: NDArray[np.int64], images: int, size_bytes: int) -> int:
    """How many rows the next piece takes; 0 where it can take more than there are."""
    fitting = max(1, int(np.searchsorted(np.cumsum(sizes[: images + 1]), size_bytes, side="right")))
    cut = min(images, fitting)
    return cut if cut < len(sizes) else 0


def _runs(list_path: Path) -> Iterator[tuple[str, NDArray[np.int64], NDArray[np.int64]]]:
    """Part, rows and bytes of images, of consecutive rows of the list in one Part."""
    for batch in pq.ParquetFile(list_path).iter_batches(_BATCH_ROWS, columns=["part", "row", "size_bytes"]):
        ends = pc.run_end_encode(batch["part"])
        start = 0
        for part, end in zip(ends.values.to_pylist(), ends.run_ends.to_pylist(), strict=True):
            yield part, batch["row"][start:end].to_numpy(), batch["size_bytes"][start:end].to_numpy()
            start = end


class RowReader:
    """Rows of Parts, one row group in memory at a time (and a Part, where it is remote): ask in the list's order."""

    def __init__(self, storage: Storage, dest: str, columns: Iterable[str]) -> None:
        self._storage = storage
        self._dest = dest
        self._columns = list(columns)
        self._part = ""
        self._file: Any = None
        self._starts: NDArray[np.int64] = np.zeros(0, np.int64)
        self._group = -1
        self._rows: pa.Table | None = None

    def read(self, piece: Piece) -> list[dict[str, Any]]:
        """The rows of a piece, in its order. Raises UsageError where its Part is not there any more,
        InfrastructureError where it cannot be read, StorageError."""
        uri = join_uri(self._dest, piece.part)
        try:
            if piece.part != self._part:
                self._open(piece.part, uri)
            groups = np.searchsorted(self._starts, piece.rows, side="right") - 1
            found: list[dict[str, Any]] = []
            for group in np.unique(groups).tolist():
                if group != self._group:
                    self._rows, self._group = self._file.read_row_group(group, columns=self._columns), group
                assert self._rows is not None
                found += self._rows.take(piece.rows[groups == group] - self._starts[group]).to_pylist()
            return found
        except StorageError as error:
            if error.kind == "missing":
                raise _gone(uri) from error
            raise
        except FileNotFoundError as error:
            raise _gone(uri) from error
        except UNREADABLE as error:
            raise InfrastructureError(f"{uri} cannot be read ({error}): see `maskmill verify {self._dest}`") from error

    def _open(self, part: str, uri: str) -> None:
        self._file, self._rows, self._group = open_parquet(self._storage, uri), None, -1
        sizes = [self._file.metadata.row_group(index).num_rows for index in range(self._file.num_row_groups)]
        self._starts = np.concatenate([[0], np.cumsum(sizes)])[:-1].astype(np.int64)
        self._part = part


def _gone(uri: str) -> UsageError:
    return UsageError(f"{uri} was in the table when this export began and is not any more: give another --out")
