"""Files of every schema version, kept for ever: what was written once stays readable."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from handmade import CREATED_AT, make_row
from tables import Table

from pipeline.errors import InfrastructureError
from pipeline.storage import local_path, normalize_uri
from pipeline.table import catalog
from pipeline.table.schema import SCHEMA_VERSION, SCHEMAS, SEGMENTS

#: `version-<n>.parquet`: a Part as the release that made version n wrote it. Never written anew.
PARTS = Path(__file__).parent / "parts"
URIS = ["s3://photos/a b.png", "s3://photos/broken.png", "s3://photos/late.png"]


def table_of(version: str, folder: Path) -> Table:
    """A DEST whose one Part is the kept file of `version`."""
    table = Table(normalize_uri(str(folder / "dest")))
    kinds = ["ok", "corrupt", "fetch_failed"]
    plan = table.run(*(make_row(uri, "e1", kind) for uri, kind in zip(URIS, kinds, strict=True)), at=CREATED_AT)
    Path(local_path(plan.part_uri(0))).write_bytes((PARTS / f"version-{version}.parquet").read_bytes())
    if version != "1":
        path = Path(local_path(table.ledger.uri(plan.run_id, "run.json")))
        record = json.loads(path.read_text())
        record["plan"]["schema_version"] = version
        path.write_text(json.dumps(record))
    return table


def test_a_file_of_every_version_is_kept() -> None:
    assert {path.stem.removeprefix("version-") for path in PARTS.iterdir()} == set(SCHEMAS)
    assert list(SCHEMAS)[-1] == SCHEMA_VERSION and SCHEMAS[SCHEMA_VERSION] == SEGMENTS


@pytest.mark.parametrize("version", SCHEMAS)
def test_a_file_is_what_its_version_says(version: str) -> None:
    schema = pq.read_schema(PARTS / f"version-{version}.parquet")
    assert schema.metadata[b"maskmill_schema_version"] == version.encode()
    assert schema.equals(SCHEMAS[version]), "a schema that was released never changes: add a version"


@pytest.mark.parametrize("version", SCHEMAS)
def test_every_view_reads_it(version: str, tmp_path: Path) -> None:
    table = table_of(version, tmp_path)
    assert table.ask("SELECT image_uri FROM segments ORDER BY 1") == [(uri,) for uri in URIS]
    assert table.ask("SELECT image_uri, status FROM images ORDER BY 1") == [(URIS[0], "ok"), (URIS[1], "error")]
    assert table.ask("SELECT name, pixels FROM classes ORDER BY class_id") == [("background", 39), ("nucleus", 9)]
    assert table.ask("SELECT name, area, bbox FROM instances") == [("nucleus", 9, [2.0, 1.0, 3.0, 3.0])]
    assert table.ask("SELECT error_kind FROM errors ORDER BY 1") == [("corrupt",), ("fetch_failed",)]
    ((mask, area),) = table.ask("SELECT decode_mask(mask.bytes), decode_rle(instances[1].rle).area FROM images LIMIT 1")
    expected = np.zeros((6, 8), np.uint8)
    expected[1:4, 2:5] = 1
    assert (mask["width"], mask["height"], mask["class_ids"], area) == (8, 6, expected.tobytes(), 9)
    assert table.ask("SELECT mask_crc32, processed_at FROM images WHERE status = 'ok'") == [(131889239, CREATED_AT)]


@pytest.fixture
def an_older_version(monkeypatch: pytest.MonkeyPatch) -> pa.Schema:
    """Version 0, as if there had been one: without `contrast`, and without `regions` of classes."""
    of_class = pa.struct([field for field in SEGMENTS.field("classes").type.value_type if field.name != "regions"])
    older = pa.schema(
        [field.with_type(pa.list_(of_class)) if field.name == "classes" else field for field in SEGMENTS
         if field.name != "contrast"]
    )  # fmt: skip
    monkeypatch.setattr(catalog, "SCHEMAS", {"0": older, **SCHEMAS})
    return older


def write_older(table: Table, older: pa.Schema) -> None:
    """Makes the first run of `table` one of version 0."""
    run_id = table.ask("SELECT run_id FROM runs")[0][0]
    (part,) = Path(local_path(table.dest)).glob(f"segments/**/{run_id}-*.parquet")
    rows = [{name: row[name] for name in older.names} for row in pq.ParquetFile(part).read().to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows, schema=older), part)
    record_path = Path(local_path(table.ledger.uri(run_id, "run.json")))
    record: dict[str, Any] = json.loads(record_path.read_text())
    record["plan"]["schema_version"] = "0"
    record_path.write_text(json.dumps(record))


CELL = {"class_id": 1, "name": "cell", "pixels": 7, "fraction": 0.5, "mean_confidence": 0.5, "regions": 2}


def test_old_and_new_files_in_one_table(tmp_path: Path, an_older_version: pa.Schema) -> None:
    table = Table(normalize_uri(str(tmp_path / "dest")))
    table.run(make_row("a", "e1", contrast=0.5, classes=[CELL]))
    write_older(table, an_older_version)
    assert table.ask("SELECT image_uri, contrast FROM segments") == [("a", None)]
    table.run(make_row("b", "e1", contrast=0.5, classes=[CELL]))
    table.run(make_row("c", "e1", contrast=0.25), run_date=dt.date(2027, 1, 1))
    assert table.ask("SELECT image_uri, contrast FROM images ORDER BY 1") == [("a", None), ("b", 0.5), ("c", 0.25)]
    assert table.ask("SELECT image_uri, pixels, regions FROM classes ORDER BY 1") == [("a", 7, None), ("b", 7, 2)]
    assert table.ask("SELECT count(*) FROM images WHERE date = DATE '2027-01-01' AND model = 'tiny-semantic'") == [(1,)]


def test_a_newer_version_is_refused_in_a_sentence(tmp_path: Path) -> None:
    table = Table(normalize_uri(str(tmp_path / "dest")))
    plan = table.run(make_row("a", "e1"))
    path = Path(local_path(table.ledger.uri(plan.run_id, "run.json")))
    record = json.loads(path.read_text())
    record["plan"]["schema_version"] = "99"
    path.write_text(json.dumps(record))
    with pytest.raises(InfrastructureError, match=r"schema version 99 .* use a newer release"):
        catalog.connect(table.dest)
