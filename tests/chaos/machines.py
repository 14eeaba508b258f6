"""A Ray cluster on this machine whose nodes are there to be killed. Owns: its nodes, their deaths and successors.
Must not know: what runs on them besides Maskmill's actors, when to strike.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from harness import actors_on, kill_all, marked, runs

_TRIES = 4


class Machines:
    """A head without a GPU, and two nodes with a pretend GPU each, where all actors live."""

    def __init__(self, mark: str) -> None:
        from ray.cluster_utils import Cluster

        self._mark = mark
        # With exit hooks a node could be added by the main thread only, where it would hold up the next kill.
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 1, "num_gpus": 0, "include_dashboard": False},
            shutdown_at_exit=False,
        )
        self._pool = ThreadPoolExecutor(1)
        self._add()
        self._coming: Future[Any] = self._pool.submit(self._add)
        self._coming.result()

    @property
    def address(self) -> str:
        """Where a driver finds it."""
        return str(self._cluster.address)

    def head_processes(self) -> dict[str, int]:
        """Ids of the processes that live as long as the cluster, by name."""
        found = self._cluster.head_node.all_processes
        return {name: infos[0].process.pid for name, infos in found.items() if name in ("gcs_server", "raylet")}

    def at_work(self) -> list[Any]:
        """The nodes that host an actor. Waits for one that is just being added."""
        self._coming.result()
        return [node for node in self._cluster.worker_nodes if actors_on(node, self._mark)]

    def kill(self, node: Any) -> None:
        """A node dies, and another one comes in the background."""
        self._cluster.remove_node(node, allow_graceful=False)
        self._coming = self._pool.submit(self._add)

    def close(self) -> None:
        """Ends all nodes."""
        import ray

        self._pool.shutdown()
        ray.shutdown()
        self._cluster.shutdown()

    def _add(self) -> Any:
        """Ray gives a node up that takes more than 30 s to start, as on a busy machine, and leaves its processes."""
        for tries_left in range(_TRIES - 1, -1, -1):
            there = {process.pid for process in marked(self._mark)}
            try:
                return self._cluster.add_node(num_cpus=1, num_gpus=1)
            except Exception:  # Ray's own is no narrower
                if not tries_left:
                    raise
                kill_all([p for p in marked(self._mark) if p.pid not in there and runs(p, "raylet")])
        return None
