"""What workers log reaches whoever drives them."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
from harness import SHAPE, write_images, write_tiny_model

import pipeline
from pipeline.engine.backlog import Backlog, LogLine
from pipeline.engine.crew import Host
from pipeline.engine.outcome import Event


def test_the_last_lines_are_kept_and_the_lost_counted() -> None:
    backlog = Backlog(lines=2)
    logger = logging.Logger("worker")
    logger.addHandler(backlog)
    for number in range(5):
        logger.warning("line %d", number)
    logger.info("not this")
    assert backlog.take() == [
        LogLine(logging.WARNING, "3 earlier lines of its log were left out"),
        LogLine(logging.WARNING, "worker: line 3"),
        LogLine(logging.WARNING, "worker: line 4"),
    ]
    assert backlog.take() == []


def test_a_worker_in_the_drivers_own_process_has_nothing_to_relay() -> None:
    host = Host()
    logging.getLogger("pipeline").warning("heard by the driver itself")
    assert host.logged() == []


def test_a_workers_warning_is_heard_by_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The warning is real: a sitecustomize in the worker's path logs it when an image is looked at."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import logging, sys\n"
        "if 'pipeline.engine.crew' in ' '.join(sys.orig_argv):\n"
        "    import pipeline.engine.intake as intake\n"
        "    peek = intake.peek\n"
        "    def loud(data):\n"
        "        logging.getLogger('pipeline.corpus').warning('an image of %d bytes', len(data))\n"
        "        return peek(data)\n"
        "    intake.peek = loud\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{site}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    images = write_images(tmp_path / "images", 5)
    heard: list[Event] = []
    pipeline.segment(
        source=str(images), dest=str(tmp_path / "out"), model=str(write_tiny_model(tmp_path / "tiny.safetensors")),
        engine="local", actors=1, listen=heard.append, **SHAPE,
    )  # fmt: skip
    lines = [event.text for event in heard if event.kind == "log"]
    sizes = sorted(path.stat().st_size for path in images.iterdir())
    assert sorted(int(line.split()[-2]) for line in lines) == sizes
    assert all("pipeline.corpus: an image of" in line for line in lines)
