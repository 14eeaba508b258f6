"""Damage of every kind is found, named, and mended in the way that the finding says."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from handmade import CREATED_AT, make_image, make_part, make_row
from harness import in_process
from tables import HOUR, PALETTE, Table, whole_row

import pipeline
from models.masks import encode_mask_png, encode_rle
from models.overrides import parse_settings
from pipeline.engine.ledger import Plan
from pipeline.errors import UsageError
from pipeline.storage import join_uri, local_path, normalize_uri
from pipeline.table.audit import Finding
from pipeline.table.removed import write_removed
from pipeline.table.schema import part_name
from pipeline.table.verify import verify


@pytest.fixture
def table(tmp_path: Path) -> Table:
    return Table(normalize_uri(str(tmp_path / "dest")))


@pytest.fixture
def plan(table: Table) -> Plan:
    """A whole run of five images in three Parts, one of them an error."""
    rows = [whole_row(f"s3://photos/{index}.jpg", index) for index in range(4)]
    return table.run(*rows, make_row("s3://photos/4.jpg", "e1", "corrupt"), shard_size=2)


def path_of(plan: Plan, ordinal: int) -> Path:
    return Path(local_path(plan.part_uri(ordinal)))


def rewrite(plan: Plan, ordinal: int, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    """The Part with other rows, as damage that Parquet itself does not notice."""
    path = path_of(plan, ordinal)
    path.write_bytes(make_part(change(pq.ParquetFile(path).read().to_pylist())))


def flip_in_a_mask(path: Path, row: int) -> None:
    """Flips the first bit in the file that changes this row's mask below its header and nothing else."""
    whole, before = path.read_bytes(), pq.ParquetFile(path).read().to_pylist()
    group = pq.ParquetFile(path).metadata.row_group(0)
    columns = [group.column(index) for index in range(group.num_columns)]
    chunk = next(column for column in columns if column.path_in_schema == "mask.bytes")
    for at in range(chunk.data_page_offset, chunk.data_page_offset + chunk.total_compressed_size):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        try:
            after = pq.ParquetFile(path).read().to_pylist()
        except (OSError, pa.ArrowException):
            continue
        changed = [one != other for one, other in zip(before, after, strict=True)]
        same_header = after[row]["mask"]["bytes"][:33] == before[row]["mask"]["bytes"][:33]
        if changed == [index == row for index in range(len(before))] and same_header:
            return
    pytest.fail("no byte of the file is the mask's alone")


def rewrite_record(table: Table, plan: Plan, **changes: Any) -> None:
    path = Path(local_path(table.ledger.uri(plan.run_id, "run.json")))
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def segment(**command: Any) -> Any:
    with in_process():
        return pipeline.segment(**command)


def kinds(findings: list[Finding]) -> list[str]:
    return [one.kind for one in findings]


def test_a_whole_table_has_no_findings(table: Table, plan: Plan) -> None:
    table.run(whole_row("s3://photos/4.jpg", 4, "e2"), changed=1)
    table.run(whole_row("s3://photos/0.jpg"), force=True)
    table.run(make_row("s3://photos/5.jpg", "e1", "fetch_failed"))
    table.run(whole_row("s3://photos/5.jpg", attempt=2))
    table.run(whole_row("s3://photos/0.jpg"), model_version="f" * 12)
    table.run(whole_row("s3://photos/0.jpg"), settings_digest="another")
    table.run()
    table.run(whole_row("s3://photos/9.jpg"), state="open")
    assert verify(table.dest) == verify(table.dest, deep=True) == []


def test_what_segment_wrote_is_whole(
    tmp_path: Path, image_folder: Callable[..., Path], instance_model: Path, semantic_model: Path
) -> None:
    source = image_folder(5)
    (source / "broken.jpg").write_bytes(b"no image")
    dest = str(tmp_path / "dest")
    for model in (instance_model, semantic_model):
        segment(source=str(source), dest=dest, model=str(model), shard_size=2)
    assert verify(dest, deep=True) == []
    make_image(source / "later.png", 9)
    segment(source=str(source), dest=dest, model=str(semantic_model))
    assert verify(dest, deep=True) == []


def test_no_table_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no Maskmill table"):
        verify(str(tmp_path))


@pytest.mark.parametrize("kept", [0.5, 0.999])
def test_a_file_that_was_cut(table: Table, plan: Plan, kept: float) -> None:
    path = path_of(plan, 1)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    (found,) = verify(table.dest)
    assert (found.kind, found.uri) == ("unreadable_file", plan.part_uri(1))
    assert "cannot be read" in found.message
    assert f"maskmill segment file:///photos {table.dest} --model tiny-semantic@{plan.model_version}" in found.mend


