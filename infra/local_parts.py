"""What `make up` starts. Owns: the parts, their commands, their order, their health, the variables that lead to them.
Must not know: processes that run, and what became of them.
"""

from __future__ import annotations

import json
import socket
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil

ROOT = Path(__file__).resolve().parents[1]
HOST = "127.0.0.1"
PORTS = {"prefect": 4200, "ray": 6379, "dashboard": 8265, "metrics": 8266, "store": 9100}
STORE_KEY = "local-site"
#: Ray's sockets lie this deep below its folder, and a socket's path has 107 characters at most.
_SOCKET_DEPTH = 70


class Part(NamedTuple):
    """One thing that is started. `ports`: names of those it must find free. `tries`: how often it is started until it
    is healthy."""

    name: str
    command: list[str]
    ports: tuple[str, ...]
    healthy: Callable[[psutil.Process], bool]
    tries: int = 1


class Layout(NamedTuple):
    """Where a site is: its folder, which is absolute, its mark, its ports, and whether it has a store of its own."""

    folder: Path
    mark: str
    ports: dict[str, int]
    own_store: bool

    def parts(self) -> list[Part]:
        """In the order in which each finds what it needs."""
        ports = {name: str(port) for name, port in self.ports.items()}
        ray = [
            sys.executable, str(ROOT / "infra" / "local_ray.py"), "--port", ports["ray"],
            "--dashboard-port", ports["dashboard"], "--metrics-port", ports["metrics"],
            "--folder", str(self.ray_folder),
        ]  # fmt: skip
        prefect = [sys.executable, "-m", "prefect"]
        server = [*prefect, "server", "start", "--host", HOST, "--port", ports["prefect"]]
        worker = [*prefect, "worker", "start", "--pool", "local", "--type", "process", "--name", "local-site"]
        store = [sys.executable, "-m", "moto.server", "-H", HOST, "-p", ports["store"]]
        return [
            *([Part("store", store, ("store",), lambda _: _answers(f"{self.store_url}/moto-api/"))] * self.own_store),
            Part("prefect-server", server, ("prefect",), lambda _: _answers(f"{self.api_url}/health")),
            # Ray gives up where a node takes more than 30 s to start, as on a busy machine.
            Part("ray", ray, ("ray", "dashboard", "metrics"), lambda _: self._ray_nodes() == 2, tries=3),
            # Last: from now on flow runs may start.
            Part("prefect-worker", worker, (), self._worker_is_online),
        ]

    @property
    def api_url(self) -> str:
        return f"http://{HOST}:{self.ports['prefect']}/api"

    @property
    def store_url(self) -> str:
        return f"http://{HOST}:{self.ports['store']}"

    def variables(self) -> dict[str, str]:
        """What leads Maskmill, Prefect, Ray and every AWS tool to this site."""
        found = {
            "PREFECT_API_URL": self.api_url,
            "PREFECT_HOME": str(self.folder / "prefect"),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
            "RAY_ADDRESS": f"{HOST}:{self.ports['ray']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.folder / "ray-token"),
            "RAY_USAGE_STATS_ENABLED": "0",
            # Otherwise Ray takes 127.0.0.1 for a slip and listens on this machine's address in the network.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        }
        if self.own_store:
            found |= {
                "AWS_ENDPOINT_URL": self.store_url,
                "AWS_ACCESS_KEY_ID": STORE_KEY,
                "AWS_SECRET_ACCESS_KEY": STORE_KEY,
                "AWS_REGION": "us-east-1",
                "AWS_EC2_METADATA_DISABLED": "true",
            }
        return found

    @property
    def ray_folder(self) -> Path:
        """Where the folder `ray` is: this one, unless its name is too long for Ray's sockets."""
        if len(str(self.folder)) + _SOCKET_DEPTH <= 107:
            return self.folder
        return Path(tempfile.gettempdir(), f"maskmill-{self.mark[:8]}")

    def make_ray_folder(self) -> None:
        """With a link to it in this site's folder, where it lies elsewhere."""
        found = self.ray_folder / "ray"
        found.mkdir(parents=True, mode=0o700, exist_ok=True)
        link = self.folder / "ray"
        if self.ray_folder != self.folder and not link.is_symlink():
            link.symlink_to(found)

    def _ray_nodes(self) -> int:
        """Living nodes of the cluster, as its dashboard says."""
        token = (self.folder / "ray-token").read_text()
        answer = _ask(f"http://{HOST}:{self.ports['dashboard']}/nodes?view=summary", token=token)
        nodes = answer["data"]["summary"] if answer else []
        return sum(node["raylet"].get("state") == "ALIVE" for node in nodes)

    def _worker_is_online(self, process: psutil.Process) -> bool:
        """One of the same name may have been killed a moment ago: the server still takes it to be there."""
        found = _ask(f"{self.api_url}/work_pools/local/workers/filter", body={})
        beats = [one["last_heartbeat_time"] for one in found or [] if one["status"] == "ONLINE"]
        started = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(process.create_time()))
        return any(beat >= started for beat in beats)


def _ask(url: str, *, token: str = "", body: Any = None) -> Any:
    """The JSON answer, or None where nobody gives one."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=5) as answer:
            return json.loads(answer.read())
    except (OSError, ValueError):
        return None


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def is_taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return True
    return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
