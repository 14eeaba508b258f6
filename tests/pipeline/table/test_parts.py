"""A Part as a file: schema, row groups, compression, statistics, metadata, and its one commit."""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from handmade import make_part, make_row

from pipeline.storage import Storage, join_uri, normalize_uri, open_storage
from pipeline.table import parts as parts_module
from pipeline.table.parts import PartBuilder, commit, commit_empty
from pipeline.table.schema import SCHEMA_VERSION, SEGMENTS

WHOLE = make_row(
    "s3://photos/a.jpg",
    "e1",
    width=4,
    height=3,
    mean_confidence=0.5,
    classes=[{"class_id": 1, "name": "cell", "pixels": 7, "fraction": 0.5, "mean_confidence": 0.25, "regions": 2}],
    mask={"bytes": b"\x89PNG", "path": None},
    mask_crc32=(1 << 32) - 1,
    instances=[
        {"class_id": 1, "name": "cell", "score": 0.5, "bbox": [0.0, 1.0, 2.0, 3.0], "area": 6,
         "rle": {"size": [3, 4], "counts": b"\x00\xff"}}
    ],
)  # fmt: skip


def read(data: bytes) -> pq.ParquetFile:
    return pq.ParquetFile(io.BytesIO(data))


def test_rows_come_back_as_they_were() -> None:
    (row,) = read(make_part([WHOLE])).read().to_pylist()
    assert {key: row[key] for key in WHOLE} == WHOLE
    assert all(row[name] is None for name in set(SEGMENTS.names) - set(WHOLE))


def test_the_schema_is_exact() -> None:
    assert read(make_part([WHOLE])).schema_arrow.equals(SEGMENTS)
    assert read(make_part([])).schema_arrow.equals(SEGMENTS)


def test_row_groups_are_bounded_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts_module, "ROW_GROUP_ROWS", 1024)
    builder = PartBuilder(model_name="tiny", card_json="{}")
    uris = [f"image-{index:04d}" for index in range(2 * 1024 + 30)]
    for start in range(0, len(uris), 100):
        builder.add([make_row(uri, "e1") for uri in uris[start : start + 100]])
    part = builder.finish()
    file = read(part.data.to_pybytes())
    sizes = [file.metadata.row_group(index).num_rows for index in range(file.metadata.num_row_groups)]
    assert sizes == [1024, 1024, 30]
    assert part.rows == len(uris)
    assert file.read(["image_uri"])["image_uri"].to_pylist() == uris


def test_every_column_is_zstd_and_flat_ones_have_statistics() -> None:
    metadata = read(make_part([WHOLE, make_row("s3://photos/b.jpg", "e1")])).metadata.row_group(0)
    columns = [metadata.column(index) for index in range(metadata.num_columns)]
    assert {column.compression for column in columns} == {"ZSTD"}
    with_statistics = {column.path_in_schema for column in columns if column.is_stats_set}
    assert with_statistics == {field.name for field in SEGMENTS if not pa.types.is_nested(field.type)}
    uri = next(column for column in columns if column.path_in_schema == "image_uri")
    assert (uri.statistics.min, uri.statistics.max) == ("s3://photos/a.jpg", "s3://photos/b.jpg")


def test_model_and_card_are_in_the_file() -> None:
    builder = PartBuilder(model_name="street", card_json='{"name": "street"}')
    metadata = read(builder.finish().data.to_pybytes()).schema_arrow.metadata
    assert metadata[b"maskmill_model"] == b"street"
    assert metadata[b"maskmill_card"] == b'{"name": "street"}'
    assert metadata[b"maskmill_schema_version"] == SCHEMA_VERSION.encode()


def storage_of(folder: Path) -> Storage:
    return open_storage(normalize_uri(str(folder)))


def test_a_part_is_committed_once_and_never_replaced(tmp_path: Path) -> None:
    storage = storage_of(tmp_path)
    uri = join_uri(storage.root, "segments/part.parquet")
    builder = PartBuilder(model_name="tiny", card_json="{}")
    builder.add([WHOLE])
    first = builder.finish()
    assert commit(storage, uri, first)
    assert not commit_empty(storage, uri)
    assert storage.get(uri).data == first.data.to_pybytes()


def test_an_empty_part_takes_the_name_and_has_no_rows(tmp_path: Path) -> None:
    storage = storage_of(tmp_path)
    uri = join_uri(storage.root, "segments/part.parquet")
    assert commit_empty(storage, uri)
    builder = PartBuilder(model_name="tiny", card_json="{}")
    builder.add([WHOLE])
    assert not commit(storage, uri, builder.finish())
    assert read(storage.get(uri).data).metadata.num_rows == 0


def test_large_masks_make_shorter_row_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts_module, "ROW_GROUP_BYTES", 1000)
    builder = PartBuilder(model_name="m", card_json="{}")
    builder.add([{"image_uri": str(i), "mask": {"bytes": b"x" * 300, "path": None}} for i in range(10)])
    part = builder.finish()
    file = pq.ParquetFile(pa.BufferReader(part.data))
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [4, 4, 2]
    assert file.read(["image_uri"])["image_uri"].to_pylist() == [str(i) for i in range(10)]
