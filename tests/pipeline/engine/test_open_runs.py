"""`segment` from end to end: runs that stopped in the middle, and others beside them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from handmade import make_image
from run_bench import Bench, names

import pipeline
from pipeline.engine import placement, reconciliation
from pipeline.engine import run as engine_run
from pipeline.engine.crew import InlineCrew
from pipeline.engine.lease import Lease
from pipeline.engine.outcome import Event
from pipeline.errors import HeldError, InfrastructureError
from pipeline.storage import normalize_uri, open_storage

pytestmark = pytest.mark.usefixtures("workers_in_this_process")


def test_the_same_command_continues(bench: Bench, image_folder: Callable[..., Path]) -> None:
    photos = image_folder(8)
    stopped = bench.interrupted(photos, after_parts=1, shard_size=1)
    committed = bench.done
    assert 0 < stopped.ok == len(committed) < 8
    assert min(stopped.seconds, stopped.images_per_s, stopped.megapixels_per_s) > 0
    make_image(photos / "new.png", 77)
    outcome = bench.segment(photos, shard_size=5)
    assert outcome.runs[0] == stopped.run_id
    assert len(outcome.runs) == 2  # the new image is a run of its own
    assert bench.done == names(photos)
    assert bench.segment(photos).planned == 0


def test_stopping_before_there_is_a_plan_changes_nothing(bench: Bench, image_folder: Callable[..., Path]) -> None:
    outcome = bench.segment(image_folder(2), precision="auto", should_stop=lambda: True)
    assert (outcome.state, outcome.run_id, outcome.runs) == ("interrupted", None, [])
    assert not bench.dest.exists()


def test_progress_ends_at_the_whole(bench: Bench, image_folder: Callable[..., Path]) -> None:
    (photos := image_folder(4)).joinpath("bad.jpg").write_bytes(b"no picture")
    bench.interrupted(photos, after_parts=1, shard_size=1)
    bench.segment(photos, shard_size=1)
    last = [event for event in bench.told if event.kind == "progress"][-1]
    assert last.progress is not None
    assert (last.progress.rows, last.total) == (5, 5)


def test_an_ad_hoc_run_beside_an_open_one_neither_loses_nor_repeats(
    bench: Bench, image_folder: Callable[..., Path]
) -> None:
    photos = image_folder(8)
    nightly = bench.interrupted(photos, after_parts=1, shard_size=1)
    done_before = len(bench.done)
    make_image(photos / "zz-new.png", 77)
    adhoc = bench.segment(photos / "*.png")
    assert adhoc.ok == 1
    assert adhoc.held == sum(adhoc.held_by.values()) > 0
    assert set(adhoc.held_by) == {nightly.run_id}
    assert f"runs abandon {bench.dest} {nightly.run_id}" in bench.texts("note")
    assert len(bench.done) == done_before + 1
    bench.segment(photos)
    assert bench.done == names(photos)


def test_images_of_an_abandoned_run_are_free_again(bench: Bench, image_folder: Callable[..., Path]) -> None:
    photos = image_folder(6)
    nightly = bench.interrupted(photos, after_parts=1, shard_size=1)
    assert nightly.run_id is not None
    row = pipeline.abandon_run(str(bench.dest), nightly.run_id)
    assert (row["state"], row["rows"]) == ("abandoned", nightly.ok)
    outcome = bench.segment(photos)
    assert (outcome.runs[0] != nightly.run_id, outcome.ok) == (True, 6 - nightly.ok)
    assert bench.done == names(photos)


def test_a_driver_that_comes_too_late_adds_nothing(
    bench: Bench, image_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Abandoned while it was between planning and work, as a driver that was paused would be."""
    photos = image_folder(3)
    work = engine_run._Segmentation._work

    def late(self: Any, plan: Any, **settings: Any) -> Any:
        pipeline.abandon_run(str(bench.dest), plan.run_id)
        return work(self, plan, **settings)

    monkeypatch.setattr(engine_run._Segmentation, "_work", late)
    with pytest.raises(InfrastructureError, match="was abandoned"):
        bench.segment(photos)
    assert bench.done == []
    monkeypatch.undo()
    monkeypatch.setattr(placement, "LocalCrew", InlineCrew)
    assert bench.segment(photos).ok == 3


def stopped_run(bench: Bench, photos: Path) -> tuple[str, Lease]:
    """A run with one Part yet, and a lease on it for another driver to take."""
    run_id = str(bench.interrupted(photos, after_parts=1, shard_size=1).run_id)
    dest = normalize_uri(str(bench.dest))
    return run_id, Lease(open_storage(dest), f"{dest}/runs/{run_id}/lease.json", ttl_s=0.5)


def test_a_run_that_another_driver_holds(bench: Bench, image_folder: Callable[..., Path]) -> None:
    photos = image_folder(4)
    run_id, holder = stopped_run(bench, photos)
    with holder, pytest.raises(HeldError, match=run_id):
        bench.segment(photos, lease_ttl_s=60)
    assert bench.segment(photos).ok == 4


def test_with_wait_it_goes_on_once_the_other_driver_is_done(bench: Bench, image_folder: Callable[..., Path]) -> None:
    photos = image_folder(4)
    _, holder = stopped_run(bench, photos)
    holder.__enter__()
    threading.Timer(1.0, holder.__exit__, (None, None, None)).start()
    assert bench.segment(photos, lease_ttl_s=60, wait=True).ok == 4
    assert not holder.superseded.is_set()


def test_a_run_whose_lease_cannot_be_renewed_stops(
    bench: Bench, image_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = image_folder(8)
    failing: list[Lease] = []
    tried = threading.Event()

    def fails(lease: Lease) -> bool:
        failing.append(lease)
        tried.set()
        raise ValueError("a bug")

    def listen(event: Event) -> None:
        if event.kind == "progress":
            assert tried.wait(60) and failing[0].superseded.wait(60)

    with monkeypatch.context() as patch:
        patch.setattr(Lease, "_renew", fails)
        with pytest.raises(InfrastructureError, match=r"the lease of run .* could not be renewed.*ValueError: a bug"):
            bench.segment(photos, shard_size=1, lease_ttl_s=0.2, listen=listen)
    assert len(bench.done) < 8
    assert bench.segment(photos, shard_size=1).state == "done"
    assert bench.done == names(photos)


def test_a_driver_killed_while_it_counts_leaves_what_the_next_removes(
    bench: Bench, image_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen in the soak: folders of drivers that were killed in the reckoning stayed for ever."""
    opened, used = reconciliation.open_duckdb, []

    def told(*args: Any, temp_path: str, **more: Any) -> Any:
        used.append(Path(temp_path).name)
        return opened(*args, temp_path=temp_path, **more)

    monkeypatch.setattr(reconciliation, "open_duckdb", told)
    assert bench.segment(image_folder(2)).ok == 2
    assert used and all(name.startswith("maskmill-run-") for name in used)
