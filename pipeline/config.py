"""What a user may choose. Owns: the frozen models that the CLI, Prefect's parameter form and Python share.
Must not know: how anything is done.
"""

from __future__ import annotations

import datetime as dt
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

Precision = Literal["fp32", "bf16", "fp16"]
PrecisionChoice = Literal["auto", "fp32", "bf16", "fp16"]
Engine = Literal["auto", "local", "ray"]

# Shared by all that hand them on. More than any machine has would be refused later, in the words of a library.
Actors = Annotated[int, Field(ge=1, le=100_000)]
GpusPerActor = Annotated[float, Field(ge=0, le=1024, allow_inf_nan=False)]
Threads = Annotated[int, Field(ge=1, le=1024)]
MOST_BATCH_IMAGES = 16_384
BatchSize = Annotated[int, Field(ge=1, le=MOST_BATCH_IMAGES)]
ShardSize = Annotated[int, Field(ge=1, le=1_000_000_000)]
ImageCount = Annotated[int, Field(ge=1, le=1_000_000_000_000)]
MaxPixels = Annotated[int, Field(ge=1, le=1_000_000_000_000)]
MemoryBytes = Annotated[int, Field(ge=1 << 20, le=1 << 44)]
LeaseTtl = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]

DEFAULT_SUFFIXES: tuple[str, ...] = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class DriftConfig(BaseModel):
    """When a run counts as drifted."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    runs: int = Field(7, ge=1, le=10_000, description="Compare with this many comparable runs before, at most.")
    psi_threshold: float = Field(
        0.2, gt=0, allow_inf_nan=False, description="A smaller PSI is no drift. 0.1 is small, above 0.25 large."
    )
    ks_threshold: float = Field(0.15, gt=0, lt=1, description="A smaller KS statistic is no drift.")
    alpha: float = Field(
        0.001, gt=0, lt=1, description="Chance of a false alarm for a whole run of the same distribution, at most."
    )
    bins: int = Field(10, ge=2, le=1000, description="Bins of the PSI, of equal share in the earlier runs.")
    least_images: int = Field(
        50, ge=10, le=1_000_000_000, description="With fewer images on either side nothing is said."
    )
    sample_images: int = Field(
        100_000, ge=1000, le=100_000_000, description="About so many images a side are looked at."
    )


class SegmentConfig(BaseModel):
    """One `maskmill segment` command. Holds no secret: credentials come from the environment and named profiles."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = Field(description="A folder, a glob, one file, a URL, or a manifest of URIs.")
    dest: str = Field(description="Where the table lives: a folder or a URL.")
    model: str = Field(
        description="A model's name, name@version or name@alias, or the path or URL of a .safetensors file."
    )
    registry: str | None = Field(
        None, description="A folder or URL with models by name. Default: MASKMILL_REGISTRY, then what ships."
    )
    engine: Engine = Field("auto", description="local: processes on this machine; ray: actors on a Ray cluster.")
    actors: Actors | None = Field(
        None, description="How many workers at most. Default: one per GPU, or one per CPU core."
    )
    gpus_per_actor: GpusPerActor | None = Field(None, description="GPUs for each actor; fractions share a GPU.")
    batch_size: BatchSize | None = Field(
        None, description="Images per forward pass at most (default 32 on a GPU, 2 on a CPU). Frozen."
    )
    shard_size: ShardSize | None = Field(None, description="Images per shard, and so per Parquet file.")
    threads: Threads | None = Field(None, description="CPU threads of each worker's network. Frozen in the run.")
    precision: PrecisionChoice = Field("auto", description="auto: bf16 where the device has it in hardware, else fp32.")
    compile: bool = Field(
        False, description="torch.compile, for each shape of batch once: faster on long runs, other last bits. Frozen."
    )
    limit: ImageCount | None = Field(None, description="Process at most this many of the images that are left.")
    canary: ImageCount | None = Field(
        None, description="Process this many first; go on only if their error rate is fine."
    )
    dry_run: bool = Field(False, description="Only print the plan.")
    retry_errors: bool = Field(False, description="Take up again all images that failed and were never done.")
    force: bool = Field(False, description="Process every image of SOURCE again.")
    max_error_rate: float = Field(0.05, ge=0, le=1, description="Above this share of errors the exit status is 3.")
    report: bool = Field(True, description="Leave an HTML report beside the record of every run that is closed.")
    drift: DriftConfig = Field(
        DriftConfig(), description="When a run counts as unlike those before it, in its report and for whoever is told."
    )
    limits: str | None = Field(
        None,
        description="File or URL of this machine's ceilings, from `maskmill limits`, for the run's record to compare "
        "with. Default: MASKMILL_LIMITS.",
    )
    wait: bool = Field(False, description="Wait for a run that another live driver holds, instead of giving up.")
    ray_address: str | None = Field(None, description="Address of a running Ray cluster.")
    source_profile: str | None = Field(None, description="AWS profile for SOURCE.")
    dest_profile: str | None = Field(None, description="AWS profile for DEST.")
    registry_profile: str | None = Field(None, description="AWS profile for the model and its registry.")
    shared_filesystem: bool = Field(False, description="Local paths mean the same on every node of the cluster.")
    suffixes: tuple[str, ...] = Field(DEFAULT_SUFFIXES, description="File endings that count as images in a listing.")
    run_date: dt.date | None = Field(None, description="The date that the run files under. Default: today, UTC.")
    settings: dict[str, JsonValue] = Field(
        {}, description="What this run changes of the model's card: size_policy, postprocessing, cleanup and the like."
    )
    max_pixels: MaxPixels = Field(
        200_000_000,
        description="Larger images become `too_large` rows (TIFFs that are read in tiles may be larger).",
    )
    memory_bytes: MemoryBytes = Field(1 << 30, description="Decoded pixels in flight in one worker, at most.")
    lease_ttl_s: LeaseTtl = Field(30.0, description="A lease that stands still this long is dead.")
    drain_timeout_s: float = Field(
        30.0,
        ge=0,
        le=86_400,
        allow_inf_nan=False,
        description="On Ctrl-C, how long shards in flight may take to finish.",
    )
