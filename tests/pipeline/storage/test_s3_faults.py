"""S3 behind a proxy that breaks things."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from chaos.faultproxy import FaultProxy
from expiring_profile import ExpiringProfile
from stores import kind_of, listed

from pipeline.errors import ExpiredCredentialsError, StorageError
from pipeline.storage import Storage, open_storage


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

    def test_a_long_listing_goes_on_where_it_broke_off(
        self, fault_proxy: FaultProxy, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("MASKMILL_STORAGE_TIMEOUT_S")  # a busy server takes a while for such a page
        bucket = open_storage(s3_bucket)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda n: bucket.put(f"{bucket.root}/many/{n:04}", b"x"), range(1050)))  # a page has 1,000
        fault_proxy.inject("truncate", limit=2, match="GET .*(start-after|continuation)")
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

    def test_credentials_that_expire_and_are_renewed(
        self, bucket: Storage, fault_proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Each call by a client that has taken the old ones before."""
        profile = ExpiringProfile(tmp_path, f"http://127.0.0.1:{fault_proxy.port}", monkeypatch)
        uri, odd = bucket.root + "/x", bucket.root + "//x"
        calls: list[Callable[[Storage], object]] = [
            lambda storage: storage.get(uri),
            lambda storage: storage.head(uri),
            lambda storage: list(storage.list(bucket.root)),
            lambda storage: storage.put(uri, self.DATA),
            lambda storage: storage.put(odd, self.DATA),
            lambda storage: storage.put_new(uri + "1", b"1") or pytest.fail("it was there"),
            lambda storage: storage.put_new(odd + "1", b"1") or pytest.fail("it was there"),
            lambda storage: storage.put_stream(uri, lambda: [self.DATA]),
            lambda storage: storage.replace(uri, self.DATA, etag=storage.head(uri).etag) or pytest.fail("not replaced"),
            lambda storage: storage.filesystem().cat(uri),  # type: ignore[union-attr]
            lambda storage: storage.delete(uri + "1"),
        ]
        storages = [open_storage(bucket.root) for _ in calls]
        for storage in storages:
            storage.get(uri)
            storage.put(uri, self.DATA)
        profile.renew()
        fault_proxy.inject("expired", key="old")
        for call, storage in zip(calls, storages, strict=True):
            call(storage)
        assert fault_proxy.hits["expired"] >= len(calls)
        assert bucket.get(odd).data == self.DATA and not bucket.exists(uri + "1")

    def test_credentials_that_expire_and_are_not_renewed(
        self, bucket: Storage, fault_proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ExpiringProfile(tmp_path, f"http://127.0.0.1:{fault_proxy.port}", monkeypatch)
        storage = open_storage(bucket.root)
        fault_proxy.inject("expired", key="old")
        for call in (
            lambda: storage.get(bucket.root + "/x"),
            lambda: list(storage.list(bucket.root)),
            lambda: storage.put_new(bucket.root + "/new", b"1"),
            lambda: storage.put(bucket.root + "//x", b"1"),
        ):
            with pytest.raises(
                ExpiredCredentialsError, match=r"ExpiredToken.*; renew the credentials and give the same"
            ):
                call()
        assert fault_proxy.hits["expired"] <= 5, "it was asked again and again"

    def test_denied(self, bucket: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
        from obstore.exceptions import PermissionDeniedError

        def refuse(*_: object, **__: object) -> None:
            raise PermissionDeniedError("Server returned non-2xx status code: 403 Forbidden: <Code>AccessDenied</Code>")

        monkeypatch.setattr("obstore.get", refuse)
        with pytest.raises(StorageError, match=r"AccessDenied.*credentials") as caught:
            bucket.get(bucket.root + "/x")
        assert caught.value.kind == "denied"
