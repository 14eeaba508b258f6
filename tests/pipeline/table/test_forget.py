"""What is forgotten is in no file any more, comes into no plan again, and takes nothing else with it."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dying_storage import DyingStorage, KilledError
from handmade import make_image, make_list, make_part, make_row
from harness import in_process
from tables import Table, whole_row

import pipeline
from pipeline.engine.ledger import Plan
from pipeline.engine.reconciliation import abandon
from pipeline.errors import InfrastructureError, UsageError
from pipeline.storage import Storage, join_uri, local_path, normalize_uri, open_storage
from pipeline.table import forget as forgetting
from pipeline.table.evaluations import EVALUATIONS, commit_evaluations, evaluation_folder
from pipeline.table.forget import Forgetting, forget, forget_in
from pipeline.table.forgotten import read_forgotten, write_forgotten
from pipeline.table.removed import write_removed, write_returned
from pipeline.table.verify import verify

JANE, KEPT = "s3://photos/jane/", "s3://photos/other/"
WHERE = "image_uri LIKE 's3://photos/jane/%'"
OLD = "f" * 12


def fill(dest: str) -> Table:
    """A table that names images of Jane in every kind of file that can name one."""
    table = Table(dest)
    first = table.run(
        whole_row(f"{JANE}1.jpg", 1), whole_row(f"{KEPT}2.jpg", 2), whole_row(f"{JANE}3.jpg", 3),
        whole_row(f"{KEPT}4.jpg", 4), make_row(f"{JANE}5.jpg", "e1", "corrupt"),
        make_row(f"{JANE}6.jpg", "e1", "missing"),
        shard_size=2, model_version=OLD,
    )  # fmt: skip
    last = table.run(whole_row(f"{JANE}1.jpg", 7, "e2"), whole_row(f"{KEPT}2.jpg", 8), source=f"{JANE}1.jpg")
    storage = table.ledger.storage
    write_removed(storage, dest, last.run_id, [f"{JANE}3.jpg", f"{KEPT}4.jpg"])
    write_returned(storage, dest, last.run_id, {f"{JANE}1.jpg": "e1"})
    for run in (first, last):
        storage.put_new(table.ledger.uri(run.run_id, "report.html"), f"pictures of {JANE}1.jpg".encode())
    table.ledger.storage.put_new(table.ledger.uri(last.run_id, "drift.json"), b"{}")
    folder = join_uri(dest, evaluation_folder("tiny-semantic", OLD, "abc"))
    rows = [
        {"image_uri": uri, "image_name": uri, "status": "ok", "evaluated_at": dt.datetime.now(dt.UTC)}
        for uri in (f"{JANE}1.jpg", f"{KEPT}2.jpg")
    ]
    commit_evaluations(storage, f"{folder}/{first.run_id}-000000.parquet", pa.Table.from_pylist(rows, EVALUATIONS))
    storage.put_new(f"{folder}/page.html", f"pictures of {JANE}1.jpg".encode())
    # Killed while it was being planned.
    storage.put_new(join_uri(dest, "runs/20260101T000000Z-0000aa/manifest.parquet"), make_list([f"{JANE}1.jpg"]))
    return table


@pytest.fixture
def table(tmp_path: Path) -> Table:
    return fill(normalize_uri(str(tmp_path / "dest")))


def contents(storage: Storage, dest: str) -> dict[str, str]:
    """Every file below DEST as text: of Parquet the values, of the rest the bytes."""
    found = {}
    for batch in storage.list(dest):
        for uri in batch["uri"].to_pylist():
            data = storage.get(uri).data
            if uri.endswith(".parquet"):
                file = pq.ParquetFile(pa.BufferReader(data))
                text = f"{file.read().to_pylist()} {file.schema_arrow.metadata}"
            else:
                text = data.decode("utf-8", "replace")
            found[uri.removeprefix(dest + "/")] = text
    return found


def rows_by_image(table: Table, prefix: str) -> list[tuple[Any, ...]]:
    return table.ask(
        f"SELECT image_uri, run_id, version, mask_crc32, md5(mask.bytes) FROM segments "
        f"WHERE starts_with(image_uri, '{prefix}') ORDER BY ALL"
    )


def segment(**command: Any) -> Any:
    with in_process():
        return pipeline.segment(report=False, **command)


def test_without_consent_nothing_changes(table: Table) -> None:
    before = contents(table.ledger.storage, table.dest)
    told: list[Forgetting] = []
    assert forget(table.dest, WHERE, yes=lambda found: bool(told.append(found))) == told[0]
    assert told[0] == Forgetting(
        images=4,
        rows=5,
        parts=4,
        lists=3,
        list_lines=6,
        evaluation_rows=1,
        event_lines=2,
        pages=3,
        records=2,
        done=False,
    )
    assert contents(table.ledger.storage, table.dest) == before


def test_no_file_names_what_was_forgotten(table: Table) -> None:
    kept = rows_by_image(table, KEPT)
    records = table.ask("SELECT run_id, ok, errors, parts FROM runs")
    assert forget(table.dest, WHERE, yes=True).done
    after = contents(table.ledger.storage, table.dest)
    assert [name for name, text in after.items() if "jane" in text.lower()] == []
    assert sum(KEPT in text for text in after.values()) == 7
    assert rows_by_image(table, KEPT) == kept and rows_by_image(table, JANE) == []
    assert table.ask("SELECT image_uri FROM images") == [(f"{KEPT}2.jpg",)]
    assert table.ask("SELECT image_name FROM evaluations") == [(f"{KEPT}2.jpg",)]
    assert table.ask("SELECT run_id, ok, errors, parts FROM runs") == records  # history, and of nobody
    assert not [name for name in after if name.endswith(".html")]
    assert verify(table.dest, deep=True) == []
    assert forget(table.dest, WHERE, yes=True).nothing and forget(table.dest, yes=True).nothing


def test_a_part_stays_as_parts_are(table: Table) -> None:
    before = {uri: text.rpartition("] ")[2] for uri, text in contents(table.ledger.storage, table.dest).items()}
    forget(table.dest, WHERE, yes=True)
    parts = [uri for uri in before if uri.startswith("segments/")]
    after = contents(table.ledger.storage, table.dest)
    assert [after[uri].rpartition("] ")[2] for uri in parts] == [before[uri] for uri in parts]  # metadata
    for uri in parts:
        chunk = pq.ParquetFile(local_path(join_uri(table.dest, uri))).metadata
        groups = [chunk.row_group(index).column(0) for index in range(chunk.num_row_groups)]
        assert all(group.compression == "ZSTD" for group in groups)


def test_a_forgotten_image_is_never_planned_again(
    tmp_path: Path, image_folder: Callable[..., Path], semantic_model: Path
) -> None:
    source, dest = image_folder(4), str(tmp_path / "dest")
    command = {"source": str(source), "dest": dest, "model": str(semantic_model)}
    segment(**command)
    done = forget(dest, "image_uri LIKE '%/0001.png' OR mask_crc32 = -1", yes=True)
    assert (done.images, done.rows) == (1, 1)
    make_image(source / "0001.png", 99)  # another image under the same name is still that name
    make_image(source / "later.png", 98)
    again = segment(**command)
    assert (again.images, again.planned, again.skipped) == (4, 1, 3)
    uris = [uri for (uri,) in pipeline.connect(dest).sql("SELECT image_uri FROM images").fetchall()]
    assert sorted(uri.rpartition("/")[2] for uri in uris) == ["0000.jpg", "0002.jpg", "0003.png", "later.png"]
    assert segment(**command | {"force": True}).planned == 4
    assert verify(dest, deep=True) == []


def test_a_condition_on_other_columns_finds_what_has_rows(table: Table) -> None:
    assert forget(table.dest, "error_kind = 'corrupt'", yes=True).images == 1
    assert table.ask(f"SELECT count(*) FROM segments WHERE image_uri = '{JANE}5.jpg'") == [(0,)]
    assert verify(table.dest) == []


def test_an_image_without_a_row_is_found_by_its_name(table: Table) -> None:
    run = table.run(whole_row(f"{JANE}9.jpg"), state="open")
    Path(local_path(run.part_uri(0))).unlink()
    abandon(table.ledger, run, ttl_s=1.0)
    assert forget(table.dest, f"image_uri = '{JANE}9.jpg'").images == 1
    assert forget(table.dest, f"image_uri = '{JANE}9.jpg' -- her wish of May").images == 1
    assert forget(table.dest, f"image_uri = '{JANE}9.jpg'", yes=True).rows == 0
    assert f"{JANE}9.jpg" not in str(contents(table.ledger.storage, table.dest))
    assert verify(table.dest) == []


@pytest.mark.parametrize("where", ["true", "image_uri NOT LIKE '%kept%'", "EXISTS (SELECT 1)"])
def test_a_condition_that_holds_of_no_name_too(table: Table, where: str) -> None:
    """It is tried on an empty name first; an answer left unread there stood in the way of what follows."""
    expected = table.ask(f"SELECT count(DISTINCT image_uri) FROM segments WHERE {where}")[0][0]
    assert expected > 0
    assert forget(table.dest, where, yes=True).images >= expected
    assert table.ask(f"SELECT count(*) FROM (SELECT image_uri FROM segments) WHERE {where}") == [(0,)]
    assert verify(table.dest) == []


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("", "is empty"),
        ("nonsense = 1", "nonsense"),
        ("1 = 1)); DROP TABLE x; SELECT ((1", "without a semicolon"),
        ("false) OR (true", "is no condition"),
    ],
)
def test_a_condition_that_is_none(table: Table, where: str, says: str) -> None:
    with pytest.raises(UsageError, match=says) as refused:
        forget(table.dest, where, yes=True)
    assert "SELECT DISTINCT" not in str(refused.value)


def test_an_open_run_that_holds_such_an_image_is_in_the_way(table: Table) -> None:
    run = table.run(whole_row(f"{JANE}8.jpg"), whole_row(f"{KEPT}8.jpg"), state="open")
    before = contents(table.ledger.storage, table.dest)
    with pytest.raises(UsageError, match=f"run {run.run_id} is open and holds 1 image of these: .*runs abandon"):
        forget(table.dest, WHERE, yes=True)
    assert contents(table.ledger.storage, table.dest) == before
    assert forget(table.dest, f"image_uri = '{JANE}5.jpg'", yes=True).images == 1  # of no open run


def test_a_plan_that_was_being_made_loses_its_race(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has read the lists of what is forgotten, and this one was not there yet."""
    ledger = table.ledger
    number = ledger.last_sequence() + 1
    plan = Plan.model_validate_json(ledger.storage.get(ledger.uri(one_run(table), "plan.json")).data)
    plan = plan.model_copy(update={"run_id": "20270101T000000Z-0000bb", "sequence": number})
    look, raced = forgetting._supersede_plans, []

    def race(storage: Storage, dest: str) -> None:
        look(storage, dest)
        raced.append(ledger.freeze(plan, make_list([f"{JANE}1.jpg"])))

    monkeypatch.setattr(forgetting, "_supersede_plans", race)
    forget(table.dest, WHERE, yes=True)
    assert raced == [False] and ledger.open_plans() == []
    assert ledger.last_sequence() == number
    assert not [name for name in contents(ledger.storage, table.dest) if "0000bb" in name]


