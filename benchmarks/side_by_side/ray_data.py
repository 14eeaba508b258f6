"""Ray Data, as its guide to batch inference has it: `read_binary_files`, decoding in tasks, the model in an actor that
stays on its device, encoding in tasks, `write_parquet`.

A network on the CPU has no stage of its own: pixels would cross the object store for nothing, so its actors decode and
encode too. A stand-in's actor holds a GPU and no CPU; those of a network hold a CPU each, and Ray is told of as many
more, for without them nothing would ever read or write.
"""

from __future__ import annotations

import logging
import os
import time
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from job import Job, timed
from pyarrow.fs import FileSystem, LocalFileSystem, S3FileSystem
from work import Model, Seen, given_job, kept_model, list_images, see, table

from models.prediction import Prediction
from pipeline.engine.rows import Picture
from pipeline.errors import ImageError

_NOTHING = np.zeros((1, 1, 3), np.uint8)


def decode(batch: dict[str, Any]) -> dict[str, Any]:
    """A task of the first stage: bytes to pixels, and what is known of them."""
    columns: dict[str, list[Any]] = {name: [] for name in ("begun_at", "pixels", "figures", "format", "error")}
    for data in batch["bytes"]:
        columns["begun_at"].append(time.time())
        try:
            seen = see(data)
        except ImageError as error:
            found = (_NOTHING, (0.0, 1.0, 0.0, 0.0), "", f"{error.kind}:{error}")
        else:
            picture = seen.picture
            figures = (seen.mean, seen.std, picture.brightness, picture.contrast)
            found = (seen.pixels, figures, picture.image_format, "")
        for name, value in zip(("pixels", "figures", "format", "error"), found, strict=True):
            columns[name].append(value)
    sizes = np.array([len(data) for data in batch["bytes"]])
    return {"path": batch["path"], "size": sizes} | {name: _column(values) for name, values in columns.items()}


class Predict:
    """An actor of the second stage: pixels to class ids."""

    def __init__(self, job: Job) -> None:
        self._model = Model(job)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        good = [index for index, error in enumerate(batch["error"]) if not error]
        seen = [Seen(batch["pixels"][index], *batch["figures"][index][:2], None) for index in good]
        answers = dict(zip(good, self._model.predict(seen), strict=True))
        classes = len(self._model.segmenter.card.classes)
        nothing = Prediction(_NOTHING[..., 0], np.zeros(classes, np.int64), np.zeros(classes), 0.0, 0.0, None)
        found = [answers.get(index, nothing) for index in range(len(batch["path"]))]
        shapes = [pixels.shape[:2] for pixels in batch.pop("pixels")]
        return batch | {
            "shape": np.array(shapes),
            "class_ids": _column([one.class_ids for one in found]),
            "pixels": np.stack([one.pixels for one in found]),
            "confidence": np.stack([one.confidence for one in found]),
            "means": np.array([(one.mean_confidence, one.mean_entropy) for one in found]),
        }


def encode(batch: dict[str, Any], job: Job) -> pa.Table:
    """A task of the third stage: class ids to rows."""
    model = kept_model(job)
    rows = []
    for index, (uri, error) in enumerate(zip(batch["path"], batch["error"], strict=True)):
        known = (str(uri), int(batch["size"][index]), float(batch["begun_at"][index]))
        if error:
            kind, _, message = error.partition(":")
            rows.append(model.error(*known, ImageError(message, kind=kind)))
            continue
        names = ("class_ids", "pixels", "confidence")
        answer = Prediction(*(batch[name][index] for name in names), *batch["means"][index].tolist(), None)
        height, width = batch["shape"][index].tolist()
        picture = Picture(height, width, str(batch["format"][index]), *batch["figures"][index][2:].tolist())
        rows.append(model.row(*known, picture, answer))
    return table(rows)


class Segment:
    """An actor that does all of it, for networks on the CPU."""

    def __init__(self, job: Job) -> None:
        self._model = Model(job)

    def __call__(self, batch: dict[str, Any]) -> pa.Table:
        return table(self._model.segment(list(zip(batch["path"], batch["bytes"], strict=True))))


def _column(values: list[Any]) -> np.ndarray:
    """One array where all are of one shape; else Ray wants them as objects."""
    if len({np.shape(value) for value in values}) == 1:
        return np.stack(values) if np.ndim(values[0]) else np.array(values)
    column = np.empty(len(values), object)
    column[:] = values
    return column


def main() -> None:
    job = given_job()
    in_stages = job.sleeps_s is not None
    cpus = job.cores if in_stages else job.cores + job.copies
    ray.init(num_cpus=cpus, num_gpus=job.copies if in_stages else 0, include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    store: FileSystem = LocalFileSystem()
    if job.is_remote:
        store = S3FileSystem(endpoint_override=os.environ["AWS_ENDPOINT_URL"])
    # A task reads one file after the other: over a store they hold a share of a core each, so that many read at once.
    shares = {"ray_remote_args": {"num_cpus": job.cores / job.reads}} if job.is_remote else {}
    images = ray.data.read_binary_files(
        [uri.removeprefix("s3://") for uri in list_images(job)], include_paths=True, filesystem=store, **shares
    )
    pool = ray.data.ActorPoolStrategy(size=job.copies)
    size = {"batch_size": job.batch_size}
    if in_stages:
        rows = (
            images.map_batches(decode, **size)
            .map_batches(Predict, fn_constructor_args=(job,), compute=pool, num_gpus=1, **size)
            .map_batches(encode, fn_args=(job,), **size)
        )
    else:
        rows = images.map_batches(Segment, fn_constructor_args=(job,), compute=pool, num_cpus=1, **size)
    rows.write_parquet(job.dest, filesystem=LocalFileSystem())


if __name__ == "__main__":
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    with timed():
        main()
