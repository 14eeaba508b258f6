"""Names and types that other people's readers rely on."""

from __future__ import annotations

import datetime as dt

import pyarrow as pa
import pytest

from pipeline.table.schema import SEGMENTS, PartPlace, parse_part_name, part_name


def test_no_column_is_also_a_path_key() -> None:
    place = PartPlace("street", "0123456789ab", dt.date(2026, 1, 2))
    keys = {piece.partition("=")[0] for piece in place.folder().split("/") if "=" in piece}
    assert keys == {"model", "version", "date"}
    assert not keys & set(SEGMENTS.names)


def test_the_mask_follows_the_convention_of_hugging_face_datasets() -> None:
    assert SEGMENTS.field("mask").type == pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def test_no_type_that_some_reader_lacks() -> None:
    """Dictionaries, views, large and unsigned types, nanoseconds: each unknown to some reader."""

    def leaves(kind: pa.DataType) -> set[str]:
        if pa.types.is_list(kind):
            return leaves(kind.value_type)
        if pa.types.is_struct(kind):
            return set().union(*(leaves(field.type) for field in kind))
        return {str(kind)}

    found = set().union(*(leaves(field.type) for field in SEGMENTS))
    assert found == {"string", "binary", "int16", "int32", "int64", "float", "timestamp[us, tz=UTC]"}


@pytest.mark.parametrize("ordinal", [0, 1, 999_999, 1_000_000])
def test_part_names_come_back(ordinal: int) -> None:
    assert parse_part_name(part_name("20260102T030405Z-abcdef", ordinal)) == ("20260102T030405Z-abcdef", ordinal)


@pytest.mark.parametrize(
    "name",
    ["part-0.parquet", "20260102T030405Z-abcdef-000001.parquet.tmp", "x20260102T030405Z-abcdef-000001.parquet",
     "20260102T030405Z-abcdef-1.parquet", "20260102T030405Z-abcdef-000001.parquet\n", "plan.json", ""],
)  # fmt: skip
def test_foreign_names_are_no_parts(name: str) -> None:
    assert parse_part_name(name) is None
