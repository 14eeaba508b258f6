"""What a worker's process logs, kept until its driver fetches it. Owns: the bounded queue between the two.
Must not know: how it travels, where it is shown.
"""

from __future__ import annotations

import logging
from collections import deque
from typing import NamedTuple

_LINES = 200


class LogLine(NamedTuple):
    """One record of a worker's log. `level` is Python's number."""

    level: int
    text: str


class Backlog(logging.Handler):
    """Keeps the last records at WARNING and above; a line says how many were lost when there were too many."""

    def __init__(self, lines: int = _LINES) -> None:
        super().__init__(logging.WARNING)
        self._lines: deque[LogLine] = deque(maxlen=lines)
        self._lost = 0

    def emit(self, record: logging.LogRecord) -> None:
        self._lost += len(self._lines) == self._lines.maxlen
        self._lines.append(LogLine(record.levelno, f"{record.name}: {record.getMessage()}"))

    def take(self) -> list[LogLine]:
        """What was logged since the last call, oldest first."""
        self.acquire()  # as `handle` does around `emit`
        try:
            taken, lost = list(self._lines), self._lost
            self._lines.clear()
            self._lost = 0
        finally:
            self.release()
        return [LogLine(logging.WARNING, f"{lost} earlier lines of its log were left out"), *taken] if lost else taken
