"""Hosts whose clocks differ by hours: what is done, what is shown and who is alive do not depend on a clock."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from dying_storage import KilledError
from handmade import make_image, rows_of, touch_later
from harness import in_process

import pipeline
from pipeline.engine import planning, reconciliation, rows, run, stream
from pipeline.engine.lease import Lease
from pipeline.engine.ledger import Ledger
from pipeline.engine.outcome import Outcome
from pipeline.storage import normalize_uri, open_storage

Host = Callable[..., Outcome]


@contextmanager
def clock_of(hours: float) -> Iterator[None]:
    """Wall clocks of this process are so far ahead; what only measures time goes on as it was."""
    now_s, shift = time.time, dt.timedelta(hours=hours)

    class Clock:
        """The module `datetime`, whose `datetime.now` is wrong."""

        UTC, timedelta, date, timezone = dt.UTC, dt.timedelta, dt.date, dt.timezone

        class datetime:  # noqa: N801
            @staticmethod
            def now(zone: dt.tzinfo | None = None) -> dt.datetime:
                return dt.datetime.fromtimestamp(now_s(), zone) + shift

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time", lambda: now_s() + hours * 3600)
        for module in (planning, reconciliation, stream, rows):
            patch.setattr(module, "dt", Clock)
        yield


@pytest.fixture
def host(tmp_path: Path, semantic_model: Path) -> Host:
    """`host(hours_ahead, source, **settings)`: a command on a host with such a clock."""

    def command(hours: float, source: Path | str, **settings: object) -> Outcome:
        with clock_of(hours), in_process():
            outcome: Outcome = pipeline.segment(
                source=str(source), dest=str(tmp_path / "dest"), model=str(semantic_model), precision="fp32", threads=1,
                lease_ttl_s=1.0, report=False, **settings,
            )  # fmt: skip
        return outcome

    return command


@pytest.mark.parametrize(("first", "second"), [(5, 0), (0, -5), (-5, 0), (30, 0)])
def test_the_image_that_was_read_last_is_shown(
    host: Host, image_folder: Callable[..., Path], tmp_path: Path, first: float, second: float
) -> None:
    photos = image_folder(3)
    host(first, photos)
    make_image(photos / "0001.png", 77)
    touch_later(photos / "0001.png")
    again = host(second, photos)
    assert (again.planned, again.skipped) == (1, 2)
    rows = [row for row in rows_of(tmp_path / "dest") if row["image_uri"].endswith("0001.png")]
    stamps = [row["processed_at"].timestamp() for row in rows]
    assert len(rows) == 2 and abs(stamps[1] - stamps[0]) > 4 * 3600, "the clocks were to differ"
    replaced = (photos / "0001.png").stat()
    table = pipeline.connect(str(tmp_path / "dest"))
    shown = table.sql("SELECT image_etag FROM images WHERE image_uri LIKE '%0001.png'").fetchall()
    assert shown == [(f"{replaced.st_size}-{replaced.st_mtime_ns}",)]
    assert table.sql("SELECT count(*) FROM images").fetchall() == [(3,)]
    assert host(second, photos).planned == host(first, photos).planned == 0
    assert pipeline.verify(str(tmp_path / "dest"), deep=True) == []


def test_an_image_that_is_gone_and_one_that_is_back(
    host: Host, image_folder: Callable[..., Path], tmp_path: Path
) -> None:
    photos = image_folder(3)
    kept = (photos / "0002.jpg").read_bytes()
    host(9, photos)
    (photos / "0002.jpg").unlink()
    host(0, photos)
    assert pipeline.connect(str(tmp_path / "dest")).sql("SELECT count(*) FROM images").fetchall() == [(2,)]
    (photos / "0002.jpg").write_bytes(kept)
    host(-9, photos)
    assert pipeline.connect(str(tmp_path / "dest")).sql("SELECT count(*) FROM images").fetchall() == [(3,)]


def _dies(*_: object) -> None:
    raise KilledError


@pytest.mark.parametrize("hours", [-50, 50])
def test_a_live_run_is_not_given_up_by_a_host_in_another_time(
    host: Host, image_folder: Callable[..., Path], tmp_path: Path, hours: float
) -> None:
    """Its lease seems to be days old, or of days to come."""
    photos = image_folder(6)
    dest = normalize_uri(str(tmp_path / "dest"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run._Segmentation, "_run_shards", _dies)
        with pytest.raises(KilledError):
            host(0, photos)
    ledger = Ledger(open_storage(dest), dest)
    (plan,) = ledger.open_plans()
    with Lease(ledger.storage, ledger.uri(plan.run_id, "lease.json"), ttl_s=1.0):
        outcome = host(hours, f"{photos}/*.png")
        assert (outcome.planned, outcome.held) == (0, 3)
        assert [one.run_id for one in ledger.open_plans()] == [plan.run_id]
    assert host(hours, photos).state == "done"
    assert ledger.open_plans() == []
