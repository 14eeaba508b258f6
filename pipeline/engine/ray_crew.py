"""Workers as Ray actors. Owns: connecting to or starting a cluster, an actor's resources, translating its death.
Must not know: shards' order, retries, planning.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

from pipeline.engine.crew import CALLS_AT_ONCE, Host, WorkerDiedError, workers_on_cpu
from pipeline.engine.telemetry import Telemetry
from pipeline.errors import InfrastructureError, UsageError
from pipeline.machine import cores

log = logging.getLogger(__name__)

_KNOCK_TIMEOUT_S = 10.0
_LOOPBACK = "127.0.0.1"
_CLUSTERS_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


class RayMember:
    """One actor."""

    def __init__(self, ray: Any, handle: Any) -> None:
        self._ray = ray
        self._handle = handle

    def call(self, method: str, *args: Any) -> Future[Any]:
        answer: Future[Any] = Future()
        try:
            inner = getattr(self._handle, method).remote(*args).future()
        except self._ray.exceptions.RayError as error:
            answer.set_exception(WorkerDiedError(_first_line(error)))
            return answer
        inner.add_done_callback(lambda done: self._settle(done, answer))
        return answer

    def _settle(self, done: Future[Any], answer: Future[Any]) -> None:
        error = done.exception()
        exceptions = self._ray.exceptions
        if error is None:
            answer.set_result(done.result())
        elif isinstance(error, exceptions.RayTaskError):
            answer.set_exception(error.cause or error)
        elif isinstance(error, exceptions.RayError):
            # ActorUnavailableError comes first when a node dies, ActorDiedError later: both mean that its shards
            # start again.
            answer.set_exception(WorkerDiedError(f"{type(error).__name__}: {_first_line(error)}"))
        else:
            answer.set_exception(error)

    def stop(self) -> None:
        self._ray.kill(self._handle)


class RayCrew:
    """A Ray cluster: the one at `address`, or one that is started on this machine and ended by `close`.

    By default one actor per GPU where the cluster has GPUs, else one for each CPU and 4 GiB of memory. Raises
    UsageError where a cluster of several nodes cannot see local paths, InfrastructureError where there is no cluster.
    """

    label = "Ray"

    def __init__(
        self,
        *,
        address: str | None,
        actors: int | None,
        gpus_per_actor: float | None,
        threads: int | None,
        local_paths: bool,
    ) -> None:
        try:
            import ray
        except ImportError as error:
            raise UsageError(
                "the engine `ray` needs Ray: pip install 'maskmill[ray]', or use --engine local"
            ) from error
        self._ray = ray
        self._owns = not ray.is_initialized()
        if self._owns:
            self._connect(address)
        nodes = [node for node in ray.nodes() if node["Alive"]]
        if len(nodes) > 1 and local_paths:
            self.close()
            raise UsageError(
                f"SOURCE or DEST is on local disk, and the Ray cluster has {len(nodes)} nodes: use object storage, "
                "or give --shared-filesystem if the path means the same on all of them"
            )
        gpus = sum(node["Resources"].get("GPU", 0) for node in nodes)
        self.has_gpus = gpus > 0
        if gpus_per_actor and not gpus and self._owns and not address:
            self.close()
            raise UsageError(f"--gpus-per-actor {gpus_per_actor:g}: this machine has no GPU that Ray can see")
        self._gpus_per_actor = gpus_per_actor if gpus_per_actor is not None else (1.0 if gpus else 0.0)
        able = [n for n in nodes if n["Resources"].get("GPU", 0) > 0] if self._gpus_per_actor else nodes
        able = [n for n in able if n["Resources"].get("CPU", 0) >= 1] or able or nodes
        if self._gpus_per_actor:
            per_node = [max(1, int(n["Resources"].get("GPU", 0) / self._gpus_per_actor)) for n in able]
        else:
            per_node = [
                workers_on_cpu(
                    int(n["Resources"].get("CPU", 1)) // (threads or 1), n["Resources"].get("memory", 1 << 50)
                )
                for n in able
            ]
        self.default_actors = max(1, sum(per_node))
        if actors and not self._gpus_per_actor:
            per_node = [-(-actors // len(able))] * len(able)
        share = [int(n["Resources"].get("CPU", 1)) // k for n, k in zip(able, per_node, strict=True)]
        self.threads = threads or max(1, min(share))
        remote: Any = ray.remote
        self._actor = remote(
            num_gpus=self._gpus_per_actor,
            num_cpus=min(self.threads, max(1, min(share))),
            max_restarts=0,
            max_concurrency=CALLS_AT_ONCE,
        )(Host)

    def _connect(self, address: str | None) -> None:
        ray = self._ray
        try:
            if address:
                _knock(address)
            join_cluster(ray, address)
        except (OSError, RuntimeError, ValueError) as error:
            where = f"at {address!r}" if address else "on this machine"
            raise InfrastructureError(f"no Ray cluster {where}: {_first_line(error)}") from error

    def start(self) -> RayMember:
        return RayMember(self._ray, self._actor.remote(owns_process=True, watch=Telemetry))

    def share(self, model: bytes) -> Any:
        return self._ray.put(model)

    def close(self) -> None:
        if self._owns:
            self._ray.shutdown()


def ray_address(given: str | None) -> str | None:
    """The cluster that the command or the environment names."""
    return given or os.environ.get("RAY_ADDRESS") or None


def join_cluster(ray: Any, address: str | None) -> None:
    """Connects to the cluster at `address`; None: starts one on this machine, which ends with `ray.shutdown` and
    listens on 127.0.0.1 only. Raises what `ray.init` raises.
    """
    # Workers' logs stay in Ray's own files: the driver's stdout belongs to results.
    quiet: dict[str, Any] = {"configure_logging": False, "log_to_driver": False}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address:
        ray.init(address=address, **quiet)
        return
    with _own_machine_only(ray):
        # "local": never join what a killed run may have left on this machine.
        ray.init(
            address="local", include_dashboard=False, num_cpus=cores(), _node_ip_address=_LOOPBACK, **quiet
        )  # fmt: skip


@contextlib.contextmanager
def _own_machine_only(ray: Any) -> Iterator[None]:
    """Otherwise Ray takes 127.0.0.1 for a slip, and listens on every address that this machine has. What it is told so
    by is read when it is imported, and by the processes that it starts.
    """
    constants, before = ray._private.ray_constants, os.environ.get(_CLUSTERS_VARIABLE)
    was_enabled = constants.ENABLE_RAY_CLUSTER
    constants.ENABLE_RAY_CLUSTER, os.environ[_CLUSTERS_VARIABLE] = False, "0"
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = was_enabled
        if before is None:
            del os.environ[_CLUSTERS_VARIABLE]
        else:
            os.environ[_CLUSTERS_VARIABLE] = before


def check_address(address: str) -> None:
    """Raises InfrastructureError where nothing listens at the address of a cluster."""
    try:
        _knock(address)
    except OSError as error:
        raise InfrastructureError(f"no Ray cluster at {address!r}: {_first_line(error)}") from error


def _knock(address: str) -> None:
    """Ray itself tries a dead address for minutes, and hears no Ctrl-C meanwhile."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        with socket.create_connection((host, int(port)), timeout=_KNOCK_TIMEOUT_S):
            return


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