def test_a_byte_that_flipped_in_a_mask(table: Table, plan: Plan) -> None:
    """The pages of a Part have checksums: it need not even be decoded."""
    flip_in_a_mask(path_of(plan, 0), row=1)
    (found,) = verify(table.dest)
    assert (found.kind, found.uri) == ("unreadable_file", plan.part_uri(0)) and "CRC" in found.message
    assert "processes its images anew" in found.mend


def test_a_byte_that_flipped_in_a_mask_of_a_file_without_checksums(table: Table, plan: Plan) -> None:
    path = path_of(plan, 0)
    pq.write_table(pq.ParquetFile(path).read(), path, compression="zstd")
    rewrite_record(table, plan, parts_bytes=sum(path_of(plan, ordinal).stat().st_size for ordinal in range(3)))
    flip_in_a_mask(path, row=1)
    assert verify(table.dest) == []
    (found,) = verify(table.dest, deep=True)
    assert (found.kind, found.uri) == ("damaged_mask", plan.part_uri(0))
    assert "'s3://photos/1.jpg'" in found.message and "processes its images anew" in found.mend


def test_every_flipped_byte_of_a_file_is_survived(table: Table, plan: Plan) -> None:
    """Whatever the damage, there is an answer; and what changes masks, sizes or keys is found."""
    path = path_of(plan, 0)
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    found = 0
    for at in random.integers(0, len(whole), 40):
        data = bytearray(whole)
        data[at] ^= 1 << int(random.integers(0, 8))
        path.write_bytes(data)
        found += bool(verify(table.dest, deep=True))
    assert found > 20


