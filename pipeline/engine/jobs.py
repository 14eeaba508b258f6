"""A `segment` call as a job of a Ray cluster that is reached through its Jobs API. Owns: a job's name, submitting it or
finding it, following it, stopping it; the lines in which it speaks. Must not know: what the call does, Prefect.

`pipeline.job` is the other end. A job is named after its command: while one is running, the same command follows it
instead of starting a second one, whoever asks. So whoever followed may die and come back.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import queue
import shlex
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any

from pipeline import errors
from pipeline.config import SegmentConfig
from pipeline.engine.fleet import FleetProgress
from pipeline.engine.outcome import Event, Listener, Outcome
from pipeline.engine.ray_crew import check_address
from pipeline.errors import InfrastructureError, MaskmillError, UsageError

log = logging.getLogger(__name__)

_PREFIX = "@maskmill "
_RAY_ADDRESSES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
_POLL_S = 0.5
_STATUS_EVERY_S = 2.0
_AWAY_TIMEOUT_S = 120.0
#: A cluster that has just come up, or is busy, answers while it has nobody to start a job; then it says so.
_NO_AGENT = "No available agent"
_AGENT_TIMEOUT_S = 60.0
#: What a job needs, beside its drain, to write down what it came to.
_CLOSE_TIMEOUT_S = 5.0


def segment(
    config: SegmentConfig, address: str, *, listen: Listener, should_stop: Callable[[], bool] = lambda: False
) -> Outcome:
    """`pipeline.segment` on the cluster whose Jobs API is at `address` (`http://HOST:8265`), or what a running job of
    the same command comes to.

    Events are those of the call, from the job's beginning; the rest of its log comes as events `log`. Once
    `should_stop` says so, the job is stopped: shards in flight have `config.drain_timeout_s`. Where this process dies,
    the job goes on. Raises what the call raises, UsageError for an address that is none, InfrastructureError where the
    cluster cannot be reached or the job ends without an answer.
    """
    client = _client(address)
    name, is_new = _submit_or_find(client, config)
    listen(Event("note", f"{'submitted' if is_new else 'following the running'} job {name} at {address}"))
    return _Following(client, name, listen, should_stop).outcome()


def check_jobs_address(address: str) -> None:
    """Raises UsageError for what is no address, InfrastructureError where nobody answers or no Jobs API does."""
    _client(address)


def job_prefix(config: SegmentConfig) -> str:
    """What the names of this command's jobs begin with. The date is no part of it: last night's job that is still
    running does tonight's work too."""
    command = config.model_dump(mode="json", exclude={"run_date", "wait", "drain_timeout_s"})
    return f"maskmill-{hashlib.sha256(json.dumps(command, sort_keys=True).encode()).hexdigest()[:12]}-"


def event_line(event: Event) -> str:
    """As the job prints it."""
    body = event._asdict() | {"progress": event.progress._asdict() if event.progress else None}
    return _PREFIX + json.dumps({"event": body})


def outcome_line(outcome: Outcome) -> str:
    """The last line of a job that came to something."""
    return _PREFIX + json.dumps({"outcome": outcome.model_dump(mode="json")})


def error_line(error: Exception) -> str:
    """The last line of a job that did not."""
    return _PREFIX + json.dumps({"error": {"kind": type(error).__name__, "text": str(error)}})


def _client(address: str) -> Any:
    parts = urllib.parse.urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"the address of a Jobs API is http://HOST:8265, not {address!r}")
    check_address(f"{parts.hostname}:{parts.port or (443 if parts.scheme == 'https' else 80)}")
    try:
        from ray.job_submission import JobSubmissionClient
    except ImportError as error:
        raise UsageError("the Jobs API needs Ray: pip install 'maskmill[ray]'") from error
    # Ray takes these for the address, whatever it is given, and `make up` and clusters set one.
    hidden = {name: os.environ.pop(name) for name in _RAY_ADDRESSES if name in os.environ}
    try:
        return JobSubmissionClient(address)
    except (OSError, RuntimeError, ValueError) as error:
        raise InfrastructureError(f"no Ray Jobs API at {address}: {error}") from error
    finally:
        os.environ.update(hidden)


