"""Stores that fsspec reaches: what they do beside the contract."""

from __future__ import annotations

import hashlib
import threading
import time
import uuid
from typing import Any

import pytest
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
