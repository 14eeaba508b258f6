"""Models, images, rows, Parts and plans made by hand, small and always the same; and DEST as pyarrow alone reads it."""

from __future__ import annotations

import datetime as dt
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.engine.ledger import Command, Plan, RunRecord, WorkCounts
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


def picture(seed: int, *, width: int = 40, height: int = 32) -> Image.Image:
    """A small picture of blobs, the same for the same seed."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.full((height, width, 3), 40.0)
    for _ in range(4):
        center_y, center_x, radius = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(3, 9)
        inside = (rows - center_y) ** 2 + (columns - center_x) ** 2 < radius**2
        pixels[inside] = rng.uniform(80, 255, 3)
    pixels += rng.normal(0, 6, pixels.shape)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def make_image(path: Path, seed: int, *, width: int = 40, height: int = 32) -> Path:
    """A small picture as a file, in the format that the name ends in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed, width=width, height=height).save(path)
    return path


def encoded_image(seed: int) -> bytes:
    """A small picture as the bytes of a PNG."""
    buffer = io.BytesIO()
    picture(seed).save(buffer, "PNG")
    return buffer.getvalue()


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


def make_record(plan: Plan, **changes: Any) -> RunRecord:
    """The record of a run that ended well."""
    fields: dict[str, Any] = {
        "state": "done", "closed_at": CREATED_AT, "plan": plan, "ok": 10, "errors": 0, "errors_by_kind": {}, "parts": 3,
        "parts_bytes": 300, "instances": 0, "megapixels": 1.0, "stage_ms": {}, "seconds": 1.0, "images_per_s": 10.0,
        "megapixels_per_s": 1.0, "model_busy_fraction": 0.5, "workers": [],
    }  # fmt: skip
    return RunRecord(**(fields | changes))


class EightBitRgb:
    """The half of a stand-in model that says which pixels it takes: 8-bit RGB, its edge repeated, no tiles."""

    input_dtype = np.dtype(np.uint8)
    input_channels = 3
    lies_as_it_is = True

    def fit(self, pixels: np.ndarray, out: np.ndarray) -> tuple[int, int]:
        height, width = pixels.shape[:2]
        bottom, right = out.shape[0] - height, out.shape[1] - width
        out[...] = np.pad(pixels, ((0, bottom), (0, right), (0, 0)), mode="edge")
        return height, width

    def mosaic(self, height: int, width: int) -> Any:
        return None

    def assemble(self, mosaic: Any) -> Any:
        raise NotImplementedError
