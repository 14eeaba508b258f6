"""What tests of several stores ask, and names and trees that are hard on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline.errors import StorageError
from pipeline.storage import LISTING_SCHEMA, Storage

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
