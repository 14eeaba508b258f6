"""What all tests of stores are given."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from pipeline.storage import Storage, open_storage


@pytest.fixture(params=["disk", "memory", pytest.param("s3", marks=pytest.mark.s3)])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """A store of each sort, opened for an empty root. The names show that nothing is decoded on the way."""
    if request.param == "disk":
        (tmp_path / "root %20#").mkdir()
        return open_storage(f"file://{tmp_path}/root %20#")
    if request.param == "memory":
        return open_storage(f"memory://test-{uuid.uuid4().hex}/root")
    return open_storage(request.getfixturevalue("s3_bucket") + "/root %20#")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stalls are noticed after a moment."""
    monkeypatch.setenv("MASKMILL_STORAGE_TIMEOUT_S", "0.3")
