"""How near a run came to what its machine could do. Owns: the file of a machine's ceilings, the share of each that a
run reached, and which stage bounds it.
Must not know: how ceilings are measured (`ceilings` does that), how anything is shown.

A ceiling is the rate of one stage with nothing beside it, by the project's own code. A run's share of it is its images
per second, over the whole time that its driver worked, divided by the ceiling for images like its own. Stages on the
CPU share its cores, so their shares add up: `cores` is that sum. The network's rate, and the encoder's, are those of a
model with its settings.

What bounds a run is told by time, with ceilings or without: the model where it is hardly ever idle, else the stage in
which the threads beside it spend most of theirs.
"""

from __future__ import annotations

import datetime as dt
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.errors import StorageError, UsageError
from pipeline.storage import normalize_uri, open_storage

VARIABLE = "MASKMILL_LIMITS"

#: Above this share of the time that its workers had, a stage is said to bound the run.
_HARDLY_IDLE = 0.5

#: Where images are resized, the network's work does not grow with them: only those of nearly the sample's size compare.
_ALIKE = 0.2

Bound = Literal["start", "fetch", "decode", "model", "encode", "none"]


class StoreCeiling(BaseModel):
    """Reading from one store. Beyond objects of `mean_bytes` the bytes a second count, below them the objects."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    gets_per_s: float = Field(gt=0, description="Objects read, with many reads at once.")
    mean_bytes: float = Field(gt=0, description="Of these objects.")
    core_ms_per_get: float = Field(ge=0, description="CPU time of the reading processes for one of them.")
    listed_per_s: float | None = Field(gt=0, description="Objects listed; null where SOURCE was no folder or prefix.")


class Ceilings(BaseModel):
    """What one machine can do at most: `maskmill limits` measures it and writes it as JSON.

    Rates of the CPU are those of one core, rates of the model those of the whole machine without its GPUs, or of one
    GPU. Megapixels are of the images as they are stored, whatever the network is given. Settings are named by their
    `pipeline.engine.settings.setup_digest`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[2] = 2
    measured_at: dt.datetime
    node: str
    device: str = Field(description="cpu or cuda.")
    device_name: str
    cores: int = Field(ge=1)
    load: float = Field(description="Load average before it began: above 1, something else was at work.")
    source: str = Field(description="The images that were used.")
    stores: dict[str, StoreCeiling] = Field(description="By scheme and bucket: file:///, s3://photos/.")
    decode_mpx_per_core_s: dict[str, float] = Field(description="Megapixels a second and core, by image format.")
    encode_mpx_per_core_s: dict[str, float] = Field(
        description="From prediction to row, the same, by model and settings."
    )
    forward_mpx_per_s: dict[str, float] = Field(description="The network alone, by model, precision and settings.")
    megapixels: float = Field(gt=0, description="Of a mean image of those that went through the network.")
    write_mb_per_core_s: float = Field(gt=0, description="Megabytes of Parts a second and core.")


