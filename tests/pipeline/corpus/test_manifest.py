from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from awkward_corpus import AWKWARD_NAMES, make_awkward_corpus

from pipeline.corpus import manifest as manifest_module
from pipeline.corpus.entries import _read_csv, read_entries
from pipeline.corpus.etags import EtagFiller
from pipeline.corpus.manifest import MANIFEST_SCHEMA, Corpus, read_source
from pipeline.errors import StorageError, UsageError
from pipeline.storage import ObjectInfo, join_uri, open_storage

Read = Callable[..., Corpus]


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def read(tmp_path: Path) -> Read:
    return lambda source, **options: read_source(str(source), scratch=tmp_path / "scratch", **options)


def rows_of(corpus: Corpus) -> list[dict[str, object]]:
    with duckdb.connect() as connection:
        connection.execute("SET TimeZone = 'UTC'")
        table = connection.sql(f"SELECT * FROM {corpus.sql}").to_arrow_table()
    assert table.schema.equals(MANIFEST_SCHEMA)
    assert table.num_rows == corpus.rows
    return table.to_pylist()


def uris_of(corpus: Corpus) -> list[str]:
    return [str(row["uri"]) for row in rows_of(corpus)]


def names_of(corpus: Corpus, folder: Path | str) -> set[str]:
    prefix = folder if isinstance(folder, str) else f"file://{folder}"
    return {uri.removeprefix(prefix + "/") for uri in uris_of(corpus)}


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * len(name))
    return folder


