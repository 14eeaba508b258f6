"""SQL over DEST: the views, and what other people's readers see."""

from __future__ import annotations

import datetime as dt
import os
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from handmade import CREATED_AT, make_list, make_plan, make_row
from tables import HOUR, Table

from pipeline.errors import BYTES_KINDS, WORLD_KINDS, InfrastructureError, UsageError
from pipeline.storage import join_uri, local_path, normalize_uri, open_storage
from pipeline.table.catalog import TERMINAL, connect, key_sql, open_duckdb, part_sizes, unreadable


@pytest.fixture
def table(tmp_path: Path) -> Table:
    return Table(normalize_uri(str(tmp_path / "dest")))


def test_terminal_means_ok_or_about_the_bytes(table: Table) -> None:
    rows = [make_row(kind, "e1", kind) for kind in BYTES_KINDS | WORLD_KINDS]
    table.run(make_row("fine", "e1"), *rows)
    terminal = {uri for (uri,) in table.ask(f"SELECT image_uri FROM segments WHERE {TERMINAL}")}
    assert terminal == {"fine"} | BYTES_KINDS
    assert {uri for (uri,) in table.ask("SELECT image_uri FROM images")} == terminal
    assert {uri for (uri,) in table.ask("SELECT image_uri FROM errors")} == BYTES_KINDS | WORLD_KINDS


def test_all_views_work_and_have_the_path_keys(table: Table) -> None:
    cell = {"class_id": 1, "name": "cell", "pixels": 7, "fraction": 0.5, "mean_confidence": 0.5, "regions": 2}
    instance = {"class_id": 1, "name": "cell", "score": 0.5, "bbox": [0.0, 1.0, 2.0, 3.0], "area": 6,
                "rle": {"size": [3, 4], "counts": b"x"}}  # fmt: skip
    plan = table.run(make_row("a", "e1", classes=[cell, cell | {"class_id": 0}], instances=[instance] * 3))
    assert table.ask("SELECT model, version, date FROM segments") == [
        (plan.model_name, plan.model_version, plan.run_date)
    ]
    assert table.ask("SELECT image_uri, class_id, name, pixels FROM classes ORDER BY class_id") == [
        ("a", 0, "cell", 7),
        ("a", 1, "cell", 7),
    ]
    assert table.ask("SELECT count(*), sum(area), max(bbox[4]) FROM instances") == [(3, 18, 3.0)]
    assert table.ask("SELECT run_id, state, ok FROM runs") == [(plan.run_id, "done", 1)]


def test_views_work_before_the_first_part(table: Table) -> None:
    plan = make_plan(table.dest)
    table.ledger.freeze(plan, make_list(["a"]))
    for view in ("segments", "images", "classes", "instances", "errors"):
        assert table.ask(f"SELECT * FROM {view}") == []
    assert table.ask("SELECT sum(area) FROM instances WHERE date = DATE '2026-01-01'") == [(None,)]
    assert table.ask("SELECT run_id, state, ok FROM runs") == [(plan.run_id, "open", None)]


def test_a_changed_image_shows_its_newest_row_only(table: Table) -> None:
    table.run(make_row("a", "e1"), make_row("b", "e1"))
    table.run(make_row("a", "e2"), changed=1)
    assert sorted(table.ask("SELECT image_uri, image_etag FROM images")) == [("a", "e2"), ("b", "e1")]
    assert table.ask("SELECT count(*) FROM segments") == [(3,)]


def test_an_image_replaced_by_an_older_file_shows_what_was_read_last(table: Table) -> None:
    """`mv` and `rsync -t` keep a file's time: what is there now may be older than what was there before."""
    table.run(make_row("a", "new", image_modified=CREATED_AT))
    table.run(make_row("a", "old", image_modified=CREATED_AT - 100 * HOUR), changed=1)
    assert table.ask("SELECT image_etag FROM images") == [("old",)]


@pytest.mark.parametrize("state", ["open", "abandoned"])
def test_rows_of_a_run_that_never_ended_well_repeat_no_image(table: Table, state: str) -> None:
    table.run(make_row("a", "e1"))
    table.run(make_row("a", "e2"), changed=1, state=state)
    assert table.ask("SELECT image_etag FROM images") == [("e2",)]


