"""The plain loop: read, decode, predict, encode, write, one batch after the other. A network may use all cores."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
from job import timed
from work import OUTPUT, Model, given_job, list_images, reader, table


def main() -> None:
    job = given_job()
    model = Model(job, threads=job.cores)
    read = reader(job)
    uris = list_images(job)
    with pq.ParquetWriter(Path(job.dest) / "masks.parquet", OUTPUT, compression="zstd") as writer:
        for start in range(0, len(uris), job.batch_size):
            files = [(uri, read(uri)) for uri in uris[start : start + job.batch_size]]
            writer.write_table(table(model.segment(files)))


if __name__ == "__main__":
    with timed():
        main()
