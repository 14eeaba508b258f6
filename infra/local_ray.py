"""A Ray head without CPUs and a worker node with all of this machine's, until SIGTERM: a part of `make up`.

Owns: the two nodes. Must not know: the other parts. `ray start` is not used for it: where it is made to listen on
127.0.0.1 only, it starts no second node.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from pathlib import Path

from ray.cluster_utils import Cluster

from pipeline.machine import cores, gpu_count

_LOOK_EVERY_S = 1.0
#: Models, and nothing else, go through it.
_OBJECT_STORE_BYTES = 1 << 30


def main() -> None:
    """The command. Exit status 1 as soon as one of the nodes is gone."""
    parser = argparse.ArgumentParser()
    for name in ("port", "dashboard-port", "metrics-port"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="Ray's files come into its subfolder `ray`")
    asked = parser.parse_args()
    os.environ["RAY_TMPDIR"] = str(asked.folder)
    (asked.folder / "ray").mkdir(parents=True, exist_ok=True)
    told_to_end = threading.Event()
    head = {
        "gcs_server_port": asked.port,
        "include_dashboard": True,
        "dashboard_host": "127.0.0.1",
        "dashboard_port": asked.dashboard_port,
        "metrics_export_port": asked.metrics_port,
        "num_cpus": 0,
    }
    cluster = Cluster(initialize_head=True, head_node_args=head)
    signal.signal(signal.SIGTERM, lambda *_: told_to_end.set())
    node = cluster.add_node(num_cpus=cores(), num_gpus=gpu_count(), object_store_memory=_OBJECT_STORE_BYTES)
    print(f"Ray at {cluster.address}, dashboard {cluster.webui_url}", flush=True)
    while not told_to_end.wait(_LOOK_EVERY_S):
        if not all(one.remaining_processes_alive() for one in (cluster.head_node, node)):
            print("a node is gone", file=sys.stderr)
            break
    cluster.shutdown()
    sys.exit(0 if told_to_end.is_set() else 1)


if __name__ == "__main__":
    main()
