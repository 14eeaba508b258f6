"""A pipeline call inside a task: interrupted, it keeps what is committed, and leaves nothing running."""

from __future__ import annotations

import logging
import os
import signal
import threading
from pathlib import Path
from types import FrameType

import pytest
from harness import SHAPE, Case, in_process, part_count, terminal_rows, wait_until

pytest.importorskip("prefect")

from flows.artifacts import LiveProgress
from flows.driving import drive
from pipeline import plan
from pipeline.config import SegmentConfig
from pipeline.engine.outcome import Outcome

IMAGES = 40


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("case"), IMAGES, side_px=128)


def driven(case: Case, folder: Path) -> Outcome:
    config = SegmentConfig(
        source=str(case.images), dest=str(folder / "out"), model=str(case.model), engine="local", shard_size=1, **SHAPE
    )
    found = plan(config, scratch=folder)
    with in_process():
        return drive(config, found.corpus, logging.getLogger("test"), LiveProgress(every_s=float("inf")))


class TermError(BaseException):
    """What Prefect's handler of SIGTERM raises is no Exception either."""


def test_a_signal_drains_the_run_and_goes_on(case: Case, tmp_path: Path) -> None:
    def on_signal(number: int, frame: FrameType | None) -> None:
        raise TermError

    def strike() -> None:
        wait_until(lambda: part_count(tmp_path / "out") >= 3, what="three Parts")
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, on_signal)
    striker = threading.Thread(target=strike)
    striker.start()
    try:
        with pytest.raises(TermError):
            driven(case, tmp_path)
    finally:
        striker.join()
        signal.signal(signal.SIGTERM, before)
    assert 3 <= part_count(tmp_path / "out") < IMAGES
    assert not list(tmp_path.glob("out/runs/*/lease.json")), "the lease is given back"
    assert "segment" not in {thread.name for thread in threading.enumerate()}
    outcome = driven(case, tmp_path)
    assert outcome.state == "done" and outcome.ok == IMAGES
    assert terminal_rows(tmp_path / "out") == case.calm
