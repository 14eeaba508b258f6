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
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import duckdb
import numpy as np

from models.mosaic import DetectionMosaic, Mosaic
from pipeline.config import DEFAULT_SUFFIXES, PrecisionChoice
from pipeline.corpus.manifest import Corpus, read_source
from pipeline.engine.batches import Batch, Rack, Shape
from pipeline.engine.crew import cores, gpu_count
from pipeline.engine.forward import Forward
from pipeline.engine.intake import Tiles, place_image, size_of
from pipeline.engine.limits import Ceilings, StoreCeiling
from pipeline.engine.messages import StreamConfig, WorkerSpec
from pipeline.engine.rows import Picture, Ref, RowMaker
from pipeline.engine.worker import describe_device, load_segmenter
from pipeline.errors import ImageError, UsageError
from pipeline.registry import Model, resolve
from pipeline.storage import Blob, open_storage, recorded_uri, store_root, uri_scheme
from pipeline.table.parts import PartBuilder

log = logging.getLogger(__name__)

_T = TypeVar("_T")
_SAMPLE_IMAGES = 64
_SAMPLE_PIXELS = 4_000_000
_GETS_AT_ONCE = 32
_ROWS_TO_WRITE = 1000
_MAX_PIXELS = 1_000_000_000


class _Asked(NamedTuple):
    """What a measuring process is told."""

    uris: list[str]
    model: Model
    spec: WorkerSpec
    seconds: float
    profile: str | None


class _Read(NamedTuple):
    """What reading came to in one process."""

    gets_per_s: float
    mean_bytes: float
    core_ms_per_get: float


class _Measured(NamedTuple):
    """What one process found. Rates per core, but `forward_mpx_per_s` per process."""

    read: _Read
    decode: dict[str, float]
    forward_mpx_per_s: float
    encode: float
    write: float


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
    batch_size: int | None = None,
    seconds: float = 3.0,
    suffixes: Sequence[str] = DEFAULT_SUFFIXES,
    profile: str | None = None,
) -> Ceilings:
    """Ceilings of this machine for images like those of SOURCE and for `model`; each stage takes about `seconds`.

    Reads SOURCE, writes nothing but in the folder `scratch`. Raises UsageError where SOURCE or the model does not
    exist, or no image of the sample can be decoded; StorageError. Safe to repeat: figures differ by the machine's mood.
    """
    resolved = resolve(model, registry=registry)
    load = os.getloadavg()[0]
    corpus, listed_per_s = _listed(source, scratch, suffixes, profile)
    uris = _sample(corpus)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        device = pool.submit(describe_device).result()
    on_gpu = gpu_count() > 0 and device.device.startswith("cuda")
    if precision == "auto":
        precision = "bf16" if device.bf16 else "fp32"
    spec = WorkerSpec(
        code_digest="", dest="", create_only=True, source_profile=profile, dest_profile=None,
        model_name=resolved.card.name, model_version=resolved.version, settings_digest="", run_id="",
        precision=precision, threads=1, stream=StreamConfig(batch_size=batch_size or (32 if on_gpu else 2)),
    )  # fmt: skip
    asked = _Asked(uris, resolved, spec, seconds, profile)
    processes = 1 if on_gpu else cores()
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        found = list(pool.map(_measure_here, [asked] * processes))
    name = f"{resolved.card.name}@{resolved.version}"
    return Ceilings(
        measured_at=dt.datetime.now(dt.UTC).replace(microsecond=0),
        node=socket.gethostname(),
        device="cuda" if on_gpu else "cpu",
        device_name=device.name,
        cores=device.cores,
        load=round(load, 2),
        source=recorded_uri(corpus.source),
        stores={store_root(uris[0]): _store([one.read for one in found], listed_per_s)},
        decode_mpx_per_core_s={
            kind: statistics.mean(one.decode[kind] for one in found if kind in one.decode) for kind in found[0].decode
        },
        encode_mpx_per_core_s={name: statistics.mean(one.encode for one in found)},
        forward_mpx_per_s={f"{name} {precision}": sum(one.forward_mpx_per_s for one in found)},
        write_mb_per_core_s=statistics.mean(one.write for one in found),
    )


def measure_store(
    source: str,
    *,
    scratch: Path,
    seconds: float = 3.0,
    suffixes: Sequence[str] = DEFAULT_SUFFIXES,
    profile: str | None = None,
) -> dict[str, StoreCeiling]:
    """As `measure`, of the store alone: for one more store beside those of `Ceilings.stores`."""
    corpus, listed_per_s = _listed(source, scratch, suffixes, profile)
    uris = _sample(corpus)
    with ProcessPoolExecutor(cores(), mp_context=get_context("spawn")) as pool:
        found = [future.result()[0] for future in [pool.submit(_read, uris, seconds, profile) for _ in range(cores())]]
    return {store_root(uris[0]): _store(found, listed_per_s)}