def _submit_or_find(client: Any, config: SegmentConfig) -> tuple[str, bool]:
    """(name of the job, whether it was made here)."""
    prefix = job_prefix(config)
    inside = config.model_copy(update={"engine": "ray", "ray_address": None})
    given_up_s = time.monotonic() + _AGENT_TIMEOUT_S
    taken = 0
    while taken < 3:
        try:
            ours = {
                job.submission_id: job for job in client.list_jobs() if (job.submission_id or "").startswith(prefix)
            }
            running = [name for name, job in ours.items() if not job.status.is_terminal()]
            if running:
                return sorted(running)[-1], False
            name = f"{prefix}{max((int(name.removeprefix(prefix)) for name in ours), default=0) + 1}"
            client.submit_job(
                entrypoint=f"python -m pipeline.job {shlex.quote(inside.model_dump_json())}",
                submission_id=name,
                runtime_env={
                    "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(round(config.drain_timeout_s + _CLOSE_TIMEOUT_S))}
                },
                metadata={"source": config.source, "dest": config.dest, "model": config.model},
            )
            return name, True
        except (OSError, RuntimeError) as error:
            if "already exists" in str(error):  # another caller's, a moment ago
                taken += 1
            elif _NO_AGENT in str(error) and time.monotonic() < given_up_s:
                time.sleep(_POLL_S)
            else:
                raise InfrastructureError(f"the Ray cluster takes no job: {error}") from error
    raise InfrastructureError("the Ray cluster takes no job: its name was taken three times")


class _Following:
    """One job, watched from here until it ends."""

    def __init__(self, client: Any, name: str, listen: Listener, should_stop: Callable[[], bool]) -> None:
        self._client = client
        self._name = name
        self._listen = listen
        self._should_stop = should_stop
        self._stopped = False
        self._outcome: Outcome | None = None
        self._error: MaskmillError | None = None
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._seen = 0

    def outcome(self) -> Outcome:
        status = None
        while status is None or not status.is_terminal():
            self._tail()
            # The log ends when the job does, or when the connection breaks; then it is read again, past what was seen.
            for line in self._until_it_ends():
                self._take(line)
            status = self._status()
        if self._outcome is not None:
            return self._outcome
        if self._error is not None:
            raise self._error
        message = self._client.get_job_info(self._name).message or ""
        raise InfrastructureError(f"job {self._name} ended as {status} without an answer: {message[-2000:]}")

    def _tail(self) -> None:
        skip = self._seen

        async def read() -> None:
            number, rest = 0, ""
            async for text in self._client.tail_job_logs(self._name):
                *lines, rest = (rest + text).split("\n")
                for line in lines:
                    number += 1
                    if number > skip:
                        self._lines.put(line)

        def run() -> None:
            try:
                asyncio.run(read())
            except Exception as error:  # noqa: BLE001 - of several libraries; the job's status tells what it means
                log.info("the log of job %s broke off: %s", self._name, error)
            self._lines.put(None)

        threading.Thread(target=run, name="job-log", daemon=True).start()

    def _until_it_ends(self) -> Iterator[str]:
        while True:
            if self._should_stop() and not self._stopped:
                self._stopped = True
                try:
                    self._client.stop_job(self._name)
                except (OSError, RuntimeError) as error:
                    log.warning("job %s could not be told to stop: %s", self._name, error)
            try:
                line = self._lines.get(timeout=_POLL_S)
            except queue.Empty:
                continue
            if line is None:
                return
            self._seen += 1
            yield line

    def _take(self, line: str) -> None:
        if not line.startswith(_PREFIX):
            if line.strip():
                self._listen(Event("log", f"job: {line.rstrip()}", level=logging.INFO))
            return
        said = json.loads(line.removeprefix(_PREFIX))
        if "outcome" in said:
            self._outcome = Outcome.model_validate(said["outcome"])
        elif "error" in said:
            self._error = _as_raised(**said["error"])
        else:
            event = said["event"]
            progress = FleetProgress(**event["progress"]) if event["progress"] else None
            self._listen(Event(**(event | {"progress": progress})))

    def _status(self) -> Any:
        """Patient: a head that restarts is away for a while."""
        deadline_s = time.monotonic() + _AWAY_TIMEOUT_S
        while True:
            time.sleep(_STATUS_EVERY_S if self._error is None and self._outcome is None else _POLL_S)
            try:
                return self._client.get_job_status(self._name)
            except (OSError, RuntimeError) as error:
                if time.monotonic() > deadline_s or self._should_stop():
                    raise InfrastructureError(
                        f"the Ray cluster of job {self._name} does not answer any more ({error}); if the job is still "
                        "running, the same command follows it"
                    ) from error


def _as_raised(kind: str, text: str) -> MaskmillError:
    raised = getattr(errors, kind, None)
    if kind == "StorageError":
        return InfrastructureError(text)
    if isinstance(raised, type) and issubclass(raised, MaskmillError):
        return raised(text)
    return MaskmillError(f"{kind} in the job, whose log has the traceback: {text}")