class RunLimits(BaseModel):
    """How near a run came to its limits; a part of its record.

    `time`: of what its workers' decoding threads and models had in time, the share that each stage took. `reached`: of
    each ceiling, the share that the run's images per second are; {} where no ceilings were given, or none fit.
    `ceilings`: the same in images per second. `measured`: what the ceilings are of, and what was not compared, and why.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bound_by: Bound
    why: str
    time: dict[str, float]
    reached: dict[str, float] = {}
    ceilings: dict[str, float] = {}
    measured: str = ""


class Traits(NamedTuple):
    """A run as its limits depend on it: what one driver did of it.

    `rows` in `seconds`. `stage_ms`, `image_bytes`, `part_bytes`, `megapixels` (by format): of a mean row. `threads`: of
    one worker, for decoding and encoding. `active_s`, `busy_s`: summed over workers. `listed` images in `listing_s`, 0
    where SOURCE was not listed. `store`: as in `Ceilings.stores`. `setup`: the digest of its settings. `resized`: the
    network is given images in one size, or nearly. `image_megapixels`: of a mean image, rows without a size left out.
    `workers`: as `Device` says them.
    """

    rows: int
    seconds: float
    stage_ms: Mapping[str, float]
    threads: int
    active_s: float
    busy_s: float
    listed: int
    listing_s: float
    store: str
    image_bytes: float
    part_bytes: float
    megapixels: Mapping[str, float]
    model: str
    precision: str
    setup: str
    resized: bool
    image_megapixels: float
    workers: Sequence[Mapping[str, Any]]


def read_ceilings(location: str | None) -> Ceilings | None:
    """The file at `location`, a path or URL, by default what MASKMILL_LIMITS names; None where neither is given.

    Raises UsageError where it is not there or is none; StorageError where its store fails.
    """
    location = location or os.environ.get(VARIABLE)
    if not location:
        return None
    uri = normalize_uri(location)
    try:
        return Ceilings.model_validate_json(open_storage(uri).get(uri).data)
    except StorageError as error:
        if error.kind != "missing":
            raise
        raise UsageError(f"there is no file of ceilings at {location}: `maskmill limits --out {location}`") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UsageError(
            f"{location} holds no ceilings of this Maskmill ({where}: {first['msg']}): make it anew with "
            f"`maskmill limits --out {location}`"
        ) from error


def write_ceilings(ceilings: Ceilings, location: str) -> None:
    """As JSON to `location`, a path or URL, replacing what is there. Raises UsageError where a local one cannot be
    written, StorageError."""
    uri = normalize_uri(location)
    try:
        open_storage(uri).put(uri, ceilings.model_dump_json(indent=1).encode())
    except StorageError as error:
        if "://" in location:
            raise
        raise UsageError(f"{location} cannot be written: {error}") from error


def assess(run: Traits, ceilings: Ceilings | None) -> RunLimits | None:
    """What bounds `run`, and the share of each ceiling that it reached. None for a run in which nothing was done."""
    if not run.rows or not run.seconds or not run.active_s:
        return None
    pool_s = run.threads * run.active_s
    time = {
        stage: round(run.stage_ms.get(stage, 0.0) / 1e3 * run.rows / pool_s, 4)
        for stage in ("fetch", "decode", "encode")
    }
    time["model"] = round(run.busy_s / run.active_s, 4)
    bound, why = _bound_by_time(run, time)
    if ceilings is None:
        return RunLimits(bound_by=bound, why=why, time=time)
    if trouble := _mismatch(run, ceilings):
        return RunLimits(bound_by=bound, why=why, time=time, measured=trouble)
    trouble = _unlike(run, ceilings)
    most = _ceilings_for(run, ceilings)
    rate = run.rows / run.seconds
    reached = {name: rate / ceiling for name, ceiling in most.items() if name != "list"}
    if "list" in most and run.listing_s:
        reached["list"] = run.listed / run.listing_s / most["list"]
    if bound in reached:
        why += f"; {reached[bound]:.0%} of its ceiling"
    if "cores" in reached:
        why += f"; the cores at {reached['cores']:.0%}"
    measured = f"{ceilings.device_name}, {ceilings.cores} cores, {ceilings.measured_at:%Y-%m-%d}"
    if trouble:
        left_out = ", ".join(name for name in ("model", "encode", "cores") if name not in most)
        measured += f"; {left_out} not compared: {trouble}"
    return RunLimits(
        bound_by=bound,
        why=why,
        time=time,
        reached={name: round(share, 4) for name, share in reached.items()},
        ceilings={name: round(ceiling, 3) for name, ceiling in most.items()},
        measured=measured,
    )


def _bound_by_time(run: Traits, time: Mapping[str, float]) -> tuple[Bound, str]:
    """Threads that fetch, decode and encode are one pool, which is as busy as the three together."""
    at_work_s = run.active_s / max(1, len(run.workers))
    if at_work_s < _HARDLY_IDLE * run.seconds:
        return "start", f"its workers were at work for {at_work_s:.1f} of {run.seconds:.1f} s"
    pool = sum(share for stage, share in time.items() if stage != "model")
    if time["model"] >= pool:
        bound: Bound = "model"
        share = time["model"]
    else:
        bound = max(("fetch", "decode", "encode"), key=lambda stage: time[stage])  # type: ignore[assignment]
        share = pool
    if share < _HARDLY_IDLE:
        return "none", f"the model was busy {time['model']:.0%} of the time, the threads beside it {pool:.0%}"
    if bound == "model":
        return bound, f"busy {share:.0%} of the time"
    return bound, f"{time[bound]:.0%} of the time of threads that were busy {pool:.0%}; the model {time['model']:.0%}"


def _mismatch(run: Traits, ceilings: Ceilings) -> str:
    """Why these are ceilings of other machines than the run's; "" where they are not."""
    for worker in run.workers:
        on_gpu = str(worker["device"]).startswith("cuda")
        if on_gpu != (ceilings.device == "cuda") or worker["name"] != ceilings.device_name:
            return f"not compared: the ceilings are of {ceilings.device_name}, a worker ran on {worker['name']}"
        if worker["cores"] != ceilings.cores:
            return f"not compared: the ceilings are of {ceilings.cores} cores, a worker had {worker['cores']}"
    return ""


