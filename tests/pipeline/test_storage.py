"""The same contract for every store, and what is particular to each."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chaos.faultproxy import FaultProxy
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import StorageError, UsageError
from pipeline.storage import (
    LISTING_SCHEMA,
    Storage,
    check_web_address,
    clean_etag,
    duckdb_path,
    file_uri,
    join_uri,
    local_path,
    normalize_uri,
    open_storage,
    recorded_uri,
    uri_name,
    uri_scheme,
    without_secrets,
)
from pipeline.storage.blob import DigestCheck, failure_text
from pipeline.storage.bucket_listing import BucketListing, KeyRange
from pipeline.storage.failures import is_refusal
from pipeline.storage.parallel import Jobs, spread

ODD_NAMES = [
    "a b.jpg",
    "q'uo\"te.jpg",
    "hash#1.jpg",
    "que?ry=1.jpg",
    "percent%20.jpg",
    "percent%.jpg",
    "%2F.jpg",
    "plus+&amp;.jpg",
    "ünï-中😀.jpg",
    "e\u0301.jpg",
    "back\\slash.jpg",
    "star*[x]{y}|<>~`^.jpg",
    "x=1/date=2.jpg",
    "tab\t.jpg",
]
S3_ONLY_NAMES = ["a//b.jpg", "/lead.jpg", "dot/./x.jpg", "dot/../x.jpg", "control\x01.jpg", "delete\x7f.jpg"]


@pytest.fixture(params=["disk", "memory", pytest.param("s3", marks=pytest.mark.s3)])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """A store of each sort, opened for an empty root. The names show that nothing is decoded on the way."""
    if request.param == "disk":
        (tmp_path / "root %20#").mkdir()
        return open_storage(f"file://{tmp_path}/root %20#")
    if request.param == "memory":
        return open_storage(f"memory://test-{uuid.uuid4().hex}/root")
    return open_storage(request.getfixturevalue("s3_bucket") + "/root %20#")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stalls are noticed after a moment."""
    monkeypatch.setenv("MASKMILL_STORAGE_TIMEOUT_S", "0.3")


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "inf"])
def test_a_patience_that_is_no_number_of_seconds_is_wrong_usage(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKMILL_STORAGE_TIMEOUT_S", text)
    with pytest.raises(UsageError, match=f"MASKMILL_STORAGE_TIMEOUT_S is '{text}'"):
        open_storage("s3://bucket/photos")


def listed(storage: Storage, prefix_uri: str, **options: int) -> dict[str, dict]:
    batches = list(storage.list(prefix_uri, **options))
    assert all(batch.schema == LISTING_SCHEMA and batch.num_rows for batch in batches)
    rows = [row for batch in batches for row in batch.to_pylist()]
    by_uri = {row["uri"]: row for row in rows}
    assert len(by_uri) == len(rows)
    return by_uri


def kind_of(call: Callable[[], object]) -> str:
    with pytest.raises(StorageError) as caught:
        call()
    return caught.value.kind


class TestContract:
    def test_what_was_written_is_read(self, storage: Storage) -> None:
        uri = join_uri(storage.root, "folder", "image.jpg")
        data = bytes(range(256)) * 300
        assert storage.put_new(uri, data) is True
        blob = storage.get(uri)
        assert blob.data == data
        assert blob.size_bytes == len(data)
        assert blob.etag and '"' not in blob.etag
        assert blob.modified is not None
        assert abs(blob.modified - datetime.now(UTC)) < timedelta(minutes=5)
        assert storage.head(uri) == (blob.etag, blob.size_bytes, blob.modified)

    def test_an_empty_object(self, storage: Storage) -> None:
        uri = join_uri(storage.root, "empty.jpg")
        assert storage.put_new(uri, b"")
        assert storage.get(uri).data == b""
        assert listed(storage, storage.root)[uri]["size_bytes"] == 0

    def test_put_new_never_replaces(self, storage: Storage) -> None:
        uri = join_uri(storage.root, "part.parquet")
        assert storage.put_new(uri, b"first") is True
        etag = storage.head(uri).etag
        assert storage.put_new(uri, b"second") is False
        assert storage.put_new(uri, b"first") is False
        assert storage.get(uri)[:2] == (b"first", etag)

    def test_put_replaces(self, storage: Storage) -> None:
        uri = join_uri(storage.root, "lease.json")
        storage.put(uri, b"one")
        first = storage.head(uri).etag
        storage.put(uri, b"three")
        assert storage.get(uri).data == b"three"
        assert storage.head(uri).etag != first

    def test_put_stream_replaces_and_leaves_nothing_half_done(self, storage: Storage) -> None:
        uri = join_uri(storage.root, "folder", "whole.json")
        chunks = [bytes([n]) * 3_000_000 for n in range(7)] + [b"", b"end"]
        storage.put_stream(uri, lambda: iter(chunks))
        assert storage.get(uri).data == b"".join(chunks)

        def broken() -> Iterator[bytes]:
            yield from chunks
            raise StorageError("the source is gone", kind="missing")

        for name in (uri, uri + "-new"):
            with pytest.raises(StorageError, match="the source is gone"):
                storage.put_stream(name, broken)
        assert storage.get(uri).data == b"".join(chunks)
        storage.put_stream(uri, lambda: [])
        assert storage.get(uri).data == b""
        assert set(listed(storage, storage.root)) == {uri}

    def test_put_new_has_one_winner(self, storage: Storage) -> None:
        for n in range(5):
            uri = join_uri(storage.root, f"part-{n}.parquet")
            barrier = threading.Barrier(8)

            def create(worker: int, uri: str = uri, barrier: threading.Barrier = barrier) -> bool:
                barrier.wait()
                return storage.put_new(uri, b"%d" % worker * 1000)

            with ThreadPoolExecutor(8) as pool:
                won = list(pool.map(create, range(8)))
            assert sum(won) == 1
            assert storage.get(uri).data == b"%d" % won.index(True) * 1000

    def test_replace_what_is_still_there(self, storage: Storage) -> None:
        uri = join_uri(storage.root, "folder", "x=1", "part.bin")
        storage.put_new(uri, b"one")
        first = storage.get(uri).etag
        assert storage.replace(uri, b"two two", etag=first) is True
        assert storage.get(uri).data == b"two two"
        assert storage.replace(uri, b"three", etag=first) is False
        assert storage.get(uri).data == b"two two"
        assert storage.replace(uri, b"three", etag=storage.get(uri).etag) is True
        storage.delete(uri)
        assert storage.replace(uri, b"four", etag=first) is False
        assert not storage.exists(uri)
        assert list(listed(storage, storage.root)) == []

    def test_delete(self, storage: Storage) -> None:
        uri = join_uri(storage.root, "x")
        storage.put(uri, b"x")
        assert storage.exists(uri)
        storage.delete(uri)
        assert not storage.exists(uri)
        storage.delete(uri)
        assert storage.put_new(uri, b"again")

    def test_missing(self, storage: Storage) -> None:
        storage.put(join_uri(storage.root, "folder", "x"), b"x")
        for name in ("nothing", "folder", "folder/x/y"):
            uri = join_uri(storage.root, name)
            assert kind_of(lambda uri=uri: storage.get(uri)) == "missing"
            assert kind_of(lambda uri=uri: storage.head(uri)) == "missing"
            assert not storage.exists(uri)

    def test_messages_name_the_uri(self, storage: Storage) -> None:
        uri = join_uri(storage.root, "no thing")
        with pytest.raises(StorageError, match="could not read") as caught:
            storage.get(uri)
        assert repr(uri) in str(caught.value)
        assert len(str(caught.value)) < len(uri) + 200

    def test_odd_names_stay_as_they_are(self, storage: Storage) -> None:
        uris = [f"{storage.root}/{name}" for name in ODD_NAMES]
        for uri in uris:
            assert storage.put_new(uri, uri.encode()), uri
            assert not storage.put_new(uri, b"other"), uri
            assert storage.get(uri).data == uri.encode(), uri
        rows = listed(storage, storage.root)
        assert set(rows) == set(uris)
        for uri in uris:
            assert rows[uri]["etag"] == storage.head(uri).etag == storage.get(uri).etag, uri
            storage.delete(uri)
        assert listed(storage, storage.root) == {}

    def test_listing(self, storage: Storage) -> None:
        names = ["a.jpg", "deep/er/b.jpg", "deep/c.jpg", "other/d.jpg", "deep2/e.jpg"]
        for name in names:
            storage.put(join_uri(storage.root, name), name.encode())
        rows = listed(storage, storage.root)
        assert set(rows) == {join_uri(storage.root, name) for name in names}
        for uri, row in rows.items():
            info = storage.head(uri)
            assert (row["etag"], row["size_bytes"], row["modified"]) == tuple(info)
        assert listed(storage, storage.root + "/") == rows
        assert listed(storage, storage.root, parallel=1) == rows
        inside = {join_uri(storage.root, name) for name in ("deep/er/b.jpg", "deep/c.jpg")}
        assert set(listed(storage, join_uri(storage.root, "deep"))) == inside
        assert set(listed(storage, join_uri(storage.root, "deep") + "/")) == inside

    def test_works_after_pickling(self, storage: Storage) -> None:
        uri = join_uri(storage.root, "x")
        storage.put(uri, b"x")  # the client exists by now
        text = pickle.dumps(storage)
        assert b"testtest" not in text
        copy = pickle.loads(text)
        assert copy.root == storage.root
        assert copy.get(uri).data == b"x"

    def test_check_create_only_leaves_nothing(self, storage: Storage) -> None:
        assert storage.check_create_only() is True
        assert storage.create_only_is_atomic
        assert listed(storage, storage.root) == {}

    def test_another_scheme_is_refused(self, storage: Storage) -> None:
        for call in (storage.get, storage.head, storage.delete, lambda uri: storage.put(uri, b"")):
            with pytest.raises(UsageError):
                call("ftp://host/x")

    def test_threads_share_one_store(self, storage: Storage) -> None:
        uris = [join_uri(storage.root, f"{n}.jpg") for n in range(64)]
        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(lambda uri: storage.put_new(uri, uri.encode()), uris))
            assert [blob.data for blob in pool.map(storage.get, uris)] == [uri.encode() for uri in uris]