def test_a_forced_repeat_shows_its_newest_row_only(table: Table) -> None:
    table.run(make_row("a", "e1", mask_crc32=1))
    table.run(make_row("a", "e1", mask_crc32=2), force=True)
    assert table.ask("SELECT mask_crc32 FROM images") == [(2,)]


def test_images_follow_the_version_and_settings_of_the_last_closed_run(table: Table) -> None:
    old, new = {"model_version": "0" * 12}, {"model_version": "f" * 12}
    table.run(make_row("a", "e1"), **old)
    table.run(make_row("a", "e1"), **new)
    assert table.ask("SELECT version FROM images") == [("f" * 12,)]
    table.run(make_row("b", "e1"), **old)  # rolled back, and one new image
    assert sorted(table.ask("SELECT image_uri, version FROM images")) == [("a", "0" * 12), ("b", "0" * 12)]
    table.run(make_row("a", "e1"), **new, state="open")
    assert {version for (version,) in table.ask("SELECT version FROM images")} == {"0" * 12}
    table.run(make_row("a", "e1"), **old, settings_digest="another")
    assert table.ask("SELECT image_uri, settings_digest FROM images") == [("a", "another")]


def test_of_two_runs_of_one_second_the_log_says_which_is_last(table: Table) -> None:
    at = "20260102T030405Z"
    table.run(make_row("a", "e1"), model_version="0" * 12, run_id=f"{at}-ffffff")
    table.run(make_row("a", "e1"), model_version="f" * 12, run_id=f"{at}-000000")
    assert table.ask("SELECT version FROM images") == [("f" * 12,)]
    assert table.ask("SELECT run_id FROM runs") == [(f"{at}-ffffff",), (f"{at}-000000",)]


def test_each_model_has_its_own_current_version(table: Table) -> None:
    table.run(make_row("a", "e1"), model_name="street", model_version="1" * 12)
    table.run(make_row("a", "e1"), model_name="nuclei", model_version="2" * 12)
    assert sorted(table.ask("SELECT model, version FROM images")) == [("nuclei", "2" * 12), ("street", "1" * 12)]


def test_a_version_of_digits_only_stays_text(table: Table) -> None:
    table.run(make_row("a", "e1"), model_version="012345678901")
    assert table.ask("SELECT version FROM images") == [("012345678901",)]


@pytest.mark.parametrize("name", ["it's here", "a[1]", "st*r", "q?", 'say "so"', "100%", "model=x/date=2020-01-01"])
def test_awkward_names_of_dest(tmp_path: Path, name: str) -> None:
    table = Table(normalize_uri(str(tmp_path / name)))
    plan = table.run(make_row("a", "e1"))
    assert table.ask("SELECT image_uri, model, version, date FROM images") == [
        ("a", plan.model_name, plan.model_version, plan.run_date)
    ]


def test_wild_cards_in_a_remote_dest_are_only_names(memory_folder: str) -> None:
    table = Table(f"{memory_folder}/a[1]*")
    table.run(make_row("it's", "e1"))
    assert table.ask("SELECT image_uri FROM images") == [("it's",)]


def test_what_a_store_says_is_said_without_the_sql() -> None:
    traceback = 'Traceback (most recent call last):\n  File "a.py", line 1, in head\nStorageError: denied'
    error = duckdb.IOException(f"{traceback}\n\nLINE 1: FROM x\n   ^^^^")
    assert str(unreadable("s3://b/k", error)) == "the table at s3://b/k could not be read: StorageError: denied"


def test_foreign_parquet_and_debris_are_left_alone(table: Table) -> None:
    plan = table.run(make_row("a", "e1"))
    folder = Path(local_path(plan.part_uri(0))).parent
    (folder / "export.parquet").write_bytes(b"PAR1 not really")
    (folder / f"{plan.run_id}-000001.parquet.part").write_bytes(b"half")
    Path(local_path(table.dest), "_tmp").mkdir(exist_ok=True)
    Path(local_path(table.dest), "_tmp", "0123").write_bytes(b"half")
    for name in ("runs/mine/plan.json", "runs/notes.txt", "runs/_log/x.json"):
        table.ledger.storage.put(join_uri(table.dest, name), b"not ours")
    assert list(part_sizes(table.ledger.storage, join_uri(table.dest, "segments"))) == [plan.part_uri(0)]
    assert table.ask("SELECT image_uri FROM images") == [("a",)]
    assert table.ask("SELECT run_id FROM runs") == [(plan.run_id,)]


