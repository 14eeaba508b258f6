"""Google Cloud Storage, as far as a stand-in for its server goes."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from chaos.faultproxy import FaultProxy
from stores import LARGE_TREE, ODD_NAMES, S3_ONLY_NAMES, check_listing_requests, kind_of, listed

from pipeline.storage import Storage, open_storage


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
