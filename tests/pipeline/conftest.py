"""What tests of the pipeline share: tiny models, folders of small images, ready Parts and plans."""

from __future__ import annotations

import datetime as dt
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.engine.ledger import Command, Ledger, Plan, WorkCounts
from pipeline.storage import normalize_uri, open_storage
from pipeline.table.parts import PartBuilder
from pipeline.table.schema import WORK

CREATED_AT = dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.UTC)
SETTINGS_DIGEST = "5e771465d1e5"


def make_model(path: Path, task: str, *, seed: int = 0) -> Path:
    """An untrained network with fixed weights, as a model file."""
    import torch

    from models.architectures import build, untrained_card
    from models.file import save_model

    torch.manual_seed(seed)
    card = untrained_card(f"tiny-{task}", task=task)
    save_model(path, build(card).state_dict(), card)
    return path


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


def make_image(path: Path, seed: int, *, width: int = 40, height: int = 32) -> Path:
    """A small image of blobs, the same for the same seed, in the format that the name ends in."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    picture = np.full((height, width, 3), 40.0)
    for _ in range(4):
        center_y, center_x, radius = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(3, 9)
        inside = (rows - center_y) ** 2 + (columns - center_x) ** 2 < radius**2
        picture[inside] = rng.uniform(80, 255, 3)
    picture += rng.normal(0, 6, picture.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).save(path)
    return path


@pytest.fixture
def image_folder(tmp_path: Path) -> Callable[..., Path]:
    """`image_folder(count, name="photos")`: a folder of `count` small images of several sizes, JPEG and PNG by turns."""

    def make(count: int, name: str = "photos") -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        for index in range(count):
            suffix = ".png" if index % 2 else ".jpg"
            make_image(folder / f"{index:04d}{suffix}", index, width=33 + 7 * (index % 4), height=30 + 5 * (index % 3))
        return folder

    return make


def touch_later(path: Path) -> None:
    """Gives `path` another etag, whatever the resolution of the clock."""
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000_000))


def part_paths(dest: str | Path) -> list[Path]:
    """The Parts below DEST on disk, in the order of their names."""
    return sorted(Path(dest, "segments").rglob("*.parquet"), key=lambda path: path.name)


def rows_of(dest: str | Path) -> list[dict[str, Any]]:
    """Every row of the table on disk, read by pyarrow alone, sorted by image and time."""
    rows = [row for path in part_paths(dest) for row in pq.ParquetFile(path).read().to_pylist()]
    return sorted(rows, key=lambda row: (row["image_uri"], row["processed_at"]))


def answers_of(dest: str | Path) -> dict[str, tuple[Any, ...]]:
    """What the model said of each image, bit for bit, and nothing that may differ between runs. One row an image."""
    rows = rows_of(dest)
    answers = {
        row["image_uri"]: (row["status"], row["error_kind"], row["mask_crc32"], str(row["mask"]), str(row["classes"]),
                           str(row["instances"]), row["mean_confidence"], row["mean_entropy"])
        for row in rows
    }  # fmt: skip
    assert len(answers) == len(rows), "an image has more than one row"
    return answers


@pytest.fixture
def memory_folder() -> Iterator[str]:
    """`memory://...`, empty before and after."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    yield "memory://place"
    files.store.clear()


def make_row(uri: str, etag: str, status: str = "ok", **changes: Any) -> dict[str, Any]:
    """A row as a worker writes it; `status` is `ok` or an error kind."""
    row: dict[str, Any] = {
        "image_uri": uri,
        "image_etag": etag,
        "listed_etag": etag,
        "model_version": "0123456789ab",
        "settings_digest": SETTINGS_DIGEST,
        "run_id": "20260102T030405Z-abcdef",
        "task": "semantic",
        "attempt": 1,
        "processed_at": CREATED_AT,
        "image_bytes": 10,
        "image_modified": CREATED_AT,
        "status": "ok" if status == "ok" else "error",
    }
    if status != "ok":
        row |= {"error_kind": status, "error_message": f"it was {status}", "image_etag": ""}
    return row | changes


def make_part(rows: list[dict[str, Any]], *, model_name: str = "tiny-semantic") -> bytes:
    """The bytes of a Part of these rows."""
    builder = PartBuilder(model_name=model_name, card_json='{"name": "tiny"}')
    builder.add(rows)
    return bytes(builder.finish().data)


def make_list(uris: list[str], *, etag: str = "e1") -> bytes:
    """The bytes of a run's frozen list."""
    sink = pa.BufferOutputStream()
    rows = [{"uri": uri, "etag": etag, "size_bytes": 10, "modified": CREATED_AT, "attempt": 1} for uri in uris]
    pq.write_table(pa.Table.from_pylist(rows, WORK), sink)
    return bytes(sink.getvalue())


def make_plan(dest: str, **changes: Any) -> Plan:
    """A frozen run of 10 images in shards of 4; `planned` changes the number of images."""
    planned = changes.pop("planned", 10)
    fields: dict[str, Any] = {
        "run_id": "20260102T030405Z-abcdef",
        "sequence": 1,
        "created_at": CREATED_AT,
        "run_date": CREATED_AT.date(),
        "dest": dest,
        "command": Command(
            source="file:///photos",
            model_version="0123456789ab",
            precision="auto",
            suffixes=(".jpg",),
            max_pixels=1000,
            limit=None,
            retry_errors=False,
            force=False,
        ),
        "model_name": "tiny-semantic",
        "model_version": "0123456789ab",
        "card": {},
        "settings": {},
        "settings_digest": SETTINGS_DIGEST,
        "precision": "fp32",
        "batch_size": 8,
        "batch_pixels": 1 << 20,
        "threads": 1,
        "shard_size": 4,
        "canary": 0,
        "counts": WorkCounts(images=planned, left=planned, new=planned, planned=planned),
        "code_digest": "c0dec0dec0de",
    }
    return Plan(**(fields | changes))


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """The ledger of a new DEST on disk."""
    dest = normalize_uri(str(tmp_path / "dest"))
    return Ledger(open_storage(dest), dest)