def test_a_plan_that_lost_is_no_run(table: Table) -> None:
    plan = table.run(make_row("a", "e1"))
    loser = make_plan(table.dest, run_id="20990101T000000Z-000000", sequence=1)
    table.ledger.storage.put_new(table.ledger.uri(loser.run_id, "plan.json"), loser.model_dump_json().encode())
    assert table.ask("SELECT run_id FROM runs") == [(plan.run_id,)]


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_text("x")])
def test_no_table_is_a_usage_error(tmp_path: Path, make: Any) -> None:
    make(tmp_path / "dest")
    with pytest.raises(UsageError, match="holds no Maskmill table"):
        connect(str(tmp_path / "dest"))


@pytest.mark.s3
@pytest.mark.parametrize("name", ["deep/it's here", "right below the bucket [1]*?"])
def test_views_on_s3(s3_bucket: str, name: str) -> None:
    table = Table(f"{s3_bucket}/{name}")
    table.run(make_row("s3://photos/a b.jpg", "e1"), make_row("s3://photos/c.jpg", "e1", "corrupt"))
    table.run(make_row("s3://photos/a b.jpg", "e2"), changed=1)
    assert sorted(table.ask("SELECT image_uri, image_etag, model FROM images WHERE date = DATE '2026-01-02'")) == [
        ("s3://photos/a b.jpg", "e2", "tiny-semantic"),
        ("s3://photos/c.jpg", "", "tiny-semantic"),
    ]
    assert table.ask("SELECT count(*) FROM runs") == [(2,)]


def test_other_peoples_readers_open_dest_as_it_is(table: Table) -> None:
    """pandas, pyarrow.dataset, Polars and DuckDB, one line each and none of our code, with debris lying beside."""
    import duckdb
    import pandas
    import polars
    import pyarrow.dataset

    table.run(make_row("a", "e1", width=5), make_row("b", "e1", "corrupt"))
    table.run(make_row("c", "e1", width=7), run_date=dt.date(2026, 1, 3), model_version="9" * 12)
    dest = local_path(table.dest)
    for debris in ("_tmp/5f0c", "_tmp/model=x/part.parquet"):
        Path(dest, debris).parent.mkdir(parents=True, exist_ok=True)
        Path(dest, debris).write_bytes(b"PAR1 half a fi")

    frames = {
        "pandas": pandas.read_parquet(f"{dest}/segments"),
        "pyarrow": pyarrow.dataset.dataset(f"{dest}/segments", partitioning="hive").to_table().to_pandas(),
        "polars": polars.scan_parquet(f"{dest}/segments", hive_partitioning=True).collect().to_pandas(),
        "duckdb": duckdb.sql(f"FROM read_parquet('{dest}/segments/**/*.parquet', hive_partitioning = true)")
        .to_arrow_table()
        .to_pandas(),
    }
    for reader, frame in frames.items():
        rows = sorted(zip(frame["image_uri"], frame["status"], frame["date"].astype(str).str[:10], strict=True))
        expected = [("a", "ok", "2026-01-02"), ("b", "error", "2026-01-02"), ("c", "ok", "2026-01-03")]
        assert rows == expected, reader
        assert frame["width"].sum() == 12, reader
        assert set(frame["model"]) == {"tiny-semantic"}, reader


def test_evaluations_are_a_view_even_before_there_are_any(table: Table) -> None:
    table.run(make_row("a", "e1"))
    assert table.ask("SELECT count(*) FROM evaluations") == [(0,)]
    for name, columns in {
        "a/1.parquet": {"model_version": ["x"], "iou": [0.5]},
        "b.parquet": {"model_version": ["y"]},
    }.items():
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(columns), sink)
        table.ledger.storage.put(join_uri(table.dest, "evaluations", name), bytes(sink.getvalue()))
    table.ledger.storage.put(join_uri(table.dest, "evaluations", "notes.txt"), b"not a table")
    assert sorted(table.ask("SELECT model_version, iou FROM evaluations")) == [("x", 0.5), ("y", None)]


