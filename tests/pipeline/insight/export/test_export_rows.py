"""The frozen list in pieces, and rows by their places."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InfrastructureError, UsageError
from pipeline.insight.export import rows
from pipeline.insight.export.rows import Piece, RowReader, list_digest, pieces
from pipeline.storage import normalize_uri, open_storage


def write_list(path: Path, *parts: tuple[str, list[int]], size_bytes: int = 10) -> Path:
    listed = [{"part": part, "row": row, "size_bytes": size_bytes} for part, found in parts for row in found]
    schema = pa.schema([("part", pa.string()), ("row", pa.int64()), ("size_bytes", pa.int64())])
    pq.write_table(pa.Table.from_pylist(listed, schema), path)
    return path


def cut(path: Path, *, asked: str = "x", images: int = 4, size_bytes: int = 1000) -> list[Piece]:
    return list(pieces(path, asked, images=images, size_bytes=size_bytes))


def test_pieces_are_the_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_list(tmp_path / "l", ("a", list(range(0, 20, 2))), ("b", [3]), ("c", list(range(8))))
    found = cut(path)
    assert [(one.part, one.rows.tolist(), one.first_image_id) for one in found] == [
        ("a", [0, 2, 4, 6], 1), ("a", [8, 10, 12, 14], 5), ("a", [16, 18], 9), ("b", [3], 11),
        ("c", [0, 1, 2, 3], 12), ("c", [4, 5, 6, 7], 16),
    ]  # fmt: skip
    assert len({one.digest for one in found}) == 6
    for batch_rows in (1, 3, 7):
        monkeypatch.setattr(rows, "_BATCH_ROWS", batch_rows)
        again = cut(path)
        assert [(one.digest, one.first_image_id) for one in again] == [(o.digest, o.first_image_id) for o in found]


def test_pieces_hold_so_many_bytes_or_one_image(tmp_path: Path) -> None:
    path = write_list(tmp_path / "l", ("a", list(range(7))))
    assert [len(one.rows) for one in cut(path, size_bytes=25)] == [2, 2, 2, 1]
    assert [len(one.rows) for one in cut(path, size_bytes=5)] == [1] * 7


def test_digests_are_of_what_is_asked_and_where(tmp_path: Path) -> None:
    one = write_list(tmp_path / "1", ("a", [1, 2]))
    other = write_list(tmp_path / "2", ("a", [1, 3]))
    moved = write_list(tmp_path / "3", ("b", [1, 2]))
    digests = [cut(path)[0].digest for path in (one, other, moved)] + [cut(one, asked="y")[0].digest]
    assert len(set(digests)) == 4
    assert len({list_digest(path) for path in (one, other, moved)}) == 3
    assert list_digest(one) == list_digest(write_list(tmp_path / "4", ("a", [1, 2]), size_bytes=99))


def test_rows_are_read_by_their_places(tmp_path: Path) -> None:
    dest = normalize_uri(str(tmp_path))
    numbers = pa.table({"number": list(range(100)), "other": ["x"] * 100})
    pq.write_table(numbers, tmp_path / "part", row_group_size=7)
    reader = RowReader(open_storage(dest), dest, ["number"])
    for wanted in ([0], [5, 6, 7, 8], [20, 48, 49, 99]):
        found = reader.read(Piece("d", "part", np.array(wanted), 1))
        assert found == [{"number": number} for number in wanted]
    with pytest.raises(UsageError, match="is not any more: give another --out"):
        reader.read(Piece("d", "gone", np.array([0]), 1))
    sink = io.BytesIO()
    pq.write_table(numbers, sink)
    (tmp_path / "cut").write_bytes(sink.getvalue()[:-20])
    with pytest.raises(InfrastructureError, match="maskmill verify"):
        reader.read(Piece("d", "cut", np.array([0]), 1))
