"""What every engine does to an image, so that only the engine differs: the same decoder, model, encoder and row.
Owns: the steps, the columns. Must not know: engines, clocks.

A peer is a script: `python ENGINE.py JOB.json`. It reads the images of `source`, and leaves Parquet files with the
columns of `OUTPUT` in `dest`, one row per image: a mask as palette PNG with figures per class, or what was wrong.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pyarrow as pa
from job import Job
from job import given_job as told_job
from stand_in import StandIn

from models.preprocessing import picture_statistics
from models.tally import tally
from pipeline.corpus.decode import decode
from pipeline.engine.messages import WorkerSpec
from pipeline.engine.rows import Picture, Ref, RowMaker
from pipeline.engine.worker import load_segmenter
from pipeline.errors import ImageError
from pipeline.table.schema import SEGMENTS

# The first figures of a process compile their machine code: in nobody's images per second.
picture_statistics(np.zeros((1, 1, 3), np.uint8))
tally(np.zeros((1, 1), np.uint8))

MAX_PIXELS = 200_000_000
_COLUMNS = (
    "image_uri", "image_bytes", "width", "height", "image_format", "status", "error_kind", "error_message",
    "mean_confidence", "mean_entropy", "foreground_fraction", "brightness", "contrast", "classes", "mask", "mask_crc32",
    "instances",
)  # fmt: skip
#: What a peer writes; `begun_at`: when its image was begun to be decoded, in seconds since 1970.
OUTPUT = pa.schema([*(SEGMENTS.field(name) for name in _COLUMNS), pa.field("begun_at", pa.float64())])


def given_job() -> Job:
    """The job that this process was started with; libraries keep to their share of the cores."""
    cv2.setNumThreads(1)
    return told_job()


class Seen(NamedTuple):
    """An image that was decoded: RGB uint8 [h, w, 3], mean and deviation to normalise by, and what the row says."""

    pixels: np.ndarray
    mean: float
    std: float
    picture: Picture


def see(data: bytes) -> Seen:
    """Decodes and measures. Raises ImageError."""
    pixels, image_format = decode(data, max_pixels=MAX_PIXELS)
    measured = picture_statistics(pixels)
    height, width = pixels.shape[:2]
    picture = Picture(height, width, image_format, measured.brightness, measured.contrast)
    return Seen(pixels, measured.mean, measured.std, picture)


class Model:
    """One copy of the model, and the rows that are made of its answers."""

    def __init__(self, job: Job, *, threads: int = 1) -> None:
        cv2.setNumThreads(1)
        if job.sleeps_s is None:
            spec = WorkerSpec.model_construct(
                precision=job.precision, threads=threads, card_settings={}, compile=False, model_name="bench"
            )
            self.segmenter: Any = load_segmenter(spec, Path(job.model).read_bytes())
        else:
            self.segmenter = StandIn(job.sleeps_s)
        self._batch_size = job.batch_size
        self._rows = RowMaker(self.segmenter, {})

    def predict(self, seen: Sequence[Seen]) -> list[Any]:
        """A prediction for each, in order. Images of one size share batches, of the job's size, padded to it."""
        answers: list[Any] = [None] * len(seen)
        by_size: dict[tuple[int, ...], list[int]] = {}
        for index, one in enumerate(seen):
            by_size.setdefault(one.pixels.shape[:2], []).append(index)
        for (height, width), indices in by_size.items():
            for start in range(0, len(indices), self._batch_size):
                some = indices[start : start + self._batch_size]
                found = self._batch([seen[index] for index in some], height, width)
                for index, prediction in zip(some, found, strict=True):
                    answers[index] = prediction
        return answers

    def _batch(self, seen: Sequence[Seen], height: int, width: int) -> list[Any]:
        size = self._batch_size
        images = np.empty((size, *self.segmenter.canvas(height, width), 3), np.uint8)
        sizes = np.zeros((size, 2), np.int32)
        statistics = np.tile(np.array([0, 1], np.float32), (size, 1))
        for slot, one in enumerate(seen):
            sizes[slot] = self.segmenter.fit(one.pixels, images[slot])
            statistics[slot] = (one.mean, one.std)
        image_sizes = np.where(sizes[:, :1] > 0, np.array([[height, width]], np.int32), 0)
        return self.segmenter.finish(self.segmenter.submit(images, sizes, statistics, image_sizes))

    def row(self, uri: str, size_bytes: int, begun_at: float, picture: Picture, prediction: Any) -> dict[str, Any]:
        """Post-processing, PNG, regions of every class, checksum: all that is known of an image."""
        return self._rows.ok(Ref(uri, "", 1, size_bytes), None, picture, prediction) | {"begun_at": begun_at}

    def error(self, uri: str, size_bytes: int, begun_at: float, error: ImageError) -> dict[str, Any]:
        return self._rows.error(Ref(uri, "", 1, size_bytes), None, error.kind, str(error)) | {"begun_at": begun_at}

    def segment(self, files: Sequence[tuple[str, bytes]]) -> list[dict[str, Any]]:
        """All of it, for a few files at once: for engines that hand bytes to the model's own process."""
        rows, good = [], []
        for uri, data in files:
            begun_at = time.time()
            try:
                good.append((uri, len(data), begun_at, see(data)))
            except ImageError as error:
                rows.append(self.error(uri, len(data), begun_at, error))
        predictions = self.predict([seen for *_, seen in good])
        for (uri, size_bytes, begun_at, seen), prediction in zip(good, predictions, strict=True):
            rows.append(self.row(uri, size_bytes, begun_at, seen.picture, prediction))
        return rows


@functools.cache
def kept_model(job: Job) -> Model:
    """The model of this process, for engines whose functions may not keep one."""
    return Model(job)


def table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    """Rows as Arrow."""
    return pa.Table.from_pylist(list(rows), schema=OUTPUT)


def list_images(job: Job) -> list[str]:
    """Paths or URIs of all files of the source, sorted."""
    if not job.is_remote:
        return sorted(str(path) for path in Path(job.source).iterdir())
    bucket, _, prefix = job.source.removeprefix("s3://").partition("/")
    pages = _s3(job).get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/")
    return sorted(f"s3://{bucket}/{entry['Key']}" for page in pages for entry in page["Contents"])


def reader(job: Job) -> Callable[[str], bytes]:
    """What reads one file, for engines that bring nothing for it."""
    if not job.is_remote:
        return lambda path: Path(path).read_bytes()
    client = _s3(job)

    def get(uri: str) -> bytes:
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        return client.get_object(Bucket=bucket, Key=key)["Body"].read()

    return get


def _s3(job: Job) -> Any:
    import boto3
    from botocore.config import Config

    return boto3.client("s3", config=Config(max_pool_connections=job.reads))
