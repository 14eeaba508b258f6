"""What DEST remembers of runs: one winner per place in the log, nothing overwritten, foreign files left alone."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from handmade import CREATED_AT, make_list, make_plan, make_record

from pipeline.engine.ledger import Ledger, Plan, new_run_id
from pipeline.errors import InfrastructureError, StorageError, UsageError
from pipeline.storage import local_path
from pipeline.table.parts import commit_empty
from pipeline.table.schema import RUN_ID

FIRST, SECOND = "20260102T030405Z-000001", "20260102T030406Z-000002"


def a_plan(ledger: Ledger, run_id: str, **changes: Any) -> Plan:
    return make_plan(ledger.dest, run_id=run_id, **changes)


def files_of(ledger: Ledger) -> set[str]:
    root = Path(local_path(ledger.dest), "runs")
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def test_a_new_dest_is_empty(ledger: Ledger) -> None:
    assert ledger.entries() == [] == ledger.open_plans() == list(ledger.history("a" * 12))
    assert ledger.last_sequence() == 0


def test_a_frozen_plan_comes_back_as_it_was(ledger: Ledger) -> None:
    plan = a_plan(ledger, FIRST)
    assert ledger.freeze(plan, make_list(["a"]))
    assert ledger.open_plans() == [plan] == [ledger.plan(FIRST)]
    assert ledger.last_sequence() == 1
    assert ledger.storage.get(ledger.uri(FIRST, "manifest.parquet")).data == make_list(["a"])


def test_of_two_plans_for_one_place_the_first_wins_and_the_second_leaves_nothing(ledger: Ledger) -> None:
    assert ledger.freeze(a_plan(ledger, SECOND), make_list(["a"]))
    before = files_of(ledger)
    assert not ledger.freeze(a_plan(ledger, FIRST), make_list(["b"]))
    assert files_of(ledger) == before
    assert [plan.run_id for plan in ledger.open_plans()] == [SECOND]


def test_of_many_at_the_same_moment_exactly_one_wins(ledger: Ledger) -> None:
    plans = [a_plan(ledger, f"20260102T030405Z-{number:06x}") for number in range(8)]
    won: list[str] = []
    start = threading.Barrier(len(plans))

    def freeze(plan: Plan) -> None:
        start.wait()
        if ledger.freeze(plan, make_list([])):
            won.append(plan.run_id)

    threads = [threading.Thread(target=freeze, args=(plan,)) for plan in plans]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert [plan.run_id for plan in ledger.open_plans()] == won
    assert files_of(ledger) == {f"{won[0]}/manifest.parquet", f"{won[0]}/plan.json", "_log/00000001.json"}


class _Deaf:
    """A store whose first answer about the log is lost on its way: the caller hears that the entry was there."""

    def __init__(self, storage: Any) -> None:
        self._storage = storage

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    def put_new(self, uri: str, data: bytes | memoryview) -> bool:
        created = self._storage.put_new(uri, data)
        return bool(created) and "/_log/" not in uri


def test_a_lost_answer_is_not_a_lost_race(ledger: Ledger) -> None:
    deaf = Ledger(_Deaf(ledger.storage), ledger.dest)  # type: ignore[arg-type]
    plan = a_plan(ledger, FIRST)
    assert deaf.freeze(plan, make_list(["a"]))
    assert ledger.open_plans() == [plan]


def test_a_crash_before_the_log_leaves_nothing_that_counts(ledger: Ledger) -> None:
    plan = a_plan(ledger, FIRST)
    ledger.storage.put_new(ledger.uri(FIRST, "manifest.parquet"), make_list(["a"]))
    assert ledger.entries() == []
    ledger.storage.put_new(ledger.uri(FIRST, "plan.json"), plan.model_dump_json().encode())
    assert ledger.open_plans() == []
    assert ledger.freeze(a_plan(ledger, SECOND), make_list(["b"]))
    assert [plan.run_id for plan in ledger.open_plans()] == [SECOND]


def test_a_plan_that_lost_may_vanish_while_others_read(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = a_plan(ledger, FIRST)
    ledger.freeze(plan, make_list(["a"]))
    loser = ledger.uri(SECOND, "plan.json")
    ledger.storage.put_new(loser, a_plan(ledger, SECOND).model_dump_json().encode())
    entries = ledger.entries()
    assert [entry.run_id for entry in entries] == [FIRST, SECOND]
    ledger.storage.delete(loser)
    monkeypatch.setattr(ledger, "entries", lambda: entries)
    assert ledger.open_plans() == [plan]


def test_a_run_id_that_is_taken_is_an_error(ledger: Ledger) -> None:
    assert ledger.freeze(a_plan(ledger, FIRST), make_list(["a"]))
    with pytest.raises(InfrastructureError, match=FIRST):
        ledger.freeze(a_plan(ledger, FIRST, sequence=2), make_list(["b"]))
    assert ledger.storage.get(ledger.uri(FIRST, "manifest.parquet")).data == make_list(["a"])


def test_a_record_closes_its_run_once(ledger: Ledger) -> None:
    plan = a_plan(ledger, FIRST)
    ledger.freeze(plan, make_list(["a"]))
    assert ledger.record(FIRST) is None
    ledger.close(make_record(plan))
    ledger.close(make_record(plan, state="abandoned", ok=0))
    assert ledger.open_plans() == []
    record = ledger.record(FIRST)
    assert record is not None
    assert (record.state, record.ok) == ("done", 10)


def test_history_is_of_one_version_newest_first_and_leaves_out_what_cannot_be_read(ledger: Ledger) -> None:
    # Within one second run ids are in no order: the log is.
    third = "20991120T083539Z-ffffff"
    versions = [(SECOND, "a" * 12), (FIRST, "a" * 12), (third, "b" * 12)]
    for sequence, (run_id, version) in enumerate(versions, start=1):
        plan = a_plan(ledger, run_id, sequence=sequence, model_version=version)
        ledger.freeze(plan, make_list([]))
        if run_id != FIRST:
            ledger.close(make_record(plan))
    found = list(ledger.history("a" * 12))
    assert [(plan.run_id, record is not None) for plan, record in found] == [(FIRST, False), (SECOND, True)]
    ledger.storage.put(ledger.uri(SECOND, "run.json"), b'{"of": "another age"}')
    assert [plan.run_id for plan, _ in ledger.history("a" * 12)] == [FIRST]


def test_committed_counts_this_runs_parts_only(ledger: Ledger) -> None:
    plan = a_plan(ledger, FIRST)
    for ordinal in (0, 2):
        commit_empty(ledger.storage, plan.part_uri(ordinal))
    commit_empty(ledger.storage, a_plan(ledger, SECOND).part_uri(1))
    folder = plan.part_uri(0).rpartition("/")[0]
    ledger.storage.put(f"{folder}/other.parquet", b"somebody else's")
    ledger.storage.put(f"{folder}/{FIRST}-000001.parquet.tmp", b"debris")
    committed = ledger.committed(plan)
    assert set(committed) == {0, 2}
    assert all(size > 0 for size in committed.values())


def test_a_million_shards_have_names_too(ledger: Ledger) -> None:
    plan = a_plan(ledger, FIRST)
    commit_empty(ledger.storage, plan.part_uri(1_234_567))
    assert set(ledger.committed(plan)) == {1_234_567}


def test_foreign_files_are_left_alone(ledger: Ledger) -> None:
    plan = a_plan(ledger, FIRST)
    ledger.freeze(plan, make_list(["a"]))
    for name in ("README.md", "_log/.DS_Store", "_log/notes.json", "mine/plan.json", "mine/run.json", ".x/plan.json"):
        ledger.storage.put(f"{ledger.dest}/runs/{name}", b"not ours")
    assert ledger.open_plans() == [plan]
    assert [entry.run_id for entry in ledger.entries()] == [FIRST]
    assert ledger.last_sequence() == 1


def test_an_unknown_run_is_a_usage_error(ledger: Ledger) -> None:
    with pytest.raises(UsageError, match="no run '20990101T000000Z-000000'"):
        ledger.plan("20990101T000000Z-000000")


def test_a_damaged_plan_is_named(ledger: Ledger) -> None:
    ledger.storage.put(ledger.uri(FIRST, "plan.json"), b'{"run_id": 1')
    with pytest.raises(InfrastructureError, match=f"{FIRST}/plan.json"):
        ledger.plan(FIRST)


def test_other_failures_of_the_store_are_not_taken_for_an_empty_dest(ledger: Ledger, monkeypatch: Any) -> None:
    def denied(*_: Any, **__: Any) -> Any:
        raise StorageError("no", kind="denied")

    monkeypatch.setattr(ledger.storage, "list", denied)
    monkeypatch.setattr(ledger.storage, "get", denied)
    for ask in (ledger.entries, ledger.last_sequence, lambda: ledger.record(FIRST), lambda: ledger.plan(FIRST)):
        with pytest.raises(StorageError):
            ask()


def test_run_ids_sort_by_time() -> None:
    early, late = new_run_id(CREATED_AT), new_run_id(CREATED_AT.replace(second=6))
    assert early < late
    assert RUN_ID.fullmatch(early)
