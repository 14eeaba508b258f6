"""Training by several workers, on any nodes of a Ray cluster, through Ray Train. Owns: the cluster, the workers'
resources, what the driver hears of them, which failures are tried again. Must not know: what a worker does.

Ray's own checkpoints are not used: workers that start again find ours, as a new command would.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pipeline.engine.messages import code_digest
from pipeline.engine.ray_crew import check_address, join_cluster, ray_address
from pipeline.errors import InfrastructureError, MaskmillError, StoppedError, UsageError
from pipeline.learning.job import Job, Summary, do_job
from pipeline.storage import normalize_uri
from pipeline.table.scratch import scratch_folder

_POLL_S = 0.5
_STOP_PATIENCE_S = 60.0
#: Seconds after which a worker that waits for another gives up; measuring is done by one while the others wait.
_SILENT_S = 7200


def train_on_ray(job: Job, *, say: Callable[[Any], None], should_stop: Callable[[], bool]) -> Summary:
    """Does the job with `job.config.workers` workers. Workers and nodes that die are replaced, up to `max_failures`
    times, and go on from the last checkpoint.

    Raises what `do_job` does, UsageError where the cluster cannot do it, InfrastructureError where it fails for good.
    """
    try:
        import ray
    except ImportError as error:
        raise UsageError("several workers need Ray: pip install 'maskmill[ray]', or train with one") from error
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    with _cluster(ray, ray_address(job.config.ray_address)):
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        use_gpu, threads = _resources(ray, job)
        config = job.config.model_copy(update={"threads": threads})
        # Where the driver is: with any other node the run could go on.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        remote: Any = ray.remote
        mailbox = remote(num_cpus=0, scheduling_strategy=here)(_Mailbox).remote()
        told = {"job": job.model_copy(update={"config": config}).model_dump(mode="json"), "mailbox": mailbox}
        with scratch_folder() as scratch:
            trainer = TorchTrainer(
                _work,
                train_loop_config=told | {"code": code_digest()},
                torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo", timeout_s=_SILENT_S),
                scaling_config=ScalingConfig(
                    num_workers=config.workers, use_gpu=use_gpu,
                    resources_per_worker={"CPU": threads, **({"GPU": 1} if use_gpu else {})},
                ),
                run_config=RunConfig(
                    name=f"{job.key}-{uuid.uuid4().hex[:8]}", storage_path=str(scratch),
                    failure_config=FailureConfig(max_failures=config.max_failures),
                ),
            )  # fmt: skip
            failure = _watched(ray, trainer, mailbox, say, should_stop)
        done, failed = ray.get([mailbox.outcome.remote(), mailbox.failure.remote()])
    if failed is not None:
        raise failed
    if done is None:
        raise InfrastructureError(
            f"training on Ray failed: {_gist(failure) or 'no worker finished'}. The same command continues"
        ) from failure
    return Summary(**done)


class _Mailbox:
    """Between workers and driver; an actor. Outlives workers."""

    def __init__(self) -> None:
        self._events: list[Any] = []
        self._stop = False
        self._failure: MaskmillError | None = None
        self._outcome: dict[str, Any] | None = None

    def post(self, events: list[Any]) -> bool:
        """Tells of events; the answer is whether to stop."""
        self._events += events
        return self._stop

    def take(self) -> list[Any]:
        events, self._events = self._events, []
        return events

    def stop(self) -> None:
        self._stop = True

    def fail(self, failure: MaskmillError) -> None:
        """What trying again would not mend."""
        self._failure = self._failure or failure

    def failure(self) -> MaskmillError | None:
        return self._failure

    def finish(self, outcome: dict[str, Any]) -> None:
        self._outcome = outcome

    def outcome(self) -> dict[str, Any] | None:
        return self._outcome


def _work(told: dict[str, Any]) -> None:
    """What Ray Train runs on each worker."""
    import ray
    from ray.train.torch import get_device

    mailbox = told["mailbox"]
    # A group that starts again after the run has failed for good, or is over, has nothing to do.
    if ray.get(mailbox.failure.remote()) is not None or ray.get(mailbox.outcome.remote()) is not None:
        return
    if code_digest() != told["code"]:
        ray.get(
            mailbox.fail.remote(UsageError("a node of the cluster has other code than the driver: install one version"))
        )
        return
    post = _Post(ray, mailbox)
    try:
        summary = do_job(
            Job.model_validate(told["job"]), device=str(get_device()), tell=post.tell, should_stop=lambda: post.stop
        )
    except MaskmillError as error:
        ray.get(mailbox.fail.remote(error))
        # Raised, not returned: the other workers may be waiting for this one.
        raise
    finally:
        post.close()
    if summary is not None:
        ray.get(mailbox.finish.remote(summary._asdict()))


class _Post:
    """A worker's way to the driver: sends what there is now and then, so that no step waits for it."""

    def __init__(self, ray: Any, mailbox: Any) -> None:
        self._ray, self._mailbox = ray, mailbox
        self._events: list[Any] = []
        self._closed = threading.Event()
        self.stop = False
        self._thread = threading.Thread(target=self._send, name="post", daemon=True)
        self._thread.start()

    def tell(self, event: Any) -> None:
        # Of steps only the last is worth telling.
        if self._events and type(self._events[-1]) is type(event) and hasattr(event, "share"):
            self._events[-1] = event
        else:
            self._events.append(event)

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _send(self) -> None:
        last = False
        while not last:
            last = self._closed.wait(1.0)
            events, self._events = self._events, []
            try:
                self.stop = self._ray.get(self._mailbox.post.remote(events))
            except self._ray.exceptions.RayError:
                logging.getLogger(__name__).warning("the driver does not hear this worker")
                return


