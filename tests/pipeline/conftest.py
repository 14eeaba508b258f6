"""Fixtures of the pipeline's tests: tiny models, folders of small images, an empty DEST, the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
from command_line import Maskmill, speaker
from handmade import make_image, make_model

from pipeline.engine import placement
from pipeline.engine.crew import InlineCrew
from pipeline.engine.ledger import Ledger
from pipeline.storage import normalize_uri, open_storage


@pytest.fixture(scope="session")
def semantic_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a tiny semantic model: classes background and object."""
    return make_model(tmp_path_factory.mktemp("models") / "tiny-semantic.safetensors", "semantic")


@pytest.fixture(scope="session")
def other_semantic_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another version of the same model."""
    return make_model(tmp_path_factory.mktemp("models") / "tiny-semantic-2.safetensors", "semantic", seed=1)


@pytest.fixture(scope="session")
def instance_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a tiny instance model."""
    return make_model(tmp_path_factory.mktemp("models") / "tiny-instance.safetensors", "instance")


@pytest.fixture
def image_folder(tmp_path: Path) -> Callable[..., Path]:
    """`image_folder(count, name="photos")`: a folder of `count` small images, JPEG and PNG by turns."""

    def make(count: int, name: str = "photos") -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        for index in range(count):
            suffix = ".png" if index % 2 else ".jpg"
            make_image(folder / f"{index:04d}{suffix}", index, width=33 + 7 * (index % 4), height=30 + 5 * (index % 3))
        return folder

    return make


@pytest.fixture
def memory_folder() -> Iterator[str]:
    """`memory://...`, empty before and after."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    yield "memory://place"
    files.store.clear()


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """The ledger of a new DEST on disk."""
    dest = normalize_uri(str(tmp_path / "dest"))
    return Ledger(open_storage(dest), dest)


@pytest.fixture
def maskmill(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Maskmill:
    """`maskmill(*arguments)` in this process, workers too."""
    monkeypatch.setattr(placement, "LocalCrew", InlineCrew)
    monkeypatch.setattr(placement, "gpu_count", lambda: 0)
    for name in ("MASKMILL_DEBUG", "MASKMILL_REGISTRY"):
        monkeypatch.delenv(name, raising=False)
    return speaker(monkeypatch, capfd)
