"""The fleet: shards over workers until every shard is committed. Owns: who does what, retries, replacement, bisection.
Must not know: where workers live (a Crew does), what a shard holds, leases, planning.

A worker's death costs its uncommitted shards, which start again elsewhere. A shard in whose company a worker died twice
is set aside; at the end it runs alone and, if it kills again, is bisected by probes that write nothing. Then it is
committed once, under its own name, with the images that kill as `crashed_worker` rows.

A shard most of whose images failed for the world's reasons is not committed by its worker. It counts in the breaker: if
that trips, the run stops, and nothing of such shards was written. If it never trips, these shards get a second try when
all others are done, and are committed as they then are.

Longer than most modules: a seat's whole life, and every way in which it ends, must be read together.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, NamedTuple

from pipeline.engine.backlog import LogLine
from pipeline.engine.breaker import WINDOW_IMAGES, Breaker
from pipeline.engine.crew import Crew, Member, WorkerDiedError
from pipeline.engine.messages import Device, Receipt, ShardTask, StreamCounts, WorkerSpec
from pipeline.errors import DeviceLostError, InfrastructureError, StoppedError, WorldFailingError

log = logging.getLogger(__name__)

_IN_FLIGHT = 2
_SEATED_EARLY = 8
_KILLS_TO_SET_ASIDE = 2
_FAILED_STARTS = 5
_BISECTIONS = 3
_POLL_S = 0.25
#: Workers that are asked each second how far they are and what they have logged. A call of a Ray actor costs the driver
#: 0.15 ms: asking 1,000 of them four times a second would take a core.
_ASKED_PER_S = 200
_LAST_WORDS_S = 2.0
_PULSE_TIMEOUT_S = 30.0
_NOBODY_COMES_S = 30.0
_SILENT_S = 1800.0
_NOTHING = StreamCounts(0, 0, 0.0, 0.0)


class FleetProgress(NamedTuple):
    """Where a fleet is. `rows` counts images of committed shards and those already done in shards under way; `tiles`
    and `tiles_done` are those of the images that are in tiles now."""

    rows: int
    errors: int
    actors: int
    busy_s: float
    active_s: float
    tiles: int = 0
    tiles_done: int = 0


class _Seat:
    """A place for one worker: starting, loading, or at work."""

    def __init__(self, member: Member, device: Future[Device]) -> None:
        self.member = member
        self.starting: Future[Any] | None = device
        self.device: Device | None = None
        self.loaded = False
        self.spec: WorkerSpec | None = None
        self.tasks: dict[Future[Receipt], ShardTask] = {}
        self.counts = _NOTHING
        self.counting: Future[StreamCounts] | None = None
        self.logging: Future[list[LogLine]] | None = None
        self.committed_rows = 0
        self.seen = (0, 0.0)
        self.moved_s = time.monotonic()


class Fleet:
    """Runs shards on up to `actors` workers of `crew`, using those that come (a cluster may grow while it works), and
    starting none for which there is no shard.

    Not thread safe. `close` ends the workers; the crew's own end is the caller's.
    """

    def __init__(
        self,
        crew: Crew,
        *,
        actors: int,
        should_stop: Callable[[], bool],
        say: Callable[[str], None] = log.warning,
        relay: Callable[[Device, LogLine], None] = lambda device, line: None,
        drain_timeout_s: float = 30.0,
        breaker_images: int = WINDOW_IMAGES,
    ) -> None:
        self._crew = crew
        self._actors = actors
        self._should_stop = should_stop
        self._say = say
        self._relay = relay
        self._alone_since_s = time.monotonic()
        self._drain_timeout_s = drain_timeout_s
        self._seats: list[_Seat] = []
        self._spec: WorkerSpec | None = None
        self._model: Any = None
        self._failed_starts = 0
        self._most_seats = 0
        self._left = 0
        self._gone_busy_s = 0.0
        self._gone_active_s = 0.0
        self._committed_rows = 0
        self._kills: dict[int, int] = {}
        self._aside: list[ShardTask] = []
        self._doubtful: list[ShardTask] = []
        self._breaker_images = breaker_images
        self._breaker = Breaker(breaker_images)
        self.devices: list[Device] = []

    def first_device(self, *, most: int) -> Device:
        """Starts workers, `most` of them at most, because there may be no work for others, and says what the first to
        come up runs on: what a run must know before it is frozen. Raises StoppedError, InfrastructureError where none
        comes.
        """
        while True:
            self._seat_up_to(min(self._actors, _SEATED_EARLY, max(1, most)))
            for seat in list(self._seats):
                if seat.device is not None:
                    return seat.device
                if seat.starting is not None and seat.starting.done():
                    if seat.starting.exception() is None:
                        device: Device = seat.starting.result()
                        return device
                    self._died(seat, seat.starting.exception())
            if self._should_stop():
                raise StoppedError("stopped before the first worker was up")
            self._wait()

    def first_loaded(self, *, shards: int) -> None:
        """Waits until one worker holds the model that `load` told of: whatever is wrong with it shows here, before any
        run is frozen. Raises what loading raises, StoppedError. Some others, as many as a machine may have and `shards`
        need, come up meanwhile.
        """
        self._seat_up_to(min(self._actors, _SEATED_EARLY, max(1, shards)))
        self._loaded_seat()

    def load(self, spec: WorkerSpec, model: bytes) -> None:
        """Tells which model to run and for which run; workers that are up load it again, others as they come."""
        self._committed_rows = 0
        self._kills.clear()
        self._aside.clear()
        self._doubtful.clear()
        self._breaker = Breaker(self._breaker_images)
        if spec == self._spec and spec is not None:
            return
        self._spec = spec
        self._model = self._crew.share(model)
        for seat in self._seats:
            if seat.loaded:
                self._gone_busy_s += seat.counts.busy_s
                self._gone_active_s += seat.counts.active_s
                seat.loaded, seat.counts, seat.counting, seat.committed_rows = False, _NOTHING, None, 0
                self._tell(seat)

    def run(
        self,
        tasks: Iterator[ShardTask],
        *,
        shards: int,
        on_receipt: Callable[[Receipt], None],
        on_progress: Callable[[FleetProgress], None],
    ) -> None:
        """Does all tasks. `shards`: how many there are, those that a later call brings included; no more workers are
        started. Raises StoppedError after draining, InfrastructureError where the world fails for good.

        Safe to call again with the tasks that are left.
        """
        again: deque[ShardTask] = deque()
        exhausted = False
        self._left = shards
        stopping_since_s: float | None = None
        told_s = asked_s = 0.0
        while True:
            stopping = self._should_stop()
            if stopping and stopping_since_s is None:
                stopping_since_s = time.monotonic()
                if any(seat.tasks for seat in self._seats):
                    self._say(f"stopping: the shards in flight have {self._drain_timeout_s:.0f} s to finish")
            if not stopping:
                exhausted = self._hand_out(tasks, again, exhausted)
            working = any(seat.tasks for seat in self._seats)
            if stopping and stopping_since_s is not None:
                late = time.monotonic() - stopping_since_s > self._drain_timeout_s
                if not working or late:
                    raise StoppedError("stopped on request; what was committed is kept")
            elif exhausted and not again and not working:
                if not self._doubtful:
                    break
                again.extend(task._replace(accept=True) for task in self._doubtful)
                self._doubtful.clear()
                continue
            self._wait()
            for seat in list(self._seats):
                self._settle(seat, again, on_receipt)
            if time.monotonic() - told_s > _POLL_S:
                told_s = time.monotonic()
                if told_s - asked_s > len(self._seats) / _ASKED_PER_S:
                    asked_s = told_s
                    self._count()
                    self._hear()
                self._lose_the_silent(again)
                on_progress(self.progress())
        while self._aside:
            on_receipt(self._commit_without_killers(self._aside.pop()))
        self._hear(_LAST_WORDS_S)
        on_progress(self.progress())

    def progress(self) -> FleetProgress:
        """A snapshot."""
        under_way = sum(max(0, seat.counts.rows - seat.committed_rows) for seat in self._seats if seat.tasks)
        return FleetProgress(
            rows=self._committed_rows + under_way,
            errors=sum(seat.counts.errors for seat in self._seats),
            actors=sum(seat.loaded for seat in self._seats),
            busy_s=self._gone_busy_s + sum(seat.counts.busy_s for seat in self._seats),
            active_s=self._gone_active_s + sum(seat.counts.active_s for seat in self._seats),
            tiles=sum(seat.counts.tiles for seat in self._seats if seat.tasks),
            tiles_done=sum(seat.counts.tiles_done for seat in self._seats if seat.tasks),
        )

    def close(self) -> None:
        """Ends all workers at once, and waits for none. Whatever they were about to commit is either there or not: both
        are fine. What is asked of it afterwards starts new ones."""
        for seat in self._seats:
            self._gone_busy_s += seat.counts.busy_s
            self._gone_active_s += seat.counts.active_s
            seat.member.stop()
        self._seats = []

    # ── one turn ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _hand_out(self, tasks: Iterator[ShardTask], again: deque[ShardTask], exhausted: bool) -> bool:
        """Gives tasks to workers with room, starting workers while there is work for them."""
        if not exhausted or again:
            at_work = sum(1 for seat in self._seats if seat.tasks)
            # One at least: that there are no more tasks is found by asking for one.
            self._seat_up_to(min(self._actors, max(1, at_work + self._left + len(again))))
        for turn in range(_IN_FLIGHT):
            for seat in self._seats:
                if not seat.loaded or len(seat.tasks) > turn:
                    continue
                task = again.popleft() if again else self._next(tasks)
                if task is None:
                    return True
                seat.tasks[seat.member.call("run", task)] = task
        return exhausted

    def _next(self, tasks: Iterator[ShardTask]) -> ShardTask | None:
        task = next(tasks, None)
        self._left = max(0, self._left - 1) if task is not None else 0
        return task

    def _seat_up_to(self, count: int) -> None:
        while len(self._seats) < count:
            member = self._crew.start()
            self._seats.append(_Seat(member, member.call("describe")))
        self._most_seats = max(self._most_seats, len(self._seats))

    def _wait(self) -> None:
        futures: list[Future[Any]] = [seat.starting for seat in self._seats if seat.starting is not None]
        for seat in self._seats:
            futures.extend(seat.tasks)
        if futures:
            wait(futures, timeout=_POLL_S, return_when=FIRST_COMPLETED)
        else:
            time.sleep(_POLL_S)
        self._say_when_nobody_comes()

    def _say_when_nobody_comes(self) -> None:
        now_s = time.monotonic()
        if any(seat.loaded for seat in self._seats) or not self._seats:
            self._alone_since_s = now_s
        elif now_s - self._alone_since_s > _NOBODY_COMES_S:
            self._alone_since_s = now_s
            self._say(
                f"no worker has come up for {_NOBODY_COMES_S:.0f} s: the machine may be busy, or the cluster growing, "
                "or too small for what one worker asks for (--gpus-per-actor, --threads)"
            )

    def _settle(self, seat: _Seat, again: deque[ShardTask], on_receipt: Callable[[Receipt], None]) -> None:
        if seat.starting is not None and seat.starting.done():
            self._started(seat)
        done = [future for future in seat.tasks if future.done()]
        for future in [future for future in done if future.exception() is None]:
            task, receipt = seat.tasks.pop(future), future.result()
            self._judge(task, receipt)
            if receipt.doubtful:
                seat.counts = receipt.counts
                self._doubtful.append(task)
            else:
                self._receive(seat, receipt)
                on_receipt(receipt)
        for future in [future for future in done if future.exception() is not None]:
            error = future.exception()
            if isinstance(error, (WorkerDiedError, DeviceLostError)):
                self._lose(seat, error, again)
                return
            else:
                assert error is not None
                raise error

    def _judge(self, task: ShardTask, receipt: Receipt) -> None:
        """Raises WorldFailingError where the last outcomes of all workers together say so."""
        if not (task.accept or task.probe):
            self._breaker.note(receipt.rows, receipt.world_failures, receipt.world_example)
            if self._breaker.tripped:
                raise WorldFailingError.like(self._breaker.example)

    def _lose(self, seat: _Seat, error: BaseException, again: deque[ShardTask]) -> None:
        """Takes a dead worker's seat away, and its shards back."""
        lost = list(seat.tasks.values())
        self._died(seat, error)
        for task in lost:
            self._kills[task.ordinal] = self._kills.get(task.ordinal, 0) + 1
            if self._kills[task.ordinal] >= _KILLS_TO_SET_ASIDE:
                log.warning("shard %d has seen two workers die: set aside to be bisected", task.ordinal)
                self._aside.append(task)
            else:
                again.append(task)

    def _lose_the_silent(self, again: deque[ShardTask]) -> None:
        """A worker that is alive and makes no row and answers no batch for a long time (a device call that never
        returns) is replaced."""
        now_s = time.monotonic()
        for seat in list(self._seats):
            # A single image in thousands of tiles makes no row for long, but its batches come back.
            seen = seat.counts.rows, seat.counts.busy_s
            if seen != seat.seen or not seat.tasks:
                seat.seen, seat.moved_s = seen, now_s
            elif now_s - seat.moved_s > _SILENT_S:
                self._say(f"a worker has made no row for {_SILENT_S:.0f} s and is replaced")
                self._lose(seat, WorkerDiedError("it made no row any more"), again)

    def _started(self, seat: _Seat) -> None:
        starting = seat.starting
        assert starting is not None
        error = starting.exception()
        if error is not None:
            self._died(seat, error)
        elif seat.device is None:
            seat.device = starting.result()
            self.devices.append(seat.device)
            self._tell(seat)
        elif seat.spec is not self._spec:
            # It was still loading for one run when the next began.
            self._tell(seat)
        else:
            seat.starting = None
            seat.loaded = True
            self._failed_starts = 0

    def _tell(self, seat: _Seat) -> None:
        seat.spec = self._spec
        seat.starting = seat.member.call("load", self._spec, self._model)

    def _receive(self, seat: _Seat, receipt: Receipt) -> None:
        seat.counts = receipt.counts
        seat.committed_rows += receipt.rows
        self._committed_rows += receipt.rows

    def _died(self, seat: _Seat, error: BaseException | None) -> None:
        """Takes a dead worker's seat away. A worker that cannot even start is the world failing, after a few tries."""
        log.warning("a worker is gone: %s", error)
        self._seats.remove(seat)
        self._gone_busy_s += seat.counts.busy_s
        self._gone_active_s += seat.counts.active_s
        seat.member.stop()
        if not seat.loaded:
            if not isinstance(error, (WorkerDiedError, DeviceLostError)):
                assert error is not None
                raise error
            self._failed_starts += 1
            # Of workers that come up together, one node takes all along.
            if self._failed_starts >= _FAILED_STARTS * min(self._most_seats, _SEATED_EARLY):
                raise InfrastructureError(
                    f"{self._failed_starts} workers in a row died before they were ready; the last: {error}"
                ) from error

    def _count(self) -> None:
        for seat in self._seats:
            if seat.counting is not None and seat.counting.done():
                if seat.counting.exception() is None and seat.counting.result().rows >= seat.counts.rows:
                    seat.counts = seat.counting.result()
                seat.counting = None
            if seat.loaded and seat.counting is None and seat.tasks:
                seat.counting = seat.member.call("counts")

    def _hear(self, patience_s: float = 0.0) -> None:
        """Hands on what the workers have logged. With `patience_s`, the answers to a last question too."""
        for seat in self._seats:
            if seat.logging is not None and seat.logging.done():
                heard = seat.logging
                seat.logging = None
                if heard.exception() is None and seat.device is not None:
                    for line in heard.result():
                        self._relay(seat.device, line)
            if seat.loaded and seat.logging is None:
                seat.logging = seat.member.call("logged")
        if patience_s:
            wait([seat.logging for seat in self._seats if seat.logging is not None], timeout=patience_s)
            self._hear()

    # ── bisection ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _commit_without_killers(self, task: ShardTask) -> Receipt:
        """Most shards that are set aside were only beside the one that kills: alone, they go through at the first
        try."""
        killers: set[int] = set(task.killers)
        for attempt in range(_BISECTIONS + 1):
            if attempt:
                killers |= self._killers(task, killers)
            receipt = self._alone(task._replace(killers=frozenset(killers), accept=True))
            if receipt is not None:
                return receipt
        log.error("shard %d kills its workers in no single image: all its images are crashed_worker", task.ordinal)
        receipt = self._alone(task._replace(killers=frozenset(range(len(task.refs))), accept=True))
        if receipt is None:
            raise InfrastructureError(f"shard {task.ordinal} kills its worker without any image: see the workers' log")
        return receipt

    def _killers(self, task: ShardTask, known: set[int]) -> set[int]:
        """Positions of images in whose sole company a worker dies twice, found by halving."""
        found: set[int] = set()
        # The whole is known to kill; its halves are the first question. A span of nothing, or of known killers, asks
        # none.
        spans = [(0, len(task.refs) // 2), (len(task.refs) // 2, len(task.refs))]
        while spans:
            start, stop = spans.pop()
            if all(index in known for index in range(start, stop)):
                continue
            probe = task._replace(
                refs=task.refs.slice(start, stop - start),
                probe=True,
                killers=frozenset(index - start for index in known if start <= index < stop),
            )
            if self._alone(probe) is not None:
                continue
            if stop - start > 1:
                middle = (start + stop) // 2
                spans += [(start, middle), (middle, stop)]
            elif self._alone(probe) is None:
                log.warning("image %r kills its worker", task.refs["uri"][start].as_py())
                found.add(start)
        return found

    def _alone(self, task: ShardTask) -> Receipt | None:
        """Runs one task with nothing beside it; None where the worker died of it."""
        while True:
            seat = self._loaded_seat()
            # A worker that was lost while it had nothing to do must not be held against this task.
            pulse = seat.member.call("counts")
            wait([pulse], timeout=_PULSE_TIMEOUT_S)
            if pulse.done() and pulse.exception() is None:
                break
            self._died(seat, WorkerDiedError("it does not answer"))
        future = seat.member.call("run", task)
        while not future.done():
            wait([future], timeout=_POLL_S)
            if self._should_stop():
                raise StoppedError("stopped on request; what was committed is kept")
        error = future.exception()
        if isinstance(error, (WorkerDiedError, DeviceLostError)):
            self._died(seat, error)
            return None
        receipt = future.result()
        if not task.probe:
            self._receive(seat, receipt)
        return receipt

    def _loaded_seat(self) -> _Seat:
        """Waits for a worker that is up and holds the model."""
        while True:
            if self._should_stop():
                raise StoppedError("stopped on request; what was committed is kept")
            self._seat_up_to(1)
            for seat in self._seats:
                if seat.loaded:
                    return seat
            self._wait()
            for seat in list(self._seats):
                if seat.starting is not None and seat.starting.done():
                    self._started(seat)
