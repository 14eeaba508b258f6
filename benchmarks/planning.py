"""Time and peak memory of planning over 1, 10 and 20 million images, on Parts as a run leaves them.

    python benchmarks/planning.py [--millions 1 10 20 100] [--nights first usual …] [--scratch DIR] [--memory-gib 3]

Four nights each: the first (nothing is done, all is frozen into a list), the same out of an S3 Inventory on this disk
(whose digests are checked, which is read and asked whether a line repeats, then planned), a quiet one (all is done),
and a usual one (1 % new, 1 % changed, 1 % gone). Measured are `work_left` and `find_changes`, the whole question from
listing file and Parts to counts, frozen list and what is gone from SOURCE, in a process of its own. Making the inputs
is not measured, nor listing a store (see benchmarks/README.md).
"""

from __future__ import annotations

import argparse
import datetime as dt
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from pipeline.corpus.manifest import Corpus, read_source
from pipeline.engine.plan import Question, work_left
from pipeline.storage import open_storage
from pipeline.table.catalog import Current, part_sizes, sql_text
from pipeline.table.removed import Coverage, find_changes
from pipeline.table.schema import SEGMENTS, PartPlace, part_name

ROWS_PER_PART = 125_000
DIGEST = "0123456789ab"
VERSION = "ba9876543210"
RUN_ID = "20260101T000000Z-000000"
FOLDER = "s3://photos-of-the-fleet/2026"
NIGHTS = ("first", "inventory", "quiet", "usual")


def make_inputs(folder: Path, images: int) -> None:
    """`corpus.parquet` (the listing of the first night), `usual.parquet` (2 % differ), and Parts in which all images
    are done."""
    folder.mkdir(parents=True, exist_ok=True)
    connection = duckdb.connect()
    uri = (
        f"'{FOLDER}/' || (i // 1000000)::VARCHAR || '/cam-' || (i % 97)::VARCHAR || '/' "
        "|| lpad(i::VARCHAR, 12, '0') || '.jpg'"
    )
    etag = "md5(i::VARCHAR)"
    rest = "(20000 + i % 50000)::BIGINT AS size_bytes, TIMESTAMPTZ '2026-01-01 00:00:00+00' AS modified"
    connection.execute(
        f"COPY (SELECT {uri} AS uri, {etag} AS etag, {rest} FROM range({images}) t(i)) "
        f"TO {sql_text(str(folder / 'corpus.parquet'))} (FORMAT parquet, COMPRESSION zstd)"
    )
    connection.execute(
        f"COPY (SELECT {uri} AS uri, CASE WHEN i % 100 = 7 THEN 'changed' || i ELSE {etag} END AS etag, {rest} "
        f"FROM range({images // 100}, {images + images // 100}) t(i)) "
        f"TO {sql_text(str(folder / 'usual.parquet'))} (FORMAT parquet, COMPRESSION zstd)"
    )
    given = {
        "image_uri": uri, "image_etag": etag, "listed_etag": etag, "settings_digest": sql_text(DIGEST),
        "status": "'ok'", "attempt": "1::SMALLINT", "width": "640::INT", "height": "480::INT",
        "run_id": sql_text(RUN_ID), "model_version": sql_text(VERSION),
        "processed_at": "TIMESTAMPTZ '2026-01-01 00:30:00+00'", "image_modified": "NULL::TIMESTAMPTZ",
        "classes": "NULL::STRUCT(class_id SMALLINT)[]", "instances": "NULL::STRUCT(class_id SMALLINT)[]",
    }  # fmt: skip
    types = {"string": "VARCHAR", "int16": "SMALLINT", "int32": "INT", "int64": "BIGINT", "float": "FLOAT"}
    columns = ", ".join(
        f"{given.get(field.name) or 'NULL::' + types.get(str(field.type), 'VARCHAR')} AS {field.name}"
        for field in SEGMENTS
        if field.name in given or str(field.type) in types
    )
    place = PartPlace("bench", VERSION, dt.date(2026, 1, 1))
    parts = folder / "dest" / place.folder()
    parts.mkdir(parents=True, exist_ok=True)
    plan = {
        "run_id": RUN_ID, "sequence": 1, "model_name": place.model, "model_version": VERSION, "settings_digest": DIGEST,
        "precision": "fp32", "command": {"source": FOLDER, "force": False, "retry_errors": False},
        "run_date": "2026-01-01", "created_at": "2026-01-01T00:00:00+00:00",
        "counts": {"planned": images, "changed": 0},
    }  # fmt: skip
    record = folder / "dest" / "runs" / RUN_ID
    record.mkdir(parents=True, exist_ok=True)
    (record / "plan.json").write_text(json.dumps(plan))
    closed = {"plan": plan, "state": "done", "closed_at": "2026-01-01T01:00:00+00:00", "ok": images, "errors": 0}
    (record / "run.json").write_text(json.dumps(closed))
    for ordinal, start in enumerate(range(0, images, ROWS_PER_PART)):
        stop = min(images, start + ROWS_PER_PART)
        connection.execute(
            f"COPY (SELECT {columns} FROM range({start}, {stop}) t(i)) "
            f"TO {sql_text(str(parts / part_name(RUN_ID, ordinal)))} "
            "(FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE 8192)"
        )


