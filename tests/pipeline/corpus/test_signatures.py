"""Which image an address is of, however it is signed."""

from __future__ import annotations

import pyarrow as pa
import pytest

from pipeline.corpus.signatures import ADDRESSES, identity, split_signatures
from pipeline.storage import LISTING_SCHEMA

AZURE = "sv=2023-11-03&st=2026-01-01&se=2026-02-01&sr=b&sp=r&spr=https&sig=SECRET%3D"
SIGNED = [
    ("https://b.s3.amazonaws.com/a%20b.jpg?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIA/x&X-Amz-Date=2026"
     "&X-Amz-Expires=600&X-Amz-SignedHeaders=host&X-Amz-Signature=SECRET", "https://b.s3.amazonaws.com/a%20b.jpg"),
    ("https://h/a.jpg?versionId=7&x-amz-signature=SECRET&X-Amz-Security-Token=T", "https://h/a.jpg?versionId=7"),
    ("https://h/a.jpg?AWSAccessKeyId=AKIA&Signature=SECRET&Expires=17", "https://h/a.jpg"),
    ("https://storage.googleapis.com/b/a.jpg?X-Goog-Credential=c&X-Goog-Signature=SECRET&generation=3",
     "https://storage.googleapis.com/b/a.jpg?generation=3"),
    ("https://storage.googleapis.com/b/a.jpg?GoogleAccessId=me&Expires=17&Signature=SECRET",
     "https://storage.googleapis.com/b/a.jpg"),
    (f"https://x.blob.core.windows.net/c/a.jpg?{AZURE}", "https://x.blob.core.windows.net/c/a.jpg"),
    ("https://d.cloudfront.net/a.jpg?size=9&Policy=p&Signature=SECRET&Key-Pair-Id=K", "https://d.cloudfront.net/a.jpg?size=9"),
    ("https://b.oss.aliyuncs.com/a.jpg?OSSAccessKeyId=k&Expires=1&Signature=SECRET", "https://b.oss.aliyuncs.com/a.jpg"),
    ("https://b.oss.aliyuncs.com/a.jpg?x-oss-process=image/resize,w_9&x-oss-signature=SECRET&x-oss-expires=1",
     "https://b.oss.aliyuncs.com/a.jpg?x-oss-process=image/resize,w_9"),
    ("https://me:SECRET@h/a.jpg", "https://h/a.jpg"),
    ("ftp://me:SECRET@h/a?b.jpg", "ftp://me@h/a?b.jpg"),
    ("ftp://me:SEC?RET@h/a.jpg", "ftp://me@h/a.jpg"),
    (f"abfs://c@account.dfs.core.windows.net/a.jpg?{AZURE}", "abfs://c@account.dfs.core.windows.net/a.jpg"),
    ("cached://https://me:SECRET@h/a.jpg", "cached://https://h/a.jpg"),
    ("https://h/proxy/https://me:SECRET@x/1.jpg", "https://h/proxy/https://x/1.jpg"),
    ("zip://a.jpg::https://me:p/SECRET@host/x.zip", "zip://a.jpg::https://host/x.zip"),
    ("zip://a.jpg::s3://AKIAIOSFODNN7EXAMPLE:SEC/RET@b/x.zip", "zip://a.jpg::s3://b/x.zip"),
    (f"zip://a@b?.jpg::https://me:SECRET@h/x.zip?id=7&{AZURE}", "zip://a@b?.jpg::https://h/x.zip?id=7"),
    ("simplecache::zip://a::s3://KEY:SECRET@b/x.zip", "simplecache::zip://a::s3://b/x.zip"),
]  # fmt: skip
PLAIN = [
    "https://h/get?key=a.jpg&token=9&expires=never", "https://h/a.jpg?signature=of-the-painter", "https://h/a.jpg?sig=1",
    "https://h/a.jpg?policy=x&se=1&sp=2", "s3://b/a.jpg?X-Amz-Signature=9", "file:///a?sig=1&sv=2", "abfs://c@acc.net/a",
    "https://h/a@b:c.jpg", "zip://a@b.jpg::https://h/x.zip?token=9", "https://h/a::b@c.jpg",
    "github://owner:first@main/a.png",
]  # fmt: skip


@pytest.mark.parametrize(("address", "image"), SIGNED)
def test_a_signature_says_nothing_of_the_image(address: str, image: str) -> None:
    assert identity(address) == image
    assert identity(image) == image


@pytest.mark.parametrize("address", PLAIN)
def test_what_may_say_which_image_it_is_stays(address: str) -> None:
    assert identity(address) == address


def test_a_batch_is_split_and_keeps_its_order() -> None:
    uris = [*PLAIN, *(address for address, _ in SIGNED)]
    count = len(uris)
    columns = {"uri": uris, "etag": ["e"] * count, "size_bytes": [1] * count, "modified": [None] * count}
    rows, signed = split_signatures(pa.RecordBatch.from_pydict(columns, schema=LISTING_SCHEMA))
    assert rows.column("uri").to_pylist() == [*PLAIN, *(image for _, image in SIGNED)]
    assert signed is not None and signed.schema == ADDRESSES
    assert [(row["address"], row["uri"]) for row in signed.to_pylist()] == SIGNED
    assert split_signatures(rows) == (rows, None)
