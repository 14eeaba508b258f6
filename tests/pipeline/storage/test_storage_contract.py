"""The same contract for every store."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pytest
from stores import ODD_NAMES, kind_of, listed

from pipeline.errors import StorageError, UsageError
from pipeline.storage import LISTING_SCHEMA, Storage, join_uri, open_storage


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "inf"])
def test_a_patience_that_is_no_number_of_seconds_is_wrong_usage(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKMILL_STORAGE_TIMEOUT_S", text)
    with pytest.raises(UsageError, match=f"MASKMILL_STORAGE_TIMEOUT_S is '{text}'"):
        open_storage("s3://bucket/photos")


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


def test_listing_schema_is_the_manifest() -> None:
    assert [str(field.type) for field in LISTING_SCHEMA] == [
        "string",
        "string",
        "int64",
        "timestamp[us, tz=UTC]",
    ]
    assert pa.schema(LISTING_SCHEMA).names == ["uri", "etag", "size_bytes", "modified"]
