"""The measurement behind 0012-zstd-level.md: rows as a model made them, written as a Part with other compression.

    python docs/decisions/0012-zstd-level.py DEST     # a table of `maskmill segment`

Few rows are made more by moving their masks about. Prints bytes a row, and CPU milliseconds of one thread to write and
to read a thousand rows, whole and without masks.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import pipeline
from models.masks import decode_mask_png, decode_rle, encode_label_rles, encode_mask_png
from pipeline.table import parts
from pipeline.table.schema import SEGMENTS

FLAT = [field.name for field in SEGMENTS if not pa.types.is_nested(field.type)]
ROWS = 512


def write(table: pa.Table, **compression: Any) -> pa.Buffer:
    """As Parts are written, but for the compression."""
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(
        sink, table.schema, use_dictionary=parts._DICTIONARY, write_statistics=parts._STATISTICS,
        write_page_checksum=True, **compression,
    ) as writer:  # fmt: skip
        writer.write_table(table, row_group_size=len(table))
    return sink.getvalue()


def moved(row: dict[str, Any], copy: int) -> dict[str, Any]:
    """The row of another image of the kind: masks rolled around and mirrored, a name of its own."""
    random = np.random.default_rng([copy, len(row["image_uri"]), row["image_bytes"]])
    class_ids = decode_mask_png(row["mask"]["bytes"])
    by = tuple(int(random.integers(side)) for side in class_ids.shape)

    def move(pixels: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(np.roll(pixels, by, (0, 1))[:: -1 if copy & 1 else 1, :: -1 if copy & 2 else 1])

    instances = row["instances"] or []
    labels = np.zeros(class_ids.shape, np.int32)
    for number, one in enumerate(instances, start=1):
        labels[decode_rle(one["rle"])] = number
    rles = encode_label_rles(move(labels), len(instances))
    shown = [(int(number), int(number), int(number)) for number in range(256)]
    changed = [
        one | {"rle": rle, "score": float(random.random()), "bbox": random.integers(0, 500, 4).astype(float).tolist()}
        for one, rle in zip(instances, rles, strict=True)
    ]
    figures = {name: float(random.random()) for name in ("mean_confidence", "mean_entropy", "brightness", "contrast")}
    figures |= {f"{stage}_ms": float(random.random()) for stage in ("fetch", "decode", "infer", "encode")}
    return row | figures | {
        "image_uri": f"s3://photos/{copy:04d}/{row['image_uri'].rpartition('/')[2]}",
        "image_etag": random.bytes(16).hex(),
        "mask": {"bytes": encode_mask_png(move(class_ids), shown), "path": None},
        "mask_crc32": int(random.integers(1 << 32)),
        "instances": changed if row["instances"] is not None else None,
    }  # fmt: skip


def best_ms(action: Callable[[], object], rows: int) -> float:
    """CPU milliseconds for a thousand rows, the best of five."""
    best_s = float("inf")
    for _ in range(5):
        began_s = time.process_time()
        action()
        best_s = min(best_s, time.process_time() - began_s)
    return best_s / rows * 1e6


def main() -> None:
    pa.set_cpu_count(1)
    names = ", ".join(SEGMENTS.names)
    rows = pipeline.connect(sys.argv[1]).sql(f"SELECT {names} FROM segments WHERE status = 'ok'").to_arrow_table()
    found = rows.cast(SEGMENTS).to_pylist()
    copies = max(1, ROWS // len(found))
    table = pa.Table.from_pylist([moved(row, copy) for copy in range(copies) for row in found], SEGMENTS)
    inside = {
        "masks": sum(len(one["bytes"]) for one in table["mask"].to_pylist() if one),
        "RLE": sum(len(one["rle"]["counts"]) for row in table["instances"].to_pylist() for one in row or []),
    }
    said = ", ".join(f"{name} {size / len(table):,.0f}" for name, size in inside.items())
    print(f"{len(table):,} rows; bytes a row before compression: {said}")
    ways: dict[str, dict[str, Any]] = {
        "none": {"compression": "none"},
        "snappy": {"compression": "snappy"},
        "lz4": {"compression": "lz4"},
    }
    ways |= {f"zstd {level}": {"compression": "zstd", "compression_level": level} for level in (1, 2, 3, 6, 9)}
    per_column = {name: "zstd" for name in leaves(table.schema)} | {"mask.bytes": "none"}
    ways["zstd 1, masks as they are"] = {"compression": per_column}
    print(f"{'':28}{'bytes a row':>12}{'write ms':>10}{'read ms':>10}{'read without masks':>20}")
    for name, compression in ways.items():
        data = write(table, **compression)
        figures = (
            best_ms(lambda compression=compression: write(table, **compression), len(table)),
            best_ms(lambda data=data: pq.read_table(pa.BufferReader(data), use_threads=False), len(table)),
            best_ms(
                lambda data=data: pq.read_table(pa.BufferReader(data), columns=FLAT, use_threads=False), len(table)
            ),
        )
        print(f"{name:28}{data.size / len(table):12,.0f}{figures[0]:10.2f}{figures[1]:10.2f}{figures[2]:20.2f}")


def leaves(schema: pa.Schema) -> list[str]:
    """Columns as Parquet names them."""
    sink = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), sink)
    found = pq.ParquetFile(pa.BufferReader(sink.getvalue())).schema
    return [found.column(i).path for i in range(len(found.names))]


if __name__ == "__main__":
    main()
