"""Where scenes are played: on disk, in memory, in a bucket."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from chaos.killed_calls import Place

from pipeline.storage import file_uri


@pytest.fixture
def empty_memory() -> Iterator[str]:
    """`memory://...`, empty before and after."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    yield "memory://place"
    files.store.clear()


@pytest.fixture(params=["disk", "memory", pytest.param("s3", marks=pytest.mark.s3)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "disk":
        return Place(file_uri(str(tmp_path)))
    if request.param == "memory":
        return Place(request.getfixturevalue("empty_memory"))
    return Place(request.getfixturevalue("s3_bucket"), request.getfixturevalue("s3_client"))
