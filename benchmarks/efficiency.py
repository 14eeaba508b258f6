"""How much of the machine the stream leaves on the table: images/s of the whole stream, local disk to committed Part.

    python benchmarks/efficiency.py [--images N] [--repeat K] [--model REF]

Three figures, each against its own limit, measured in one sitting (medians of K):
1. a stand-in model that sleeps 2 ms an image, as a GPU looks from the CPU: limit 500 images/s;
2. a stand-in model that costs nothing: the pipeline alone;
3. the model REF, on one worker of one thread for each core, as a run has by default: limit = cores ÷ (core-seconds per
   image summed over the stages, each measured alone on one core).
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.table import Table
from side_by_side.corpora import write_photos
from side_by_side.stand_in import StandIn

from models.masks import encode_mask_png, mask_crc32
from models.preprocessing import picture_statistics
from models.segmenter import supports_bf16
from pipeline.corpus.decode import decode
from pipeline.engine.messages import ShardTask, StreamConfig, WorkerSpec, code_digest
from pipeline.engine.worker import Worker, load_segmenter
from pipeline.machine import cores
from pipeline.registry import resolve
from pipeline.table.schema import WORK

HEIGHT, WIDTH = 360, 480


def work_table(paths: list[Path]) -> pa.Table:
    return pa.table(
        {
            "uri": [f"file://{path}" for path in paths],
            "etag": ["x"] * len(paths),
            "size_bytes": [path.stat().st_size for path in paths],
            "modified": pa.nulls(len(paths), pa.timestamp("us", "UTC")),
            "attempt": [1] * len(paths),
        }
    ).cast(WORK)


class Throughput(NamedTuple):
    images_per_s: float
    core_s_per_image: float
    busy: float


def whole_stream(load: Any, model: bytes, refs: pa.Table, folder: Path, *, threads: int, batch_size: int) -> Throughput:
    """One shard through a real Worker, from files to a committed Part; a short one before it warms up."""
    spec = WorkerSpec(
        code_digest=code_digest(), dest=f"file://{folder}", create_only=True,
        source_profile=None, dest_profile=None, model_name="bench",
        model_version="0" * 12, settings_digest="0" * 12, run_id="20260101T000000Z-000000",
        precision="bf16" if supports_bf16("cpu") else "fp32", threads=threads,
        stream=StreamConfig(batch_size=batch_size, threads=threads),
    )  # fmt: skip
    worker = Worker(spec, model, load=load)
    try:
        stamp = time.time_ns()
        worker.run(ShardTask(0, refs.slice(0, 32), f"file://{folder}/{stamp}-warm.parquet"))
        before = worker.counts()
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        receipt = worker.run(ShardTask(1, refs, f"file://{folder}/{stamp}.parquet"))
        seconds, cpu_s = time.perf_counter() - began_s, time.process_time() - began_cpu_s
        assert receipt.rows == len(refs) and receipt.created
        busy = (receipt.counts.busy_s - before.busy_s) / seconds
        return Throughput(len(refs) / seconds, cpu_s / len(refs), busy)
    finally:
        worker.close()


def stages_alone(refs: pa.Table, model: Any, batch_size: int) -> dict[str, float]:
    """Core-seconds per image of each stage by itself: one thread, nothing beside it."""
    import torch

    torch.set_num_threads(1)
    segmenter = load_segmenter(
        WorkerSpec.model_construct(precision="bf16" if supports_bf16("cpu") else "fp32", threads=1), model.data
    )
    paths = [uri.removeprefix("file://") for uri in refs["uri"].to_pylist()[:64]]
    spent: dict[str, float] = {}

    def measure(name: str, action: Any) -> Any:
        action()
        began_s = time.process_time()
        result = action()
        spent[name] = (time.process_time() - began_s) / len(paths)
        return result

    blobs = measure("read", lambda: [Path(path).read_bytes() for path in paths])
    images = measure("decode", lambda: [decode(blob, max_pixels=10**9).pixels for blob in blobs])
    statistics_N = measure("statistics", lambda: [picture_statistics(pixels) for pixels in images])
    canvas = segmenter.canvas(HEIGHT, WIDTH)

    def forward() -> list[Any]:
        answers = []
        for start in range(0, len(images), batch_size):
            some = images[start : start + batch_size]
            batch = np.zeros((batch_size, *canvas, 3), np.uint8)
            sizes = np.zeros((batch_size, 2), np.int32)
            stats = np.tile(np.array([0, 1], np.float32), (batch_size, 1))
            for slot, pixels in enumerate(some):
                batch[slot, :HEIGHT, :WIDTH] = pixels
                sizes[slot] = (HEIGHT, WIDTH)
                stats[slot] = statistics_N[start + slot][:2]
            answers += segmenter.finish(segmenter.submit(batch, sizes, stats))
        return answers

    predictions = measure("forward", forward)
    final = measure("post-process", lambda: [segmenter.postprocess(p) for p in predictions])
    palette = segmenter.card.palette
    measure("encode", lambda: [encode_mask_png(c, palette) for c, _ in final])
    measure("checksum", lambda: [mask_crc32(c, [i.rle for i in found]) for c, found in final])
    return spent


def one_of_several(asked: tuple[str, pa.Table, Path, int]) -> Throughput:
    """One worker of one thread, in a process of its own."""
    reference, refs, folder, batch_size = asked
    cv2.setNumThreads(1)
    folder.mkdir(exist_ok=True)
    return whole_stream(load_segmenter, resolve(reference).data, refs, folder, threads=1, batch_size=batch_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--model", default="nuclei-unet")
    parser.add_argument("--model-images", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=2, help="of the model; stand-ins get 32, as a GPU does")
    options = parser.parse_args()
    threads = cores()
    cv2.setNumThreads(1)
    table = Table(title=f"{WIDTH}×{HEIGHT} JPEG, {threads} cores, load {os.getloadavg()[0]:.1f}")
    for column in ("model", "images/s", "limit", "share", "core-ms per image", "model busy"):
        table.add_column(column, justify="left" if column == "model" else "right")

    def add(name: str, runs: list[Throughput], limit: float | None) -> None:
        rate = statistics.median(run.images_per_s for run in runs)
        cpu_ms = statistics.median(run.core_s_per_image for run in runs) * 1e3
        busy = statistics.median(run.busy for run in runs)
        share = f"{rate / limit:.3f}" if limit else ""
        table.add_row(name, f"{rate:.1f}", f"{limit:.1f}" if limit else "", share, f"{cpu_ms:.2f}", f"{busy:.0%}")

    with tempfile.TemporaryDirectory(prefix="maskmill-bench-") as scratch:
        folder = Path(scratch)
        (folder / "images").mkdir()
        refs = work_table(write_photos(folder / "images", options.images))
        for name, seconds, limit in (("sleeps 2 ms an image", 0.002, 500.0), ("costs nothing", 0.0, None)):
            runs = [
                whole_stream(
                    lambda spec, data, s=seconds: StandIn(s),
                    b"",
                    refs,
                    folder,
                    threads=threads,
                    batch_size=32,
                )
                for _ in range(options.repeat)
            ]
            add(name, runs, limit)
        try:
            model = resolve(options.model)
        except Exception as error:  # noqa: BLE001 - the other figures stand without it
            Console().print(f"no third figure: {error}")
        else:
            some = refs.slice(0, options.model_images)
            spent = stages_alone(some, model, options.batch_size)
            runs = []
            for _ in range(options.repeat):
                asked = [(options.model, some, folder / f"worker-{n}", options.batch_size) for n in range(threads)]
                with mp.get_context("spawn").Pool(threads) as pool:
                    each = pool.map(one_of_several, asked, chunksize=1)
                runs.append(
                    Throughput(
                        sum(one.images_per_s for one in each),
                        statistics.mean(one.core_s_per_image for one in each),
                        statistics.mean(one.busy for one in each),
                    )
                )
            add(model.card.name, runs, threads / sum(spent.values()))
            alone = ", ".join(f"{name} {seconds * 1e3:.2f}" for name, seconds in spent.items())
            table.caption = f"{model.card.name}, core-ms per image of each stage alone: {alone}"
    Console().print(table)


if __name__ == "__main__":
    main()