def complaint(call: Callable[[], object]) -> str:
    with pytest.raises(UsageError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and text
    return text


# -- folders, files, globs


def test_a_folder_gives_every_awkward_name_raw(read: Read, tmp_path: Path) -> None:
    folder = tmp_path / "a corpus [1] 100%"
    expected = make_awkward_corpus(folder)
    corpus = read(folder)
    assert names_of(corpus, folder) == set(expected)
    assert corpus.full_listing and corpus.source == f"file://{folder}"
    for row in rows_of(corpus):
        status = Path(str(row["uri"]).removeprefix("file://")).stat()
        assert row["etag"] == f"{status.st_size}-{status.st_mtime_ns}"
        assert row["size_bytes"] == status.st_size
        assert abs(row["modified"].timestamp() - status.st_mtime) < 1e-3  # type: ignore[attr-defined]


def test_listing_goes_by_suffix_whatever_the_case_and_skips_dot_names(read: Read, tmp_path: Path) -> None:
    folder = touch(
        tmp_path / ".photos",
        *("a.jpg", "b.JPEG", "c.Png", "d.tif", "e.webp", "sub/f.gif", "sub/deep/g.bmp", "h.tiff"),
        *("notes.txt", "i.jpg.txt", "jpg", ".hidden.jpg", ".trash/j.jpg", "sub/.cache/k.png", "xjpg", "l.jpg\n"),
    )
    found = names_of(read(folder), folder)
    assert found == {"a.jpg", "b.JPEG", "c.Png", "d.tif", "e.webp", "sub/f.gif", "sub/deep/g.bmp", "h.tiff"}
    assert names_of(read(folder, suffixes=(".TXT",)), folder) == {"notes.txt", "i.jpg.txt"}


def test_the_same_folder_however_it_is_written(read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "photos", "a.jpg", "sub/b.jpg")
    monkeypatch.chdir(tmp_path)
    ways = ["photos", "./photos/", f"{tmp_path}/photos", f"file://{tmp_path}/photos/", f"file://{tmp_path}/x/../photos"]
    found = {(tuple(sorted(uris_of(read(way)))), read(way).source) for way in ways}
    assert found == {
        ((f"file://{tmp_path}/photos/a.jpg", f"file://{tmp_path}/photos/sub/b.jpg"), f"file://{tmp_path}/photos")
    }


def test_one_file_has_a_row_whatever_its_name(read: Read, tmp_path: Path) -> None:
    folder = touch(tmp_path / "photos", "picture.xyz", "a.jpg")
    corpus = read(folder / "picture.xyz")
    assert names_of(corpus, folder) == {"picture.xyz"} and not corpus.full_listing
    assert rows_of(corpus)[0]["size_bytes"] == len("picture.xyz")


GLOBS = {
    "*.jpg": {"a.jpg", "b.jpg"},
    "?.jpg": {"a.jpg", "b.jpg"},
    "[ac].jpg": {"a.jpg"},
    "[!a].jpg": {"b.jpg"},
    "*": {"a.jpg", "b.jpg", "c.png"},
    "**": {"a.jpg", "b.jpg", "c.png", "x/d.jpg", "x/y/e.jpg", "z/f.jpg"},
    "**/*.jpg": {"a.jpg", "b.jpg", "x/d.jpg", "x/y/e.jpg", "z/f.jpg"},
    "*/*.jpg": {"x/d.jpg", "z/f.jpg"},
    "[xz]/*": {"x/d.jpg", "z/f.jpg"},
    "x/**/*.jpg": {"x/d.jpg", "x/y/e.jpg"},
    "*/**/e.*": {"x/y/e.jpg"},
    "*.txt": {"notes.txt"},
    ".hid*/*.jpg": {".hidden/g.jpg"},
}


@pytest.mark.parametrize("pattern", GLOBS)
@pytest.mark.parametrize("where", ["disk", "memory"])
def test_globs(read: Read, tmp_path: Path, pattern: str, where: str) -> None:
    names = ("a.jpg", "b.jpg", "c.png", "notes.txt", "x/d.jpg", "x/y/e.jpg", "z/f.jpg", ".hidden/g.jpg")
    if where == "disk":
        base = f"file://{touch(tmp_path / 'photos', *names)}"
    else:
        base = f"memory://{tmp_path.name}-{abs(hash(pattern))}"
        storage = open_storage(base)
        for name in names:
            storage.put(join_uri(base, name), b"x")
    corpus = read(f"{base}/{pattern}")
    assert names_of(corpus, base) == GLOBS[pattern]
    assert corpus.full_listing


def test_what_exists_literally_wins_over_a_glob(read: Read, tmp_path: Path) -> None:
    folder = touch(tmp_path / "a[1]", "b*.jpg", "bc.jpg")
    assert names_of(read(folder), folder) == {"b*.jpg", "bc.jpg"}
    assert names_of(read(folder / "b*.jpg"), folder) == {"b*.jpg"}


# -- manifests of URIs


ENTRIES = ["sub/b.jpg", "./a.jpg", "../outside.jpg", "odd name#1?.xyz", "sub/b.jpg", "100%25.jpg"]


def manifest_folder(tmp_path: Path) -> tuple[Path, list[str]]:
    folder = touch(tmp_path / "m", "sub/b.jpg", "a.jpg", "odd name#1?.xyz", "100%25.jpg", "not listed.jpg")
    touch(tmp_path, "outside.jpg")
    wanted = [
        f"file://{path}"
        for path in (
            *(folder / "sub/b.jpg", folder / "a.jpg", tmp_path / "outside.jpg", folder / "odd name#1?.xyz"),
            *(folder / "sub/b.jpg", folder / "100%25.jpg"),
        )
    ]
    return folder, wanted


def write_manifest(path: Path, entries: list[str], column: str = "uri") -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"other": range(len(entries)), column: entries}), path)
    elif path.suffix == ".csv":
        quoted = [entry.replace('"', '""') for entry in entries]
        path.write_text(f"other,{column}\n" + "".join(f'{n},"{entry}"\n' for n, entry in enumerate(quoted)))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({column: entry, "other": [1, {}]}) + "\n" for entry in entries))
    else:
        path.write_text("# a comment\n\n" + "".join(entry + "\n" for entry in entries))
    return path


@pytest.mark.parametrize("name", ["m.parquet", "m.csv", "m.jsonl", "m.txt", "M.CSV"])
def test_manifests_keep_order_duplicates_and_raw_names(read: Read, tmp_path: Path, name: str) -> None:
    folder, wanted = manifest_folder(tmp_path)
    path = write_manifest(folder / name.lower(), ENTRIES).rename(folder / name)
    corpus = read(path)
    assert uris_of(corpus) == wanted
    assert not corpus.full_listing
    for row in rows_of(corpus):
        status = Path(str(row["uri"]).removeprefix("file://")).stat()
        assert (row["etag"], row["size_bytes"]) == (f"{status.st_size}-{status.st_mtime_ns}", status.st_size)


