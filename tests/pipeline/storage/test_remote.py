"""Stores that fsspec reaches: what they do beside the contract."""

from __future__ import annotations

import hashlib
import os
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
from chaos.torn_files import KINDS, Break, torn_line
from dying_storage import KilledError
from stores import kind_of, listed

from pipeline.errors import StorageError
from pipeline.storage import open_storage


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


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_what_breaks_off_is_not_there(kind: str, tmp_path: Path) -> None:
    """A half Part under its own name would count as committed for ever."""
    root = f"torn://{tmp_path}/place"
    uri = f"{root}/segments/part.parquet"
    with torn_line(kind, str(tmp_path), lambda call: "half"):
        storage = open_storage(root)
        with pytest.raises(StorageError, match="the connection was reset"):
            storage.put_new(uri, b"PAR1 and more")
        assert not storage.exists(uri)
    with torn_line(kind, str(tmp_path)):
        assert storage.put_new(uri, b"PAR1 and more")
        assert not storage.put_new(uri, b"PAR1 and else")
        assert storage.get(uri).data == b"PAR1 and more"
    assert [path.name for path in (tmp_path / "place").rglob("*") if path.is_file()] == ["part.parquet"]


def test_what_arrived_though_the_answer_was_lost_is_there(kind: str, tmp_path: Path) -> None:
    root = f"torn://{tmp_path}/place"
    uri = f"{root}/segments/part.parquet"
    with torn_line(kind, str(tmp_path), lambda call: "whole"):
        storage = open_storage(root)
        try:
            assert not storage.put_new(uri, b"PAR1 and more")
        except StorageError:
            assert not storage.exists(uri)  # it was not moved yet
        else:
            assert storage.get(uri).data == b"PAR1 and more"


def test_what_replaces_is_old_or_new(tmp_path: Path) -> None:
    """A Part that is forgotten from holds rows that are nowhere else."""
    root = f"torn://{tmp_path}/place"
    uri = f"{root}/part.parquet"
    with torn_line("moves", str(tmp_path)):
        storage = open_storage(root)
        storage.put(uri, b"the old rows")
    breaks: tuple[Break, ...] = ("half", "kill", "whole")
    for how in breaks:
        with (
            torn_line("moves", str(tmp_path), lambda call, how=how: how),  # type: ignore[misc]
            pytest.raises(KilledError if how == "kill" else StorageError),
        ):
            storage.put(uri, b"the new")
        with torn_line("moves", str(tmp_path)):
            assert storage.get(uri).data == b"the old rows"
    with (
        torn_line("moves", str(tmp_path), lambda call: "whole" if call.method == "mv" else None),
        pytest.raises(StorageError),
    ):
        storage.put(uri, b"the new")
    with torn_line("moves", str(tmp_path)):
        assert storage.get(uri).data == b"the new"


@pytest.mark.parametrize("says_so", [True, False], ids=["SMB", "WebHDFS"])
def test_files_that_cannot_be_moved_over_others_are_written_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says_so: bool
) -> None:
    uri = f"torn://{tmp_path}/place/lease.json"
    with torn_line("moves", str(tmp_path)):
        storage = open_storage(f"torn://{tmp_path}/place")
        files: Any = storage.filesystem()
        move = files.mv

        def over_nothing(path1: str, path2: str) -> None:
            if not files.exists(path2):
                move(path1, path2)
            elif says_so:
                raise FileExistsError(path2)

        monkeypatch.setattr(files, "mv", over_nothing)
        for data in (b"1", b"2"):
            storage.put(uri, data)
            assert storage.get(uri).data == data
        storage.put_stream(uri, lambda: [b"3", b"4"])
        assert storage.get(uri).data == b"34"
        assert storage.replace(uri, b"5", etag=storage.head(uri).etag) and storage.get(uri).data == b"5"
        assert not storage.put_new(uri, b"6") and storage.get(uri).data == b"5"
    assert [path.name for path in (tmp_path / "place").rglob("*") if path.is_file()] == ["lease.json"]


def test_a_file_may_be_its_own_root(kind: str, tmp_path: Path) -> None:
    """As of a report: `--out sftp://host/report.html`."""
    uri = f"torn://{tmp_path}/page.html"
    with torn_line(kind, str(tmp_path)):
        for data in (b"1", b"2"):
            open_storage(uri).put(uri, data)
            assert open_storage(uri).get(uri).data == data
        open_storage(uri).put_stream(uri, lambda: [b"3"])
        assert not open_storage(uri).put_new(uri, b"4")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["page.html"]


def test_what_a_killed_process_left_goes_after_a_day(kind: str, tmp_path: Path) -> None:
    old, young = (tmp_path / "place" / "_tmp" / name for name in ("old", "young"))
    for path in (old, young):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 25 * 3600,) * 2)
    with torn_line(kind, str(tmp_path)):
        assert open_storage(f"torn://{tmp_path}/place").check_create_only() is False
    assert young.exists()
    assert old.exists() == (kind == "cannot move")
