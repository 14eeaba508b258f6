"""The fast reading of S3 Inventories held against the one that goes row by row."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.config import DEFAULT_SUFFIXES
from pipeline.corpus import manifest as manifest_module
from pipeline.corpus.inventory import Part, Query, find_parts, query_parts, read_parts
from pipeline.corpus.manifest import MANIFEST_SCHEMA, Corpus, _images, _images_sql, read_source
from pipeline.errors import UsageError
from pipeline.storage import join_uri, open_storage

MS, US = pa.timestamp("ms", "UTC"), pa.timestamp("us", "UTC")
TYPES = {
    "bucket": [pa.string(), pa.large_string()],
    "key": [pa.string(), pa.large_string()],
    "e_tag": [pa.string()],
    "size": [pa.int64(), pa.int32()],
    "last_modified_date": [MS, US],
    "is_latest": [pa.bool_()],
    "is_delete_marker": [pa.bool_()],
    "version_id": [pa.string()],
}
KEYS = st.builds(
    "{}{}".format,
    st.text(st.sampled_from("aB/.%+ 20#?*'\"\\\n\x00ü\u0130ſK😀"), max_size=8),
    st.sampled_from([*DEFAULT_SUFFIXES, ".JPG", ".PnG", ".jpg/", ".tıff", ".txt", ""]),
)
VALUES = {
    "bucket": st.sampled_from(["photos", "other.photos", ".odd", None]),
    "key": st.one_of(KEYS, st.none()),
    "e_tag": st.text("0aF-", min_size=1, max_size=5),
    "size": st.one_of(st.none(), st.integers(0, 2**31 - 1)),
    "last_modified_date": st.one_of(st.none(), st.integers(-(10**13), 10**13)),
    "is_latest": st.sampled_from([True, False, None]),
    "is_delete_marker": st.sampled_from([True, False, None]),
    "version_id": st.just("v"),
}


@st.composite
def tables(draw: Any) -> pa.Table:
    """A part as the store writes it: some columns may be missing, and it may be empty."""
    names = ["bucket", "key", "e_tag", *(name for name in list(TYPES)[3:] if draw(st.booleans()))]
    rows = draw(st.integers(0, 6))
    return pa.table(
        {
            name: pa.array(
                draw(st.lists(VALUES[name], min_size=rows, max_size=rows)), draw(st.sampled_from(TYPES[name]))
            )
            for name in names
        }
    )


def part(folder: Path, table: pa.Table) -> Part:
    path = folder / f"{uuid.uuid4().hex}.parquet"
    pq.write_table(table, path, row_group_size=4)
    return Part(f"file://{path}", str(path), hashlib.md5(path.read_bytes()).hexdigest().upper())


def one(**columns: Any) -> pa.Table:
    return pa.table({"bucket": ["b"], "key": ["a.jpg"], "e_tag": ["e"], **columns})


def rows_of(query: Query | Corpus) -> pa.Table:
    with duckdb.connect() as connection:
        connection.execute("SET TimeZone = 'UTC'")
        table: pa.Table = connection.sql(f"SELECT * FROM {query.sql}").to_arrow_table()
    assert table.num_rows == query.rows
    return table


def row_by_row(parts: list[Part], suffixes: tuple[str, ...]) -> pa.Table:
    return pa.Table.from_batches((_images(batch, "", suffixes) for batch in read_parts(parts)), MANIFEST_SCHEMA)


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(tables(), min_size=1, max_size=3), st.sampled_from([DEFAULT_SUFFIXES, (), (".txt", "s/.jpg")]))
def test_a_query_gives_the_rows_that_are_read_one_by_one(
    tmp_path: Path, parts_tables: list[pa.Table], suffixes: tuple[str, ...]
) -> None:
    parts = [part(tmp_path, table) for table in parts_tables]
    parts.append(parts[0])  # and what stands twice is there twice
    wanted = row_by_row(parts, suffixes)
    query = query_parts(parts, where=_images_sql(suffixes))
    assert query is not None
    assert rows_of(query).equals(wanted)
    uris = wanted["uri"].to_pylist()
    assert query.distinct == (len(set(uris)) == len(uris))


@pytest.mark.parametrize(
    "odd",
    [
        one(e_tag=['"e"']),
        one(e_tag=["W/e"]),
        one(e_tag=[""]),
        one(e_tag=pa.array([None], pa.string())),
        one().drop_columns("e_tag"),
        one(e_tag=pa.array([b"e"])),
        one(key=pa.array([b"a.jpg"])),
        one(key=pa.array(["a.jpg"]).dictionary_encode()),
        one(size=["7"]),
        one(size=[7.0]),
        one(last_modified_date=["2026-01-01T00:00:00Z"]),
        one(last_modified_date=pa.array([1], pa.timestamp("us"))),
        one(last_modified_date=pa.array([1], pa.timestamp("ns", "UTC"))),
        one(KEY=["b.jpg"]),
        pa.Table.from_arrays([pa.array(["x"])] * 4, names=["bucket", "key", "key", "e_tag"]),
    ],
    ids=lambda table: str(table.schema).replace("\n", ", "),
)
def test_what_a_store_does_not_write_is_left_to_the_rows(tmp_path: Path, odd: pa.Table) -> None:
    assert query_parts([part(tmp_path, one())], where="true") is not None
    assert query_parts([part(tmp_path, one()), part(tmp_path, odd)], where="true") is None


def test_an_etag_that_no_image_needs_is_not_missed(tmp_path: Path) -> None:
    table = one(is_latest=[True], is_delete_marker=[False])
    marker = one(is_latest=[True], is_delete_marker=[True], e_tag=pa.array([None], pa.string()))
    text = one(key=["a.txt"], e_tag=pa.array([None], pa.string()), is_latest=[True], is_delete_marker=[False])
    parts = [part(tmp_path, each) for each in (table, marker, text)]
    query = query_parts(parts, where=_images_sql((".jpg",)))
    assert query is not None and query.rows == 1 and query.distinct


def test_names_of_one_hash_are_not_taken_for_one_name(tmp_path: Path) -> None:
    """These two have the same `hash` in DuckDB 2.0."""
    keys = [
        "photos-of-the-flee0/2026/17/cam-13/000017000039.jpg",
        "photos-of-the-flee1/2026/17/cam-14/000017540039.jpg",
    ]
    alike = [part(tmp_path, one(bucket=[key.partition("/")[0]], key=[key.partition("/")[2]])) for key in keys]
    query = query_parts(alike, where="true")
    assert query is not None and query.distinct
    query = query_parts([*alike, alike[0]], where="true")
    assert query is not None and not query.distinct


def test_names_that_duckdb_would_take_for_more(tmp_path: Path) -> None:
    folder = tmp_path / "a[b]*" / "bucket=x" / "it's"
    folder.mkdir(parents=True)
    (tmp_path / "ab").mkdir()
    parts = [part(folder, one())]
    query = query_parts(parts, where="true")
    assert query is not None and rows_of(query).equals(row_by_row(parts, ()))


def write(folder: Path, *parts: Part, **more: object) -> str:
    files = [{"key": Path(each.path).name, "MD5checksum": each.md5} for each in parts]
    (folder / "manifest.json").write_text(json.dumps({"fileFormat": "Parquet", "files": files, **more}))
    return str(folder / "manifest.json")


def test_parts_on_a_disk_are_not_copied(tmp_path: Path) -> None:
    source = write(tmp_path, part(tmp_path, one(size=[7])), part(tmp_path, one(key=["b.jpg"])))
    corpus = read_source(source, scratch=tmp_path / "scratch")
    assert rows_of(corpus)["uri"].to_pylist() == ["s3://b/a.jpg", "s3://b/b.jpg"]
    assert corpus.distinct and not corpus.full_listing
    assert list((tmp_path / "scratch").rglob("*.parquet")) == []


@pytest.mark.parametrize("etag", ["e", '"e"'])
def test_parts_in_a_store_are_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, etag: str) -> None:
    base = f"memory://{tmp_path.name}-{len(etag)}"
    storage = open_storage(base)
    local = part(tmp_path, one(e_tag=[etag]))
    write(tmp_path, local, local)
    storage.put(f"{base}/manifest.json", (tmp_path / "manifest.json").read_bytes())
    storage.put(join_uri(base, Path(local.path).name), Path(local.path).read_bytes())
    fetched = []
    get = type(storage).get
    monkeypatch.setattr(type(storage), "get", lambda self, uri: (fetched.append(uri), get(self, uri))[1])
    corpus = read_source(f"{base}/manifest.json", scratch=tmp_path / "scratch")
    assert rows_of(corpus).to_pydict() == {
        "uri": ["s3://b/a.jpg"] * 2, "etag": ["e"] * 2, "size_bytes": [None] * 2, "modified": [None] * 2,
    }  # fmt: skip
    assert not corpus.distinct
    assert len(fetched) == 3
    copies = len(list((tmp_path / "scratch").rglob("inventory/*.parquet")))
    assert copies == (2 if etag == "e" else 0)  # of no use beside a file of their rows


def test_parts_without_a_digest_go_row_by_row(tmp_path: Path) -> None:
    """DuckDB believes statistics, and of a damaged part they may lie: found by fuzzing."""
    whole = part(tmp_path, one(is_delete_marker=pa.array([None], pa.bool_())))
    assert query_parts([whole], where="true") is not None
    assert query_parts([whole, whole._replace(md5=None)], where="true") is None
    assert [len(batch) for batch in read_parts([whole._replace(md5=None)])] == [1]


@pytest.mark.parametrize("key", ["9" * 400, "nowhere/x.parquet", "manifest.json/x.parquet", ".", "loop"])
@pytest.mark.parametrize("md5", [None, "0" * 32])
def test_a_part_that_no_file_can_be_is_a_sentence(tmp_path: Path, key: str, md5: str | None) -> None:
    """Found by fuzzing: a name of four hundred characters."""
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    source = write(tmp_path)
    files = [{"key": key, "MD5checksum": md5}]
    (tmp_path / "manifest.json").write_text(json.dumps({"fileFormat": "Parquet", "files": files}))
    with pytest.raises(UsageError, match="cannot be read"):
        read_source(source, scratch=tmp_path / "scratch")


def test_a_column_whose_name_is_no_unicode_is_a_sentence(tmp_path: Path) -> None:
    """Found by fuzzing."""
    pq.write_table(pa.table({"bucket": ["b"], "key": ["a.jpg"], "QQQQ": [1]}), tmp_path / "x.parquet")
    (tmp_path / "x.parquet").write_bytes((tmp_path / "x.parquet").read_bytes().replace(b"QQQQ", b"Q\xe1QQ"))
    source = write(tmp_path, Part("", str(tmp_path / "x.parquet"), None))
    with pytest.raises(UsageError, match="cannot be read"):
        read_source(source, scratch=tmp_path / "scratch")


def test_a_key_with_half_a_character_is_a_sentence(tmp_path: Path) -> None:
    """Found by fuzzing."""
    text = json.dumps({"fileFormat": "Parquet", "files": [{"key": "HALF.parquet"}]}).replace("HALF", r"\ud800")
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UsageError, match="no manifest of an S3 Inventory"):
        read_source(str(tmp_path / "manifest.json"), scratch=tmp_path / "scratch")


def spoil(name: str) -> Callable[[Path], None]:
    """Changes bytes in the pages of the last group of a column."""

    def change(path: Path) -> None:
        metadata = pq.read_metadata(path)
        column = metadata.row_group(metadata.num_row_groups - 1).column(metadata.schema.names.index(name))
        at = column.data_page_offset if column.dictionary_page_offset is None else column.dictionary_page_offset
        data = bytearray(path.read_bytes())
        data[at : at + column.total_compressed_size] = b"\xff" * column.total_compressed_size
        path.write_bytes(data)

    return change


@pytest.mark.parametrize("name", ["bucket", "key", "e_tag", "size", "last_modified_date", "is_latest"])
def test_damage_in_any_column_that_counts_is_found_at_once_and_named(tmp_path: Path, name: str) -> None:
    table = pa.table(
        {"bucket": ["b"] * 40, "key": [f"{i}.jpg" for i in range(40)], "e_tag": [f"e{i}" for i in range(40)],
         "size": range(40), "is_latest": [True] * 40, "last_modified_date": pa.array(range(40), MS)}
    )  # fmt: skip
    good, bad = part(tmp_path, table), part(tmp_path, table)
    spoil(name)(Path(bad.path))
    assert query_parts([good, bad._replace(md5=None)], where="true") is None
    source = write(tmp_path, good, bad._replace(md5=None))
    with pytest.raises(UsageError, match=Path(bad.path).name):
        read_source(source, scratch=tmp_path / "scratch")
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_digest_is_checked_before_anything_is_believed(tmp_path: Path) -> None:
    good, other = part(tmp_path, one()), part(tmp_path, one(key=["b.jpg"]))
    source = write(tmp_path, good, other._replace(md5="F" * 32))
    with pytest.raises(UsageError, match=f"{Path(other.path).name}.*its manifest says F{{32}}: fetch both again"):
        read_source(source, scratch=tmp_path / "scratch")


def test_an_inventory_without_images_says_so(tmp_path: Path) -> None:
    source = write(tmp_path, part(tmp_path, one(key=["a.txt"])))
    with pytest.raises(UsageError, match="names no images"):
        read_source(source, scratch=tmp_path / "scratch")
    assert list((tmp_path / "scratch").iterdir()) == []


def test_the_fast_way_is_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An inventory as Amazon writes it, whatever of it is left out."""
    monkeypatch.setattr(manifest_module, "read_parts", lambda parts: (1 / 0 for _ in parts))
    whole = one(
        version_id=["v"], is_latest=[True], is_delete_marker=[False], size=[1], last_modified_date=pa.array([1], MS),
        storage_class=["STANDARD"], is_multipart_uploaded=[False],
    )  # fmt: skip
    for name in [None, *whole.column_names[3:]]:
        table = whole if name is None else whole.drop_columns(name)
        folder = tmp_path / str(name)
        folder.mkdir()
        assert read_source(write(folder, part(folder, table)), scratch=tmp_path / "scratch").rows == 1
    storage = open_storage(f"file://{folder}")
    assert len(find_parts(f"file://{folder}/manifest.json", storage, folder=tmp_path)) == 1
