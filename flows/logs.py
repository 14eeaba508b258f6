"""What the pipeline and its workers log, in a flow run's log. Owns: how much of it. Must not know: who wrote it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_LINES = 30
_PERIOD_S = 30.0
_SOURCES = ("pipeline", "models")


class Meter:
    """Hands lines on to a logger, at most `lines` in `period_s`, and then says how many it left out.

    May be called from several threads. `close` says what is still unsaid.
    """

    def __init__(self, logger: Any, *, lines: int = _LINES, period_s: float = _PERIOD_S) -> None:
        self._logger = logger
        self._lines = lines
        self._period_s = period_s
        self._since_s = time.monotonic()
        self._told = 0
        self._left_out = 0
        self._lock = threading.Lock()

    def log(self, level: int, text: str) -> None:
        """Levels are Python's numbers."""
        with self._lock:
            if time.monotonic() - self._since_s > self._period_s:
                self._say_left_out()
                self._since_s, self._told = time.monotonic(), 0
            if self._told < self._lines:
                self._told += 1
                self._logger.log(level, "%s", text)
            else:
                self._left_out += 1

    def close(self) -> None:
        with self._lock:
            self._say_left_out()

    def _say_left_out(self) -> None:
        if self._left_out:
            self._logger.warning("%d more lines were left out", self._left_out)
            self._left_out = 0


class _Forwarder(logging.Handler):
    def __init__(self, meter: Meter) -> None:
        super().__init__(logging.WARNING)
        self._meter = meter

    def emit(self, record: logging.LogRecord) -> None:
        self._meter.log(record.levelno, f"{record.name}: {record.getMessage()}")


@contextmanager
def forwarded(logger: Any) -> Iterator[Meter]:
    """While it lasts, warnings and errors of the pipeline go to `logger` too, at the meter's rate."""
    meter = Meter(logger)
    handler = _Forwarder(meter)
    for name in _SOURCES:
        logging.getLogger(name).addHandler(handler)
    try:
        yield meter
    finally:
        for name in _SOURCES:
            logging.getLogger(name).removeHandler(handler)
        meter.close()
