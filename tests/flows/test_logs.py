"""What reaches a flow's log, and at what rate."""

from __future__ import annotations

import logging

import pytest

from flows.logs import Meter, forwarded


def test_a_flood_is_cut_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("flood")
    meter = Meter(logger, lines=3, period_s=3600)
    with caplog.at_level(logging.INFO):
        for number in range(10):
            meter.log(logging.INFO, f"line {number}")
        meter.close()
        meter.close()
    assert caplog.messages == ["line 0", "line 1", "line 2", "7 more lines were left out"]


def test_after_a_while_lines_are_let_through_again(caplog: pytest.LogCaptureFixture) -> None:
    meter = Meter(logging.getLogger("flood"), lines=1, period_s=-1)
    meter.log(logging.WARNING, "100 % of a")
    meter.log(logging.WARNING, "b")
    assert caplog.messages == ["100 % of a", "b"]


def test_warnings_of_the_pipeline_are_forwarded_while_it_lasts(caplog: pytest.LogCaptureFixture) -> None:
    to = logging.getLogger("the-flow")
    with forwarded(to):
        logging.getLogger("pipeline.engine.fleet").warning("a worker is gone: %s", "SIGKILL")
        logging.getLogger("pipeline.engine.run").info("not this")
        logging.getLogger("elsewhere").warning("nor this")
    logging.getLogger("pipeline.engine.fleet").warning("too late")
    forwarded_lines = [record.getMessage() for record in caplog.records if record.name == "the-flow"]
    assert forwarded_lines == ["pipeline.engine.fleet: a worker is gone: SIGKILL"]
