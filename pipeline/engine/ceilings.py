"""What this machine can do at most: each stage of the stream by itself, on a sample of somebody's own images. Owns: the
sample, the stages, their timing.
Must not know: runs, Ray, how a file of ceilings is used (`limits` does that) or shown.

Stages of the CPU are measured in as many processes as there are cores, at the same time, since cores slow each other
down; the network in each of them with one thread, as workers without a GPU have it, or in one with the GPU.
"""

from __future__ import annotations

import datetime as dt
import logging
import os
import socket
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import JsonValue

from models.mosaic import DetectionMosaic, Mosaic
from pipeline.config import DEFAULT_SUFFIXES, MOST_BATCH_IMAGES, PrecisionChoice
from pipeline.engine.batches import Batch, Rack, Shape
from pipeline.engine.forward import Forward
from pipeline.engine.intake import Tiles, place_image, size_of
from pipeline.engine.limits import Ceilings
from pipeline.engine.messages import StreamConfig, WorkerSpec
from pipeline.engine.rows import Picture, Ref, RowMaker
from pipeline.engine.settings import asked_of, settings_of, setup_digest
from pipeline.engine.store_ceilings import (
    Read,
    ceiling_of,
    check_seconds,
    in_processes,
    listing_of,
    rate,
    read_all,
    sample_of,
)
from pipeline.engine.worker import describe_device, load_segmenter
from pipeline.errors import ImageError, UsageError
from pipeline.machine import cores, gpu_count
from pipeline.registry import Model, resolve
from pipeline.storage import Blob, recorded_uri, store_root
from pipeline.table.parts import PartBuilder

log = logging.getLogger(__name__)

_SAMPLE_PIXELS = 4_000_000
_ROWS_TO_WRITE = 1000
_MAX_PIXELS = 1_000_000_000


class _Asked(NamedTuple):
    """What a measuring process is told."""

    uris: list[str]
    model: Model
    spec: WorkerSpec
    seconds: float
    profile: str | None


class _Measured(NamedTuple):
    """What one process found. Rates per core, but `forward_mpx_per_s` per process."""

    read: Read
    decode: dict[str, float]
    forward_mpx_per_s: float
    encode: float
    write: float
    image_megapixels: float


class _Canvas(NamedTuple):
    """An image, or a tile of one, on its canvas."""

    image: int
    window: Any
    shape: Shape
    pixels: np.ndarray
    size: tuple[int, int]
    image_size: tuple[int, int]
    statistics: tuple[float, float]


def measure(
    source: str,
    model: str,
    *,
    scratch: Path,
    registry: str | None = None,
    precision: PrecisionChoice = "auto",
    settings: Mapping[str, JsonValue] | None = None,
    compile: bool = False,
    batch_size: int | None = None,
    seconds: float = 3.0,
    suffixes: Sequence[str] = DEFAULT_SUFFIXES,
    profile: str | None = None,
) -> Ceilings:
    """Ceilings of this machine for images like those of SOURCE and for `model`, with `settings` in its card as a run
    would have them; each stage takes about `seconds`.

    Reads SOURCE, writes nothing but in the folder `scratch`. Raises UsageError where SOURCE or the model does not
    exist, `settings` do not fit it, or no image of the sample can be read and decoded; InfrastructureError where a
    store fails or a measuring process dies. Safe to repeat: figures differ by the machine's mood.
    """
    if batch_size is not None and not 1 <= batch_size <= MOST_BATCH_IMAGES:
        raise UsageError(f"--batch-size is {batch_size}: give 1 to {MOST_BATCH_IMAGES:,}")
    check_seconds(seconds)
    shipped = resolve(model, registry=registry)
    resolved = asked_of(shipped, settings or {})
    load = os.getloadavg()[0]
    corpus, listed_per_s = listing_of(source, scratch, seconds, suffixes, profile)
    uris = sample_of(corpus)
    (device,) = in_processes(1, describe_device)
    on_gpu = gpu_count() > 0 and device.device.startswith("cuda")
    if precision == "auto":
        precision = "bf16" if device.bf16 else "fp32"
    spec = WorkerSpec(
        code_digest="", dest="", create_only=True, source_profile=profile, dest_profile=None,
        model_name=resolved.card.name, model_version=resolved.version, settings_digest="", run_id="",
        card_settings=dict(settings or {}), compile=compile, precision=precision,
        threads=1, stream=StreamConfig(batch_size=batch_size or (32 if on_gpu else 2)),
    )  # fmt: skip
    asked = _Asked(uris, resolved, spec, seconds, profile)
    found = in_processes(1 if on_gpu else cores(), _measure_here, asked)
    name = f"{resolved.card.name}@{resolved.version}"
    setup = setup_digest(
        settings_of(shipped.card, resolved.card, precision=precision, max_pixels=_MAX_PIXELS, compile=compile)
    )
    return Ceilings(
        measured_at=dt.datetime.now(dt.UTC).replace(microsecond=0),
        node=socket.gethostname(),
        device="cuda" if on_gpu else "cpu",
        device_name=device.name,
        cores=device.cores,
        load=round(load, 2),
        source=recorded_uri(corpus.source),
        stores={store_root(uris[0]): ceiling_of([one.read for one in found], listed_per_s)},
        decode_mpx_per_core_s={
            kind: statistics.mean(one.decode[kind] for one in found if kind in one.decode) for kind in found[0].decode
        },
        encode_mpx_per_core_s={f"{name} {setup}": statistics.mean(one.encode for one in found)},
        forward_mpx_per_s={f"{name} {precision} {setup}": sum(one.forward_mpx_per_s for one in found)},
        megapixels=found[0].image_megapixels,
        write_mb_per_core_s=statistics.mean(one.write for one in found),
    )


