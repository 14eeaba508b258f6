"""Listings of large buckets: in parallel, whole, in few requests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.storage.bucket_listing import BucketListing, KeyRange
from pipeline.storage.parallel import Jobs, spread


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
