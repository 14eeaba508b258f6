"""Inside a job that `pipeline.engine.jobs` has submitted: `python -m pipeline.job CONFIG`. Owns: one `segment` call,
and telling what it does. Must not know: who follows it.

CONFIG is a `SegmentConfig` as JSON. Exit statuses are those of `maskmill segment`.
"""

from __future__ import annotations

import sys
import time

from rich.console import Console

import pipeline
from pipeline.commands.options import INFRASTRUCTURE, INTERRUPTED, OK, USAGE, interruptible
from pipeline.config import SegmentConfig
from pipeline.engine.jobs import error_line, event_line, outcome_line
from pipeline.engine.outcome import Event
from pipeline.errors import MaskmillError, UsageError

#: A log keeps every line for as long as the job lasts.
_PROGRESS_EVERY_S = 2.0


def main() -> int:
    """Prints events, and at last the outcome or the error, one to a line."""
    config = SegmentConfig.model_validate_json(sys.argv[1])
    told_s = -_PROGRESS_EVERY_S
    unsaid: Event | None = None

    def listen(event: Event) -> None:
        nonlocal told_s, unsaid
        if event.kind == "progress" and time.monotonic() - told_s < _PROGRESS_EVERY_S:
            unsaid = event
            return
        if event.kind == "progress":
            told_s, unsaid = time.monotonic(), None
        print(event_line(event), flush=True)

    try:
        with interruptible(Console(stderr=True)) as should_stop:
            outcome = pipeline.segment(config, listen=listen, should_stop=should_stop)
    except MaskmillError as error:
        print(error_line(error), flush=True)
        return USAGE if isinstance(error, UsageError) else INFRASTRUCTURE
    except Exception as error:
        print(error_line(error), flush=True)
        raise
    if unsaid is not None:
        print(event_line(unsaid), flush=True)
    print(outcome_line(outcome), flush=True)
    return INTERRUPTED if outcome.state == "interrupted" else OK


if __name__ == "__main__":
    sys.exit(main())