def _measure_here(asked: _Asked) -> _Measured:
    """All stages one after the other, in this process."""
    segmenter: Any = load_segmenter(asked.spec, asked.model.data)
    read, blobs = read_all(asked.uris, asked.seconds, asked.profile)
    images, pictures = _decodable(segmenter, blobs)
    by_format: dict[str, list[int]] = {}
    for i, picture in enumerate(pictures):
        by_format.setdefault(picture.image_format, []).append(i)
    decode: dict[str, float] = {}
    canvases: list[_Canvas] = []
    for kind, some in by_format.items():
        decoded = rate(partial(_decode_all, segmenter, images, some), asked.seconds)
        decode[kind] = _megapixels([pictures[i] for i in some]) / decoded.cpu_s
        canvases += decoded.result
    batches = _batches(segmenter, canvases, asked.spec.stream.batch_size)
    forward = Forward(segmenter)
    answered = rate(lambda: _run(forward, batches), asked.seconds)
    predictions = _predictions(segmenter, pictures, batches, answered.result)
    maker = RowMaker(segmenter, {"run_id": "limits", "task": segmenter.card.task})

    def encode() -> list[dict[str, Any]]:
        together = zip(images, pictures, predictions, strict=True)
        return [
            maker.ok(Ref("", blob.etag, 1, blob.size_bytes), blob, picture, find()) for blob, picture, find in together
        ]

    encoded = rate(encode, asked.seconds)
    rows = unlike_rows(encoded.result, _ROWS_TO_WRITE)
    written = rate(lambda: _write(segmenter, rows), asked.seconds)
    megapixels = _megapixels(pictures)
    return _Measured(
        read=read,
        decode=decode,
        forward_mpx_per_s=megapixels / answered.seconds,
        encode=megapixels / encoded.cpu_s,
        write=written.result / 1e6 / written.cpu_s,
        image_megapixels=megapixels / len(pictures),
    )


def _write(segmenter: Any, rows: Sequence[dict[str, Any]]) -> int:
    """Bytes of a Part of these rows."""
    builder = PartBuilder(model_name=segmenter.card.name, card_json="{}")
    builder.add(rows)
    return builder.finish().data.size


