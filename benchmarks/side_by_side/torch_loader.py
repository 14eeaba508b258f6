"""PyTorch's DataLoader: a map-style data set that reads and decodes in as many workers as there are cores, and a
loop in the main process that predicts, encodes and writes with pyarrow.

Over a store more workers hide its latency. A network in the main process may use all cores.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from job import Job, timed
from torch.utils.data import DataLoader, Dataset
from work import OUTPUT, Model, Seen, given_job, list_images, reader, see, table

from pipeline.errors import ImageError


class Images(Dataset[tuple[str, int, float, Any]]):
    """Decoded images, or what is wrong with them."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._uris = list_images(job)
        self._read: Any = None

    def __len__(self) -> int:
        return len(self._uris)

    def __getitem__(self, index: int) -> tuple[str, int, float, Any]:
        self._read = self._read or reader(self._job)
        uri = self._uris[index]
        data = self._read(uri)
        begun_at = time.time()
        try:
            seen = see(data)
            # A tensor comes through shared memory, an array through a pipe.
            return uri, len(data), begun_at, seen._replace(pixels=torch.from_numpy(seen.pixels))
        except ImageError as error:
            return uri, len(data), begun_at, (error.kind, str(error))


def as_array(seen: Any) -> Seen:
    return seen._replace(pixels=seen.pixels.numpy())


def main() -> None:
    job = given_job()
    model = Model(job, threads=job.cores)
    workers = job.reads if job.is_remote else job.cores
    loader = DataLoader(Images(job), batch_size=job.batch_size, num_workers=workers, collate_fn=list)
    with pq.ParquetWriter(Path(job.dest) / "masks.parquet", OUTPUT, compression="zstd") as writer:
        for batch in loader:
            good = [(*known, as_array(seen)) for *known, seen in batch if hasattr(seen, "pixels")]
            answers = model.predict([seen for *_, seen in good])
            rows = [
                model.row(*known, seen.picture, answer) for (*known, seen), answer in zip(good, answers, strict=True)
            ]
            for uri, size_bytes, begun_at, found in batch:
                if not hasattr(found, "pixels"):
                    kind, message = found
                    rows.append(model.error(uri, size_bytes, begun_at, ImageError(message, kind=kind)))
            writer.write_table(table(rows))


if __name__ == "__main__":
    with timed():
        main()
