"""What a soak comes to. Owns: counting rows and comparing masks from the files alone, with pyarrow and DuckDB and none
of the project's views; the line through samples of memory. Must not know: how the files came to be.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from scipy import stats

#: Written out, not taken from the project: docs/table.md says that these errors are final.
TERMINAL = (
    "(status = 'ok' OR error_kind IN "
    "('empty', 'truncated', 'not_an_image', 'unsupported', 'too_large', 'corrupt', 'model_failed'))"
)
_COLUMNS = ["image_uri", "image_etag", "listed_etag", "run_id", "attempt", "status", "error_kind", "mask_crc32"]


class Accounts(NamedTuple):
    """The counts of one table."""

    rows: int
    terminal: int
    #: Images of the last listing without a terminal row.
    lost: int
    #: (image, etag) pairs with more than one terminal row.
    duplicated: int
    #: Images on the frozen list of a closed run that have not exactly one row in its Parts.
    unaccounted: int
    #: Terminal rows whose status, kind, mask or checksum are not those of an undisturbed run.
    different: int
    closed_runs: int
    error_kinds: dict[str, int]
    examples: list[str]


def download(client: Any, dest: str, folder: Path) -> Path:
    """Parts, frozen lists and records below the URI `dest`, with the paths that they have there."""
    bucket, _, prefix = dest.removeprefix("s3://").partition("/")
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/"):
        for found in page.get("Contents", []):
            name = found["Key"].removeprefix(f"{prefix}/")
            if name.startswith("segments/") or name.endswith(("/manifest.parquet", "/run.json")):
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(client.get_object(Bucket=bucket, Key=found["Key"])["Body"].read())
    return folder


def answers_of(folder: Path, contents: Mapping[str, bytes]) -> pa.Table:
    """What an undisturbed run, whose table is `folder`, says of each of `contents`, which are its images by name: by
    the MD5 of the bytes, which is also the etag of a store.
    """
    digests = {name: hashlib.md5(data, usedforsecurity=False).hexdigest() for name, data in contents.items()}
    rows = _rows(folder)
    names = [uri.rpartition("/")[2] for uri in rows["image_uri"].to_pylist()]
    assert sorted(names) == sorted(contents), "the undisturbed run has not one row for each image"
    etags = pa.array([digests[name] for name in names])
    return rows.set_column(rows.schema.get_field_index("image_etag"), "image_etag", etags)


def account(folder: Path, listing: Mapping[str, str], answers: pa.Table) -> Accounts:
    """`folder`: see `download`. `listing`: etags by URI, as the store has them now. `answers`: see `answers_of`."""
    rows = _rows(folder)
    connection = duckdb.connect()
    connection.register("rows", rows)
    connection.register("listing", pa.table({"uri": list(listing), "etag": list(listing.values())}))
    connection.register("answers", answers)
    connection.execute(f"CREATE TABLE terminal AS SELECT * FROM rows WHERE {TERMINAL}")
    closed = sorted(path.parent.name for path in folder.glob("runs/*/run.json"))
    lists = [
        pq.read_table(folder / "runs" / run_id / "manifest.parquet", columns=["uri", "etag"]).append_column(
            "run", pa.array([run_id] * pq.read_metadata(folder / "runs" / run_id / "manifest.parquet").num_rows)
        )
        for run_id in closed
    ]
    connection.register("frozen", pa.concat_tables(lists))
    examples: list[str] = []

    def count(what: str, sql: str) -> int:
        found = connection.execute(sql).fetchall()
        examples.extend(f"{what}: {' '.join(map(str, row))}" for row in found[:3])
        return len(found)

    lost = count(
        "lost",
        "SELECT uri, etag FROM listing WHERE NOT EXISTS (SELECT 1 FROM terminal "
        "WHERE image_uri = uri AND etag IN (listed_etag, image_etag))",
    )
    duplicated = count(
        "duplicated",
        "SELECT image_uri, listed_etag, list(run_id) FROM terminal GROUP BY image_uri, listed_etag HAVING count(*) > 1",
    )
    unaccounted = count(
        "unaccounted",
        "SELECT run, uri, count(run_id) FROM frozen LEFT JOIN rows "
        "ON run_id = run AND image_uri = uri AND listed_etag = etag GROUP BY run, uri, etag HAVING count(run_id) <> 1",
    )
    different = count(
        "different",
        "SELECT t.image_uri, image_etag, t.status, t.error_kind FROM terminal t LEFT JOIN answers a USING (image_etag) "
        "WHERE (t.status, t.error_kind, t.mask_crc32, t.mask) IS DISTINCT FROM "
        "(a.status, a.error_kind, a.mask_crc32, a.mask)",
    )
    kinds = connection.execute("SELECT error_kind, count(*) FROM rows WHERE status <> 'ok' GROUP BY 1 ORDER BY 1")
    error_kinds = dict(kinds.fetchall())
    terminal = int(connection.execute("SELECT count(*) FROM terminal").fetchall()[0][0])
    connection.close()
    return Accounts(
        rows.num_rows, terminal, lost, duplicated, unaccounted, different, len(closed), error_kinds, examples
    )


class Slope(NamedTuple):
    """A line through samples of memory, the first third left out."""

    samples: int
    median_bytes: float
    #: Of the line, and the half width of its 95 % interval.
    bytes_per_min: float
    margin_bytes_per_min: float
    minutes: float

    @property
    def lowest_bytes_per_min(self) -> float:
        """The lower end of the interval."""
        return self.bytes_per_min - self.margin_bytes_per_min

    @property
    def text(self) -> str:
        """For people."""
        return (
            f"{self.bytes_per_min / 2**20:+.3f} ± {self.margin_bytes_per_min / 2**20:.3f} MiB/min over "
            f"{self.minutes:.1f} min, {self.samples} samples, median {self.median_bytes / 2**20:.0f} MiB"
        )


def slope(at_s: list[float], memory_bytes: list[float]) -> Slope:
    """Ordinary least squares; the interval by Student's t, as if samples were independent. At least 9 samples."""
    start = len(at_s) // 3
    minutes = [second / 60 for second in at_s[start:]]
    line = stats.linregress(minutes, memory_bytes[start:])
    margin = float(stats.t.ppf(0.975, len(minutes) - 2) * line.stderr)
    median = float(sorted(memory_bytes)[len(memory_bytes) // 2])
    return Slope(len(minutes), median, float(line.slope), margin, minutes[-1] - minutes[0])


def _rows(folder: Path) -> pa.Table:
    tables = []
    for path in sorted(folder.glob("segments/**/*.parquet")):
        table = pq.ParquetFile(path).read(columns=[*_COLUMNS, "mask"])
        mask = pc.struct_field(table["mask"], "bytes")
        tables.append(table.drop_columns(["mask"]).append_column("mask", mask))
    return pa.concat_tables(tables)
