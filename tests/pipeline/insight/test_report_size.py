"""A report does not grow with its run, nor does the memory that it takes."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from handmade import make_list, make_plan, make_record, make_row

from models.masks import encode_mask_png
from pipeline.engine.ledger import Ledger
from pipeline.insight.questions import Questions, choose_run
from pipeline.storage import normalize_uri, open_storage
from pipeline.table.catalog import connect
from pipeline.table.parts import part_writer
from pipeline.table.schema import SEGMENTS

_KINDS, _PARTS, _WIDTH, _HEIGHT = 300, 4, 720, 540
_COLORS = [(12 * index, 250 - 10 * index, 60) for index in range(20)]
_MTIME_NS = 1_700_000_000_000_000_000


def noise_image(path: Path) -> str:
    """An image that hardly compresses, and always has the same etag, which it gives."""
    import cv2

    pixels = np.random.default_rng(0).integers(0, 256, (_HEIGHT, _WIDTH, 3)).astype(np.uint8)
    path.write_bytes(cv2.imencode(".jpg", cv2.GaussianBlur(pixels, (5, 5), 0))[1].tobytes())
    os.utime(path, ns=(_MTIME_NS, _MTIME_NS))
    uri = normalize_uri(str(path))
    return open_storage(uri).get(uri).etag


def write_run(dest: str, photos: str, etag: str, rows: int) -> None:
    """A finished run of that many rows, of a few hundred kinds."""
    random = np.random.default_rng(0)
    kinds = []
    for index in range(_KINDS):
        ids = np.zeros((_HEIGHT, _WIDTH), np.uint8)
        for _ in range(40):
            y, x = random.integers(0, _HEIGHT), random.integers(0, _WIDTH)
            ids[y : y + 120, x : x + 160] = random.integers(0, 20 if index % 50 == 0 else 15)
        counts = np.bincount(ids.ravel(), minlength=20)
        classes = [
            {"class_id": id_, "name": f"class {id_}", "pixels": int(count), "fraction": count / ids.size,
             "mean_confidence": 0.9, "regions": 2}
            for id_, count in enumerate(counts) if count
        ]  # fmt: skip
        facts: dict[str, Any] = {
            "width": _WIDTH, "height": _HEIGHT, "classes": classes, "image_format": "JPEG", "mean_entropy": 0.1,
            "mask": {"bytes": encode_mask_png(ids, _COLORS), "path": None}, "foreground_fraction": 0.5,
            "brightness": 0.5, "contrast": 0.2, "fetch_ms": 9.0, "decode_ms": 2.0, "infer_ms": 4.0, "encode_ms": 1.0,
        }  # fmt: skip
        kinds.append(make_row("", etag, **facts))
    for index in range(_KINDS // 20):
        kinds.append(make_row("", etag, ("corrupt", "empty", "missing")[index % 3]))
    base = pa.Table.from_pylist(kinds, SEGMENTS)
    storage = open_storage(dest)
    ledger = Ledger(storage, dest)
    plan = make_plan(dest, planned=rows, shard_size=rows // _PARTS)
    assert ledger.freeze(plan, make_list(["x"]))
    for ordinal in range(_PARTS):
        numbers = np.arange(ordinal * plan.shard_size, (ordinal + 1) * plan.shard_size)
        table = base.take(random.integers(0, len(base), len(numbers)))
        stamps = np.datetime64("2026-01-02T03:04:05") + (numbers * 1000).astype("timedelta64[us]")
        for name, values in (
            ("image_uri", [f"{photos}/{number:08d}.jpg" for number in numbers]),
            ("mean_confidence", random.beta(20, 2, len(numbers)).astype(np.float32)),
            ("processed_at", stamps),
        ):
            column = SEGMENTS.get_field_index(name)
            table = table.set_column(column, SEGMENTS.field(column), pa.array(values, SEGMENTS.field(column).type))
        sink = io.BytesIO()
        with part_writer(sink, SEGMENTS) as writer:
            writer.write_table(table, row_group_size=4096)
        storage.put_new(plan.part_uri(ordinal), sink.getvalue())
    ledger.close(make_record(plan, ok=rows, parts=_PARTS, seconds=rows / 1000, images_per_s=1000.0))


_MEASURE = """
import json, pathlib, re, sys, time
import pipeline
began_s = time.monotonic()
made = pipeline.report(sys.argv[1], out=sys.argv[2])
# Not getrusage: its maximum is the parent's too, from before the exec.
peak_bytes = 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
took = {"seconds": time.monotonic() - began_s, "cpu_seconds": time.process_time()}
print(json.dumps({"size_bytes": made.size_bytes, "peak_bytes": peak_bytes} | took))
"""


@pytest.mark.parametrize("rows", [8000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_a_page_of_so_many_images_is_below_5_mb(rows: int, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    etag = noise_image(photos / "any.jpg")
    dest = normalize_uri(str(tmp_path / "dest"))
    write_run(dest, normalize_uri(str(photos)), etag, rows)
    connection = connect(dest)
    ask = Questions(connection, dest, choose_run(connection, dest, None))
    classes = sorted(ask.classes().records(), key=lambda one: (one["images"], one["name"]))
    rarest = [one["name"] for one in classes[:6]]
    chosen = [ask.random_images(12), ask.uncertain_images(12), ask.rare_images(rarest)]
    for uri, *_ in (row for answer in chosen for row in answer.rows):
        path = photos / Path(uri).name
        if not path.exists():
            noise_image(path)
    connection.close()
    out = tmp_path / "report.html"
    command = [sys.executable, "-c", _MEASURE, dest, str(out)]
    measured = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(f"{rows} rows: {measured}")
    assert measured["size_bytes"] == out.stat().st_size
    assert 500_000 < measured["size_bytes"] < 5_000_000, "pictures and all"
    assert measured["peak_bytes"] < 2 << 30
    assert out.read_text().count("data:image/webp") > 30
