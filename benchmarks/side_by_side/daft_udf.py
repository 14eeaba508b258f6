"""Daft, as its guides to images and to classes have it: `download`, decoding in a function, the model in a class that
holds a device, encoding in a function, `write_parquet`.

A network on the CPU has no stage of its own: its instances, each a process, decode and encode too. The decoder is the
same as everybody's, in place of Daft's own, so that masks can be compared bit for bit.
"""

from __future__ import annotations

import os
import time
from typing import Any

import daft
import pyarrow as pa
from daft import DataType, Series, col
from daft.functions import download
from daft.io import IOConfig, S3Config
from job import Job, timed
from work import OUTPUT, Model, Seen, given_job, kept_model, list_images, see

from pipeline.errors import ImageError

_ROW = DataType.from_arrow_type(pa.struct(list(OUTPUT)))
_ANY = DataType.python()


@daft.func(return_dtype=_ANY)
def decode(data: bytes) -> Any:
    """Pixels and what is known of them, or what is wrong."""
    begun_at = time.time()
    try:
        return len(data), begun_at, see(data)
    except ImageError as error:
        return len(data), begun_at, error


def stages(job: Job, images: daft.DataFrame) -> daft.DataFrame:
    """For a model that is one device."""

    @daft.cls(max_concurrency=job.copies)
    class Predict:
        def __init__(self) -> None:
            self._model = Model(job)

        @daft.method.batch(return_dtype=_ANY, batch_size=job.batch_size)
        def __call__(self, decoded: Series) -> Series:
            found = decoded.to_pylist()
            good = [seen for *_, seen in found if isinstance(seen, Seen)]
            answers = iter(self._model.predict(good))
            ordered = [next(answers) if isinstance(seen, Seen) else None for *_, seen in found]
            return Series.from_pylist(ordered, dtype=_ANY)

    @daft.func(return_dtype=_ROW, unnest=True)
    def encode(uri: str, decoded: Any, answer: Any) -> dict[str, Any]:
        size_bytes, begun_at, seen = decoded
        model = kept_model(job)
        if isinstance(seen, ImageError):
            return _row(model.error(uri, size_bytes, begun_at, seen))
        return _row(model.row(uri, size_bytes, begun_at, seen.picture, answer))

    predict = Predict()
    images = images.with_column("decoded", decode(col("data")))
    images = images.with_column("answer", predict(col("decoded")))
    return images.select(encode(col("uri"), col("decoded"), col("answer")))


def whole(job: Job, images: daft.DataFrame) -> daft.DataFrame:
    """For a network on the CPU."""

    @daft.cls(max_concurrency=job.copies, use_process=True)
    class Segment:
        def __init__(self) -> None:
            self._model = Model(job)

        @daft.method.batch(return_dtype=_ROW, batch_size=job.batch_size, unnest=True)
        def __call__(self, uris: Series, data: Series) -> list[Any]:
            files = zip(uris.to_pylist(), data.to_pylist(), strict=True)
            return [_row(row) for row in self._model.segment(list(files))]

    return images.select(Segment()(col("uri"), col("data")))


def _row(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row.get(name) for name in OUTPUT.names}


def main() -> None:
    job = given_job()
    s3 = S3Config(endpoint_url=os.environ.get("AWS_ENDPOINT_URL"), use_ssl=False) if job.is_remote else None
    images = daft.from_pydict({"uri": list_images(job)})
    images = images.with_column("data", download(col("uri"), io_config=IOConfig(s3=s3)))
    rows = whole(job, images) if job.sleeps_s is None else stages(job, images)
    rows.write_parquet(job.dest)


if __name__ == "__main__":
    with timed():
        main()