def _watched(
    ray: Any, trainer: Any, mailbox: Any, say: Callable[[Any], None], should_stop: Callable[[], bool]
) -> BaseException | None:
    """Runs the trainer while handing on what workers tell; gives what it failed with."""
    failures: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except Exception as error:  # noqa: BLE001 - handed to the thread that waits for it
            failures.append(error)

    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    thread.start()
    asked_s: float | None = None
    while thread.is_alive():
        thread.join(_POLL_S)
        for event in ray.get(mailbox.take.remote()):
            say(event)
        if asked_s is None and should_stop():
            asked_s = time.monotonic()
            ray.get(mailbox.stop.remote())
        if asked_s is not None and time.monotonic() - asked_s > _STOP_PATIENCE_S:
            raise StoppedError("stopped on request: the same command continues from the last epoch")
    for event in ray.get(mailbox.take.remote()):
        say(event)
    return failures[0] if failures else None


@contextmanager
def _cluster(ray: Any, address: str | None) -> Iterator[None]:
    """A connection to the cluster at `address`, or to one on this machine that ends with it."""
    if ray.is_initialized():
        yield
        return
    try:
        if address:
            check_address(address)
        join_cluster(ray, address)
    except (OSError, RuntimeError, ValueError) as error:
        where = f"at {address!r}" if address else "on this machine"
        raise InfrastructureError(f"no Ray cluster {where}: {_gist(error)}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _resources(ray: Any, job: Job) -> tuple[bool, int]:
    """Whether workers get a GPU each, and the CPUs of each. Raises UsageError where the cluster cannot hold them, or
    does not see the files.
    """
    config = job.config
    nodes = [node for node in ray.nodes() if node["Alive"]]
    places = [config.dataset, config.registry, config.out, job.folder]
    local = [place for place in places if place and normalize_uri(place).startswith("file:")]
    if len(nodes) > 1 and local and not config.shared_filesystem:
        raise UsageError(
            f"{local[0]} is on local disk, and the Ray cluster has {len(nodes)} nodes: use object storage, or give "
            "--shared-filesystem if the path means the same on all of them"
        )
    gpus = int(sum(node["Resources"].get("GPU", 0) for node in nodes))
    use_gpu = gpus > 0 if config.use_gpu is None else config.use_gpu
    if use_gpu and gpus < config.workers and not config.ray_address:
        raise UsageError(f"{config.workers} workers with a GPU each, and the cluster has {gpus}: fewer, or --cpu")
    cpus = [int(node["Resources"].get("CPU", 0)) for node in nodes]
    threads = config.threads or max(1, min(sum(cpus) // config.workers, max(cpus, default=1)))
    if sum(one // threads for one in cpus) < config.workers and not config.ray_address:
        raise UsageError(
            f"{config.workers} workers with {threads} CPUs each do not fit on this machine, which has {sum(cpus)}"
        )
    return use_gpu, threads


def _gist(error: BaseException | None) -> str:
    lines = [line.strip() for line in str(error or "").splitlines() if line.strip()]
    # Ray puts the traceback of a worker first; what was raised is its last line.
    return lines[-1][:300] if lines else ""