def test_every_awkward_name_survives_every_manifest(read: Read, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    make_awkward_corpus(folder)
    names = [name for name in AWKWARD_NAMES if not name.startswith(("# ", ".", "/"))]
    for suffix in ("parquet", "csv", "jsonl", "txt"):
        path = write_manifest(folder / f"list.{suffix}", names)
        assert uris_of(read(path)) == [f"file://{folder}/{name}" for name in names], suffix
        assert all(row["etag"] for row in rows_of(read(path))), suffix


@pytest.mark.parametrize("column", ["uri", "image_uri", "path", "url"])
@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl"])
def test_names_of_the_uri_column(read: Read, tmp_path: Path, column: str, suffix: str) -> None:
    folder, wanted = manifest_folder(tmp_path)
    assert uris_of(read(write_manifest(folder / f"m.{suffix}", ENTRIES, column))) == wanted


def test_jsonl_of_plain_strings_and_absolute_entries(read: Read, tmp_path: Path) -> None:
    folder, wanted = manifest_folder(tmp_path)
    entries = [wanted[0], wanted[1].removeprefix("file://"), "file:" + wanted[3].removeprefix("file://")]
    (folder / "m.jsonl").write_text("\n".join(json.dumps(entry) for entry in entries))
    assert uris_of(read(folder / "m.jsonl")) == [wanted[0], wanted[1], wanted[3]]


def test_a_date_without_a_time_is_its_midnight(read: Read, tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"uri": "s3://b/a.jpg", "etag": "e", "modified": "2026-01-02"}')
    assert rows_of(read(tmp_path / "m.jsonl"))[0]["modified"] == datetime(2026, 1, 2, tzinfo=UTC)


def test_a_csv_that_was_cut_off_inside_a_value_is_refused(read: Read, tmp_path: Path) -> None:
    """Read for whole, its last line was an image of another name."""
    path = tmp_path / "m.csv"
    for rest in ("", "\ns3://b/e.jpg,e" * 20_000):
        path.write_text(f'uri,etag\n"s3://b/a, b.jpg",e\n"s3://b/c, d{rest}')
        with pytest.raises(UsageError, match="a quoted value in it does not end: it was cut off"):
            read(path)
    path.write_text('uri,etag\n"s3://b/a, b.jpg",e\ns3://b/5" disk.jpg,e\n')
    assert uris_of(read(path)) == ["s3://b/a, b.jpg", 's3://b/5" disk.jpg']


@pytest.mark.parametrize("uri", ["generic://a/b.png", "zip://0.png::file:///nowhere/x.zip", "nosuch://a/b.png"])
def test_an_image_that_no_store_can_have_stays_in_the_list(read: Read, tmp_path: Path, uri: str) -> None:
    (tmp_path / "m.jsonl").write_text(f'{{"uri": "{uri}"}}\n{{"uri": "s3://b/b.jpg", "etag": "e"}}\n')
    assert [(row["uri"], row["etag"]) for row in rows_of(read(tmp_path / "m.jsonl"))] == [
        (uri, ""),
        ("s3://b/b.jpg", "e"),
    ]


def test_repositories_of_one_owner_are_two(read: Read, tmp_path: Path) -> None:
    uris = [f"github://owner:{name}@main/a.png" for name in ("first", "second")]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps({"uri": uri, "etag": "e"}) + "\n" for uri in uris))
    assert uris_of(read(tmp_path / "m.jsonl")) == uris


def test_a_password_with_a_slash_is_refused_and_not_shown(read: Read, tmp_path: Path) -> None:
    (tmp_path / "m.txt").write_text("https://h/a@b.jpg\nhttp://me:ab/SECRET@h/2.png\n")
    with pytest.raises(UsageError, match=r"credentials in row 2, before the host of 'http://h/2\.png'") as refused:
        read(tmp_path / "m.txt")
    assert "SECRET" not in str(refused.value)