@pytest.mark.s3
def test_evaluations_on_s3(s3_bucket: str) -> None:
    table = Table(f"{s3_bucket}/out")
    table.run(make_row("a", "e1"))
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"iou": [0.5]}), sink)
    table.ledger.storage.put(f"{table.dest}/evaluations/x/1.parquet", bytes(sink.getvalue()))
    assert table.ask("SELECT iou, decode_mask(NULL) FROM evaluations") == [(0.5, None)]


def test_other_versions_are_left_out_by_their_paths(table: Table) -> None:
    """A Part of an old version is not even opened to answer about the current one."""
    old = table.run(make_row("a", "e1"), model_version="f" * 12)
    table.run(make_row("a", "e1"), model_version="0" * 12)
    Path(local_path(old.part_uri(0))).write_bytes(b"damaged since")
    assert table.ask("SELECT image_uri, version FROM images") == [("a", "0" * 12)]


def test_a_damaged_record_is_named(table: Table) -> None:
    plan = table.run(make_row("a", "e1"))
    table.ledger.storage.put(table.ledger.uri(plan.run_id, "run.json"), b'{"plan": ')
    with pytest.raises(InfrastructureError, match=rf"{plan.run_id}/run.json cannot be read"):
        connect(table.dest)


def test_runs_show_what_they_took(table: Table) -> None:
    worker = {"node": "host-1", "device": "cuda:0", "name": "NVIDIA H200", "bf16": True, "cores": 8, "software": {}}
    table.run(make_row("a", "e1"), record={"workers": [worker] * 2, "megapixels": 3.0})
    assert table.ask("SELECT megapixels, len(workers), workers[1].name FROM runs") == [(3.0, 2, "NVIDIA H200")]


@pytest.mark.parametrize(
    "sql", ["SELECT avg(mean_confidence) FROM images", "SELECT name, sum(pixels) FROM classes GROUP BY 1"]
)
def test_a_query_on_metrics_reads_no_masks(table: Table, sql: str) -> None:
    cell = {"class_id": 1, "name": "cell", "pixels": 7, "fraction": 0.5, "mean_confidence": 0.5, "regions": 2}
    masks = ({"bytes": os.urandom(40_000), "path": None} for _ in range(200))
    rows = [make_row(str(index), "e1", classes=[cell], mask=mask) for index, mask in enumerate(masks)]
    table.run(*rows, shard_size=50)

    def read_so_far() -> int:
        lines = Path("/proc/self/io").read_text().splitlines()
        return int(dict(line.split(": ") for line in lines)["rchar"])

    connection = connect(table.dest)
    before = read_so_far()
    connection.sql(sql).fetchall()
    assert read_so_far() - before < 1_000_000  # of 8 MB
    connection.sql("SELECT sum(octet_length(mask.bytes)) FROM images").fetchall()
    assert read_so_far() - before > 8_000_000


def test_a_key_is_of_the_texts_together() -> None:
    pairs = [("a b", "c"), ("a", "b c"), ("a 1", "1"), ("a", "1 1"), ("", "a"), ("a", ""), ("a", None), ("ä", "b")]
    rows = pa.table({"uri": [uri for uri, _ in pairs] * 2, "etag": [etag for _, etag in pairs] * 2})
    found = duckdb.sql(f"SELECT {key_sql('uri', 'etag')} AS key, count(*) AS rows FROM rows GROUP BY ALL").fetchall()
    assert [count for _, count in found] == [2] * len(pairs) and None not in {key for key, _ in found}
    assert rows.num_rows == 2 * len(pairs)


@pytest.mark.parametrize(("machine_gib", "taken"), [(24, "3.0 GiB"), (4, "2.0 GiB")])
def test_duckdb_takes_half_of_a_small_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine_gib: int, taken: str
) -> None:
    monkeypatch.setattr("pipeline.table.catalog.machine_bytes", lambda: machine_gib << 30)
    connection = open_duckdb(open_storage(f"file://{tmp_path}"), memory_bytes=3 << 30)
    assert connection.sql("SELECT current_setting('memory_limit')").fetchall() == [(taken,)]