class TestUris:
    def test_paths_become_absolute(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", "/home/someone")
        assert normalize_uri("./a b%20#") == f"file://{tmp_path}/a b%20#"
        assert normalize_uri("/x/../y/") == "file:///y"
        assert normalize_uri("~/x") == "file:///home/someone/x"
        assert normalize_uri("file:/x") == "file:///x"

    @pytest.mark.parametrize(
        "uri", ["s3://b/k%20 #?", "s3://b//k/", "file:///a b", "https://h/x?y=%2F", "abfs://c@a.b/x"]
    )
    def test_uris_stay(self, uri: str) -> None:
        assert normalize_uri(uri) == uri

    @pytest.mark.parametrize("text", ["", "file://relative/x"])
    def test_nonsense_is_refused(self, text: str) -> None:
        with pytest.raises(UsageError):
            normalize_uri(text)

    def test_parts(self) -> None:
        assert uri_scheme("S3://b/k") == "s3"
        assert uri_name("s3://b/a/c d.jpg") == "c d.jpg"
        assert uri_name("s3://b/a/") == "a"
        assert join_uri("s3://b/a/", "x", "y.jpg") == "s3://b/a/x/y.jpg"
        assert local_path("file:///a%20b") == duckdb_path("file:///a%20b") == "/a%20b"
        assert duckdb_path("s3://b/k") == "s3://b/k"
        with pytest.raises(UsageError):
            local_path("s3://b/k")
        with pytest.raises(UsageError):
            uri_scheme("/x")

    @pytest.mark.parametrize(
        ("etag", "clean"),
        [('"abc"', "abc"), ('W/"abc"', "abc"), ("abc", "abc"), ("", ""), (None, ""), ('"a-2"', "a-2")],
    )
    def test_etags(self, etag: str | None, clean: str) -> None:
        assert clean_etag(etag) == clean

    @given(
        name=st.one_of(
            st.binary(min_size=1), st.text(min_size=1, alphabet="a\u00e9\uef7f\uef80\uefff\uf000").map(str.encode)
        )
    )
    def test_every_path_has_a_uri_that_leads_back_to_it(self, name: bytes) -> None:
        path = os.fsdecode(b"/" + name.replace(b"/", b"").replace(b"\0", b""))
        uri = file_uri(path)
        assert uri.encode().decode() == uri
        assert os.fsencode(local_path(uri)) == os.fsencode(path)
        assert normalize_uri(uri) == uri
        written = b"".join(
            bytes([ord(c) - 0xEF00]) if 0xEF80 <= ord(c) <= 0xEFFF else c.encode() for c in uri.removeprefix("file://")
        )
        assert written == os.fsencode(path)

    def test_escapes_are_as_documented(self) -> None:
        assert file_uri(os.fsdecode(b"/caf\xe9")) == "file:///caf\uefe9"
        assert file_uri("/\uef80") == "file:///\uefee\uefbe\uef80"
        assert normalize_uri(os.fsdecode(b"file:///caf\xe9")) == normalize_uri(os.fsdecode(b"/caf\xe9"))
        with pytest.raises(UsageError, match="not UTF-8"):
            duckdb_path("file:///caf\uefe9")

    @pytest.mark.parametrize(
        ("uri", "shown"),
        [
            ("https://user:pass@host/a.csv?X-Amz-Signature=1&b=2", "https://host/a.csv?…"),
            ("https://token@host/a.csv", "https://host/a.csv"),
            ("sftp://user:pass@host/a", "sftp://user@host/a"),
            ("abfs://container@account.dfs.core.windows.net/a b", "abfs://container@account.dfs.core.windows.net/a b"),
            ("s3://b/k?x=1@y", "s3://b/k?x=1@y"),
            ("file:///a?b@c", "file:///a?b@c"),
        ],
    )
    def test_secrets_are_not_shown(self, uri: str, shown: str) -> None:
        assert without_secrets(uri) == shown

    def test_an_address_that_is_signed_anew_is_recorded_alike(self) -> None:
        plain = "https://host/list.csv"
        aws = plain + "?X-Amz-Credential=AKIA%2F2026&X-Amz-Date={0}&X-Amz-Expires=60&X-Amz-Signature={0}"
        azure = plain + "?sv=2025&sr=b&sp=r&se={0}&sig={0}"
        for signed in (aws, azure, plain + "?AWSAccessKeyId=A&Expires={0}&Signature={0}", plain + "?token={0}"):
            assert recorded_uri(signed.format("one")) == recorded_uri(signed.format("two")) == plain + "?…"
        asked = [recorded_uri(f"{plain}?id={n}&X-Amz-Signature={secret}") for n in (1, 2) for secret in ("abc", "def")]
        assert asked[0] == asked[1] != asked[2] == asked[3]
        assert asked[0].startswith(plain + "?…") and "abc" not in asked[0]
        for uri in ("s3://b/k?token=1", "file:///a?token=1", plain):
            assert recorded_uri(uri) == uri

    @pytest.mark.parametrize(
        "uri", ["http:///", "https://", "http:///a.jpg", "http://h:99999/a", "http://[::1/a", "http://:80/a"]
    )
    def test_what_is_no_web_address(self, uri: str) -> None:
        with pytest.raises(UsageError):
            check_web_address(uri)
        with pytest.raises(UsageError):
            open_storage("https://host").get(uri.replace("http:", "https:"))

    def test_an_unknown_scheme_says_what_to_do(self) -> None:
        with pytest.raises(UsageError, match=r"'nosuch'.*install"):
            open_storage("nosuch://x/y")

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of fsspec's destructor
    def test_a_scheme_that_needs_a_host_takes_it_from_the_uri(self) -> None:
        with pytest.raises(StorageError, match=r"could not reach 'ftp://127\.0\.0\.1:1/a\.jpg'") as caught:
            open_storage("ftp://127.0.0.1:1/a.jpg")  # where nobody listens
        assert caught.value.kind == "fetch_failed"
        with pytest.raises(UsageError, match="does not say enough"):
            open_storage("ftp:///a.jpg")


class TestDisk:
    @pytest.fixture
    def disk(self, tmp_path: Path) -> Storage:
        return open_storage(f"file://{tmp_path}")

    def test_the_etag_is_size_and_time(self, disk: Storage, tmp_path: Path) -> None:
        path = tmp_path / "x"
        path.write_bytes(b"abc")
        os.utime(path, ns=(0, 1_234_567_890_123_456_789))
        blob = disk.get(f"file://{path}")
        assert blob.etag == "3-1234567890123456789"
        assert blob.modified == datetime(2009, 2, 13, 23, 31, 30, 123456, tzinfo=UTC)

    def test_of_many_who_replace_one_file_one_wins(self, disk: Storage, tmp_path: Path) -> None:
        path = tmp_path / "x"
        path.write_bytes(b"-1")
        for _ in range(20):
            etag = disk.get(f"file://{path}").etag
            with ThreadPoolExecutor(8) as pool:
                won = list(
                    pool.map(lambda one: disk.replace(f"file://{path}", str(one).encode(), etag=etag), range(10, 18))  # noqa: B023
                )
            assert sum(won) == 1 and path.read_bytes() == str(won.index(True) + 10).encode()

    def test_a_file_that_changes_while_it_is_read_is_read_again(
        self, disk: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "x"
        path.write_bytes(b"old" * 100)
        read = os.read
        changes = iter([b"new" * 200])

        def read_while_changing(descriptor: int, size: int) -> bytes:
            data = read(descriptor, size)
            if (content := next(changes, None)) is not None:
                path.write_bytes(content)
            return data

        monkeypatch.setattr("os.read", read_while_changing)
        blob = disk.get(f"file://{path}")
        assert blob.data == b"new" * 200
        assert blob.etag == disk.head(f"file://{path}").etag

    def test_a_file_that_never_rests_fails(
        self, disk: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "x"
        path.write_bytes(b"x")
        read = os.read

        def read_while_growing(descriptor: int, size: int) -> bytes:
            data = read(descriptor, size)
            with path.open("ab") as file:
                file.write(b"x")
            return data

        monkeypatch.setattr("os.read", read_while_growing)
        assert kind_of(lambda: disk.get(f"file://{path}")) == "fetch_failed"

    def test_short_reads_are_continued(self, disk: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "x"
        path.write_bytes(bytes(range(256)))
        read = os.read
        monkeypatch.setattr("os.read", lambda descriptor, size: read(descriptor, min(size, 100)))
        assert disk.get(f"file://{path}").data == bytes(range(256))

    @pytest.mark.parametrize(
        ("code", "kind", "word"),
        [
            (errno.EACCES, "denied", "permission"),
            (errno.EPERM, "denied", "permission"),
            (errno.ELOOP, "missing", "symbolic links"),
            (errno.EMFILE, "fetch_failed", "open files"),
            (errno.EIO, "fetch_failed", "error"),
        ],
    )
    def test_errors_of_the_system(
        self, disk: Storage, monkeypatch: pytest.MonkeyPatch, code: int, kind: str, word: str
    ) -> None:
        def fail(*_: object) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr("os.open", fail)
        with pytest.raises(StorageError, match=word) as caught:
            disk.get("file:///x")
        assert caught.value.kind == kind

    def test_things_that_are_no_files(self, disk: Storage, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        os.symlink(tmp_path / "loop", tmp_path / "loop")
        for name in ("pipe", "loop", "nul\x00", "x" * 300):
            assert kind_of(lambda name=name: disk.get(f"file://{tmp_path}/{name}")) == "missing"
            assert not disk.exists(f"file://{tmp_path}/{name}")
        assert listed(disk, disk.root) == {}

    def test_links_are_followed_and_cycles_end(self, disk: Storage, tmp_path: Path) -> None:
        (tmp_path / "real").mkdir()
        (tmp_path / "real" / "x.jpg").write_bytes(b"x")
        os.symlink(tmp_path / "real", tmp_path / "alias")
        os.symlink(tmp_path / "real" / "x.jpg", tmp_path / "link.jpg")
        os.symlink(tmp_path, tmp_path / "real" / "back")
        os.symlink(tmp_path / "nowhere", tmp_path / "dangling.jpg")
        found = {uri.removeprefix(disk.root) for uri in listed(disk, disk.root)}
        assert found == {"/real/x.jpg", "/alias/x.jpg", "/link.jpg"}

    def test_names_that_are_not_unicode(self, disk: Storage, tmp_path: Path) -> None:
        folder = os.fsencode(tmp_path) + b"/caf\xe9"
        os.mkdir(folder)
        with open(folder + b"/im\xff.jpg", "wb") as file:
            file.write(b"data")
        (uri,) = listed(disk, disk.root)
        assert uri == f"{disk.root}/caf\uefe9/im\uefff.jpg"
        assert disk.get(uri).data == b"data"
        assert disk.head(uri).size_bytes == 4
        assert kind_of(lambda: disk.get(f"{disk.root}/caf\uefe9/other\uefff.jpg")) == "missing"

    def test_names_that_differ_in_their_odd_bytes_only(self, disk: Storage, tmp_path: Path) -> None:
        names = [b"\xe9.jpg", b"\xe8.jpg", b"\xff\xfe.jpg", "\ufffd.jpg".encode(), "\uef80.jpg".encode(), b"\x80.jpg"]
        for name in names:
            with open(os.fsencode(tmp_path) + b"/" + name, "wb") as file:
                file.write(name)
        rows = listed(disk, disk.root)
        assert len(rows) == len(names)
        assert {disk.get(uri).data for uri in rows} == set(names)
        for uri, row in rows.items():
            uri.encode()
            assert disk.head(uri).etag == disk.get(uri).etag == row["etag"]
        for uri in list(rows):
            disk.put(uri, b"replaced")
            disk.delete(uri)
        assert os.listdir(tmp_path) == ["_tmp"]

    def test_folders_are_read_side_by_side_where_the_disk_is_slow(
        self, disk: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for n in range(40):
            (tmp_path / f"{n}").mkdir()
            (tmp_path / f"{n}" / "x").write_bytes(b"")
        scandir = os.scandir
        busy, most = [0], [0]

        def slow(path: str) -> Any:
            busy[0] += 1
            most[0] = max(most[0], busy[0])
            time.sleep(0.02)
            busy[0] -= 1
            return scandir(path)

        monkeypatch.setattr("os.scandir", slow)
        assert len(listed(disk, disk.root, parallel=4)) == 40
        assert most == [4]
        most[0] = 0
        assert len(listed(disk, disk.root, parallel=1)) == 40
        assert most == [1]

    def test_missing_and_unreadable_folders(
        self, disk: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").write_bytes(b"")
        assert kind_of(lambda: list(disk.list(f"file://{tmp_path}/none"))) == "missing"
        assert kind_of(lambda: list(disk.list(f"file://{tmp_path}/file"))) == "missing"
        (tmp_path / "shut").mkdir()
        scandir = os.scandir

        def refuse(path: str) -> object:
            if path.endswith("shut"):
                raise PermissionError(errno.EACCES, "denied", path)
            return scandir(path)

        monkeypatch.setattr("os.scandir", refuse)
        assert kind_of(lambda: list(disk.list(disk.root))) == "denied"

    def test_files_that_vanish_while_listing_are_left_out(
        self, disk: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for n in range(5):
            (tmp_path / f"folder{n}").mkdir()
            (tmp_path / f"folder{n}" / "x").write_bytes(b"")
        scandir = os.scandir

        def vanish(path: str) -> object:
            if path.endswith("folder2"):
                (tmp_path / "folder2" / "x").unlink()
                (tmp_path / "folder2").rmdir()
            return scandir(path)

        monkeypatch.setattr("os.scandir", vanish)
        assert len(listed(disk, disk.root)) == 4

    def test_many_files_come_in_batches(self, disk: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("pipeline.storage.disk._ROWS_PER_BATCH", 10)
        for n in range(25):
            (tmp_path / f"{n}").write_bytes(b"")
        assert [batch.num_rows for batch in disk.list(disk.root)] == [10, 10, 5]

    @pytest.mark.parametrize("call", ["put", "put_new"])
    @pytest.mark.parametrize(
        ("function", "code", "kind_and_sentence"),
        [
            ("write", errno.ENOSPC, ("fetch_failed", "disk is full")),
            ("fsync", errno.EDQUOT, ("fetch_failed", "quota")),
            ("open", errno.EROFS, ("denied", "read-only")),
            ("open", errno.EACCES, ("denied", "permission denied")),
        ],
    )
    def test_a_failed_write_says_why_and_leaves_nothing(
        self, disk: Storage, call: str, function: str, code: int, kind_and_sentence: tuple[str, str]
    ) -> None:
        kind, sentence = kind_and_sentence
        uri = join_uri(disk.root, "part")
        disk.put(uri, b"")
        disk.delete(uri)

        def fail(*_: object) -> None:
            raise OSError(code, os.strerror(code))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(f"os.{function}", fail)
            with pytest.raises(StorageError, match=sentence) as caught:
                getattr(disk, call)(uri, b"data")
        assert caught.value.kind == kind
        assert repr(uri) in str(caught.value)
        assert listed(disk, disk.root) == {}

    def test_a_file_where_a_folder_should_be(self, disk: Storage, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"")
        with pytest.raises(StorageError, match="not a folder"):
            disk.put_new(f"file://{tmp_path}/file/part", b"")

    def test_temporary_files_lie_under_the_root(
        self, disk: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen = []
        link = os.link
        monkeypatch.setattr("os.link", lambda source, target: (seen.append(source), link(source, target)))
        assert disk.put_new(join_uri(disk.root, "a", "b", "part"), b"data")
        assert [os.path.dirname(path) for path in seen] == [f"{tmp_path}/_tmp"]
        assert os.listdir(tmp_path / "_tmp") == []

    def test_a_file_system_without_hard_links(self, disk: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object) -> None:
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr("os.link", fail)
        assert disk.check_create_only() is False
        assert disk.create_only_is_atomic is False
        assert disk.put_new(join_uri(disk.root, "part"), b"one")
        assert not disk.put_new(join_uri(disk.root, "part"), b"two")
        assert disk.get(join_uri(disk.root, "part")).data == b"one"
        assert pickle.loads(pickle.dumps(disk)).create_only_is_atomic is False

    def test_leavings_of_killed_processes_are_swept(self, disk: Storage, tmp_path: Path) -> None:
        (tmp_path / "_tmp").mkdir()
        for name in ("old", "young"):
            (tmp_path / "_tmp" / name).write_bytes(b"half")
        os.utime(tmp_path / "_tmp" / "old", (0, 0))
        disk.check_create_only()
        assert os.listdir(tmp_path / "_tmp") == ["young"]

    def test_writing_outside_the_root(self, disk: Storage, tmp_path_factory: pytest.TempPathFactory) -> None:
        elsewhere = tmp_path_factory.mktemp("elsewhere")
        assert disk.put_new(f"file://{elsewhere}/x", b"x")
        assert disk.get(f"file://{elsewhere}/x").data == b"x"

    def test_duckdb_needs_no_filesystem(self, disk: Storage) -> None:
        assert disk.filesystem() is None


class TestRemote:
    @pytest.mark.s3
    def test_https_is_read_only(self, s3_bucket: str, s3_server: str, s3_client: Any) -> None:
        s3_client.put_object(Bucket=s3_bucket.removeprefix("s3://"), Key="x y.jpg", Body=b"data", ACL="public-read")
        open_storage(s3_bucket).put(s3_bucket + "/shut.jpg", b"data")
        # The S3 server is also a plain web server for whoever asks it.
        base = s3_server + "/" + s3_bucket.removeprefix("s3://")
        storage = open_storage(base)
        blob = storage.get(base + "/x%20y.jpg")
        assert blob.data == b"data"
        assert blob.etag == hashlib.md5(b"data").hexdigest()
        assert kind_of(lambda: storage.get(base + "/shut.jpg")) == "denied"
        public = s3_server + "/no-such-bucket"
        assert kind_of(lambda: storage.get(public + "/none.jpg")) == "missing"
        assert not storage.exists(public + "/none.jpg")
        assert kind_of(lambda: storage.get("http://127.0.0.1:1/nobody-listens")) == "fetch_failed"
        with pytest.raises(StorageError, match="read-only"):
            storage.put(base + "/new", b"")
        with pytest.raises(StorageError, match="read-only"):
            storage.put_new(base + "/new", b"")

    def test_memory_lists_in_batches(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("pipeline.storage.remote._ROWS_PER_BATCH", 4)
        storage = open_storage(f"memory://{uuid.uuid4().hex}")
        for n in range(10):
            storage.put(f"{storage.root}/{n % 3}/{n}", b"x")
        assert len(listed(storage, storage.root)) == 10

    def test_folders_are_listed_side_by_side_and_forgotten(self, monkeypatch: pytest.MonkeyPatch) -> None:
        storage = open_storage(f"memory://{uuid.uuid4().hex}")
        for n in range(30):
            storage.put(f"{storage.root}/{n % 10}/{n}", b"x")
        files = storage.filesystem()
        ls = files.ls
        asked: list[str] = []
        forgotten: list[str] = []
        threads = set()

        def slow(path: str, detail: bool) -> Any:
            threads.add(threading.current_thread().name)
            asked.append(path)
            time.sleep(0.02)
            return ls(path, detail=detail)

        monkeypatch.setattr(files, "ls", slow)
        monkeypatch.setattr(files, "invalidate_cache", forgotten.append)
        assert len(listed(storage, storage.root, parallel=4)) == 30
        assert len(threads) == 4 and len(asked) == 11 and sorted(asked) == sorted(forgotten)

    def test_a_folder_that_cannot_be_listed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        storage = open_storage(f"memory://{uuid.uuid4().hex}")
        for n in range(3):
            storage.put(f"{storage.root}/{n}/x", b"x")
        files = storage.filesystem()
        ls = files.ls

        def refuse(path: str, detail: bool) -> Any:
            if path.endswith("/1"):
                raise PermissionError("no")
            return ls(path, detail=detail)

        monkeypatch.setattr(files, "ls", refuse)
        with pytest.raises(StorageError, match=f"list '{storage.root}/1'") as caught:
            list(storage.list(storage.root))
        assert caught.value.kind == "denied"

    def test_duckdb_reads_through_it(self) -> None:
        import duckdb

        storage = open_storage(f"memory://{uuid.uuid4().hex}")
        storage.put(storage.root + "/a.csv", b"x\n1\n2\n")
        connection = duckdb.connect()
        connection.register_filesystem(storage.filesystem())
        assert connection.execute(f"select sum(x) from read_csv('{storage.root}/*.csv')").fetchall() == [(3,)]


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("status code: 400 Bad Request <Code>XAmzContentSHA256Mismatch</Code>", False),
        ("status code: 400 Bad Request <Code>BadDigest</Code>", False),
        ("status code: 400 Bad Request <Code>InvalidArgument</Code>", True),
        ("status code: 429", False),
        ("status code: 503", False),
        ("connection reset", False),
    ],
)
def test_what_is_worth_another_try(text: str, refused: bool) -> None:
    assert is_refusal(OSError(text)) is refused


#: For pages of 50: two folders of several pages, one of them deep down, small ones, and files beside them.
LARGE_TREE = [
    *(f"a/{n:04}" for n in range(170)),
    *(f"b/{n:02}/x" for n in range(40)),
    *(f"c/deep/er/{n:04}" for n in range(110)),
    "c/deep0",
    "c0",
    "d",
]


def fill(storage: Storage, keys: list[str]) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda key: storage.put(f"{storage.root}/{key}", b"x"), keys))


def check_listing_requests(requests: list[str], parallel: int) -> None:
    """The server's own pages hold all of it: one request, and one for each range that was cut off."""
    prefixes = Counter(request.partition("prefix=")[2].partition("&")[0] for request in requests)
    assert all(request.startswith("GET ") for request in requests)
    if parallel == 1:
        assert prefixes == {"": 1}
    else:
        assert {"", "a%2F", "c%2Fdeep%2Fer%2F"} <= set(prefixes)
        assert all("start-after=" in request or "delimiter=" in request for request in requests[1:])
        assert len(requests) <= 30


class TestBucketListing:
    """Over obstore's own store in memory, which sorts and pages as the others do."""

    @staticmethod
    def read(keys: list[str], prefix: str, parallel: int, seen: list[KeyRange] | None = None) -> list[str]:
        import obstore
        from obstore.store import MemoryStore

        store = MemoryStore()
        for key in keys:
            obstore.put(store, key, b"x")
        listing = BucketListing("t://b/", lambda: store, lambda *_: pytest.fail("an odd key"), lambda uri: True)

        def read(jobs: Jobs[KeyRange]) -> Iterator[pa.RecordBatch]:
            def note() -> Iterator[KeyRange]:
                for job in jobs:
                    if seen is not None:
                        seen.append(job)
                    yield job

            watched: Any = type("Watched", (), {"__iter__": lambda _: note(), "add": jobs.add, "hungry": jobs.hungry})()
            return listing.read(watched)

        batches = spread(Jobs([KeyRange(prefix)], readers=parallel), read, parallel=parallel)
        return [uri for batch in batches for uri in batch["uri"].to_pylist()]

    @settings(max_examples=60, deadline=None)
    @given(
        names=st.sets(
            st.lists(
                st.sampled_from(["a", "b", "b0", "B-", "b.x", "é", "\U0010ffff", "z"]), min_size=1, max_size=5
            ).map("/".join),
            max_size=60,
        ),
        prefix=st.sampled_from(["", "a/", "b/", "b/a/"]),
        parallel=st.sampled_from([1, 2, 5]),
        page=st.sampled_from([1, 2, 7]),
        pieces=st.sampled_from([1, 3, 32]),
    )
    def test_every_key_once(self, names: set[str], prefix: str, parallel: int, page: int, pieces: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("pipeline.storage.bucket_listing._PIECES", pieces)
            patch.setattr("pipeline.storage.bucket_listing._PAGE_ROWS", page)
            found = self.read(sorted(names), prefix, parallel)
        assert sorted(found) == sorted(f"t://b/{name}" for name in names if name.startswith(prefix))

    def test_what_is_cut(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("pipeline.storage.bucket_listing._PAGE_ROWS", 3)
        keys = [f"x/{folder}/{n}" for folder in ("a", "b", "c") for n in range(9)]
        seen: list[KeyRange] = []
        assert len(self.read(keys, "", 8, seen)) == len(keys)
        assert seen[0] == KeyRange("")
        cut = {KeyRange("x/a/", "x/a/2\0"), KeyRange("x/", "x/a0", level="wanted"), KeyRange("", "x0", level="wanted")}
        assert cut <= set(seen)
        assert {KeyRange("x/", "x/b/", "x/c/", "one"), KeyRange("x/", "x/c/", "", "one")} <= set(seen)
        assert len(seen) == 1 + 3 + 3
        seen.clear()
        monkeypatch.setattr("pipeline.storage.bucket_listing._PIECES", 1)
        assert len(self.read(keys, "", 8, seen)) == len(keys)
        assert KeyRange("x/", "x/b/", "", "known") in seen
        seen.clear()
        assert len(self.read(keys, "", 1, seen)) == len(keys)
        assert seen == [KeyRange("")]

    def test_a_level_that_takes_too_long_is_listed_all_the_same(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import asyncio

        cancelled = []

        async def endless(*_: object, **__: object) -> None:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                cancelled.append(1)
                raise

        monkeypatch.setattr("obstore.list_with_delimiter_async", endless)
        monkeypatch.setattr("pipeline.storage.bucket_listing._LEVEL_TIMEOUT_S", 0.05)
        monkeypatch.setattr("pipeline.storage.bucket_listing._PAGE_ROWS", 3)
        keys = [f"{folder}/{n}" for folder in ("a", "b", "c") for n in range(9)]
        assert sorted(self.read(keys, "", 8)) == [f"t://b/{key}" for key in keys]
        assert cancelled


@pytest.mark.s3
class TestGoogle:
    """gs:// against the S3 server: Google's XML API lists, looks and reads as S3 does. Its writes and its errors
    differ, and are not shown by this."""

    @pytest.fixture
    def bucket(self, s3_client: Any, s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Storage]:
        name = f"test{uuid.uuid4().hex[:16]}"
        s3_client.create_bucket(Bucket=name, ACL="public-read")
        with FaultProxy(int(s3_server.rpartition(":")[2])) as proxy:
            monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{proxy.port}")
            self.proxy, self.client = proxy, s3_client
            yield open_storage(f"gs://{name}")

    def write(self, bucket: Storage, keys: list[str]) -> None:
        name = bucket.root.removeprefix("gs://")
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda key: self.client.put_object(Bucket=name, Key=key, Body=b"x", ACL="public-read"), keys))

    @pytest.mark.parametrize("parallel", [1, 8])
    def test_listing(self, bucket: Storage, parallel: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.write(bucket, LARGE_TREE)
        monkeypatch.setattr("pipeline.storage.bucket_listing._PAGE_ROWS", 50)
        rows = listed(bucket, bucket.root, parallel=parallel)
        assert set(rows) == {f"{bucket.root}/{key}" for key in LARGE_TREE}
        check_listing_requests(self.proxy.requests, parallel)
        info = bucket.head(f"{bucket.root}/c0")
        assert rows[f"{bucket.root}/c0"] == {"uri": f"{bucket.root}/c0"} | info._asdict()
        assert info.etag == hashlib.md5(b"x").hexdigest()
        inside = {f"{bucket.root}/{key}" for key in LARGE_TREE if key.startswith("c/")}
        assert set(listed(bucket, bucket.root + "/c", parallel=parallel)) == inside

    def test_reading(self, bucket: Storage) -> None:
        names = [name for name in ODD_NAMES if "\t" not in name]
        self.write(bucket, names)
        self.proxy.inject("flip", limit=1, match="GET")
        for name in names:
            assert bucket.get(f"{bucket.root}/{name}").data == b"x", name
        assert self.proxy.hits["flip"] == 1
        assert set(listed(bucket, bucket.root)) == {f"{bucket.root}/{name}" for name in names}
        assert kind_of(lambda: bucket.get(f"{bucket.root}/{S3_ONLY_NAMES[0]}")) == "fetch_failed"


@pytest.mark.s3
class TestS3:
    @pytest.fixture
    def bucket(self, s3_bucket: str) -> Storage:
        return open_storage(s3_bucket)

    def test_names_are_the_same_for_other_clients(self, bucket: Storage, s3_client: Any) -> None:
        name_of_bucket = bucket.root.removeprefix("s3://")
        names = ODD_NAMES + S3_ONLY_NAMES
        for name in names:
            s3_client.put_object(Bucket=name_of_bucket, Key=f"theirs/{name}", Body=b"theirs")
            assert bucket.get(f"{bucket.root}/theirs/{name}").data == b"theirs", name
            ours = f"{bucket.root}/ours/{name}"
            assert bucket.put_new(ours, b"ours"), name
            assert not bucket.put_new(ours, b"other"), name
            answer = s3_client.get_object(Bucket=name_of_bucket, Key=f"ours/{name}")
            assert answer["Body"].read() == b"ours", name
            assert bucket.head(ours).etag == hashlib.md5(b"ours").hexdigest(), name
            bucket.put(ours, b"replaced")
            assert bucket.get(ours).data == b"replaced", name
            bucket.delete(ours)
            assert not bucket.exists(ours), name
        theirs = listed(bucket, f"{bucket.root}/theirs")
        assert set(theirs) == {f"{bucket.root}/theirs/{name}" for name in names}

    @pytest.mark.parametrize("parallel", [1, 8])
    def test_one_odd_key_does_not_spoil_the_listing(self, bucket: Storage, s3_client: Any, parallel: int) -> None:
        keys = [f"{folder}/{n}.jpg" for folder in ("a", "b", "c") for n in range(5)] + [
            "b//2.jpg",
            "top.jpg",
            "b/./z",
        ]
        for key in keys:
            s3_client.put_object(Bucket=bucket.root.removeprefix("s3://"), Key=key, Body=b"x")
        assert set(listed(bucket, bucket.root, parallel=parallel)) == {f"{bucket.root}/{key}" for key in keys}

    @pytest.mark.parametrize("parallel", [1, 8])
    def test_folder_markers_are_not_listed(self, bucket: Storage, s3_client: Any, parallel: int) -> None:
        for key in ("photos/", "photos/trip.jpg/", "photos/empty.jpg", "photos/trip.jpg/1.jpg"):
            s3_client.put_object(Bucket=bucket.root.removeprefix("s3://"), Key=key, Body=b"")
        found = listed(bucket, bucket.root, parallel=parallel)
        assert set(found) == {bucket.root + "/photos/empty.jpg", bucket.root + "/photos/trip.jpg/1.jpg"}
        assert listed(bucket, bucket.root + "/photos", parallel=parallel) == found

    def test_pages(self, bucket: Storage, s3_client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("pipeline.storage.bucket_listing._PAGE_ROWS", 300)
        for n in range(1050):
            bucket.put(f"{bucket.root}/flat/{n:04}", b"x")
        s3_client.put_object(Bucket=bucket.root.removeprefix("s3://"), Key="flat2/x", Body=b"x")
        assert len(listed(bucket, bucket.root + "/flat")) == 1050
        assert len(listed(bucket, bucket.root)) == 1051
        s3_client.put_object(Bucket=bucket.root.removeprefix("s3://"), Key="flat/0500//odd", Body=b"x")
        assert len(listed(bucket, bucket.root + "/flat")) == 1051

    @pytest.mark.parametrize("parallel", [1, 8])
    def test_folders_of_many_pages_are_listed_side_by_side(
        self, bucket: Storage, fault_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, parallel: int
    ) -> None:
        fill(bucket, LARGE_TREE)
        fault_proxy.clear()
        storage = open_storage(bucket.root)
        monkeypatch.setattr("pipeline.storage.bucket_listing._PAGE_ROWS", 50)
        assert set(listed(storage, bucket.root, parallel=parallel)) == {f"{bucket.root}/{key}" for key in LARGE_TREE}
        check_listing_requests(fault_proxy.requests, parallel)

    def test_a_missing_bucket(self, s3_environment: str) -> None:
        storage = open_storage("s3://no-such-bucket-here")
        for call in (
            lambda: storage.get(storage.root + "/x"),
            lambda: storage.put_new(storage.root + "/x", b""),
            lambda: list(storage.list(storage.root)),
            lambda: list(storage.list(storage.root + "/x", parallel=1)),
        ):
            assert kind_of(call) == "missing"

    def test_an_empty_prefix(self, bucket: Storage) -> None:
        assert listed(bucket, bucket.root) == {}
        assert listed(bucket, bucket.root + "/none") == {}

    def test_a_bucket_is_no_object(self, bucket: Storage) -> None:
        with pytest.raises(UsageError, match="s3://bucket/key"):
            bucket.get(bucket.root)

    def test_a_multipart_etag_is_no_digest(self, bucket: Storage, s3_client: Any) -> None:
        name = bucket.root.removeprefix("s3://")
        upload = s3_client.create_multipart_upload(Bucket=name, Key="big")["UploadId"]
        part = s3_client.upload_part(Bucket=name, Key="big", UploadId=upload, PartNumber=1, Body=b"data")
        s3_client.complete_multipart_upload(
            Bucket=name,
            Key="big",
            UploadId=upload,
            MultipartUpload={"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]},
        )
        blob = bucket.get(bucket.root + "/big")
        assert blob.data == b"data"
        assert blob.etag.endswith("-1")

    def test_a_named_profile(
        self, bucket: Storage, s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bucket.put(bucket.root + "/x.csv", b"x\n1\n")
        (tmp_path / "config").write_text(f"[profile lab]\nregion = eu-west-1\nendpoint_url = {s3_server}\n")
        (tmp_path / "keys").write_text("[lab]\naws_access_key_id = k\naws_secret_access_key = verysecret\n")
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "keys"))
        storage = open_storage(bucket.root, profile="lab")
        assert storage.get(bucket.root + "/x.csv").data == b"x\n1\n"
        assert set(listed(storage, bucket.root)) == {bucket.root + "/x.csv"}
        assert storage.filesystem().cat(bucket.root + "/x.csv") == b"x\n1\n"
        text = pickle.dumps(storage)
        assert b"verysecret" not in text
        assert pickle.loads(text).get(bucket.root + "/x.csv").data == b"x\n1\n"
        monkeypatch.setenv("AWS_PROFILE", "lab")
        assert open_storage(bucket.root).get(bucket.root + "/x.csv").data == b"x\n1\n"

    def test_an_unknown_profile_of_the_environment(self, s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_PROFILE", "nobody")
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        with pytest.raises(UsageError, match="'nobody'"):
            open_storage(s3_bucket).get(s3_bucket + "/x")

    def test_an_unknown_profile_is_told_the_known_ones(
        self, tmp_path: Path, s3_environment: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "config").write_text("[profile lab]\nregion = eu-west-1\n[default]\n")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
        with pytest.raises(UsageError, match=r"'nobody'.* default, lab\Z"):
            open_storage(f"file://{tmp_path}", profile="nobody")
        open_storage(f"file://{tmp_path}", profile="lab")

    def test_an_unknown_profile(self, s3_bucket: str) -> None:
        with pytest.raises(UsageError, match="'nobody'"):
            open_storage(s3_bucket, profile="nobody")

    def test_no_credentials(self, s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        with pytest.raises(StorageError, match="no credentials") as caught:
            open_storage(s3_bucket).get(s3_bucket + "/x")
        assert caught.value.kind == "denied"

    def test_a_public_bucket_needs_none(self, s3_bucket: str, s3_client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        name = s3_bucket.removeprefix("s3://")
        s3_client.put_object(Bucket=name, Key="x", Body=b"x", ACL="public-read")
        s3_client.put_bucket_acl(Bucket=name, ACL="public-read")
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
        storage = open_storage(s3_bucket)
        assert storage.get(s3_bucket + "/x").data == b"x"
        assert len(listed(storage, s3_bucket)) == 1

    def test_duckdb_reads_through_it(self, bucket: Storage) -> None:
        import duckdb

        for n in range(3):
            bucket.put(f"{bucket.root}/segments/model=m/{n}.csv", b"x\n%d\n" % n)
        connection = duckdb.connect()
        connection.register_filesystem(bucket.filesystem())
        files = f"read_csv('{bucket.root}/segments/**/*.csv', hive_partitioning=true)"
        assert connection.execute(f"select sum(x), any_value(model) from {files}").fetchall() == [(3, "m")]

    def test_duckdb_asks_little(self, bucket: Storage, fault_proxy: FaultProxy) -> None:
        import duckdb

        uris = [f"{bucket.root}/a b/{n}.parquet" for n in range(4)]
        for uri in uris:
            sink = pa.BufferOutputStream()
            pq.write_table(pa.table({"n": range(1000)}), sink)
            bucket.put(uri, sink.getvalue().to_pybytes())
        connection = duckdb.connect()
        connection.register_filesystem(open_storage(bucket.root).filesystem())
        for _ in range(3):
            assert connection.execute(f"select sum(n) from read_parquet({uris})").fetchone() == (4 * 499_500,)
        asked = Counter(request.split(" ")[0] for request in fault_proxy.requests)
        assert asked == {"PUT": 4, "HEAD": 4, "GET": 4}

    def test_files_that_are_not_there(self, bucket: Storage) -> None:
        files = bucket.filesystem()
        assert files is not None
        assert not files.exists(bucket.root + "/nothing")
        with pytest.raises(FileNotFoundError):
            files.open(bucket.root + "/nothing")
        with pytest.raises(PermissionError, match="only be read"):
            files.open(bucket.root + "/new", "wb")

    def test_a_store_that_ignores_the_condition_is_found_out(
        self, bucket: Storage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import obstore

        put = obstore.put

        def forget_mode(*arguments: object, mode: str = "", **options: object) -> object:
            return put(*arguments, **options)

        monkeypatch.setattr("obstore.put", forget_mode)
        assert bucket.check_create_only() is False
        assert bucket.put_new(bucket.root + "/x", b"one")
        assert not bucket.put_new(bucket.root + "/x", b"two")
        assert bucket.get(bucket.root + "/x").data == b"one"
        assert set(listed(bucket, bucket.root)) == {bucket.root + "/x"}

    def test_an_odd_answer_to_a_condition_is_settled_by_looking(
        self, bucket: Storage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from obstore.exceptions import GenericError

        bucket.put(bucket.root + "/there", b"x")

        def refuse(*_: object, **__: object) -> None:
            raise GenericError("Server returned non-2xx status code: 400 Bad Request: <Code>InvalidArgument</Code>")

        monkeypatch.setattr("obstore.put", refuse)
        assert bucket.put_new(bucket.root + "/there", b"y") is False
        with pytest.raises(StorageError, match="InvalidArgument") as caught:
            bucket.put_new(bucket.root + "/free", b"y")
        assert caught.value.kind == "fetch_failed"


@pytest.mark.s3
@pytest.mark.usefixtures("impatient")
class TestS3Faults:
    DATA = os.urandom(100_000)

    @pytest.fixture
    def bucket(self, s3_bucket: str, fault_proxy: FaultProxy) -> Storage:
        storage = open_storage(s3_bucket)
        storage.put(s3_bucket + "/x", self.DATA)
        fault_proxy.clear()
        return storage

    @pytest.mark.parametrize(
        "kind",
        [
            "flip",
            "truncate",
            "unavailable",
            "error",
            "refuse",
            "reset_before",
            "reset_after",
            "stall",
            "stall_body",
        ],
    )
    def test_get_survives(self, bucket: Storage, fault_proxy: FaultProxy, kind: str) -> None:
        fault_proxy.inject(kind, limit=2, seconds=1)
        assert bucket.get(bucket.root + "/x").data == self.DATA
        assert fault_proxy.hits[kind] == 2

    @pytest.mark.parametrize("kind", ["flip", "truncate", "unavailable"])
    def test_get_of_an_odd_name_survives(self, bucket: Storage, fault_proxy: FaultProxy, kind: str) -> None:
        bucket.put(bucket.root + "//x", self.DATA)
        fault_proxy.inject(kind, limit=1, match="GET .*//x")
        assert bucket.get(bucket.root + "//x").data == self.DATA
        assert fault_proxy.hits[kind] == 1

    @pytest.mark.parametrize("kind", ["unavailable", "error", "refuse", "reset_before", "reset_after", "stall"])
    @pytest.mark.parametrize("name", ["/new", "//new"])
    def test_put_new_survives(self, bucket: Storage, fault_proxy: FaultProxy, kind: str, name: str) -> None:
        fault_proxy.inject(kind, limit=1, match="" if kind == "refuse" else "PUT", seconds=1)
        uri = bucket.root + name
        # "False" after a reset whose outcome was unknown: the object is there, and it is ours.
        assert bucket.put_new(uri, self.DATA) is (kind != "reset_after")
        assert fault_proxy.hits[kind] == 1
        assert bucket.get(uri).data == self.DATA
        assert bucket.put_new(uri, b"other") is False
        assert bucket.get(uri).data == self.DATA

    @pytest.mark.parametrize("kind", ["unavailable", "reset_before", "reset_after", "stall"])
    def test_put_and_delete_survive(self, bucket: Storage, fault_proxy: FaultProxy, kind: str) -> None:
        fault_proxy.inject(kind, limit=1, match="PUT", seconds=1)
        bucket.put(bucket.root + "/x", b"other")
        fault_proxy.inject(kind, limit=1, match="DELETE", seconds=1)
        assert bucket.get(bucket.root + "/x").data == b"other"
        bucket.delete(bucket.root + "/x")
        assert not bucket.exists(bucket.root + "/x")
        assert fault_proxy.hits[kind] == 2

    @pytest.mark.parametrize("kind", ["unavailable", "reset_before", "reset_after", "stall"])
    def test_replacing_survives(self, bucket: Storage, fault_proxy: FaultProxy, kind: str) -> None:
        """After a reset whose outcome was unknown the object may be ours, which is success."""
        uri = bucket.root + "/x"
        bucket.put(uri, b"before")
        etag = bucket.get(uri).etag
        fault_proxy.inject(kind, limit=1, match="PUT", seconds=1)
        assert bucket.replace(uri, self.DATA, etag=etag) is True
        assert fault_proxy.hits[kind] == 1
        assert bucket.get(uri).data == self.DATA
        assert bucket.replace(uri, b"other", etag=etag) is False

    @pytest.mark.parametrize("kind", ["truncate", "unavailable", "reset_before", "stall"])
    def test_listing_survives(self, bucket: Storage, fault_proxy: FaultProxy, kind: str) -> None:
        bucket.put(bucket.root + "/folder/y", b"y")
        bucket.put(bucket.root + "/other/z", b"z")
        fault_proxy.inject(kind, limit=2, match="GET .*list-type", seconds=1)
        assert len(listed(bucket, bucket.root)) == 3
        assert fault_proxy.hits[kind] == 2

    def test_a_long_listing_goes_on_where_it_broke_off(self, bucket: Storage, fault_proxy: FaultProxy) -> None:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda n: bucket.put(f"{bucket.root}/many/{n:04}", b"x"), range(1050)))  # a page has 1,000
        fault_proxy.inject("truncate", limit=2, match="GET .*(start-after|continuation)", seconds=1)
        batches = list(bucket.list(bucket.root + "/many", parallel=1))
        uris = [uri for batch in batches for uri in batch["uri"].to_pylist()]
        assert len(uris) == len(set(uris)) == 1050
        assert fault_proxy.hits["truncate"] == 2

    def test_no_such_object_is_missing_even_where_that_answer_is_cut(
        self, bucket: Storage, fault_proxy: FaultProxy
    ) -> None:
        fault_proxy.inject("stall_body", limit=2, match="GET .*/nothing", seconds=1)
        assert kind_of(lambda: bucket.get(bucket.root + "/nothing")) == "missing"
        assert fault_proxy.hits["stall_body"] == 2

    def test_files_for_duckdb_survive(self, bucket: Storage, fault_proxy: FaultProxy) -> None:
        large = os.urandom(3 << 20)
        bucket.put(bucket.root + "/large", large)
        fault_proxy.clear()
        for kind in ("unavailable", "reset_after", "truncate"):
            fault_proxy.inject(kind, limit=2)
        fault_proxy.inject("flip", limit=1, match="GET .*/x")
        files = bucket.filesystem()
        assert files is not None
        assert files.cat_file(bucket.root + "/x") == self.DATA
        with files.open(bucket.root + "/large") as file:
            file.seek(-8, os.SEEK_END)
            assert file.read(8) == large[-8:]
            file.seek(1 << 20)
            assert file.read(1 << 20) == large[1 << 20 : 2 << 20]
        assert sum(fault_proxy.hits.values()) == 7

    @pytest.mark.parametrize("read", ["get", "cat_file", "open", "readall"])
    def test_a_flipped_bit_of_a_large_object_is_noticed(
        self, bucket: Storage, fault_proxy: FaultProxy, read: str
    ) -> None:
        large = os.urandom((1 << 20) + 1)
        uri = bucket.root + "/large"
        bucket.put(uri, large)
        fault_proxy.clear()
        fault_proxy.inject("flip", limit=1, match="GET .*/large")
        files = bucket.filesystem()
        assert files is not None
        calls: dict[str, Callable[[], bytes]] = {
            "get": lambda: bucket.get(uri).data,
            "cat_file": lambda: files.cat_file(uri),
            "open": lambda: files.open(uri).read(),
            "readall": lambda: files.open(uri).readall(),
        }
        assert calls[read]() == large
        assert fault_proxy.hits["flip"] == 1

    def test_a_large_object_whose_etag_is_no_digest_is_fetched_twice(
        self, bucket: Storage, fault_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        large = os.urandom((1 << 20) + 1)
        bucket.put(bucket.root + "/large", large)
        monkeypatch.setattr("pipeline.storage.bucket.clean_etag", lambda etag: "0" * 32)
        fault_proxy.clear()
        files = bucket.filesystem()
        assert files is not None
        assert files.cat_file(bucket.root + "/large") == large
        assert [request.split(" ")[0] for request in fault_proxy.requests] == ["HEAD", "GET", "GET"]
        assert files.cat_file(bucket.root + "/large", 5, -3) == large[5:-3]
        assert files.cat_file(bucket.root + "/large", -9) == large[-9:]

    def test_one_in_ten_of_everything(self, bucket: Storage, fault_proxy: FaultProxy) -> None:
        for kind in ("unavailable", "reset_before", "reset_after", "truncate", "flip"):
            fault_proxy.inject(kind, probability=0.1, match="(GET|PUT) .*/data")
        uris = [f"{bucket.root}/data/{n}" for n in range(60)]
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda uri: bucket.put_new(uri, uri.encode() * 100), uris))
            blobs = list(pool.map(bucket.get, uris))
        assert [blob.data for blob in blobs] == [uri.encode() * 100 for uri in uris]
        assert sum(fault_proxy.hits.values()) > 20

    def test_an_etag_that_is_no_digest_after_all(
        self, bucket: Storage, fault_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As with KMS keys: 32 hex digits, but not an MD5. It costs a second fetch, three times."""
        monkeypatch.setattr("pipeline.storage.bucket.clean_etag", lambda etag: "0" * 32)
        fetches = []
        for _ in range(5):
            fault_proxy.clear()
            assert bucket.get(bucket.root + "/x").data == self.DATA
            fetches.append(len(fault_proxy.requests))
        assert fetches == [2, 2, 2, 1, 1]

    def test_damage_that_never_ends_fails(self, bucket: Storage, fault_proxy: FaultProxy) -> None:
        fault_proxy.inject("flip", match="GET")
        with pytest.raises(StorageError, match="do not match") as caught:
            bucket.get(bucket.root + "/x")
        assert caught.value.kind == "fetch_failed"

    def test_a_dead_store_fails(
        self, bucket: Storage, fault_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("pipeline.storage.bucket._RETRIES_PER_REQUEST", 2)
        storage = open_storage(bucket.root)
        fault_proxy.inject("unavailable")
        assert kind_of(lambda: storage.get(bucket.root + "/x")) == "fetch_failed"
        assert kind_of(lambda: list(storage.list(bucket.root, parallel=1))) == "fetch_failed"
        assert kind_of(lambda: storage.head(bucket.root + "/x")) == "fetch_failed"

    def test_denied(self, bucket: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
        from obstore.exceptions import GenericError, PermissionDeniedError

        answers: Iterator[Exception] = iter(
            [
                PermissionDeniedError("Server returned non-2xx status code: 403 Forbidden: <Code>AccessDenied</Code>"),
                GenericError("Server returned non-2xx status code: 400 Bad Request: <Code>ExpiredToken</Code>"),
            ]
        )

        def refuse(*_: object, **__: object) -> None:
            raise next(answers)

        monkeypatch.setattr("obstore.get", refuse)
        for word in ("AccessDenied", "ExpiredToken"):
            with pytest.raises(StorageError, match=f"{word}.*credentials") as caught:
                bucket.get(bucket.root + "/x")
            assert caught.value.kind == "denied"


class TestDigestCheck:
    DATA = b"data"
    ETAG = hashlib.md5(DATA).hexdigest()
    OTHER = "0" * 32

    def test_a_match(self) -> None:
        assert DigestCheck().start().accepts(self.DATA, self.ETAG)

    @pytest.mark.parametrize("etag", ["", "abc", "0" * 32 + "-2", "3-1234567890123456789", ("0" * 31 + "G")])
    def test_other_etags_say_nothing(self, etag: str) -> None:
        assert DigestCheck().start().accepts(self.DATA, etag)

    def test_two_equal_fetches_are_accepted(self) -> None:
        attempts = DigestCheck().start()
        assert not attempts.accepts(b"damaged", self.OTHER)
        assert not attempts.accepts(self.DATA, self.OTHER)
        assert attempts.accepts(self.DATA, self.OTHER)

    def test_an_object_replaced_between_fetches_is_not_accepted_for_being_equal(self) -> None:
        attempts = DigestCheck().start()
        assert not attempts.accepts(self.DATA, "1" * 32)
        assert not attempts.accepts(self.DATA, self.OTHER)

    def test_after_several_in_a_row_it_is_off(self) -> None:
        check = DigestCheck()
        for _ in range(3):
            attempts = check.start()
            assert not attempts.accepts(self.DATA, self.OTHER)
            assert attempts.accepts(self.DATA, self.OTHER)
        assert not check.enabled
        assert check.start().accepts(self.DATA, self.OTHER)

    def test_a_match_in_between_keeps_it_on(self) -> None:
        check = DigestCheck()
        for _ in range(5):
            attempts = check.start()
            assert not attempts.accepts(self.DATA, self.OTHER)
            assert attempts.accepts(self.DATA, self.OTHER)
            assert check.start().accepts(self.DATA, self.ETAG)
        assert check.enabled


def merge(streams: list[Callable[[], Iterator[int]]], *, parallel: int) -> Iterator[int]:
    def read(jobs: Jobs[Callable[[], Iterator[int]]]) -> Iterator[int]:
        for stream in jobs:
            yield from stream()

    return spread(Jobs(streams, readers=parallel), read, parallel=parallel)


class TestSpread:
    def test_everything_arrives(self) -> None:
        streams = [lambda n=n: iter(range(n * 100, n * 100 + 100)) for n in range(20)]
        assert sorted(merge(streams, parallel=4)) == list(range(2000))

    def test_nothing_to_merge(self) -> None:
        assert list(merge([], parallel=4)) == []

    def test_an_error_is_raised_to_the_reader(self) -> None:
        def broken() -> Iterator[int]:
            yield 1
            raise StorageError("broken", kind="denied")

        with pytest.raises(StorageError, match="broken"):
            list(merge([broken, lambda: iter([2])], parallel=2))

    def test_closing_early_ends_the_threads(self) -> None:
        read = []

        def endless() -> Iterator[int]:
            while True:
                read.append(1)
                yield 1

        stream = merge([endless, endless], parallel=2)
        next(stream)
        stream.close()
        names = {"list-0", "list-1"}
        for thread in threading.enumerate():
            if thread.name in names:
                thread.join(5)
        assert not names & {thread.name for thread in threading.enumerate()}
        assert len(read) < 20  # they never ran far ahead

    def test_jobs_are_found_while_others_are_done(self) -> None:
        """A tree of numbers: n leads to 10 n ... 10 n + 9, below 10,000."""

        def read(jobs: Jobs[int]) -> Iterator[int]:
            for n in jobs:
                yield n
                if n < 1000:
                    jobs.add(*(10 * n + digit for digit in range(10) if n or digit))

        for parallel in (1, 2, 8):
            assert sorted(spread(Jobs([0], readers=parallel), read, parallel=parallel)) == list(range(10_000))

    def test_readers_flush_at_their_end(self) -> None:
        def read(jobs: Jobs[int]) -> Iterator[list[int]]:
            kept = []
            for n in jobs:
                kept.append(n)
                time.sleep(random.random() / 1000)
                if n < 100:
                    jobs.add(n + 100, n + 200)
            yield kept

        found = [n for some in spread(Jobs(range(100), readers=4), read, parallel=4) for n in some]
        assert sorted(found) == list(range(300))

    def test_more_readers_come_when_they_are_allowed(self) -> None:
        both = threading.Barrier(2, timeout=10)

        def read(jobs: Jobs[str]) -> Iterator[str]:
            for job in jobs:
                if job == "first":
                    assert not jobs.hungry()
                    jobs.add("other")
                    jobs.widen(2)
                both.wait()
                yield job

        assert sorted(spread(Jobs(["first"], readers=1), read, parallel=2)) == ["first", "other"]

    def test_an_error_ends_readers_that_wait(self) -> None:
        def read(jobs: Jobs[int]) -> Iterator[int]:
            for n in jobs:
                if n == 0:
                    time.sleep(0.1)
                    raise StorageError("broken", kind="denied")
                yield n

        with pytest.raises(StorageError, match="broken"):
            list(spread(Jobs([0, 1, 2], readers=3), read, parallel=3))
        for thread in threading.enumerate():
            if thread.name.startswith("list-"):
                thread.join(5)
                assert not thread.is_alive()


def test_failure_text_hides_what_may_be_secret() -> None:
    error = ValueError(
        "Error performing GET https://user:pass@host/key?X-Token=secret&y=1 in 3 ms\n\nDebug source: secret"
    )
    assert failure_text(error) == "Error performing GET https://host/key in 3 ms"


def test_listing_schema_is_the_manifest() -> None:
    assert [str(field.type) for field in LISTING_SCHEMA] == [
        "string",
        "string",
        "int64",
        "timestamp[us, tz=UTC]",
    ]
    assert pa.schema(LISTING_SCHEMA).names == ["uri", "etag", "size_bytes", "modified"]
