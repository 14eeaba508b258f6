"""SQL over a table of 10 million rows without masks, and the bytes that a query reads of 200,000 rows with masks.

    python benchmarks/query.py [--rows 10000000] [--masked 200000] [--repeat 3] [--threads 2] [--scratch DIR]

The tables are Parts as a run leaves them (the same writer, row groups and Part sizes), with random values: four classes
and two objects an image. Goals on 2 cores: aggregates over flat columns in 1 s each, those that unnest in 10 s; a query
on metrics reads no mask bytes. Measured is the query on an open connection, best of `--repeat`, the files in the page
cache: wall-clock seconds, the seconds that its threads computed (core-s: on a machine that does nothing else the query
takes about that, divided by the threads), and the bytes that its system calls read (`rchar` of /proc/self/io). Opening
the connection is timed apart. Making the tables is not measured.
"""

from __future__ import annotations

import argparse
import datetime as dt
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

import pipeline
from pipeline.engine.plan import choose_shard_size
from pipeline.table.parts import ROW_GROUP_BYTES, ROW_GROUP_ROWS, part_writer
from pipeline.table.schema import SCHEMA_VERSION, SEGMENTS, PartPlace, part_name

RUN_ID, MODEL, VERSION, DIGEST = "20260101T000000Z-000000", "street", "0123456789ab", "ba9876543210"
MASK_BYTES = 6_000
CLASSES = ("road", "building", "car", "tree")
#: (name, goal in seconds, SQL)
QUERIES = (
    ("count, mean confidence and entropy", 1.0, "SELECT count(*), avg(mean_confidence), avg(mean_entropy) FROM images"),
    (
        "errors by kind and node", 1.0,
        "SELECT node, error_kind, count(*) FROM segments WHERE status = 'error' GROUP BY ALL",
    ),
    (
        "histogram of brightness, confidence in each bin", 1.0,
        "SELECT floor(brightness * 20), count(*), avg(mean_confidence) FROM images GROUP BY 1",
    ),
    ("throughput by node", 1.0, "SELECT node, count(*), min(processed_at), max(processed_at) FROM segments GROUP BY 1"),
    ("milliseconds by stage", 1.0, "SELECT avg(fetch_ms), avg(decode_ms), avg(infer_ms), avg(encode_ms) FROM images"),
    (
        "the 100 least sure images", 1.0,
        "SELECT image_uri, mean_entropy FROM images ORDER BY mean_entropy DESC LIMIT 100",
    ),
    (
        "images and bytes by prefix", 1.0,
        "SELECT parse_dirpath(image_uri), count(*), sum(image_bytes) FROM images GROUP BY 1",
    ),
    ("coverage of each class", 10.0, "SELECT name, sum(pixels), avg(fraction) FROM classes GROUP BY name"),
    (
        "coverage of each class by prefix", 10.0,
        "SELECT parse_dirpath(image_uri), name, sum(pixels) FROM classes GROUP BY ALL",
    ),
    ("objects and sizes by class", 10.0, "SELECT name, count(*), avg(area), avg(score) FROM instances GROUP BY name"),
    ("histogram of objects per image", 10.0, "SELECT len(instances), count(*) FROM images GROUP BY 1"),
)  # fmt: skip


def rows_of(start: int, count: int, mask_bytes: int) -> pa.RecordBatch:
    """Rows `start` to `start + count` of the table. Nested values repeat from batch to batch; names do not."""
    fixed, ok = _values(count, mask_bytes)
    numbers = np.arange(start, start + count)
    stamps = pa.array(1_767_225_600_000_000 + numbers * 1000, pa.timestamp("us", "UTC"))
    etags = [f"{n * 2654435761 % 2**32:08x}" * 4 for n in numbers]
    uris = [f"s3://photos-of-the-fleet/{n // 50_000:03d}/cam-{n % 97:02d}/{n:012d}.jpg" for n in numbers]
    named = {
        "image_uri": uris,
        "image_etag": etags,
        "listed_etag": etags,
        "processed_at": stamps,
        "image_modified": stamps,
    }
    columns = fixed | {name: pa.array(column, SEGMENTS.field(name).type) for name, column in named.items()}
    random = np.random.default_rng(start)
    for field in SEGMENTS:
        if field.type == pa.float32():
            columns[field.name] = _known(pa.array(random.random(count, dtype=np.float32)), ok)
    return pa.RecordBatch.from_arrays([columns[name] for name in SEGMENTS.names], schema=SEGMENTS)