def make_inventory(folder: Path) -> None:
    """`inventory/manifest.json`: the images of `corpus.parquet` as Amazon S3 Inventory writes them."""
    place = folder / "inventory"
    (place / "data").mkdir(parents=True)
    bucket = FOLDER.removeprefix("s3://").partition("/")[0]
    connection = duckdb.connect()
    connection.execute("SET preserve_insertion_order = false")
    connection.execute(
        f"COPY (SELECT {sql_text(bucket)} AS bucket, substr(uri, {len(bucket) + 7}) AS key, size_bytes AS size, "
        f"modified AS last_modified_date, etag AS e_tag FROM read_parquet({sql_text(str(folder / 'corpus.parquet'))})) "
        f"TO {sql_text(str(place / 'data'))} (FORMAT parquet, COMPRESSION zstd, FILE_SIZE_BYTES '250MB', "
        "OVERWRITE_OR_IGNORE)"
    )
    files = []
    for path in sorted((place / "data").rglob("*.parquet")):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "md5").hexdigest()
        files.append({"key": str(path.relative_to(place)), "MD5checksum": digest})
    manifest = {"sourceBucket": bucket, "destinationBucket": "arn:aws:s3:::i", "fileFormat": "Parquet", "files": files}
    (place / "manifest.json").write_text(json.dumps(manifest))


def plan_once(folder: Path, night: str, memory_bytes: int, dest: str | None = None) -> dict[str, float]:
    """Runs in the measured process. `dest`: where the Parts lie, by default in `folder`."""
    dest = dest or f"file://{folder / ('new' if night in ('first', 'inventory') else 'dest')}"
    storage = open_storage(dest)
    with tempfile.TemporaryDirectory(prefix="maskmill-bench-", dir=folder) as scratch:
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        listing, reading_s = folder / ("usual.parquet" if night == "usual" else "corpus.parquet"), 0.0
        if night == "inventory":
            corpus = read_source(str(folder / "inventory" / "manifest.json"), scratch=Path(scratch))
            reading_s = time.perf_counter() - began_s
        else:
            rows = pq.read_metadata(listing).num_rows
            corpus = Corpus(f"read_parquet({sql_text(str(listing))})", rows, True, True, FOLDER)
        question = Question(
            corpus=corpus.sql, corpus_rows=corpus.rows, corpus_is_distinct=corpus.distinct,
            part_sizes=part_sizes(storage, f"{dest}/segments"), held={}, settings_digest=DIGEST,
            unmatched_path=None if night == "inventory" else Path(scratch, "unmatched.parquet"),
        )  # fmt: skip
        counts = work_left(
            question, storage, scratch=Path(scratch), list_path=Path(scratch, "work.parquet"),
            memory_bytes=memory_bytes,
        )  # fmt: skip
        gone = 0
        if corpus.full_listing:  # only then is it asked for
            gone = find_changes(
                storage, dest, listing=corpus.sql, coverage=Coverage(FOLDER),
                current=Current("bench", VERSION, DIGEST), scratch=Path(scratch),
                unmatched_path=question.unmatched_path, memory_bytes=memory_bytes,
            ).removed  # fmt: skip
        seconds, cpu_s = time.perf_counter() - began_s, time.process_time() - began_cpu_s
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    return {
        "seconds": seconds, "cpu_s": cpu_s, "reading_s": reading_s, "peak_bytes": peak_bytes, "planned": counts.planned,
        "images": counts.images, "gone": gone,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=float, nargs="+", default=[1, 10, 20])
    parser.add_argument("--nights", nargs="+", choices=NIGHTS, default=NIGHTS)
    parser.add_argument("--scratch", type=Path, default=None)
    parser.add_argument("--memory-gib", type=float, default=3.0)
    parser.add_argument("--once", nargs=2, metavar=("FOLDER", "NIGHT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    memory_bytes = int(options.memory_gib * (1 << 30))
    if options.once:
        print(json.dumps(plan_once(Path(options.once[0]), options.once[1], memory_bytes)))
        return
    table = Table(
        title=f"planning, {os.cpu_count()} cores, DuckDB with {options.memory_gib:g} GiB, load {os.getloadavg()[0]:.1f}"
    )
    for column in ("images", "night", "planned", "gone", "seconds", "core-seconds", "peak memory"):
        table.add_column(column, justify="left" if column == "night" else "right")
    scratch = Path(tempfile.mkdtemp(prefix="maskmill-bench-", dir=options.scratch))
    try:
        for millions in options.millions:
            images = int(millions * 1e6)
            folder = scratch / str(images)
            make_inputs(folder, images)
            if "inventory" in options.nights:
                make_inventory(folder)
            expected = {
                "inventory": images,
                "first": images,
                "quiet": 0,
                "usual": images // 100 + sum(1 for i in range(images // 100, images) if i % 100 == 7),
            }
            for night in options.nights:
                command = [
                    sys.executable,
                    __file__,
                    "--once",
                    str(folder),
                    night,
                    "--memory-gib",
                    str(options.memory_gib),
                ]
                got = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                assert got["planned"] == expected[night], (night, got)
                table.add_row(
                    f"{images:,}",
                    night,
                    f"{int(got['planned']):,}",
                    f"{int(got['gone']):,}",
                    f"{got['seconds']:.1f}" + (f" ({got['reading_s']:.1f} reading)" if got["reading_s"] else ""),
                    f"{got['cpu_s']:.1f}",
                    f"{got['peak_bytes'] / 2**30:.2f} GiB",
                )
            shutil.rmtree(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    Console().print(table)


if __name__ == "__main__":
    main()