def _unlike(run: Traits, ceilings: Ceilings) -> str:
    """Why the network, or the encoder, has no ceiling for such a run; "" where both have."""
    if not run.megapixels:
        return ""
    asked = f"{run.model} {run.precision} {run.setup}"
    if asked not in ceilings.forward_mpx_per_s or f"{run.model} {run.setup}" not in ceilings.encode_mpx_per_core_s:
        known = ", ".join(ceilings.forward_mpx_per_s)
        return f"the ceilings are of {known}, the run was of {asked} (model, precision, settings)"
    if _resized_from_another_size(run, ceilings):
        return (
            f"images are resized, those of the sample have {ceilings.megapixels:.3g} megapixels, those of the run "
            f"{run.image_megapixels:.3g}"
        )
    return ""


def _resized_from_another_size(run: Traits, ceilings: Ceilings) -> bool:
    return run.resized and abs(run.image_megapixels - ceilings.megapixels) > (_ALIKE + 1e-9) * ceilings.megapixels


def _ceilings_for(run: Traits, ceilings: Ceilings) -> dict[str, float]:
    """Images a second for images like those of `run`, of each stage alone and of all that share the cores. Stages
    without a ceiling are left out, and then there is none for the cores."""
    cores = ceilings.cores * len({worker["node"] for worker in run.workers})
    megapixels = sum(run.megapixels.values())
    comparable = not _resized_from_another_size(run, ceilings)
    core_s: dict[str, float | None] = {}
    if megapixels:
        rates = ceilings.decode_mpx_per_core_s
        known = all(name in rates for name in run.megapixels)
        core_s["decode"] = sum(size / rates[name] for name, size in run.megapixels.items()) if known else None
        encoding = ceilings.encode_mpx_per_core_s.get(f"{run.model} {run.setup}") if comparable else None
        core_s["encode"] = megapixels / encoding if encoding else None
    core_s["write"] = run.part_bytes / 1e6 / ceilings.write_mb_per_core_s
    most: dict[str, float] = {}
    forward = ceilings.forward_mpx_per_s.get(f"{run.model} {run.precision} {run.setup}") if comparable else None
    if forward and megapixels and ceilings.device == "cuda":
        most["model"] = forward * len(run.workers) / megapixels
    elif megapixels:
        core_s["model"] = megapixels / forward * ceilings.cores if forward else None
    store = ceilings.stores.get(run.store)
    beside_s = 0.0
    if store is not None:
        larger = max(1.0, run.image_bytes / store.mean_bytes)
        most["fetch"] = store.gets_per_s / larger
        if store.listed_per_s:
            most["list"] = store.listed_per_s
        beside_s = store.core_ms_per_get / 1e3 * larger
    on_cores = {name: seconds for name, seconds in core_s.items() if seconds}
    most |= {name: cores / seconds for name, seconds in on_cores.items()}
    if None not in core_s.values() and on_cores:
        most["cores"] = cores / (sum(on_cores.values()) + beside_s)
    return most
