"""Stores that fsspec reaches: what they do beside the contract."""

from __future__ import annotations

import hashlib
import os
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
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


class _Breaking:
    """Of a file system's writes, every one breaks off half way until told otherwise, as a line that drops does."""

    protocol = "breaking"
    cachable = False
    breaks = True
    left = "half"

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return LocalFileSystem._strip_protocol(
            path.replace("breaking://", "file://") if isinstance(path, str) else path
        )

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        if mode == "create" and Path(path).exists():
            raise FileExistsError(path)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        whole = not _Breaking.breaks or _Breaking.left == "whole"
        Path(path).write_bytes(value if whole else value[: len(value) // 2])
        if _Breaking.breaks:
            raise OSError("connection reset")


class _Server(_Breaking, LocalFileSystem):  # type: ignore[misc]
    """Files can be moved, as on SFTP."""


class _Objects(_Breaking, LocalFileSystem):  # type: ignore[misc]
    """They cannot, as in most object stores."""

    mv = AbstractFileSystem.mv


@pytest.fixture(params=[_Server, _Objects], ids=["moves", "cannot move"])
def breaking_uri(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    fsspec.register_implementation("breaking", request.param, clobber=True)
    monkeypatch.setattr(_Breaking, "breaks", True)
    return f"breaking://{tmp_path}/place"


def test_what_breaks_off_is_not_there(breaking_uri: str, tmp_path: Path) -> None:
    """A half Part under its own name would count as committed for ever."""
    storage, uri = open_storage(breaking_uri), f"{breaking_uri}/segments/part.parquet"
    with pytest.raises(StorageError, match="connection reset"):
        storage.put_new(uri, b"PAR1 and more")
    assert not storage.exists(uri)
    _Breaking.breaks = False
    assert storage.put_new(uri, b"PAR1 and more")
    assert not storage.put_new(uri, b"PAR1 and else")
    assert storage.get(uri).data == b"PAR1 and more"
    assert [path.name for path in (tmp_path / "place").rglob("*") if path.is_file()] == ["part.parquet"]


def test_what_arrived_though_the_answer_was_lost_is_there(breaking_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, uri = open_storage(breaking_uri), f"{breaking_uri}/segments/part.parquet"
    monkeypatch.setattr(_Breaking, "left", "whole")
    try:
        assert not storage.put_new(uri, b"PAR1 and more")
    except StorageError:
        assert not storage.exists(uri)  # it was not moved yet
    else:
        assert storage.get(uri).data == b"PAR1 and more"


def test_what_a_killed_process_left_goes_after_a_day(breaking_uri: str, tmp_path: Path) -> None:
    _Breaking.breaks = False
    old, young = (tmp_path / "place" / "_tmp" / name for name in ("old", "young"))
    for path in (old, young):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 25 * 3600,) * 2)
    storage = open_storage(breaking_uri)
    assert storage.check_create_only() is False
    assert young.exists()
    assert old.exists() == (type(storage.filesystem()) is _Objects)
