"""What a listing says of the table, and what the view `images` makes of it."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from handmade import CREATED_AT, make_row
from tables import HOUR, Table

from pipeline.corpus.manifest import MANIFEST_SCHEMA
from pipeline.engine.ledger import Plan
from pipeline.storage import join_uri, normalize_uri
from pipeline.table.catalog import Current
from pipeline.table.removed import Changes, Coverage, find_changes, write_changes, write_removed, write_returned

PHOTOS = "s3://b/photos"
A, B, C = (f"{PHOTOS}/{name}.jpg" for name in "abc")


@pytest.fixture
def table(tmp_path: Path) -> Table:
    return Table(normalize_uri(str(tmp_path / "dest")))


def look(
    table: Table, tmp_path: Path, listing: dict[str, str], coverage: Coverage | None = None, **version: str
) -> Changes:
    """What a full listing of PHOTOS that shows these etags would record."""
    path = tmp_path / "listing.parquet"
    rows = [{"uri": uri, "etag": etag, "size_bytes": 1, "modified": CREATED_AT} for uri, etag in listing.items()]
    pq.write_table(pa.Table.from_pylist(rows, MANIFEST_SCHEMA), path)
    scratch = tmp_path / "scratch"
    scratch.mkdir(exist_ok=True)
    current = Current(
        "tiny-semantic", version.get("model_version", "0123456789ab"), version.get("settings_digest", "5e771465d1e5")
    )
    return find_changes(
        table.ledger.storage, table.dest, listing=f"read_parquet('{path}')", coverage=coverage or Coverage(PHOTOS),
        current=current, scratch=scratch,
    )  # fmt: skip


def record(table: Table, changes: Changes, *rows: dict[str, object], **fields: object) -> Plan:
    """The run of that listing: these rows, perhaps none, and what changed."""
    plan = table.run(*rows, **fields)
    write_changes(table.ledger.storage, table.dest, plan.run_id, changes)
    return plan


def shown(table: Table) -> dict[str, str]:
    rows = table.ask("SELECT image_uri, image_etag FROM images")
    assert len(rows) == len(dict(rows)), "an image has more than one row"
    return dict(rows)


def removed(changes: Changes) -> list[str]:
    return pq.read_table(changes.removed_path)["image_uri"].to_pylist() if changes.removed_path else []


def returned(changes: Changes) -> dict[str, str]:
    return dict(zip(*pq.read_table(changes.returned_path).to_pydict().values(), strict=True)) if (
        changes.returned_path
    ) else {}  # fmt: skip


def test_nothing_is_known_before_the_first_run(table: Table, tmp_path: Path) -> None:
    assert look(table, tmp_path, {A: "e1"}) == Changes()


def test_what_is_gone_leaves_images_and_stays_in_segments(table: Table, tmp_path: Path) -> None:
    table.run(make_row(A, "e1"), make_row(B, "e1"))
    changes = look(table, tmp_path, {A: "e1"})
    assert removed(changes) == [B] and changes.returned == 0 and changes.worth_a_run
    assert shown(table) == {A: "e1", B: "e1"}  # nothing is recorded yet
    record(table, changes)  # a run of no images
    assert shown(table) == {A: "e1"}
    assert table.ask("SELECT count(*) FROM classes") == [(0,)]
    assert table.ask("SELECT count(*) FROM segments") == [(2,)]
    assert not look(table, tmp_path, {A: "e1"}).worth_a_run  # the same listing has nothing more to say


def test_what_is_back_counts_again(table: Table, tmp_path: Path) -> None:
    table.run(make_row(A, "e1"), make_row(B, "e1"))
    record(table, look(table, tmp_path, {A: "e1"}))
    changes = look(table, tmp_path, {A: "e1", B: "e1"})
    assert returned(changes) == {B: "e1"} and changes.removed == 0
    record(table, changes)
    assert shown(table) == {A: "e1", B: "e1"}
    assert not look(table, tmp_path, {A: "e1", B: "e1"}).worth_a_run
    record(table, look(table, tmp_path, {A: "e1"}))
    assert shown(table) == {A: "e1"}


def test_what_is_back_with_new_bytes_shows_the_row_of_these(table: Table, tmp_path: Path) -> None:
    table.run(make_row(A, "e1"), make_row(B, "e1"))
    record(table, look(table, tmp_path, {A: "e1"}))
    record(table, look(table, tmp_path, {A: "e1", B: "e2"}), make_row(B, "e2"), changed=1)
    assert shown(table) == {A: "e1", B: "e2"}
    assert not look(table, tmp_path, {A: "e1", B: "e2"}).worth_a_run


def test_a_row_made_after_the_removal_speaks_for_itself(table: Table, tmp_path: Path) -> None:
    """As after a run over a manifest, which records nothing of SOURCE."""
    table.run(make_row(A, "e1"), make_row(B, "e1"))
    record(table, look(table, tmp_path, {A: "e1"}))
    table.run(make_row(B, "e2"), changed=1)
    assert shown(table) == {A: "e1", B: "e2"}
    assert not look(table, tmp_path, {A: "e1", B: "e2"}).worth_a_run
    assert removed(look(table, tmp_path, {A: "e1"})) == [B]


def test_an_image_that_went_back_to_an_older_etag_shows_that_row(table: Table, tmp_path: Path) -> None:
    table.run(make_row(A, "e1"), make_row(B, "e1"))
    table.run(make_row(A, "e2"), changed=1)
    assert shown(table) == {A: "e2", B: "e1"}
    changes = look(table, tmp_path, {A: "e1", B: "e1"})
    assert returned(changes) == {A: "e1"} and changes.removed == 0
    record(table, changes)
    assert shown(table) == {A: "e1", B: "e1"}
    assert not look(table, tmp_path, {A: "e1", B: "e1"}).worth_a_run
    # And forward again, to what is done as well; then to bytes that are new.
    changes = look(table, tmp_path, {A: "e2", B: "e1"})
    assert returned(changes) == {A: "e2"}
    record(table, changes)
    assert shown(table) == {A: "e2", B: "e1"}
    changes = look(table, tmp_path, {A: "e3", B: "e1"})
    assert not changes.worth_a_run  # e3 is work, not a change of what is shown
    record(table, changes, make_row(A, "e3"), changed=1)
    assert shown(table) == {A: "e3", B: "e1"}


def test_an_etag_that_was_read_counts_as_well_as_the_one_that_was_listed(table: Table, tmp_path: Path) -> None:
    """Replaced between listing and reading: planned as e1, read as e2."""
    table.run(make_row(A, "e1", image_etag="e2"))
    assert not look(table, tmp_path, {A: "e2"}).worth_a_run
    table.run(make_row(A, "e3"), changed=1)
    assert returned(look(table, tmp_path, {A: "e2"})) == {A: "e2"}


def test_rolled_back_to_an_older_version(table: Table, tmp_path: Path) -> None:
    old, new = {"model_version": "0" * 12}, {"model_version": "f" * 12}
    table.run(make_row(A, "e1"), make_row(B, "e1"), make_row(C, "e1"), **old)
    table.run(make_row(A, "e1"), make_row(B, "e1"), **new)
    changes = look(table, tmp_path, {A: "e1", B: "e1"}, **old)
    # All is done by the old version, so no image is left; that C went was not looked at under the new one.
    assert changes.switches and removed(changes) == [C] and changes.returned == 0
    record(table, changes, **old)
    assert sorted(table.ask("SELECT image_uri, version FROM images")) == [(A, "0" * 12), (B, "0" * 12)]
    assert not look(table, tmp_path, {A: "e1", B: "e1"}, **old).worth_a_run


def test_other_settings_are_a_switch_too(table: Table, tmp_path: Path) -> None:
    table.run(make_row(A, "e1"))
    table.run(make_row(A, "e1"), settings_digest="another")
    assert look(table, tmp_path, {A: "e1"}).switches
    assert not look(table, tmp_path, {A: "e1"}, settings_digest="another").switches


def test_a_limit_leaves_what_was_not_reached_as_it_was(table: Table, tmp_path: Path) -> None:
    table.run(make_row(A, "e1"), make_row(B, "e1"), make_row(C, "e1"))
    changes = look(table, tmp_path, {A: "e2", B: "e2"})
    record(table, changes, make_row(A, "e2"), changed=2, limit=1)
    assert shown(table) == {A: "e2", B: "e1"}  # B has changed, too, but its turn has not come; C is gone
    new = {"model_version": "f" * 12}
    record(table, look(table, tmp_path, {A: "e2", B: "e2"}, **new), make_row(A, "e2"), limit=1, **new)
    assert shown(table) == {A: "e2"}  # of the new version there is no other row


def test_only_what_the_listing_could_have_shown_is_gone(table: Table, tmp_path: Path) -> None:
    others = ["s3://b/photos2/x.jpg", "s3://other/photos/x.jpg", f"{PHOTOS}/x.TIF", f"{PHOTOS}/.trash/x.jpg",
              f"{PHOTOS}/deep/it's.JPG", f"{PHOTOS}/a.jpg.bak"]  # fmt: skip
    table.run(*(make_row(uri, "e1") for uri in [A, B, *others]))
    listing = {A: "e1"}
    assert removed(look(table, tmp_path, listing, Coverage(PHOTOS, (".jpg", ".jpeg")))) == [
        B,
        f"{PHOTOS}/deep/it's.JPG",
    ]
    assert removed(look(table, tmp_path, listing, Coverage(PHOTOS + "/", (".jpg",), r"(?s)\A[^/]*\.jpg\z"))) == [B]
    everything = sorted([B, *others[2:]])
    assert removed(look(table, tmp_path, listing, Coverage(PHOTOS, hidden=True))) == everything
    assert removed(look(table, tmp_path, listing, Coverage("s3://b/photos2"))) == ["s3://b/photos2/x.jpg"]


def test_other_models_lose_the_image_as_well(table: Table, tmp_path: Path) -> None:
    table.run(make_row(A, "e1"), make_row(B, "e1"), model_name="street", model_version="1" * 12)
    table.run(make_row(A, "e1"))
    record(table, look(table, tmp_path, {A: "e1"}))
    assert sorted(table.ask("SELECT model, image_uri FROM images")) == [("street", A), ("tiny-semantic", A)]


def test_a_model_that_never_saw_the_etag_keeps_the_row_it_has(table: Table) -> None:
    table.run(make_row(A, "e2"), model_name="street", model_version="1" * 12)
    table.run(make_row(A, "e1"))
    table.run(make_row(A, "e2"), changed=1)
    plan = table.run()
    write_returned(table.ledger.storage, table.dest, plan.run_id, {A: "e1"})
    assert sorted(table.ask("SELECT model, image_etag FROM images")) == [("street", "e2"), ("tiny-semantic", "e1")]


def test_a_plan_that_lost_its_race_has_removed_nothing(table: Table) -> None:
    table.run(make_row(A, "e1"))
    write_removed(table.ledger.storage, table.dest, "20990101T000000Z-000000", [A])
    assert shown(table) == {A: "e1"}


def test_the_record_is_written_once(table: Table) -> None:
    plan = table.run(make_row(A, "e1"), make_row(B, "e1"))
    assert write_removed(table.ledger.storage, table.dest, plan.run_id, [B])
    assert not write_removed(table.ledger.storage, table.dest, plan.run_id, [A])
    data = table.ledger.storage.get(join_uri(table.dest, "runs", plan.run_id, "removed.parquet")).data
    assert pq.read_schema(pa.BufferReader(data)).metadata == {b"maskmill_schema_version": b"1"}
    assert shown(table) == {A: "e1"}


def test_find_changes_writes_the_version_too(table: Table, tmp_path: Path) -> None:
    table.run(make_row(A, "e1"), make_row(B, "e1"))
    changes = look(table, tmp_path, {A: "e1"})
    assert changes.removed_path is not None
    assert pq.read_schema(changes.removed_path).metadata[b"maskmill_schema_version"] == b"1"


def test_errors_of_the_world_bring_nothing_back(table: Table, tmp_path: Path) -> None:
    table.run(make_row(A, "e1"), make_row(B, "e1"))
    record(table, look(table, tmp_path, {A: "e1"}))
    table.run(make_row(B, "e1", "missing"))
    assert shown(table) == {A: "e1"}


@pytest.mark.s3
def test_on_s3(s3_bucket: str, tmp_path: Path) -> None:
    table = Table(f"{s3_bucket}/deep/it's here")
    table.run(make_row(A, "e1"), make_row(B, "e1"), at=CREATED_AT - HOUR)
    table.run(make_row(A, "e2"), changed=1)
    changes = look(table, tmp_path, {A: "e1"})
    assert (removed(changes), returned(changes)) == ([B], {A: "e1"})
    record(table, changes)
    assert shown(table) == {A: "e1"}