def test_another_mask_than_the_row_says(table: Table, plan: Plan) -> None:
    def swap(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [rows[0] | {"mask": rows[1]["mask"]}, rows[1]]

    rewrite(plan, 0, swap)
    (found,) = [one for one in verify(table.dest, deep=True) if one.kind != "wrong_counts"]
    assert (found.kind, found.uri) == ("damaged_mask", plan.part_uri(0)) and "CRC-32" in found.message


@pytest.mark.parametrize(
    "change",
    [
        {"width": 41},
        {"mask": {"bytes": encode_mask_png(np.zeros((30, 41), np.uint8), PALETTE), "path": None}},
        {"mask": {"bytes": b"no PNG", "path": None}},
        {"mask": None},
        {"classes": []},
    ],
    ids=["width", "mask", "no PNG", "no mask", "classes"],
)
def test_sizes_that_disagree_with_the_image(table: Table, plan: Plan, change: dict[str, Any]) -> None:
    rewrite(plan, 0, lambda rows: [rows[0] | change, rows[1]])
    found = [one for one in verify(table.dest) if one.kind != "wrong_counts"]
    assert kinds(found) == ["wrong_size"] and "'s3://photos/0.jpg'" in found[0].message
    assert found[0].uri == plan.part_uri(0)


def test_an_instance_of_another_image(table: Table, plan: Plan) -> None:
    other = encode_rle(np.ones((31, 40), bool))

    def change(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [rows[0] | {"instances": [rows[0]["instances"][0] | {"rle": other}]}, rows[1]]

    rewrite(plan, 0, change)
    (found,) = [one for one in verify(table.dest) if one.kind != "wrong_counts"]
    assert found.kind == "wrong_size" and "instance in 40×31" in found.message


def test_a_part_that_was_deleted_until_its_images_have_rows_again(table: Table, plan: Plan) -> None:
    path_of(plan, 1).unlink()
    (found,) = verify(table.dest)
    assert (found.kind, found.uri) == ("missing_part", plan.part_uri(1))
    assert "2 of their images have no row" in found.message and "'s3://photos/2.jpg'" in found.message
    table.run(whole_row("s3://photos/2.jpg", 2))
    (found,) = verify(table.dest)
    assert "1 of their images have no row" in found.message
    gone = table.run(make_row("s3://photos/other.jpg", "e1", "corrupt"))
    write_removed(table.ledger.storage, table.dest, gone.run_id, ["s3://photos/3.jpg"])
    assert verify(table.dest) == []


def test_a_deleted_part_is_mended_by_the_same_command(
    tmp_path: Path, image_folder: Callable[..., Path], semantic_model: Path
) -> None:
    source, dest = str(image_folder(6)), str(tmp_path / "dest")
    command = {"source": source, "dest": dest, "model": str(semantic_model)}
    segment(**command, shard_size=2)
    parts = sorted(Path(dest).glob("segments/**/*.parquet"))
    assert len(parts) == 3
    parts[1].unlink()
    assert kinds(verify(dest)) == ["missing_part"]
    assert segment(**command).ok == 2
    assert verify(dest, deep=True) == []


def test_the_command_that_mends_is_of_the_same_question(tmp_path: Path) -> None:
    """Word by word as a shell hands it to the command line; with other settings it would process everything else."""
    table = Table(normalize_uri(str(tmp_path / "dest")))
    settings = {"tile_above_pixels": 5, "postprocessing": {"min_area_px": 40}, "augmentation": {"flips": ["vertical"]}}
    plan = table.run(whole_row("s3://photos/a.jpg"))
    command = plan.command.model_copy(update={"source": "s3://my photos/*.jpg", "settings": settings, "limit": 7})
    for name in ("plan.json", "run.json"):
        path = Path(local_path(table.ledger.uri(plan.run_id, name)))
        body = json.loads(path.read_text())
        (body.get("plan") or body)["command"] = command.model_dump(mode="json")
        path.write_text(json.dumps(body))
    path_of(plan, 0).unlink()
    (found,) = verify(table.dest)
    words = shlex.split(found.mend.split("`")[1])
    assert words[:4] == ["maskmill", "segment", "s3://my photos/*.jpg", table.dest]
    said = dict(zip(words[4::2], words[5::2], strict=True))
    assert said["--model"] == f"{plan.model_name}@{plan.model_version}"
    assert (said["--max-pixels"], said["--suffix"]) == ("1000", ".jpg")
    assert "--limit" not in words and "--precision" not in words
    assert parse_settings(words[at + 1] for at, word in enumerate(words) if word == "--set") == settings


def test_wrong_counts_are_mended_by_counting_anew(
    tmp_path: Path, image_folder: Callable[..., Path], semantic_model: Path
) -> None:
    source, dest = str(image_folder(2)), str(tmp_path / "dest")
    command = {"source": source, "dest": dest, "model": str(semantic_model)}
    run_id = segment(**command).run_id
    record = Path(dest, "runs", str(run_id), "run.json")
    record.write_text(record.read_text().replace('"ok": 2', '"ok": 3'))
    (found,) = verify(dest)
    assert found.kind == "wrong_counts" and "delete it and give the command again" in found.mend
    record.unlink()
    segment(**command)
    assert verify(dest) == []


def test_a_doubled_row_in_one_part(table: Table, plan: Plan) -> None:
    rewrite(plan, 0, lambda rows: [*rows, rows[0]])
    (found,) = verify(table.dest)
    assert (found.kind, found.uri) == ("repeated_row", plan.part_uri(0))
    assert "1 images have more than one terminal row" in found.message and "'s3://photos/0.jpg'" in found.message


def test_a_doubled_row_in_two_runs(table: Table, plan: Plan) -> None:
    """As two drivers could write it on a store without create-only writes."""
    twin = table.run(whole_row("s3://photos/0.jpg"), whole_row("s3://photos/1.jpg", 1))
    (found,) = verify(table.dest)
    assert (found.kind, found.uri) == ("repeated_row", twin.part_uri(0))
    assert plan.part_uri(0) in found.message and found.message.startswith("2 images")
    path_of(twin, 0).unlink()  # the way to mend it
    assert verify(table.dest) == []


def test_a_doubled_row_in_a_run_that_was_forced(table: Table, plan: Plan) -> None:
    again = table.run(whole_row("s3://photos/0.jpg"), force=True)
    assert verify(table.dest) == []
    rewrite(again, 0, lambda rows: rows * 2)
    assert kinds(verify(table.dest)) == ["repeated_row"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"ok": 5}, "ok 5, and it is 4"),
        ({"errors": 0, "errors_by_kind": {}}, "errors 0, and it is 1"),
        ({"errors_by_kind": {"empty": 1}}, "errors_by_kind {'empty': 1}, and it is {'corrupt': 1}"),
        ({"parts": 2}, "parts 2, and it is 3"),
        ({"parts_bytes": 1}, "parts_bytes 1, and it is"),
        ({"instances": 9}, "instances 9, and it is 4"),
    ],
)
def test_wrong_counts_in_the_record(table: Table, plan: Plan, change: dict[str, Any], says: str) -> None:
    rewrite_record(table, plan, **change)
    (found,) = verify(table.dest)
    assert (found.kind, found.uri) == ("wrong_counts", table.ledger.uri(plan.run_id, "run.json"))
    assert says in found.message


def test_rows_that_are_lost_and_rows_that_nobody_asked_for(table: Table, plan: Plan) -> None:
    rewrite(plan, 0, lambda rows: rows[:1])
    (found,) = verify(table.dest)
    assert found.kind == "missing_rows" and "1 images of its frozen list have no row" in found.message
    rewrite(plan, 0, lambda rows: [rows[0], whole_row("s3://photos/1.jpg", 1), whole_row("s3://stranger")])
    assert set(kinds(verify(table.dest))) == {"foreign_rows"}


