"""Runs as people ask about them from another shell."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
from handmade import make_list, make_part, make_plan, make_record, make_row

from pipeline.engine.lease import Lease, process_start, this_host
from pipeline.engine.ledger import Ledger
from pipeline.engine.status import abandon_run, list_runs, show_run
from pipeline.errors import HeldError, InfrastructureError, UsageError
from pipeline.table.parts import PartBuilder, commit

OLD, NEW = "20260101T000000Z-000001", "20260102T000000Z-000002"


@pytest.fixture
def dest(ledger: Ledger) -> str:
    """A DEST with a closed run and an open one, of which one shard of three is committed."""
    closed = make_plan(ledger.dest, run_id=OLD, sequence=1)
    ledger.freeze(closed, make_list(["a"]))
    ledger.close(make_record(closed, ok=9, errors=1))
    plan = make_plan(ledger.dest, run_id=NEW, sequence=2)
    ledger.freeze(plan, make_list([f"image-{index}" for index in range(10)]))
    seen = {"run_id": NEW, "width": 1000, "height": 500, "infer_ms": 2.0}
    rows = [make_row(f"image-{index}", "e1", **seen) for index in range(3)] + [make_row("image-3", "e1", "corrupt")]
    ledger.storage.put_new(plan.part_uri(0), make_part(rows))
    return ledger.dest


def hold(ledger: Ledger, **changes: Any) -> None:
    body = {"holder": "somebody", "beat": 1, "host": this_host(), "pid": os.getpid(),
            "started": process_start(os.getpid()), "at": 0.0, "ttl_s": 30.0} | changes  # fmt: skip
    ledger.storage.put(ledger.uri(NEW, "lease.json"), json.dumps(body).encode())


def test_runs_are_listed_newest_first(dest: str, ledger: Ledger) -> None:
    ledger.storage.put(ledger.uri(NEW, "progress.json"), b'{"rows": 7, "errors": 1}')
    new, old = list_runs(dest)
    # Rows are those of committed Parts: one of four images here, whatever a driver has said of its progress.
    assert (new["run_id"], new["state"], new["rows"], new["errors"], new["planned"]) == (NEW, "open", 4, 1, 10)
    assert (old["run_id"], old["state"], old["rows"], old["errors"]) == (OLD, "done", 10, 1)
    assert json.loads(json.dumps([new, old])) == [new, old]


def test_a_run_that_ends_while_it_is_listed_is_in_the_list(
    dest: str, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = Ledger.entries

    def ends(self: Ledger) -> Any:
        found = entries(self)
        self.close(make_record(self.plan(NEW)))
        return found

    monkeypatch.setattr(Ledger, "entries", ends)
    assert [(row["run_id"], row["state"]) for row in list_runs(dest)] == [(NEW, "done"), (OLD, "done")]


def test_a_plan_that_lost_is_no_run(dest: str, ledger: Ledger) -> None:
    loser = make_plan(dest, run_id="20260103T000000Z-000003", sequence=2)
    ledger.storage.put_new(ledger.uri(loser.run_id, "plan.json"), loser.model_dump_json().encode())
    assert [row["run_id"] for row in list_runs(dest)] == [NEW, OLD]


def test_a_run_with_a_live_holder_is_running(dest: str, ledger: Ledger) -> None:
    hold(ledger)
    row = list_runs(dest)[0]
    assert row["state"] == "running"
    assert row["holder"].endswith(f":{os.getpid()}")
    hold(ledger, started="1")
    assert list_runs(dest)[0]["state"] == "open"


def test_no_runs_is_a_usage_error(ledger: Ledger) -> None:
    with pytest.raises(UsageError, match="holds no runs"):
        list_runs(ledger.dest)
    for ask in (show_run, abandon_run):
        with pytest.raises(UsageError, match=NEW):
            ask(ledger.dest, NEW)


def test_show_gives_the_whole_plan_or_record(dest: str) -> None:
    assert show_run(dest, NEW)["plan"]["shard_size"] == 4
    record = show_run(dest, OLD)
    assert (record["ok"], record["plan"]["run_id"], record["state"]) == (9, OLD, "done")


def test_abandon_takes_every_free_name_and_keeps_what_is_committed(dest: str, ledger: Ledger) -> None:
    plan = ledger.plan(NEW)
    row = abandon_run(dest, NEW)
    assert (row["state"], row["rows"], row["errors"]) == ("abandoned", 4, 1)
    assert set(ledger.committed(plan)) == {0, 1, 2}
    assert ledger.open_plans() == []
    record = show_run(dest, NEW)
    assert (record["ok"], record["errors_by_kind"]) == (3, {"corrupt": 1})
    assert (record["megapixels"], record["stage_ms"]["infer"]) == (1.5, 6.0)
    late = PartBuilder(model_name="tiny", card_json="{}")
    late.add([make_row("image-4", "e1")])
    assert not commit(ledger.storage, plan.part_uri(1), late.finish())
    assert abandon_run(dest, NEW)["rows"] == 4


def test_a_run_with_a_damaged_part_is_not_abandoned_and_says_why(dest: str, ledger: Ledger) -> None:
    ledger.storage.put(ledger.plan(NEW).part_uri(0), b"PAR1 and no more")
    with pytest.raises(InfrastructureError, match="could not be read"):
        abandon_run(dest, NEW)


def test_abandoning_a_closed_run_changes_nothing(dest: str) -> None:
    assert abandon_run(dest, OLD)["state"] == "done"


def test_a_live_run_is_not_abandoned(dest: str, ledger: Ledger) -> None:
    with Lease(ledger.storage, ledger.uri(NEW, "lease.json"), ttl_s=0.5), pytest.raises(HeldError, match=NEW):
        abandon_run(dest, NEW)
    assert set(ledger.committed(ledger.plan(NEW))) == {0}


def test_what_a_plan_found_gone_is_listed(ledger: Ledger) -> None:
    plan = make_plan(ledger.dest, run_id=OLD, removed=3, returned=2)
    ledger.freeze(plan, make_list(["a"]))
    ledger.close(make_record(plan))
    (row,) = list_runs(ledger.dest)
    assert (row["removed"], row["returned"]) == (3, 2)


def test_a_run_is_shown_with_its_drift(dest: str, ledger: Ledger) -> None:
    assert show_run(dest, OLD)["drift"] is None
    ledger.storage.put_new(ledger.uri(OLD, "drift.json"), b'{"state": "compared"}')
    assert show_run(dest, OLD)["drift"] == {"state": "compared"}


def test_a_pruned_run_says_so(dest: str, ledger: Ledger) -> None:
    ledger.storage.put_new(ledger.uri(OLD, "pruned.json"), b'{"keep_versions": 1}')
    assert [row["state"] for row in list_runs(dest)] == ["open", "pruned"]
    assert show_run(dest, OLD)["state"] == "pruned" and show_run(dest, NEW)["state"] == "open"