@functools.lru_cache(2)
def _values(count: int, mask_bytes: int) -> tuple[dict[str, pa.Array], pa.Array]:
    """Columns but those that `rows_of` fills in, and which rows are ok: 99 of 100."""
    random = np.random.default_rng(count)
    failed = random.random(count) < 0.01
    ok = pa.array(~failed)
    good = count - int(failed.sum())
    of_class, of_object = np.tile(np.arange(4), good), random.integers(0, 4, 2 * good)
    shares = random.dirichlet([1, 1, 1, 1], good).ravel()
    names = np.array(CLASSES)
    rles = [
        pa.ListArray.from_arrays(_offsets(2 * good, 2), pa.array(np.tile([480, 640], 2 * good), pa.int32())),
        pa.array([random.bytes(24) for _ in range(2 * good)], pa.binary()),
    ]
    classes = {
        "class_id": of_class, "name": names[of_class], "pixels": (shares * 307200).astype(np.int64),
        "fraction": shares, "mean_confidence": random.random(4 * good), "regions": random.integers(1, 9, 4 * good),
    }  # fmt: skip
    objects = {
        "class_id": of_object, "name": names[of_object], "score": random.random(2 * good),
        "bbox": pa.ListArray.from_arrays(_offsets(2 * good, 4), pa.array(random.random(8 * good, dtype=np.float32))),
        "area": random.integers(10, 50_000, 2 * good),
        "rle": pa.StructArray.from_arrays(rles, names=["size", "counts"]),
    }  # fmt: skip
    masks = [random.bytes(mask_bytes) if mask_bytes and not one else None for one in failed]
    plain = {
        "model_version": [VERSION] * count, "settings_digest": [DIGEST] * count, "run_id": [RUN_ID] * count,
        "task": ["instance"] * count, "attempt": np.ones(count, np.int16), "image_format": ["JPEG"] * count,
        "node": np.array([f"host-{n}" for n in range(8)])[random.integers(0, 8, count)],
        "image_bytes": random.integers(20_000, 90_000, count), "status": np.where(failed, "error", "ok"),
    }  # fmt: skip
    columns = {name: pa.array(column, SEGMENTS.field(name).type) for name, column in plain.items()}
    columns |= {
        "width": _known(pa.array(np.full(count, 640, np.int32)), ok),
        "height": _known(pa.array(np.full(count, 480, np.int32)), ok),
        "mask_crc32": _known(pa.array(random.integers(0, 2**32, count)), ok),
        "error_kind": pa.array(np.full(count, "corrupt"), pa.string(), mask=~failed),
        "error_message": pa.array(np.full(count, "the image is damaged"), pa.string(), mask=~failed),
        "classes": _lists("classes", 4, classes, failed),
        "instances": _lists("instances", 2, objects, failed),
        "mask": pa.StructArray.from_arrays(
            [pa.array(masks, pa.binary()), pa.nulls(count, pa.string())],
            fields=list(SEGMENTS.field("mask").type),
            mask=pa.array([one is None for one in masks]),
        ),
    }
    return columns, ok


def _known(values: pa.Array, ok: pa.Array) -> pa.Array:
    return pc.if_else(ok, values, pa.scalar(None, values.type))


def _offsets(lists: int, length: int) -> pa.Array:
    return pa.array(np.arange(lists + 1, dtype=np.int32) * length)


def _lists(field: str, per_row: int, columns: dict[str, Any], failed: NDArray[np.bool_]) -> pa.Array:
    """A column of lists of structs, NULL where `failed`."""
    kind = SEGMENTS.field(field).type
    children = list(kind.value_type)
    arrays = [
        columns[one.name].cast(one.type) if isinstance(columns[one.name], pa.Array)
        else pa.array(columns[one.name]).cast(one.type, safe=False)
        for one in children
    ]  # fmt: skip
    offsets = np.concatenate(([0], np.cumsum(np.where(failed, 0, per_row)))).astype(np.int32)
    structs = pa.StructArray.from_arrays(arrays, fields=children)
    return pa.ListArray.from_arrays(pa.array(offsets), structs, type=kind, mask=pa.array(failed))


def make_table(dest: Path, rows: int, *, mask_bytes: int) -> None:
    """A DEST of one finished run."""
    place = PartPlace(MODEL, VERSION, dt.date(2026, 1, 1))
    folder = dest / place.folder()
    folder.mkdir(parents=True)
    schema = SEGMENTS.with_metadata({"maskmill_schema_version": SCHEMA_VERSION})
    per_part = choose_shard_size(rows, actors=1, row_bytes=mask_bytes + 400)
    per_group = min(ROW_GROUP_ROWS, ROW_GROUP_BYTES // (mask_bytes + 1))
    for ordinal, start in enumerate(range(0, rows, per_part)):
        stop = min(rows, start + per_part)
        with part_writer(folder / part_name(RUN_ID, ordinal), schema) as writer:
            for first in range(start, stop, 20 * per_group):
                batch = rows_of(first, min(stop - first, 20 * per_group), mask_bytes)
                writer.write_batch(batch.replace_schema_metadata(schema.metadata), row_group_size=per_group)
    counts = {"planned": rows, "changed": 0}
    plan = {
        "run_id": RUN_ID, "sequence": 1, "model_name": MODEL, "model_version": VERSION, "settings_digest": DIGEST,
        "precision": "bf16", "command": {"source": "s3://photos-of-the-fleet", "force": False, "retry_errors": False},
        "run_date": "2026-01-01", "created_at": "2026-01-01T00:00:00Z", "counts": counts,
    }  # fmt: skip
    run = dest / "runs" / RUN_ID
    run.mkdir(parents=True)
    (run / "plan.json").write_text(json.dumps(plan))
    (run / "run.json").write_text(json.dumps({"state": "done", "closed_at": "2026-01-02T00:00:00Z", "plan": plan}))


def bytes_read() -> int:
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["rchar"])


