"""Fixtures of runs from end to end."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_bench import Bench

from pipeline.engine import placement
from pipeline.engine.crew import InlineCrew


@pytest.fixture
def workers_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of its own costs a worker seconds; what it is for is tested in test_fleet and test_kills."""
    monkeypatch.setattr(placement, "LocalCrew", InlineCrew)
    monkeypatch.setattr(placement, "gpu_count", lambda: 0)


@pytest.fixture
def bench(tmp_path: Path, semantic_model: Path, workers_in_this_process: None) -> Bench:
    return Bench(tmp_path / "dest", semantic_model)
