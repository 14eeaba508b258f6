"""Old versions go, whatever the moment at which the command is killed; what `images` shows never does."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from dying_storage import DyingStorage, KilledError
from handmade import CREATED_AT, make_row
from tables import HOUR, Table, whole_row

from pipeline.engine.ledger import Plan
from pipeline.errors import InfrastructureError, UsageError
from pipeline.storage import local_path, normalize_uri, open_storage
from pipeline.table.prune import Pruning, prune, prune_in
from pipeline.table.removed import write_removed
from pipeline.table.verify import verify

A, B, C = (f"s3://photos/{name}.jpg" for name in "abc")
FIRST, SECOND, THIRD, OTHER = "1" * 12, "2" * 12, "3" * 12, "9" * 12


def fill(dest: str) -> Table:
    """Three versions of a model, of which the first was used twice, and one of another model."""
    table = Table(dest)
    first = table.run(whole_row(A), whole_row(B), model_version=FIRST, shard_size=1)
    table.run(whole_row(A), model_version=OTHER, model_name="other")
    table.run(whole_row(A), whole_row(B), model_version=SECOND)
    second = table.run(whole_row(C), model_version=FIRST)
    table.run(whole_row(A), whole_row(C), model_version=THIRD)
    write_removed(table.ledger.storage, dest, second.run_id, [A])
    table.ledger.storage.put_new(table.ledger.uri(first.run_id, "report.html"), b"pictures")
    table.ledger.storage.put_new(table.ledger.uri(first.run_id, "drift.json"), b"{}")
    return table


@pytest.fixture
def table(tmp_path: Path) -> Table:
    return fill(normalize_uri(str(tmp_path / "dest")))


def versions(table: Table) -> list[tuple[str, str]]:
    rows = table.ask("SELECT DISTINCT model, version FROM segments ORDER BY ALL")
    return [(model, version[0]) for model, version in rows]


def files(table: Table) -> set[str]:
    root = Path(local_path(table.dest))
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file() and "_tmp" not in path.parts}


def test_without_consent_nothing_changes(table: Table) -> None:
    before = files(table)
    found = prune(table.dest, keep_versions=1)
    told: list[Pruning] = []
    assert prune(table.dest, keep_versions=1, yes=lambda one: bool(told.append(one))) == found == told[0]
    assert [(one.model, one.version[0], one.goes, one.parts) for one in found.versions] == [
        ("other", "9", False, 1), ("tiny-semantic", "3", False, 1), ("tiny-semantic", "1", True, 3),
        ("tiny-semantic", "2", True, 1),
    ]  # fmt: skip
    assert not found.done and files(table) == before


def test_the_newest_of_each_model_stay(table: Table) -> None:
    shown = table.ask("SELECT model, image_uri FROM images ORDER BY ALL")
    runs = table.ask("SELECT run_id FROM runs")
    assert prune(table.dest, keep_versions=2, yes=True).done
    # The first was used after the second.
    assert versions(table) == [("other", "9"), ("tiny-semantic", "1"), ("tiny-semantic", "3")]
    assert prune(table.dest, keep_versions=1, yes=True).done
    assert versions(table) == [("other", "9"), ("tiny-semantic", "3")]
    # What was found gone from SOURCE by a run that is pruned is gone still.
    assert table.ask("SELECT model, image_uri FROM images ORDER BY ALL") == shown
    assert table.ask("SELECT run_id FROM runs") == runs
    assert table.ask("SELECT state, count(*) FROM runs GROUP BY 1 ORDER BY 1") == [("done", 2), ("pruned", 3)]
    left = {name.rpartition("/")[2] for name in files(table) if runs[0][0] in name}
    assert left == {"plan.json", "run.json", "drift.json", "pruned.json"}
    assert verify(table.dest, deep=True) == []
    again = prune(table.dest, keep_versions=1, yes=True)
    assert not again.going and not again.done


def test_going_back_to_an_older_version_makes_it_the_newest(table: Table) -> None:
    table.run(model_version=SECOND)  # of no images, as a rollback leaves it
    prune(table.dest, keep_versions=1, yes=True)
    assert versions(table) == [("other", "9"), ("tiny-semantic", "2")]
    assert verify(table.dest) == []


def test_a_pruned_version_may_be_used_again(table: Table) -> None:
    prune(table.dest, keep_versions=1, yes=True)
    table.run(whole_row(A), whole_row(B), model_version=SECOND)
    assert table.ask("SELECT count(*) FROM images WHERE version = repeat('2', 12)") == [(2,)]
    assert prune(table.dest, keep_versions=1, yes=True).going[0].version == THIRD
    assert versions(table) == [("other", "9"), ("tiny-semantic", "2")]
    assert verify(table.dest) == []


def test_a_prune_that_was_killed_ends_though_its_version_is_used_again(table: Table) -> None:
    marks = sum(one.runs for one in prune(table.dest, keep_versions=1).going)
    with pytest.raises(KilledError):
        prune_in(DyingStorage(table.ledger.storage, marks), table.dest, keep_versions=1, yes=True)  # type: ignore[arg-type]
    again = table.run(whole_row(A), model_version=SECOND)
    prune(table.dest, keep_versions=9, yes=True)
    assert verify(table.dest) == []
    assert table.ask("SELECT DISTINCT run_id FROM segments WHERE model_version = repeat('2', 12)") == [(again.run_id,)]


def test_a_version_with_an_open_run_stays(table: Table) -> None:
    table.run(whole_row(C), model_version=SECOND, state="open")
    found = prune(table.dest, keep_versions=1, yes=True)
    assert [one.version for one in found.versions if one.is_open] == [SECOND]
    assert versions(table) == [("other", "9"), ("tiny-semantic", "2"), ("tiny-semantic", "3")]


def test_runs_that_were_given_up_make_no_version_new(table: Table) -> None:
    table.run(whole_row(A), model_version="4" * 12, state="abandoned")
    prune(table.dest, keep_versions=1, yes=True)
    assert versions(table) == [("other", "9"), ("tiny-semantic", "3")]
    assert verify(table.dest) == []


def test_a_worker_that_comes_back_from_the_dead(table: Table) -> None:
    """The names of its Parts are free again: what it commits is found, and goes."""
    plan = Plan.model_validate_json(
        table.ledger.storage.get(table.ledger.uri(table.ask("SELECT min(run_id) FROM runs")[0][0], "plan.json")).data
    )
    part = Path(local_path(plan.part_uri(0))).read_bytes()
    prune(table.dest, keep_versions=1, yes=True)
    assert table.ledger.storage.put_new(plan.part_uri(0), part)
    (found,) = verify(table.dest)
    assert found.kind == "half_pruned" and plan.part_uri(0) in found.message
    assert f"maskmill prune {table.dest} --keep-versions N" in found.mend
    assert prune(table.dest, keep_versions=9, yes=True).going[0].parts == 1
    assert verify(table.dest) == []


def test_wrong_usage(table: Table, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--keep-versions is 0"):
        prune(table.dest, keep_versions=0)
    with pytest.raises(UsageError, match="holds no Maskmill table"):
        prune(str(tmp_path / "nothing"), keep_versions=1)
    run_id = table.ask("SELECT min(run_id) FROM runs")[0][0]
    Path(local_path(table.ledger.uri(run_id, "run.json"))).write_text("{")
    with pytest.raises(InfrastructureError, match=r"run\.json cannot be read .* `maskmill verify"):
        prune(table.dest, keep_versions=1, yes=True)


def test_killed_at_every_change(table: Table, tmp_path: Path) -> None:
    shown = table.ask("SELECT model, image_uri, version FROM images ORDER BY ALL")
    ends = set()
    for changes in range(1000):
        copy = Table(normalize_uri(str(tmp_path / f"copy-{changes}")))
        shutil.copytree(local_path(table.dest), local_path(copy.dest))
        dying = DyingStorage(open_storage(copy.dest), changes)
        try:
            prune_in(dying, copy.dest, keep_versions=1, yes=True)  # type: ignore[arg-type]
        except KilledError:
            assert dying.died
        assert copy.ask("SELECT model, image_uri, version FROM images ORDER BY ALL") == shown
        assert all("maskmill prune" in one.mend for one in verify(copy.dest))
        prune(copy.dest, keep_versions=1, yes=True)
        assert verify(copy.dest) == []
        ends.add(frozenset(files(copy)))
        if not dying.died:
            break
    assert changes > 10 and len(ends) == 1


@pytest.mark.s3
def test_on_s3(s3_bucket: str) -> None:
    table = fill(f"{s3_bucket}/it's here")
    table.run(make_row(A, "e1", "corrupt"), model_version="4" * 12, at=CREATED_AT + 9 * HOUR)
    dying = DyingStorage(open_storage(table.dest), 5)
    with pytest.raises(KilledError):
        prune_in(dying, table.dest, keep_versions=1, yes=True)  # type: ignore[arg-type]
    assert {one.kind for one in verify(table.dest)} == {"half_pruned"}
    assert prune(table.dest, keep_versions=1, yes=True).done
    assert versions(table) == [("other", "9"), ("tiny-semantic", "4")]
    assert verify(table.dest) == []