def test_a_plan_that_came_first_is_named(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    supersede = forgetting._supersede_plans

    def race(storage: Storage, dest: str) -> None:
        table.run(whole_row(f"{JANE}1.jpg", 1, "e9"), state="open")
        supersede(storage, dest)

    monkeypatch.setattr(forgetting, "_supersede_plans", race)
    with pytest.raises(InfrastructureError, match="is open and holds 1 image"):
        forget(table.dest, WHERE, yes=True)
    assert read_forgotten(table.ledger.storage, table.dest).stand_in(f"{JANE}1.jpg")


def test_what_comes_back_is_found_and_forgotten_again(table: Table) -> None:
    """A worker that slept, or a backup: whatever brings a file back."""
    path = Path(local_path(f"{table.dest}/segments"))
    shutil.copytree(path, path.with_name("backup"))
    forget(table.dest, WHERE, yes=True)
    shutil.rmtree(path)
    path.with_name("backup").rename(path)
    found = verify(table.dest)
    assert {one.kind for one in found} == {"not_forgotten"} and len(found) == 4
    assert all(f"maskmill forget {table.dest}" in one.mend for one in found)
    assert forget(table.dest, yes=True).rows == 5
    assert verify(table.dest, deep=True) == []


def test_two_commands_at_once_do_not_undo_each_other(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    """One stands still between reading a Part and replacing it, while the other does all of its work."""
    storage = open_storage(table.dest)
    replace, other = storage.replace, open_storage(table.dest)
    stood_still: list[str] = []

    def slowly(uri: str, data: bytes, *, etag: str) -> bool:
        if "/segments/" in uri and not stood_still:
            stood_still.append(uri)
            forget_in(other, table.dest, f"image_uri = '{JANE}1.jpg'", yes=True)
        return replace(uri, data, etag=etag)

    monkeypatch.setattr(storage, "replace", slowly)
    forget_in(storage, table.dest, f"image_uri = '{KEPT}2.jpg'", yes=True)
    assert stood_still
    uris = {uri for (uri,) in table.ask("SELECT DISTINCT image_uri FROM segments")}
    assert uris.isdisjoint({f"{JANE}1.jpg", f"{KEPT}2.jpg"}) and len(uris) == 4
    assert verify(table.dest) == []


def test_a_damaged_file_is_named(table: Table) -> None:
    path = next(Path(local_path(table.dest)).rglob("*-000001.parquet"))
    whole = path.read_bytes()
    path.write_bytes(b"PAR1 no more")
    with pytest.raises(InfrastructureError, match="could not be read"):
        forget(table.dest, WHERE, yes=True)
    write_forgotten(table.ledger.storage, table.dest, "00", ["00" * 32])
    with pytest.raises(InfrastructureError, match=r"-000001\.parquet cannot be read, so nobody knows"):
        forget(table.dest, yes=True)
    path.write_bytes(whole)
    assert forget(table.dest, yes=True).nothing


def test_lists_of_two_salts(table: Table) -> None:
    """As two first commands at the same moment leave them."""
    storage = table.ledger.storage
    for salt, uri in (("aa", f"{JANE}1.jpg"), ("bb", f"{JANE}3.jpg")):
        write_forgotten(storage, table.dest, salt, [hashlib.sha256((salt + uri).encode()).hexdigest()])
    assert forget(table.dest, WHERE, yes=True).images == 2
    assert "jane" not in str(contents(storage, table.dest))


def killed_everywhere(table: Table, copy: Callable[[int], Table]) -> int:
    """Forgets on copies of `table`, each killed one change later; gives how many changes there are."""
    kept = rows_by_image(table, KEPT)
    ends = set()
    for changes in range(1000):
        again = copy(changes)
        dying = DyingStorage(open_storage(again.dest), changes)
        try:
            forget_in(dying, again.dest, WHERE, yes=True)  # type: ignore[arg-type]
        except KilledError:
            assert dying.died
        assert rows_by_image(again, KEPT) == kept, "rows of others were lost or repeated"
        assert {one.kind for one in verify(again.dest)} <= {"not_forgotten"}
        # What was listed needs no condition any more.
        listed = len(read_forgotten(again.ledger.storage, again.dest)) > 0
        forget(again.dest, None if listed and changes % 2 else WHERE, yes=True)
        assert verify(again.dest) == []
        texts = contents(again.ledger.storage, again.dest)
        assert "jane" not in str(texts).lower()
        own = ("runs/_forgotten/", "runs/_log/", "_tmp/")  # as many as there were commands
        salted = re.compile(r"forgotten:[0-9a-f]{64}")
        ends.add(frozenset((name, salted.sub("", text)) for name, text in texts.items() if not name.startswith(own)))
        if not dying.died:
            assert len(ends) == 1, "the end depends on when it was killed"
            return changes
    raise AssertionError("it never came to an end")


def test_killed_at_every_change(table: Table, tmp_path: Path) -> None:
    def copy(number: int) -> Table:
        folder = tmp_path / f"copy-{number}"
        shutil.copytree(local_path(table.dest), folder)
        return Table(normalize_uri(str(folder)))

    assert killed_everywhere(table, copy) > 12


@pytest.mark.slow
@pytest.mark.s3
def test_killed_at_every_change_on_s3(s3_bucket: str, s3_client: Any) -> None:
    table = fill(f"{s3_bucket}/original")
    bucket = s3_bucket.removeprefix("s3://")
    listed = s3_client.list_objects_v2(Bucket=bucket, Prefix="original/")["Contents"]

    def copy(number: int) -> Table:
        for one in listed:
            key = one["Key"].replace("original/", f"copy-{number}/", 1)
            s3_client.copy_object(Bucket=bucket, Key=key, CopySource={"Bucket": bucket, "Key": one["Key"]})
        return Table(f"{s3_bucket}/copy-{number}")

    assert killed_everywhere(table, copy) > 12


def test_in_memory(memory_folder: str) -> None:
    table = fill(f"{memory_folder}/dest")
    kept = rows_by_image(table, KEPT)
    assert forget(table.dest, WHERE, yes=True).rows == 5
    assert rows_by_image(table, KEPT) == kept
    assert "jane" not in str(contents(table.ledger.storage, table.dest)).lower()
    assert verify(table.dest, deep=True) == []


def one_run(table: Table) -> str:
    return str(table.ask("SELECT min(run_id) FROM runs")[0][0])


@pytest.mark.s3
def test_on_s3(s3_bucket: str) -> None:
    table = fill(f"{s3_bucket}/it's here")
    kept = rows_by_image(table, KEPT)
    assert {one.kind for one in verify(table.dest)} == set()
    assert forget(table.dest, WHERE, yes=True).rows == 5
    assert rows_by_image(table, KEPT) == kept
    assert "jane" not in str(contents(table.ledger.storage, table.dest)).lower()
    assert verify(table.dest, deep=True) == []
    part = next(uri for uri in contents(table.ledger.storage, table.dest) if uri.startswith("segments/"))
    uri = join_uri(table.dest, part)
    data = make_part([whole_row(f"{JANE}1.jpg")])
    table.ledger.storage.put(uri, data)
    assert "not_forgotten" in {one.kind for one in verify(table.dest)}
    assert json.dumps(forget(table.dest, yes=True).model_dump())