def _listed(source: str, scratch: Path, suffixes: Sequence[str], profile: str | None) -> tuple[Corpus, float | None]:
    """SOURCE, and how many objects a second its listing gave; None where it is no listing."""
    began_s = time.perf_counter()
    corpus = read_source(source, scratch=scratch, suffixes=suffixes, profile=profile)
    seconds = time.perf_counter() - began_s
    return corpus, corpus.rows / seconds if corpus.full_listing else None


def _sample(corpus: Corpus) -> list[str]:
    """Images from all over the corpus, of one store."""
    step = max(1, corpus.rows // _SAMPLE_IMAGES)
    found: list[str] = []
    at = 0
    with duckdb.connect() as connection:
        for batch in connection.sql(f"SELECT uri FROM {corpus.sql}").to_arrow_reader():
            rows = range(-at % step, batch.num_rows, step)
            found += batch.column("uri").take(np.array(list(rows), np.int64)).to_pylist()
            at += batch.num_rows
    return [uri for uri in found if store_root(uri) == store_root(found[0])][:_SAMPLE_IMAGES]


def _measure_here(asked: _Asked) -> _Measured:
    """All stages one after the other, in this process."""
    segmenter: Any = load_segmenter(asked.spec, asked.model.data)
    read, blobs = _read(asked.uris, asked.seconds, asked.profile)
    images, pictures = _decodable(segmenter, blobs)
    by_format: dict[str, list[int]] = {}
    for i, picture in enumerate(pictures):
        by_format.setdefault(picture.image_format, []).append(i)
    decode: dict[str, float] = {}
    canvases: list[_Canvas] = []
    for kind, some in by_format.items():
        decoded = _rate(partial(_decode_all, segmenter, images, some), asked.seconds)
        decode[kind] = _megapixels([pictures[i] for i in some]) / decoded.cpu_s
        canvases += decoded.result
    batches = _batches(segmenter, canvases, asked.spec.stream.batch_size)
    forward = Forward(segmenter)
    answered = _rate(lambda: _run(forward, batches), asked.seconds)
    predictions = _predictions(segmenter, pictures, batches, answered.result)
    maker = RowMaker(segmenter, {"run_id": "limits", "task": segmenter.card.task})

    def encode() -> list[dict[str, Any]]:
        together = zip(images, pictures, predictions, strict=True)
        return [
            maker.ok(Ref("", blob.etag, 1, blob.size_bytes), blob, picture, find()) for blob, picture, find in together
        ]

    encoded = _rate(encode, asked.seconds)
    written = _rate(lambda: _write(segmenter, encoded.result), asked.seconds)
    megapixels = _megapixels(pictures)
    return _Measured(
        read=read,
        decode=decode,
        forward_mpx_per_s=megapixels / answered.seconds,
        encode=megapixels / encoded.cpu_s,
        write=written.result / 1e6 / written.cpu_s,
    )


def _read(uris: Sequence[str], seconds: float, profile: str | None) -> tuple[_Read, list[Blob]]:
    """Reads all of `uris`, as many at once as a run does."""
    storage = open_storage(uris[0], profile=profile)
    with ThreadPoolExecutor(1 if uri_scheme(uris[0]) == "file" else _GETS_AT_ONCE) as pool:
        got = _rate(lambda: list(pool.map(storage.get, uris)), seconds)
    mean_bytes = statistics.mean(len(blob.data) for blob in got.result)
    return _Read(len(uris) / got.seconds, mean_bytes, got.cpu_s / len(uris) * 1e3), got.result


def _store(found: Sequence[_Read], listed_per_s: float | None) -> StoreCeiling:
    return StoreCeiling(
        gets_per_s=sum(one.gets_per_s for one in found),
        mean_bytes=found[0].mean_bytes,
        core_ms_per_get=statistics.mean(one.core_ms_per_get for one in found),
        listed_per_s=listed_per_s,
    )


def _write(segmenter: Any, rows: Sequence[dict[str, Any]]) -> int:
    """Bytes of a Part of these rows, many times over: a real one has thousands."""
    builder = PartBuilder(model_name=segmenter.card.name, card_json="{}")
    for _ in range(_ROWS_TO_WRITE // len(rows) + 1):
        builder.add(rows)
    return builder.finish().data.size


class _Turn(NamedTuple, Generic[_T]):
    """What a call took on average, and what it gave at last."""

    seconds: float
    cpu_s: float
    result: _T


def _rate(action: Callable[[], _T], seconds: float) -> _Turn[_T]:
    """About `seconds` of calls, after one that warms up."""
    result = action()
    began_s, began_cpu_s, calls = time.perf_counter(), time.process_time(), 0
    while not calls or time.perf_counter() - began_s < seconds:
        result = action()
        calls += 1
    return _Turn((time.perf_counter() - began_s) / calls, (time.process_time() - began_cpu_s) / calls, result)


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