def unlike_rows(rows: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """So many rows as large as these, of bytes that zstd finds only once: a Part holds no image twice.

    PNGs become noise, which they nearly are; of a run length code the characters are shuffled.
    """
    random = np.random.default_rng(0)

    def shuffled(rle: Mapping[str, Any]) -> dict[str, Any]:
        return {**rle, "counts": random.permutation(np.frombuffer(rle["counts"], np.uint8)).tobytes()}

    made = []
    for i in range(count):
        row = dict(rows[i % len(rows)])
        if row["mask"]:
            row["mask"] = row["mask"] | {"bytes": random.bytes(len(row["mask"]["bytes"]))}
        row["instances"] = [one | {"rle": shuffled(one["rle"])} for one in row.get("instances") or []]
        made.append(row)
    return made


def _decodable(segmenter: Any, blobs: Sequence[Blob]) -> tuple[list[Blob], list[Picture]]:
    """Those images of the sample that a run would have a mask of. Raises UsageError where there is none."""
    images: list[Blob] = []
    pictures: list[Picture] = []
    pixels, trouble = 0, ""
    for blob in blobs:
        try:
            height, width = size_of(segmenter, blob.data)
            if images and pixels + height * width > _SAMPLE_PIXELS:
                continue
            picture = _picture(segmenter, blob.data, height, width)
        except ImageError as error:
            trouble = str(error)
            continue
        pixels += height * width
        images.append(blob)
        pictures.append(picture)
    if not images:
        raise UsageError(f"no image of the sample can be decoded: {trouble}")
    return images, pictures


def _picture(segmenter: Any, data: bytes, height: int, width: int) -> Picture:
    mosaic = segmenter.mosaic(height, width)
    if mosaic is None:
        canvas = np.empty((*segmenter.canvas(height, width), segmenter.input_channels), segmenter.input_dtype)
        return place_image(segmenter, data, canvas, height=height, width=width, max_pixels=_MAX_PIXELS)[1]
    tiles = Tiles(segmenter, data, mosaic, max_pixels=_MAX_PIXELS)
    try:
        return tiles.measure()[0]
    finally:
        tiles.close()


def _decode_all(segmenter: Any, images: Sequence[Blob], chosen: Sequence[int]) -> list[_Canvas]:
    return [one for i in chosen for one in _decode(segmenter, images[i].data, i)]


def _decode(segmenter: Any, data: bytes, image: int) -> Iterator[_Canvas]:
    """An image as the stream decodes it: onto its canvas, or tile by tile."""

    def empty(height: int, width: int) -> np.ndarray:
        return np.empty((*segmenter.canvas(height, width), segmenter.input_channels), segmenter.input_dtype)

    height, width = size_of(segmenter, data)
    mosaic = segmenter.mosaic(height, width)
    if mosaic is None:
        canvas = empty(height, width)
        placed, _ = place_image(segmenter, data, canvas, height=height, width=width, max_pixels=_MAX_PIXELS)
        size, figures = (placed.height, placed.width), (placed.mean, placed.std)
        shape = Shape(*canvas.shape[:2])
        yield _Canvas(image, None, shape, canvas, size, (height, width), figures)
        return
    tiles = Tiles(segmenter, data, mosaic, max_pixels=_MAX_PIXELS)
    try:
        _, mean, std = tiles.measure()
        for window in tiles.windows():
            canvas = empty(window.height, window.width)
            size = tiles.place(window, canvas)
            of_image = (window.height, window.width)
            shape = Shape(canvas.shape[0], canvas.shape[1], tiles=True)
            yield _Canvas(image, window, shape, canvas, size, of_image, (mean, std))
    finally:
        tiles.close()


def _batches(segmenter: Any, canvases: Sequence[_Canvas], batch_size: int) -> list[Batch]:
    """Full batches of one shape each, as a run freezes them, and the rest padded."""
    rack = Rack(
        batch_size=batch_size,
        batch_pixels=batch_size << 18,
        memory_bytes=1 << 62,
        channels=segmenter.input_channels,
        dtype=segmenter.input_dtype,
    )
    for one in canvases:
        slot = rack.take(one.shape)
        assert slot is not None
        slot.canvas_pixels[:] = one.pixels
        slot.fill(one, size=one.size, image_size=one.image_size, statistics=one.statistics)
        rack.written(slot)
    while (batch := rack.fullest()) is not None:
        rack.ready.append(batch)
    return list(rack.ready)


def _run(forward: Forward, batches: Sequence[Batch]) -> list[Any]:
    """Answers of all batches, one of them on the device while the one before is brought back."""
    answers: list[Any] = []
    under_way = None
    for batch in [*batches, None]:
        started = forward.start(batch) if batch is not None else None
        if under_way is not None:
            answers.append(forward.finish(under_way).answers)
        under_way = started
    for answer in (answer for some in answers for answer in some):
        if isinstance(answer, Exception):
            raise UsageError(f"the model fails on the sample: {answer}") from answer
    return answers


def _predictions(
    segmenter: Any, pictures: Sequence[Picture], batches: Sequence[Batch], answers: Sequence[Sequence[Any]]
) -> list[Callable[[], Any]]:
    """What gives each image's prediction; of one in tiles, by putting these together, as its row's maker does."""
    found: dict[int, Any] = {}
    for batch, some in zip(batches, answers, strict=True):
        for one, answer in zip([item for item in batch.items if item is not None], some, strict=True):
            if one.window is None:
                found[one.image] = answer
            else:
                picture = pictures[one.image]
                mosaic = found.setdefault(one.image, segmenter.mosaic(picture.height, picture.width))
                mosaic.add(one.window, answer)
    return [partial(_whole, segmenter, found[i]) for i in range(len(pictures))]


def _whole(segmenter: Any, answer: Any) -> Any:
    return segmenter.assemble(answer) if isinstance(answer, (Mosaic, DetectionMosaic)) else answer


def _megapixels(pictures: Sequence[Picture]) -> float:
    return sum(picture.height * picture.width for picture in pictures) / 1e6