def test_text_lines_keep_hashes_and_spaces(read: Read, tmp_path: Path) -> None:
    folder = touch(tmp_path / "m", "#1.jpg", " a .jpg ", "# no.jpg")
    (folder / "m.txt").write_bytes("\ufeff#1.jpg\r\n   \n# no.jpg\n a .jpg \n".encode())
    assert uris_of(read(folder / "m.txt")) == [f"file://{folder}/#1.jpg", f"file://{folder}/ a .jpg "]


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl"])
def test_etags_sizes_and_times_of_a_manifest_are_taken_without_a_head(
    read: Read, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EtagFiller, "_info", lambda *_: pytest.fail("asked the store"))
    rows = [
        {"uri": "s3://nowhere/a.jpg", "etag": '"0123"', "size_bytes": 12, "modified": "2026-01-02T03:04:05Z"},
        {"uri": "s3://nowhere/b.jpg", "etag": 'W/"x-2"', "size_bytes": None, "modified": None},
    ]
    path = tmp_path / f"m.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix == "csv":
        path.write_text('uri,etag,size_bytes,modified\ns3://nowhere/a.jpg,"""0123""",12,2026-01-02T03:04:05Z\n')
        path.write_text(path.read_text() + 's3://nowhere/b.jpg,"W/""x-2""",,\n')
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert rows_of(read(path)) == [
        {
            "uri": "s3://nowhere/a.jpg",
            "etag": "0123",
            "size_bytes": 12,
            "modified": datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        },
        {"uri": "s3://nowhere/b.jpg", "etag": "x-2", "size_bytes": None, "modified": None},
    ]


@pytest.mark.parametrize("column", ["uri", "etag"])
def test_a_text_in_parquet_that_is_no_text_is_told(read: Read, tmp_path: Path, column: str) -> None:
    """Found by fuzzing: Parquet's texts may hold any bytes, and Arrow does not look."""
    wild = pa.Array.from_buffers(pa.string(), 1, pa.array([b"s3://b/\xff.jpg"], pa.binary()).buffers())
    good = pa.array(["s3://b/a.jpg"])
    pq.write_table(pa.table({"uri": good, "etag": good} | {column: wild}), tmp_path / "list.parquet")
    with pytest.raises(UsageError, match=r"list\.parquet.* row 1: .*UTF8"):
        read(tmp_path / "list.parquet")


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_two_columns_of_one_name_are_told(read: Read, tmp_path: Path, suffix: str) -> None:
    """Found by fuzzing."""
    path = tmp_path / f"list.{suffix}"
    one = pa.array(["s3://b/a.jpg"])
    table = pa.Table.from_arrays([one, one, one], ["uri", "etag", "etag"])
    if suffix == "csv":
        pyarrow.csv.write_csv(table, path)
    else:
        pq.write_table(table, path)
    with pytest.raises(UsageError, match=r"list\..*two of its columns have the same name"):
        read(path)


def test_parquet_times_without_a_zone_are_utc(read: Read, tmp_path: Path) -> None:
    moment = pa.array([1_700_000_000_123], pa.timestamp("ms"))
    pq.write_table(pa.table({"uri": ["s3://nowhere/a.jpg"], "etag": ["e"], "modified": moment}), tmp_path / "m.parquet")
    assert rows_of(read(tmp_path / "m.parquet"))[0]["modified"] == datetime.fromtimestamp(1_700_000_000.123, UTC)


def test_a_missing_image_has_a_row_without_etag(read: Read, tmp_path: Path) -> None:
    folder = touch(tmp_path / "m", "a.jpg")
    (folder / "m.txt").write_text("gone.jpg\na.jpg\nhttps-like/name.jpg\n")
    assert [(row["etag"] != "", row["size_bytes"]) for row in rows_of(read(folder / "m.txt"))] == [
        (False, None),
        (True, len("a.jpg")),
        (False, None),
    ]


@pytest.mark.parametrize("entries", [1, 3])
def test_what_no_store_can_have_gets_its_row(read: Read, tmp_path: Path, entries: int) -> None:
    folder = touch(tmp_path / "m", "a.jpg")
    odd = [
        "foo://x",
        "foo://y/b.jpg",
        "http:///c.jpg",
        "http://h:99999/d.jpg",
        "s3:///e.jpg",
        "s3://b",
        "file://host/f.jpg",
    ]
    for uri in odd:
        (folder / "m.txt").write_text("\n".join([uri] * entries + ["a.jpg"]))
        rows = rows_of(read(folder / "m.txt"))
        assert [(row["uri"], row["etag"], row["size_bytes"]) for row in rows[:-1]] == [(uri, "", None)] * entries
        assert rows[-1]["size_bytes"] == len("a.jpg")
        (folder / "m.txt").write_text(uri)
        assert uris_of(read(folder / "m.txt")) == [uri]


