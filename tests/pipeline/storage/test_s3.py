"""S3: what it does beside the contract."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chaos.faultproxy import FaultProxy
from stores import LARGE_TREE, ODD_NAMES, S3_ONLY_NAMES, check_listing_requests, fill, kind_of, listed

from pipeline.errors import StorageError, UsageError
from pipeline.storage import Storage, open_storage


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