def ask(dest: str, sql: str, threads: int, repeat: int) -> dict[str, float]:
    """In the measured process: seconds to connect, best seconds of the query, and the bytes that its first run read."""
    began_s = time.perf_counter()
    connection = pipeline.connect(dest)
    connection.execute(f"SET threads = {threads}")
    connect_s = time.perf_counter() - began_s
    times, core_times, first = [], [], 0
    for attempt in range(repeat):
        before, began_s, computed_s = bytes_read(), time.perf_counter(), time.process_time()
        rows = connection.execute(sql).fetchall()
        times.append(time.perf_counter() - began_s)
        core_times.append(time.process_time() - computed_s)
        if attempt == 0:
            first = bytes_read() - before
    return {
        "connect_s": connect_s, "seconds": min(times), "core_s": min(core_times), "bytes": first, "rows": len(rows)
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--masked", type=int, default=200_000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scratch", type=Path, default=None)
    parser.add_argument("--keep", type=Path, default=None, help="make the tables here, or use those that are here")
    parser.add_argument("--once", nargs=2, metavar=("DEST", "SQL"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        print(json.dumps(ask(*options.once, options.threads, options.repeat)))
        return
    scratch = options.keep or Path(tempfile.mkdtemp(prefix="maskmill-bench-", dir=options.scratch))
    try:
        for name, rows, mask_bytes in (("flat", options.rows, 0), ("masked", options.masked, MASK_BYTES)):
            if not (scratch / name).exists():
                make_table(scratch / name, rows, mask_bytes=mask_bytes)
        report(scratch, options)
    finally:
        if options.keep is None:
            shutil.rmtree(scratch, ignore_errors=True)


def report(scratch: Path, options: argparse.Namespace) -> None:
    def once(name: str, sql: str) -> dict[str, float]:
        command = [sys.executable, __file__, "--once", str(scratch / name), sql]
        command += ["--threads", str(options.threads), "--repeat", str(options.repeat)]
        found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        return found

    stored = {
        name: sum(path.stat().st_size for path in (scratch / name / "segments").rglob("*.parquet"))
        for name in ("flat", "masked")
    }
    parts = len(list((scratch / "flat" / "segments").rglob("*.parquet")))
    table = Table(
        title=f"{options.rows:,} rows without masks, {stored['flat'] / 1e9:.2f} GB in {parts} Parts, {options.threads} "
        f"threads, load {os.getloadavg()[0]:.1f}"
    )
    for column in ("query", "seconds", "core-s", "goal", "MB read", "rows"):
        table.add_column(column, justify="left" if column == "query" else "right")
    connect_s = []
    for name, goal, sql in QUERIES:
        got = once("flat", sql)
        connect_s.append(got["connect_s"])
        times = (f"{got['seconds']:.2f}", f"{got['core_s']:.2f}", f"{goal:g}")
        table.add_row(name, *times, f"{got['bytes'] / 1e6:.0f}", f"{got['rows']:,.0f}")
    table.caption = f"connecting: {min(connect_s):.2f} s"
    masked = Table(title=f"{options.masked:,} rows with masks of {MASK_BYTES:,} bytes: {stored['masked'] / 1e9:.2f} GB")
    for column in ("query", "seconds", "MB read", "share of the files"):
        masked.add_column(column, justify="left" if column == "query" else "right")
    for name, sql in (
        (
            "mean confidence by node",
            "SELECT node, avg(mean_confidence), avg(foreground_fraction) FROM images GROUP BY 1",
        ),
        ("coverage of each class", "SELECT name, sum(pixels) FROM classes GROUP BY 1"),
        ("objects by class", "SELECT name, count(*), avg(area) FROM instances GROUP BY 1"),
        ("bytes of all masks (reads them)", "SELECT sum(octet_length(mask.bytes)) FROM images"),
    ):
        got = once("masked", sql)
        masked.add_row(
            name, f"{got['seconds']:.2f}", f"{got['bytes'] / 1e6:.1f}", f"{got['bytes'] / stored['masked']:.1%}"
        )
    Console().print(table, masked)


if __name__ == "__main__":
    main()
