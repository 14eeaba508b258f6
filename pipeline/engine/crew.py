"""Where workers live: in this process, in processes of this machine. Owns: starting them, calling them, noticing
their death. Must not know: shards' order, retries, Ray (`ray_crew` is the same thing on a cluster).

A call is answered by a future. A worker that dies fails all its calls with WorkerDiedError.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection, Pipe
from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa

from pipeline.engine.backlog import Backlog, LogLine
from pipeline.engine.messages import Device, Receipt, ShardTask, StreamCounts, WorkerSpec
from pipeline.errors import InfrastructureError, UsageError
from pipeline.machine import cores, gpu_count, memory_bytes

if TYPE_CHECKING:
    from pipeline.engine.worker import Worker

log = logging.getLogger(__name__)

CALLS_AT_ONCE = 8
#: A worker takes 0.6 GiB before it has a model or an image.
_LEAST_WORKER_BYTES = 1 << 30


class WorkerDiedError(InfrastructureError):
    """A worker's process is gone. What it had not committed is to be done again."""


class Member(Protocol):
    """One worker, wherever it is. `call` never blocks and never raises: the future carries the outcome. `stop` ends it,
    in the middle of whatever it does; who closes its crew waits until it is gone."""

    def call(self, method: str, *args: Any) -> Future[Any]: ...
    def stop(self) -> None: ...


class Crew(Protocol):
    """A place where workers can be started."""

    @property
    def label(self) -> str: ...
    @property
    def default_actors(self) -> int: ...
    @property
    def threads(self) -> int: ...
    @property
    def has_gpus(self) -> bool: ...
    def start(self) -> Member: ...
    def share(self, model: bytes) -> Any: ...
    def close(self) -> None: ...


class Watch(Protocol):
    """Who is told what a worker does, as it does it, from several threads (`telemetry`)."""

    def begin(self, spec: WorkerSpec) -> None: ...
    def take(self, task: ShardTask) -> None: ...
    def rows(self, rows: Sequence[Mapping[str, Any]]) -> None: ...
    def look(self, counts: StreamCounts) -> None: ...


class Host:
    """What runs in a worker's process, whatever started it. Methods may be called from several threads.

    `owns_process`: this process is the worker's own. What it logs is kept for `logged`, its garbage is not collected
    while it starts, and Arrow takes memory from where everybody takes it (docs/decisions/0021). `watch` makes, in this
    process, who is told what it does.
    """

    def __init__(self, *, owns_process: bool = False, watch: Callable[[], Watch] | None = None) -> None:
        self._worker: Worker | None = None
        self._watch = watch() if watch else None
        self._backlog: Backlog | None = None
        self._owns_process = owns_process
        if owns_process:
            pa.set_memory_pool(pa.system_memory_pool())
            self._backlog = Backlog()
            logging.getLogger().addHandler(self._backlog)

    def describe(self) -> Device:
        """The device of this process."""
        with self._uncollected():
            from pipeline.engine.worker import describe_device

            return describe_device()

    def load(self, spec: WorkerSpec, model: bytes) -> None:
        """Makes the Segmenter and its stream, in place of those of an earlier run."""
        with self._uncollected():
            from pipeline.engine.worker import Worker  # here, because a driver hosts none and needs no PyTorch

            self.close()
            self._worker = None
            if self._watch:
                self._watch.begin(spec)
                self._worker = Worker(spec, model, on_rows=self._watch.rows)
            else:
                self._worker = Worker(spec, model)

    def run(self, task: ShardTask) -> Receipt:
        """See Worker.run."""
        if self._worker is None:
            raise InfrastructureError("a worker was given a shard before its model")
        if self._watch:
            self._watch.take(task)
        return self._worker.run(task)

    def counts(self) -> StreamCounts:
        """Zeroes until a model is there."""
        counts = self._worker.counts() if self._worker else StreamCounts(0, 0, 0.0, 0.0)
        if self._watch:
            self._watch.look(counts)
        return counts

    def ask(self, function: Callable[..., Any], *args: Any) -> Any:
        """What a function of some module answers in this process."""
        return function(*args)

    def logged(self) -> list[LogLine]:
        """What this process has logged since the last call."""
        return self._backlog.take() if self._backlog else []

    def close(self) -> None:
        """Ends the stream."""
        if self._worker:
            self._worker.close()

    @contextlib.contextmanager
    def _uncollected(self) -> Iterator[None]:
        """Imports make half a million objects that stay. To look through them for garbage, again and again while they
        come, takes a worker half a second of its start, and 0.2 s in the middle of a shard later."""
        if not self._owns_process or self._worker:  # a second model takes the first one's place, which is garbage
            yield
            return
        gc.disable()
        try:
            yield
        finally:
            gc.freeze()
            gc.enable()


class InlineMember:
    """A worker in this very process: for stores that no other process can see, and for tests."""

    def __init__(self, host: Host | None = None) -> None:
        self._host = host or Host()
        self._pool = ThreadPoolExecutor(CALLS_AT_ONCE, "worker")

    def call(self, method: str, *args: Any) -> Future[Any]:
        return self._pool.submit(getattr(self._host, method), *args)

    def stop(self) -> None:
        self._host.close()
        self._pool.shutdown(wait=True, cancel_futures=True)


