"""This machine's ceilings, stage by stage, as `maskmill limits` measures them: on disk, on S3, or of one more store.

    python benchmarks/limits.py [--source URI] [--ceph] [--model REF] [--images N] [--seconds S] [--out FILE]

Without --source the images are 480×360 JPEGs of nuclei, in a folder of this machine and in an S3 server on it: moto's,
which is slow, or with --ceph the gateway of a Ceph cluster of one, where its programs are installed (Debian: ceph-mon
ceph-osd radosgw ceph-common). What it costs the client in CPU is ours, objects per second are the server's. The store
of a user is measured by `--source s3://bucket/some/prefix`, which is only read. --out writes what `maskmill segment
--limits` takes, of all stores together.

Below the table: PNG and COCO run lengths by themselves, of the masks that the model gave.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from s3_client import moto
from side_by_side.corpora import write_nuclei

import pipeline
from models.masks import decode_mask_png, decode_rle, encode_label_rles, encode_mask_png
from pipeline.commands.limits import ceilings_table
from pipeline.engine.limits import Ceilings, write_ceilings
from pipeline.engine.store_ceilings import measure_store
from pipeline.storage import open_storage


def made_images(folder: Path, options: Any) -> Ceilings:
    """Ceilings for images on this machine's disk and, of the store alone, in moto."""
    (folder / "photos").mkdir()
    paths = write_nuclei(folder / "photos", options.images)
    found = pipeline.limits(str(folder / "photos"), options.model, seconds=options.seconds)
    with s3_server(options.ceph):
        import boto3

        boto3.client("s3").create_bucket(Bucket="photos")
        storage = open_storage("s3://photos")
        for path in paths:
            storage.put(f"s3://photos/some/{path.name}", path.read_bytes())
        there = measure_store("s3://photos/some", scratch=folder / "listing", seconds=options.seconds)
    return found.model_copy(update={"stores": found.stores | there})


@contextmanager
def s3_server(ceph: bool) -> Iterator[None]:
    """With the environment of every S3 client led to it."""
    if not ceph:
        with moto():
            yield
        return
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    from chaos.ceph import CephStore

    with CephStore() as store:
        os.environ |= {
            "AWS_ENDPOINT_URL": store.endpoint, "AWS_ACCESS_KEY_ID": store.ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": store.SECRET_KEY, "AWS_REGION": "us-east-1",
        }  # fmt: skip
        yield


def masks_alone(options: Any, source: str, folder: Path) -> list[str]:
    """CPU time of the two encoders, by what the model makes of a few images."""
    done = pipeline.segment(
        source=source, dest=str(folder / "masks"), model=options.model, limit=4, report=False, engine="local"
    )
    rows = pipeline.connect(str(folder / "masks")).sql(
        f"SELECT mask.bytes, instances FROM segments WHERE run_id = '{done.run_id}' AND status = 'ok'"
    ).fetchall()  # fmt: skip
    ids = [decode_mask_png(png) for png, _ in rows]
    megapixels = sum(mask.size for mask in ids) / 1e6
    palette = [(i, i, i) for i in range(256)]
    said = [
        f"PNG {megapixels / cpu_s(lambda: [encode_mask_png(mask, palette) for mask in ids]):,.0f} Mpixel/s and core"
    ]
    labels = []
    for mask, (_, instances) in zip(ids, rows, strict=True):
        painted = np.zeros(mask.shape, np.int32)
        for number, one in enumerate(instances or [], start=1):
            painted[decode_rle(one["rle"])] = number
        labels.append((painted, len(instances or [])))
    if any(count for _, count in labels):
        spent_s = cpu_s(lambda: [encode_label_rles(painted, count) for painted, count in labels])
        objects = sum(count for _, count in labels)
        said.append(f"RLE {megapixels / spent_s:,.0f} Mpixel/s and core, {objects / spent_s:,.0f} objects/s")
    return said


def cpu_s(action: Any) -> float:
    """The best of five."""
    best = float("inf")
    for _ in range(5):
        began_s = time.thread_time()
        action()
        best = min(best, time.thread_time() - began_s)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default=None)
    parser.add_argument("--ceph", action="store_true")
    parser.add_argument("--model", default="nuclei-unet")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--out", default=None)
    options = parser.parse_args()
    console = Console(width=120)
    with tempfile.TemporaryDirectory(prefix="maskmill-bench-") as scratch:
        folder = Path(scratch)
        if options.source:
            found = pipeline.limits(options.source, options.model, seconds=options.seconds)
        else:
            found = made_images(folder, options)
        console.print(ceilings_table(found))
        for line in masks_alone(options, options.source or str(folder / "photos"), folder):
            console.print(f"encoders alone: {line}", highlight=False)
    if options.out:
        write_ceilings(found, options.out)


if __name__ == "__main__":
    sys.exit(main())
