"""Versions of one model, and a registry to put them into."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import write_tiny_model


@pytest.fixture(scope="session")
def street(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The files of four versions of the model `street`."""
    folder = tmp_path_factory.mktemp("street")
    return [write_tiny_model(folder / f"{seed}.safetensors", name="street", seed=seed) for seed in range(4)]


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a registry that is not there yet; the environment names none."""
    monkeypatch.delenv("MASKMILL_REGISTRY", raising=False)
    return tmp_path / "registry"