def test_names_that_are_not_utf8(read: Read, tmp_path: Path) -> None:
    names = [b"caf\xe9/a.jpg", b"caf\xe8/a.jpg", b"caf\xe9/\xff[1].jpg", "caf\ufffd/a.jpg".encode()]
    for name in names:
        path = os.path.join(os.fsencode(tmp_path), b"photos", name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(name)
    storage = open_storage(f"file://{tmp_path}")

    def contents(source: str) -> set[bytes]:
        corpus = read(source)
        assert all(row["size_bytes"] for row in rows_of(corpus))
        return {storage.get(uri).data for uri in uris_of(corpus)}

    photos = f"{tmp_path}/photos"
    assert contents(photos) == set(names)
    assert contents(f"{photos}/caf?/a.jpg") == {names[0], names[1], names[3]}
    e_acute = os.fsdecode(b"caf\xe9")
    assert contents(f"{photos}/{e_acute}") == contents(f"{photos}/{e_acute}/*") == {names[0], names[2]}
    assert contents(f"{photos}/{e_acute}/a.jpg") == {names[0]}
    assert contents(f"file://{photos}/{e_acute}/a.jpg") == {names[0]}
    assert contents(uris_of(read(f"{photos}/{e_acute}/a.jpg"))[0]) == {names[0]}
    # A table's own URIs, as a manifest that lies in such a folder itself.
    uris = uris_of(read(photos))
    manifest = f"{photos}/{e_acute}/list.txt"
    Path(manifest).write_text("\n".join([*uris, "a.jpg"]))
    corpus = read(manifest)
    assert len(uris_of(corpus)) == 5 and contents(manifest) == set(names)


def test_a_store_that_fails_while_it_is_asked_fails_the_reading(
    read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = touch(tmp_path / "m", "a.jpg")
    (folder / "m.txt").write_text("a.jpg\n")

    def head(*_: object) -> ObjectInfo:
        raise StorageError("the network is down", kind="fetch_failed")

    read(folder / "m.txt")
    monkeypatch.setattr("pipeline.storage.disk.DiskStorage.head", head)
    with pytest.raises(StorageError):
        read(folder / "m.txt")


def test_a_manifest_longer_than_one_batch_streams_and_keeps_order(
    read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest_module, "_ROWS_PER_GROUP", 70_000)
    uris = [f"s3://bucket/{n:07d}.jpg" for n in range(230_000)]
    table = pa.table({"uri": uris, "etag": ["e"] * len(uris)})
    pq.write_table(table, tmp_path / "m.parquet")
    pyarrow.csv.write_csv(table, tmp_path / "m.csv")
    for name in ("m.parquet", "m.csv"):
        corpus = read(tmp_path / name)
        assert uris_of(corpus) == uris
        (path,) = (tmp_path / "scratch").glob("*/corpus.parquet")
        assert pq.ParquetFile(path).num_row_groups >= 2
        shutil.rmtree(path.parent)


def test_a_csv_is_read_by_one_reader_alone() -> None:
    """Arrow's reads ahead, in a thread of its own: one that was only asked for the names of the columns took a block
    away from the one that came after it."""

    class Slow(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell():
                time.sleep(0.02)
            return super().read(size)

    uris = [f"s3://bucket/{n:07d}.jpg" for n in range(150_000)]
    for _ in range(3):
        stream = pa.PythonFile(Slow(b"uri,etag\n" + b"".join(b"%b,e\n" % uri.encode() for uri in uris)), "r")
        assert [uri for batch in _read_csv(stream) for uri in batch["uri"].to_pylist()] == uris


# -- what is refused


def test_sources_that_cannot_be_used(read: Read, tmp_path: Path) -> None:
    touch(tmp_path / "no images", "notes.txt", ".hidden.jpg")
    (tmp_path / "empty").mkdir()
    for name in ("empty.txt", "empty.csv", "empty.jsonl", "corrupt.parquet"):
        (tmp_path / name).write_bytes(b"not parquet" if "corrupt" in name else b"")
    (tmp_path / "header.csv").write_text("uri,etag\n")
    (tmp_path / "columns.csv").write_text("name,size\na.jpg,1\n")
    (tmp_path / "ragged.csv").write_text("uri,etag\na.jpg,1\nb.jpg,2,3\n")
    (tmp_path / "broken.jsonl").write_text('{"uri": "a.jpg"}\n{"uri": \n')
    (tmp_path / "late.jsonl").write_text('{"uri": "a.jpg"}\n{"uri": "b.jpg"}\n\n{"uri": "c.jpg"\n{"uri": "d.jpg"}\n')
    (tmp_path / "listed.jsonl").write_text('{"uri": "a.jpg"}\n["b.jpg"]\n')
    (tmp_path / "sized.jsonl").write_text(
        '{"uri": "a.jpg", "size_bytes": 3}\n{"uri": "b.jpg", "size_bytes": "large"}\n'
    )
    (tmp_path / "unquoted.jsonl").write_text('"a.jpg"\n"b.jpg"\nc.jpg\n')
    (tmp_path / "numbers.jsonl").write_text("1\n2\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x01\n")
    (tmp_path / "keyless.jsonl").write_text('{"name": "a.jpg"}\n')
    (tmp_path / "some.json").write_text('["a.jpg"]')
    pq.write_table(pa.table({"name": ["a.jpg"]}), tmp_path / "columns.parquet")
    pq.write_table(pa.table({"uri": ["s3://b/a.jpg", None], "etag": ["e", "f"]}), tmp_path / "null.parquet")
    pq.write_table(pa.table({"uri": pa.array([], pa.string())}), tmp_path / "none.parquet")
    expected = {
        "missing": "does not exist",
        "missing/*.jpg": "does not exist",
        "no images/*.jpg": "no images match",
        "no images": "no images in",
        "empty": "no images in",
        "empty.txt": "names no images",
        "empty.jsonl": "names no images",
        "empty.csv": "empty.csv",
        "header.csv": "names no images",
        "none.parquet": "names no images",
        "corrupt.parquet": "cannot be read",
        "columns.csv": "no column named uri",
        "columns.parquet": "no column named uri",
        "keyless.jsonl": "no URI in row 1",
        "ragged.csv": "cannot be read",
        "broken.jsonl": "line 2 is no JSON: Expecting value at character",
        "late.jsonl": "line 4 is no JSON",
        "listed.jsonl": "line 2 is no object",
        "sized.jsonl": "line 2 has 'large' for size_bytes",
        "numbers.jsonl": "line 1 is no text in quotes",
        "unquoted.jsonl": "line 3 is no JSON",
        "binary.txt": "cannot be read",
        "null.parquet": "no URI in row 2",
        "some.json": "no manifest of an S3 Inventory",
    }
    for name, words in expected.items():
        assert words in complaint(lambda name=name: read(tmp_path / name)), name
    assert "nosuchscheme" in complaint(lambda: read("nosuchscheme://a/b.jpg"))
    assert "SOURCE is empty" in complaint(lambda: read(" "))
    assert "name one bucket" in complaint(lambda: read("memory://buck*/a.jpg"))
    for source in ("http:///", "https://", "http:///a.jpg"):
        assert "names no host" in complaint(lambda source=source: read(source))
    assert "names no file" in complaint(lambda: read("http://127.0.0.1/"))
    assert "no web address" in complaint(lambda: read("https://127.0.0.1:99999/a.jpg"))
    assert "'nobody'" in complaint(lambda: read("s3://bucket/photos", profile="nobody"))
    assert "'nobody'" in complaint(lambda: read(tmp_path / "no images", profile="nobody"))
    assert list((tmp_path / "scratch").iterdir()) == []


# -- other stores


def test_memory_store(read: Read, tmp_path: Path) -> None:
    base = f"memory://{tmp_path.name}-store"
    storage = open_storage(base)
    for name in ("a.jpg", "sub/b with space#1.png", "c.txt"):
        storage.put(f"{base}/{name}", b"12345")
    storage.put(f"{base}/lists/m.csv", b"path\n../a.jpg\nmissing.jpg\n")
    assert names_of(read(base), base) == {"a.jpg", "sub/b with space#1.png"}
    assert names_of(read(f"{base}/sub/"), base) == {"sub/b with space#1.png"}
    rows = rows_of(read(f"{base}/lists/m.csv"))
    assert [(row["uri"], row["size_bytes"]) for row in rows] == [
        (f"{base}/a.jpg", 5),
        (f"{base}/lists/missing.jpg", None),
    ]
    assert rows[0]["etag"] == storage.head(f"{base}/a.jpg").etag and rows[1]["etag"] == ""
    assert "does not exist" in complaint(lambda: read(f"{base}/nothing"))


def write_inventory(folder: Path, **changes: object) -> dict[str, object]:
    """An inventory whose one part lies at `<folder>/inv/data/1.parquet`; returns the manifest's content."""
    key = "inv/data/1.parquet"
    (folder / "inv/data").mkdir(parents=True)
    columns = {
        "bucket": ["photos"] * 7,
        "key": ["a.jpg", "b%20c#.PNG", "old.jpg", "gone.jpg", "notes.txt", ".hidden/x.jpg", "sub/ü.jpeg"],
        "version_id": ["v"] * 7,
        "is_latest": [True, True, False, True, True, True, None],
        "is_delete_marker": [False, False, False, True, False, False, False],
        "size": pa.array([1, 2, 3, None, 5, 6, 7], pa.int64()),
        "last_modified_date": pa.array([1_700_000_000_000] * 7, pa.timestamp("ms", "UTC")),
        "e_tag": ["aa", '"bb"', "cc", None, "ee", "ff", "gg-2"],
    }
    pq.write_table(pa.table(columns), folder / key)
    return {
        "sourceBucket": "photos",
        "destinationBucket": "arn:aws:s3:::reports",
        "version": "2016-11-30",
        "fileFormat": "Parquet",
        "files": [
            {
                "key": key,
                "size": (folder / key).stat().st_size,
                "MD5checksum": hashlib.md5((folder / key).read_bytes()).hexdigest(),
            }
        ],
        **changes,
    }


INVENTORY = [
    ("s3://photos/a.jpg", "aa", 1),
    ("s3://photos/b%20c#.PNG", "bb", 2),
    ("s3://photos/sub/ü.jpeg", "gg-2", 7),
]


def test_inventory_gives_the_latest_images_with_raw_keys(read: Read, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(write_inventory(tmp_path)))
    corpus = read(tmp_path / "manifest.json")
    rows = rows_of(corpus)
    assert [(row["uri"], row["etag"], row["size_bytes"]) for row in rows] == INVENTORY
    assert rows[0]["modified"] == datetime.fromtimestamp(1_700_000_000, UTC)
    assert not corpus.full_listing


def test_inventories_that_cannot_be_used(read: Read, tmp_path: Path) -> None:
    manifest = write_inventory(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(manifest | {"fileFormat": "CSV"}))
    assert "configure it to write Parquet" in complaint(lambda: read(path))
    path.write_text(json.dumps(manifest | {"files": [{"key": "inv/data/none.parquet"}]}))
    assert "cannot be read" in complaint(lambda: read(path))
    path.write_text(json.dumps(manifest | {"files": [{"key": "inv/data/1.parquet", "MD5checksum": "0" * 32}]}))
    assert "its manifest says 000" in complaint(lambda: read(path))
    (tmp_path / "inv/data/1.parquet").write_bytes(b"PAR1 damaged")
    path.write_text(json.dumps(manifest))
    assert "fetch both again" in complaint(lambda: read(path))
    path.write_text(json.dumps(manifest | {"files": [{"key": "inv/data/1.parquet"}]}))
    assert "cannot be read" in complaint(lambda: read(path))


@pytest.mark.s3
def test_s3_folder_glob_file_manifest_and_inventory(read: Read, tmp_path: Path, s3_bucket: str) -> None:
    storage = open_storage(s3_bucket)
    folder = tmp_path / "photos"
    expected = make_awkward_corpus(folder)
    for name in expected:
        storage.put(f"{s3_bucket}/photos/{name}", (folder / name).read_bytes())
    storage.put(f"{s3_bucket}/photos2/z.jpg", b"z")
    base = f"{s3_bucket}/photos"
    corpus = read(base)
    assert names_of(corpus, base) == set(expected) and corpus.full_listing
    assert all(len(str(row["etag"])) == 32 for row in rows_of(corpus))
    assert names_of(read(s3_bucket), s3_bucket) == {f"photos/{name}" for name in expected} | {"photos2/z.jpg"}
    assert names_of(read(f"{base}/orientation_[12].jpg"), base) == {"orientation_1.jpg", "orientation_2.jpg"}
    assert names_of(read(f"{base}/brackets[1].jpg"), base) == {"brackets[1].jpg"}

    names = [*AWKWARD_NAMES[:6], "missing.jpg"]
    storage.put(f"{base}/list.txt", "\n".join(names).encode())
    rows = rows_of(read(f"{base}/list.txt"))
    assert [row["uri"] for row in rows] == [f"{base}/{name}" for name in names]
    assert [row["etag"] for row in rows] == [
        *(storage.head(f"{base}/{name}").etag for name in names[:-1]),
        "",
    ]

    bucket = s3_bucket.removeprefix("s3://")
    manifest = write_inventory(tmp_path / "report", destinationBucket=f"arn:aws:s3:::{bucket}")
    storage.put(f"{s3_bucket}/inv/data/1.parquet", (tmp_path / "report/inv/data/1.parquet").read_bytes())
    storage.put(f"{s3_bucket}/inv/2026/manifest.json", json.dumps(manifest).encode())
    rows = rows_of(read(f"{s3_bucket}/inv/2026/manifest.json"))
    assert [(row["uri"], row["etag"], row["size_bytes"]) for row in rows] == INVENTORY

    assert "does not exist" in complaint(lambda: read(f"{s3_bucket}/nothing"))
    assert "does not exist" in complaint(lambda: read("s3://no-such-bucket-here/x"))


def test_a_manifest_of_a_place_that_is_not_there_is_a_usage_error(read: Read, tmp_path: Path) -> None:
    names = [f"/nowhere/{i}.jpg" for i in range(1000)]
    (tmp_path / "all.txt").write_text("\n".join(names))
    assert "not one of the 1,000 images" in complaint(lambda: read(tmp_path / "all.txt"))
    (tmp_path / "fewer.txt").write_text("\n".join(names[1:]))  # so few may all have gone
    assert read(tmp_path / "fewer.txt").rows == 999
    touch(tmp_path, "one.jpg")
    (tmp_path / "but-one.txt").write_text("\n".join([*names, "one.jpg"]))
    assert read(tmp_path / "but-one.txt").rows == 1001


def test_one_file_and_a_manifest_over_http(read: Read, tmp_path: Path) -> None:
    folder = touch(tmp_path / "www", "a b.jpg", "c.png")
    handler = partial(QuietHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            base = f"http://127.0.0.1:{server.server_port}"
            (folder / "list.csv").write_text(f"url\n{base}/c.png\nc.png\n{base}/gone.png\n")
            (row,) = rows_of(read(f"{base}/c.png"))
            assert (row["uri"], row["size_bytes"]) == (f"{base}/c.png", len("c.png"))
            rows = rows_of(read(f"{base}/list.csv"))
            assert [row["uri"] for row in rows] == [f"{base}/c.png", f"{base}/c.png", f"{base}/gone.png"]
            assert [row["size_bytes"] for row in rows] == [5, 5, None]
            signed = read(f"{base}/list.csv?X-Amz-Credential=a/b&X-Amz-Signature=secret")
            assert [row["uri"] for row in rows_of(signed)] == [row["uri"] for row in rows]
            assert "does not exist" in complaint(lambda: read(f"{base}/gone.png"))
            (folder / "none.csv").write_text("url\n")
            for name in ("gone.csv", "none.csv"):
                assert "secret" not in complaint(lambda name=name: read(f"{base}/{name}?X-Amz-Signature=secret"))
        finally:
            server.shutdown()


def test_an_at_sign_in_a_name_is_no_credential(tmp_path: Path) -> None:
    names = ["s3://b/a@b.jpg", "gs://b/K:S@c/d.jpg", "file:///me:x@h/a.jpg", "s3://tenant:b/a@c.jpg"]
    path = tmp_path / "list.txt"
    path.write_text("\n".join(names))
    (rows,) = read_entries(f"file://{path}", open_storage(f"file://{path}"))
    assert rows.column("uri").to_pylist() == names
    path.write_text("\n".join([*names, "s3://KEY:SECRET@b/a@b.jpg"]))
    with pytest.raises(UsageError, match=r"row 5, before the bucket of 's3://b/a@b\.jpg'"):
        list(read_entries(f"file://{path}", open_storage(f"file://{path}")))
