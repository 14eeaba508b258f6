"""One pipeline call inside a Prefect task. Owns: stopping it when Prefect cancels, following it while it runs.
Must not know: what the call does, what is shown of it.
"""

from __future__ import annotations

import contextvars
import logging
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field

import pipeline
from flows.artifacts import LiveProgress
from flows.logs import forwarded
from pipeline.config import SegmentConfig
from pipeline.corpus.manifest import Corpus
from pipeline.engine import jobs
from pipeline.engine.outcome import Event, Outcome

#: Prefect kills a cancelled run's process 30 s after it asked, and Ray takes its time to end.
DRAIN_TIMEOUT_S = 18.0
_CLOSE_TIMEOUT_S = 8.0
_POLL_S = 0.5

T = TypeVar("T")
Listen = Callable[[Any], None]
ShouldStop = Callable[[], bool]


class Place(BaseModel):
    """Where a call is driven from, beside what `SegmentConfig` says."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ray_jobs_address: str | None = Field(
        None,
        description="A Ray cluster's Jobs API, http://HOST:8265: the run is a job there, which the flow follows.",
    )


def drive(
    config: SegmentConfig, corpus: Corpus, logger: Any, progress: LiveProgress, place: Place | None = None
) -> Outcome:
    """`pipeline.segment`, in a thread beside this one, so that Prefect's signal reaches this one at once. Where `place`
    names a Jobs API it is a job there, which reads SOURCE itself.

    On that signal, as on any exception here, shards in flight have up to DRAIN_TIMEOUT_S to be committed; then it goes
    on. Raises what the call raises.
    """
    config = config.model_copy(update={"drain_timeout_s": min(config.drain_timeout_s, DRAIN_TIMEOUT_S)})

    def call(listen: Listen, should_stop: ShouldStop) -> Outcome:
        if place and place.ray_jobs_address:
            return jobs.segment(config, place.ray_jobs_address, listen=listen, should_stop=should_stop)
        return pipeline.segment(config, listen=listen, should_stop=should_stop, corpus=corpus)

    def line(event: Event) -> tuple[int, str] | None:
        if event.kind != "progress":
            return event_line(event)
        progress.now = event
        return None

    return follow(call, logger, line=line, tick=progress.publish, drain_timeout_s=config.drain_timeout_s)


def event_line(event: Event) -> tuple[int, str] | None:
    """Level and text of what the engine says; None for progress."""
    if event.kind == "progress":
        return None
    return {"note": logging.INFO, "warning": logging.WARNING}.get(event.kind, event.level), event.text


def follow(
    call: Callable[[Listen, ShouldStop], T],
    logger: Any,
    *,
    line: Callable[[Any], tuple[int, str] | None],
    tick: Callable[[], None] = lambda: None,
    drain_timeout_s: float = DRAIN_TIMEOUT_S,
) -> T:
    """`call(listen, should_stop)` in a thread beside this one. What it says goes to `logger` as `line` has it, at most
    so many lines in a while; `tick` is called every half second.

    On an exception here, such as Prefect's signal, the call is asked to stop and has `drain_timeout_s`; then it goes
    on. Raises what the call raises.
    """
    stop = threading.Event()
    with forwarded(logger) as meter:

        def listen(event: Any) -> None:
            said = line(event)
            if said is not None:
                meter.log(*said)

        done = _in_thread(lambda: call(listen, stop.is_set))
        try:
            while not done.done():
                wait([done], timeout=_POLL_S)
                tick()
        except BaseException as reason:
            logger.warning("%s: the run is being stopped; another one continues it", type(reason).__name__)
            stop.set()
            wait([done], timeout=drain_timeout_s + _CLOSE_TIMEOUT_S)
            raise
        return done.result()


def _in_thread(work: Callable[[], T]) -> Future[T]:
    """A daemon: a process that is told to end does not wait for it."""
    done: Future[T] = Future()

    def run() -> None:
        # Prefect's SIGTERM goes to the whole process group. What this thread starts inherits the mask: a Ray cluster in
        # this process then lives until the run is drained and ends it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            done.set_result(work())
        except BaseException as error:  # noqa: BLE001 - the caller gets it
            done.set_exception(error)

    threading.Thread(target=contextvars.copy_context().run, args=(run,), name="segment", daemon=True).start()
    return done
