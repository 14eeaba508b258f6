"""What a driver and its workers say to each other: what a worker is told, its tasks and its answers. Owns: these types,
and the digest by which both know that they run the same code. Must not know: networks, PyTorch, whose import takes
longer than all that a driver does before its workers are up.
"""

from __future__ import annotations

import functools
import hashlib
from importlib import resources
from typing import Any, NamedTuple

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, JsonValue

from pipeline.config import Precision
from pipeline.engine.breaker import WINDOW_IMAGES


class StreamConfig(BaseModel):
    """How a stream works. `batch_size` and `batch_pixels` are the frozen batch shape; the rest changes only the
    speed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    batch_size: int = Field(8, ge=1, description="Slots of a batch, at most.")
    batch_pixels: int = Field(4 << 20, ge=1, description="Pixels of a batch, at most; a larger image goes alone.")
    memory_bytes: int = Field(1 << 30, ge=1, description="Bytes of batches in flight; one larger batch goes alone.")
    threads: int = Field(2, ge=1, description="Threads that decode and encode.")
    fetch_threads: int = Field(0, ge=0, description="Fetches in flight; 0: the decoding threads read by themselves.")
    max_pixels: int = Field(200_000_000, ge=1, description="Larger images become `too_large`.")
    max_tiled_pixels: int = Field(4_000_000_000, ge=1, description="The same, for TIFFs that are read in tiles.")
    breaker_images: int = Field(
        WINDOW_IMAGES, ge=1, description="Outcomes over which failures of the world are watched."
    )
    listed: bool = Field(True, description="A listing has shown the images: one that is missing has gone since then.")


class StreamCounts(NamedTuple):
    """What a stream has done since it began: `busy_s` of the model's `active_s`, and rows made. Of the images that are
    in tiles at this moment: how many there are, and how many have been through the model."""

    rows: int
    errors: int
    busy_s: float
    active_s: float
    tiles: int = 0
    tiles_done: int = 0


class WorkerSpec(BaseModel):
    """All that a worker process must be told; the model's bytes travel beside it. Holds no secret."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    code_digest: str
    dest: str
    create_only: bool
    source_profile: str | None
    dest_profile: str | None
    model_name: str
    model_version: str
    settings_digest: str
    card_settings: dict[str, JsonValue] = {}
    compile: bool = False
    run_id: str
    precision: Precision
    threads: int
    stream: StreamConfig


class ShardTask(NamedTuple):
    """A shard to do. `probe`: run everything, write nothing. `killers`: positions that must not be touched again.
    `accept`: commit it even where most of its images fail for the world's reasons."""

    ordinal: int
    refs: pa.Table
    part_uri: str
    probe: bool = False
    killers: frozenset[int] = frozenset()
    accept: bool = False


class Receipt(NamedTuple):
    """What became of a shard: counts and timings, never pixels. `created` is false where the Part was there already.

    `doubtful`: more than half of its images failed for the world's reasons, and nothing was written. `world_example`:
    what happened to one of these.
    """

    ordinal: int
    rows: int
    size_bytes: int
    created: bool
    node: str
    counts: StreamCounts
    world_failures: int = 0
    doubtful: bool = False
    world_example: str = ""


class Device(NamedTuple):
    """What a worker runs on."""

    node: str
    device: str
    name: str
    bf16: bool
    cores: int
    software: dict[str, str]


@functools.cache
def code_digest() -> str:
    """First 12 hex of the SHA-256 over this installation's `models` and `pipeline` sources: driver and actors must
    agree."""
    digest = hashlib.sha256()
    for package in ("models", "pipeline"):
        root = resources.files(package)
        for path in sorted(_sources(root)):
            digest.update(path.encode())
            digest.update(root.joinpath(path).read_bytes())
    return digest.hexdigest()[:12]


def _sources(root: Any, prefix: str = "") -> list[str]:
    found: list[str] = []
    for entry in root.iterdir():
        if entry.is_dir() and entry.name != "__pycache__":
            found.extend(_sources(entry, f"{prefix}{entry.name}/"))
        elif entry.name.endswith(".py"):
            found.append(prefix + entry.name)
    return found