class InlineCrew:
    """Workers in this process: no isolation from an image that kills it."""

    label = "in this process"
    default_actors = 1

    def __init__(self, *, actors: int | None = None, threads: int | None = None) -> None:
        self.has_gpus = gpu_count() > 0
        self.threads = threads or max(1, cores() // (actors or 1))
        self._members: list[InlineMember] = []

    def start(self) -> InlineMember:
        member = InlineMember()
        self._members.append(member)
        return member

    def share(self, model: bytes) -> bytes:
        return model

    def close(self) -> None:
        for member in self._members:
            member.stop()


class ProcessMember:
    """A worker in a process of its own, at the other end of a socket pair. When the parent dies, the child sees the
    end and exits."""

    def __init__(self) -> None:
        mine, theirs = Pipe(duplex=True)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.engine.crew", str(theirs.fileno())],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            process_group=0,
        )
        theirs.close()
        self._connection = mine
        self._calls: dict[int, Future[Any]] = {}
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._dead = False
        threading.Thread(target=self._listen, name="worker-replies", daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def call(self, method: str, *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        with self._lock:
            if self._dead:
                future.set_exception(WorkerDiedError("the worker process is gone"))
                return future
            number = next(self._numbers)
            self._calls[number] = future
            try:
                self._connection.send((number, method, args))
            except OSError:
                del self._calls[number]
                future.set_exception(WorkerDiedError("the worker process is gone"))
        return future

    def stop(self) -> None:
        self._process.kill()

    def wait(self) -> None:
        """Until the process is gone: to give a gigabyte back takes 0.05 s."""
        self._process.wait()

    def _listen(self) -> None:
        try:
            while True:
                number, answer, error = self._connection.recv()
                with self._lock:
                    future = self._calls.pop(number)
                if error is None:
                    future.set_result(answer)
                else:
                    future.set_exception(error)
        except (EOFError, OSError):
            log.debug("the worker process %d is gone", self.pid)
        except Exception:  # a reply that cannot be read: this worker is of no use any more
            log.exception("a reply of worker process %d could not be read", self.pid)
            self._process.kill()
        self._process.wait()
        code = self._process.returncode
        reason = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        with self._lock:
            self._dead = True
            lost, self._calls = list(self._calls.values()), {}
        for future in lost:
            future.set_exception(WorkerDiedError(f"the worker process {self.pid} ended by {reason}"))


class LocalCrew:
    """Workers in processes of this machine. An image that kills its process kills only that.

    By default one worker with a GPU, or one for each core and 4 GiB of memory: on a CPU, workers of one thread each do
    a quarter more than one worker with all threads, and their answers do not depend on the number of cores.
    """

    label = "local processes"

    def __init__(self, *, actors: int | None = None, threads: int | None = None) -> None:
        self.has_gpus = gpu_count() > 0
        self.default_actors = 1 if self.has_gpus else workers_on_cpu(cores() // (threads or 1), memory_bytes())
        self.threads = threads or max(1, cores() // (actors or self.default_actors))
        self._members: list[ProcessMember] = []

    def start(self) -> ProcessMember:
        member = ProcessMember()
        self._members.append(member)
        return member

    def share(self, model: bytes) -> bytes:
        return model

    def close(self) -> None:
        stop_all(self._members)


def stop_all(members: Sequence[ProcessMember]) -> None:
    """Ends them all at once, and waits until they are gone."""
    for member in members:
        member.stop()
    for member in members:
        member.wait()


def workers_on_cpu(places: int, room_bytes: float) -> int:
    """How many workers a machine without a GPU has by default: as many as it has room for, with 4 GiB for each."""
    return max(1, min(places, int(room_bytes // (4 << 30))))


def check_local_actors(actors: int) -> None:
    """Raises UsageError where this machine's memory cannot hold so many workers, whatever they do."""
    most = max(1, memory_bytes() // _LEAST_WORKER_BYTES)
    if actors > most:
        raise UsageError(
            f"--actors {actors}: {memory_bytes() / (1 << 30):.1f} GiB of memory may be used here, and each "
            f"worker is reckoned to take {_LEAST_WORKER_BYTES >> 30}: give {most} at most, or use a cluster "
            "(--engine ray)"
        )


def serve(connection: Connection, host: Host) -> None:
    """Answers calls until the other end is gone, then ends the process at once: nobody is left to commit for."""
    sending = threading.Lock()

    def answer(number: int, method: str, args: tuple[Any, ...]) -> None:
        reply: tuple[int, Any, BaseException | None]
        try:
            bound: Callable[..., Any] = getattr(host, method)
            reply = (number, bound(*args), None)
            packed = ForkingPickler.dumps(reply)
        except BaseException as error:  # noqa: BLE001 - the per-actor boundary: the caller gets it
            packed = ForkingPickler.dumps((number, None, _portable(error)))
        with sending, contextlib.suppress(OSError):
            connection.send_bytes(packed)

    with ThreadPoolExecutor(CALLS_AT_ONCE, "call") as pool:
        while True:
            try:
                number, method, args = connection.recv()
            except (EOFError, OSError):
                os._exit(0)
            pool.submit(answer, number, method, args)


def _portable(error: BaseException) -> BaseException:
    """`error` itself where it survives the trip between processes, else its text."""
    import pickle

    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - re-raised by the caller as text
        return InfrastructureError(f"{type(error).__name__}: {error}")
    return error


def main() -> None:
    """Entry of a worker process: `python -m pipeline.engine.crew FD`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    serve(Connection(int(sys.argv[1])), Host(owns_process=True))


if __name__ == "__main__":
    main()