def test_rows_of_another_run(table: Table, plan: Plan) -> None:
    rewrite(plan, 0, lambda rows: [row | {"run_id": "20200101T000000Z-000000"} for row in rows])
    found = [one for one in verify(table.dest) if one.kind != "wrong_counts"]
    assert kinds(found) == ["foreign_rows"] and "of run 20200101T000000Z-000000" in found[0].message


def test_foreign_files(table: Table, plan: Plan) -> None:
    folder = path_of(plan, 0).parent
    (folder / "export.parquet").write_bytes(b"somebody's")
    Path(local_path(table.dest), "_tmp").mkdir(exist_ok=True)
    Path(local_path(table.dest), "_tmp", "0123").write_bytes(b"half a file")
    (found,) = verify(table.dest)
    assert found.kind == "foreign_file" and found.uri.endswith("/export.parquet")
    assert found.mend == "move it out of DEST/segments"


def test_a_part_in_another_place_than_its_run_put_it(table: Table, plan: Plan) -> None:
    elsewhere = path_of(plan, 0).parents[1] / "date=2030-01-01"
    elsewhere.mkdir()
    shutil.copy(path_of(plan, 0), elsewhere)
    assert kinds(verify(table.dest)) == ["misplaced_part"]
    shutil.copy(path_of(plan, 0), path_of(plan, 0).with_name(part_name(plan.run_id, 7)))
    assert kinds(verify(table.dest)) == ["misplaced_part"] * 2


def test_a_part_without_a_run(table: Table, plan: Plan) -> None:
    other = table.run(whole_row("s3://photos/7.jpg"))
    shutil.rmtree(local_path(join_uri(table.dest, "runs", other.run_id)))
    (found,) = verify(table.dest)
    assert (found.kind, found.uri) == ("unknown_run", other.part_uri(0))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("run.json", "unreadable_record"),
        ("manifest.parquet", "unreadable_file"),
        ("removed.parquet", "unreadable_file"),
    ],
)
def test_a_damaged_file_of_a_run(table: Table, plan: Plan, name: str, kind: str) -> None:
    write_removed(table.ledger.storage, table.dest, plan.run_id, ["s3://photos/gone.jpg"])
    uri = table.ledger.uri(plan.run_id, name)
    path = Path(local_path(uri))
    path.write_bytes(path.read_bytes()[:-9])
    (found,) = verify(table.dest)
    assert (found.kind, found.uri) == (kind, uri)
    assert "backup" in found.mend


def test_a_frozen_list_of_another_length(table: Table, plan: Plan) -> None:
    other = table.run(whole_row("s3://photos/7.jpg"))
    lists = [Path(local_path(table.ledger.uri(one.run_id, "manifest.parquet"))) for one in (plan, other)]
    shutil.copy(lists[1], lists[0])
    assert kinds(verify(table.dest)) == ["wrong_list"]
    lists[0].unlink()
    assert kinds(verify(table.dest)) == ["unreadable_file"]


def test_a_file_of_a_newer_release(table: Table, plan: Plan) -> None:
    path = path_of(plan, 0)
    rows = pq.ParquetFile(path).read()
    pq.write_table(rows.replace_schema_metadata({"maskmill_schema_version": "99"}), path)
    (found,) = verify(table.dest)
    assert found.kind == "wrong_schema" and "'99'" in found.message


def test_abandoned_runs(table: Table, plan: Plan) -> None:
    """Their lists are not all answered, and need not be."""
    from pipeline.engine.reconciliation import abandon

    rows = [whole_row(f"s3://photos/later-{index}.jpg", index) for index in range(4)]
    left = table.run(*rows, shard_size=2, state="open")
    path_of(left, 1).unlink()
    abandon(table.ledger, left, ttl_s=1.0)
    assert verify(table.dest) == []
    path_of(left, 1).unlink()  # an empty one: nothing is lost with it
    assert verify(table.dest) == []
    path_of(left, 0).unlink()
    assert kinds(verify(table.dest)) == ["missing_part"]


@pytest.mark.s3
def test_on_s3(s3_bucket: str) -> None:
    table = Table(f"{s3_bucket}/it's h[e]re*")
    plan = table.run(whole_row("s3://photos/a.jpg"), whole_row("s3://photos/b.jpg"), shard_size=1, at=CREATED_AT + HOUR)
    assert verify(table.dest, deep=True) == []
    table.ledger.storage.delete(plan.part_uri(0))
    table.ledger.storage.put(plan.part_uri(1), b"PAR1 no more")
    table.ledger.storage.put(join_uri(table.dest, "segments/notes.txt"), b"x")
    assert kinds(verify(table.dest)) == ["foreign_file", "missing_part", "unreadable_file"]
