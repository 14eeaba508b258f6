"""`make up` and `make down`: all that Maskmill needs beside itself, on this machine and without containers.

Owns: the parts' order, health, ports, processes. Must not know: flows, tables. Everything lies in one folder, `.site/`
by default: `site.json` (ports, process ids and their start times), `logs/`, `env` (for your shell), the server's
database, Ray's files. Nothing listens beyond 127.0.0.1.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import secrets
import shlex
import socket
import subprocess
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
#: In the environment of every process of a site, whose mark is its value: so `down` finds what a killed part left.
MARK = "MASKMILL_SITE"
_PORTS = {"prefect": 4200, "ray": 6379, "dashboard": 8265, "metrics": 8266, "store": 9100}
_STORE_KEY = "local-site"
_HEALTHY_TIMEOUT_S = 120.0
_END_TIMEOUT_S = 20.0
#: Ray's sockets lie this deep below its folder, and a socket's path has 107 characters at most.
_SOCKET_DEPTH = 70


class SiteError(Exception):
    """A part does not start. The message says which, why, and what to do."""


class Part(NamedTuple):
    """One thing that is started. `ports`: names of those it must find free."""

    name: str
    command: list[str]
    ports: tuple[str, ...]
    healthy: Callable[[psutil.Process], bool]


class Site:
    """What `folder` says of a site, and what is true of it now."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self._state_path = self.folder / "site.json"
        state: dict[str, Any] = json.loads(self._state_path.read_text()) if self._state_path.exists() else {}
        self.mark: str = state.get("mark") or secrets.token_hex(16)
        self.ports: dict[str, int] = state.get("ports") or dict(_PORTS)
        self.own_store: bool = state.get("own_store", True)
        self.processes: dict[str, dict[str, Any]] = state.get("processes") or {}

    def save(self) -> None:
        state = {"mark": self.mark, "ports": self.ports, "own_store": self.own_store, "processes": self.processes}
        new = self._state_path.with_suffix(".new")
        new.write_text(json.dumps(state, indent=2) + "\n")
        new.replace(self._state_path)

    def process(self, name: str) -> psutil.Process | None:
        """The living process of a part: a process id that now belongs to something else does not count."""
        noted = self.processes.get(name)
        try:
            found = psutil.Process(noted["pid"]) if noted else None
            if noted and found and found.create_time() == noted["started"] and _lives(found):
                return found
        except psutil.NoSuchProcess:
            pass
        return None

    def strangers(self) -> list[psutil.Process]:
        """Living processes of this site that belong to none of its living parts."""
        kept: set[int] = set()
        for name in self.processes:
            if part := self.process(name):
                kept |= {part.pid, *(child.pid for child in part.children(recursive=True))}
        return [process for process in marked(self.mark) if process.pid not in kept]

    # ── what is started ──────────────────────────────────────────────────────────────────────────────────────────────

    def parts(self) -> list[Part]:
        """In the order in which each finds what it needs."""
        ports = {name: str(port) for name, port in self.ports.items()}
        ray = [
            sys.executable, str(ROOT / "infra" / "local_ray.py"), "--port", ports["ray"],
            "--dashboard-port", ports["dashboard"], "--metrics-port", ports["metrics"],
            "--folder", str(self._ray_folder()),
        ]  # fmt: skip
        prefect = [sys.executable, "-m", "prefect"]
        server = [*prefect, "server", "start", "--host", HOST, "--port", ports["prefect"]]
        worker = [*prefect, "worker", "start", "--pool", "local", "--type", "process", "--name", "local-site"]
        store = [sys.executable, "-m", "moto.server", "-H", HOST, "-p", ports["store"]]
        return [
            *([Part("store", store, ("store",), lambda _: _answers(f"{self.store_url}/moto-api/"))] * self.own_store),
            Part("prefect-server", server, ("prefect",), lambda _: _answers(f"{self.api_url}/health")),
            Part("ray", ray, ("ray", "dashboard", "metrics"), lambda _: self._ray_nodes() == 2),
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
                "AWS_ACCESS_KEY_ID": _STORE_KEY,
                "AWS_SECRET_ACCESS_KEY": _STORE_KEY,
                "AWS_REGION": "us-east-1",
                "AWS_EC2_METADATA_DISABLED": "true",
            }
        return found

    def prepare(self) -> None:
        """The folder, with the token that Ray asks of everybody and the variables for a shell."""
        (self.folder / "logs").mkdir(parents=True, exist_ok=True)
        token = self.folder / "ray-token"
        if not token.exists():
            token.touch(mode=0o600)
            token.write_text(secrets.token_hex(32))
        lines = [f"export {name}={shlex.quote(value)}" for name, value in self.variables().items()]
        (self.folder / "env").write_text("\n".join(lines) + "\n")
        self.save()

    def start(self, part: Part) -> None:
        """Raises SiteError where it does not become healthy."""
        for name in part.ports:
            if _is_taken(self.ports[name]):
                raise SiteError(
                    f"{part.name}: port {self.ports[name]} of {HOST} is taken by another program: "
                    f"make up ARGS='--{name}-port N'"
                )
        log = self.folder / "logs" / f"{part.name}.log"
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "RAY_"))}
        database = {name: value for name, value in os.environ.items() if name.startswith("PREFECT_SERVER_DATABASE_")}
        # Jobs of the Ray cluster are told to run `python`.
        path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
        with log.open("ab") as out:
            started = subprocess.Popen(
                part.command,
                env=inherited | database | self.variables() | {MARK: self.mark, "PATH": path},
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        process = psutil.Process(started.pid)
        self.processes[part.name] = {"pid": process.pid, "started": process.create_time()}
        self.save()
        if not _becomes_healthy(part, process):
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise SiteError(f"{part.name} does not come up; the end of {log}:\n{tail}")

    def stop(self, name: str) -> bool:
        """Ends a part and all that it started. False where there was nothing to end."""
        process = self.process(name)
        family = [process, *process.children(recursive=True)] if process else []
        if process:
            process.terminate()
            _await_end([process], _END_TIMEOUT_S)
        _kill(family)
        self.processes.pop(name, None)
        self.save()
        return process is not None

    def _ray_folder(self) -> Path:
        """Where the folder `ray` is: this one, unless its name is too long for Ray's sockets."""
        if len(str(self.folder)) + _SOCKET_DEPTH <= 107:
            return self.folder
        short = Path(tempfile.gettempdir(), f"maskmill-{self.mark[:8]}")
        (short / "ray").mkdir(parents=True, mode=0o700, exist_ok=True)
        link = self.folder / "ray"
        if not link.is_symlink():
            link.symlink_to(short / "ray")
        return short

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


def up(site: Site) -> None:
    """Starts what is not up. Raises SiteError; what is up by then stays up."""
    site.prepare()
    began = 0
    for part in site.parts():
        process = site.process(part.name)
        if process is not None and _becomes_healthy(part, process, timeout_s=10.0):
            print(f"  {part.name:15} is up already, process {process.pid}")
            continue
        if part.name in site.processes:
            print(f"  {part.name:15} was {'not healthy' if process else 'gone'}: started again")
            site.stop(part.name)
        began_s = time.monotonic()
        site.start(part)
        began += 1
        print(f"  {part.name:15} is up, process {site.processes[part.name]['pid']}, {time.monotonic() - began_s:.0f} s")
    print(f"\nUp{'' if began else ' already'}. Logs: {site.folder / 'logs'}; end: make down")
    print(f"  Prefect {site.api_url.removesuffix('/api')}   Ray http://{HOST}:{site.ports['dashboard']}")
    if site.own_store:
        print(f"  S3      {site.store_url} (moto: for a tour only; it keeps everything in memory)")
    else:
        print(f"  S3      {os.environ['AWS_ENDPOINT_URL']}, yours")
    print(f"In your shell: source {site.folder / 'env'}")


def down(site: Site) -> None:
    """Ends what `up` has started, and nothing else."""
    ended = [name for name in reversed(list(site.processes)) if site.stop(name)]
    orphans = site.strangers()
    _kill(orphans)
    for name in ended:
        print(f"  {name} ended")
    if orphans:
        print(f"  {len(orphans)} processes that killed parts had left ended")
    print("Down." if ended or orphans else "Nothing was up.")


def upload(site: Site, folder: Path, uri: str) -> None:
    """Puts the files of `folder` under `s3://BUCKET/PREFIX`, and makes the bucket."""
    import boto3

    os.environ.update(site.variables())
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    client = boto3.client("s3")
    client.create_bucket(Bucket=bucket)
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    for path in files:
        client.upload_file(str(path), bucket, "/".join(filter(None, (prefix.rstrip("/"), path.name))))
    print(f"{len(files)} files are in {uri}")


def marked(mark: str) -> list[psutil.Process]:
    """The living processes that carry a site's mark, children and orphans alike."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def _becomes_healthy(part: Part, process: psutil.Process, *, timeout_s: float = _HEALTHY_TIMEOUT_S) -> bool:
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        if not _lives(process):
            return False
        if part.healthy(process):
            return True
        time.sleep(0.2)
    return False


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    _await_end(processes, 5.0)


def _await_end(processes: list[psutil.Process], timeout_s: float) -> None:
    """A zombie is at its end, whoever may come to collect it."""
    deadline_s = time.monotonic() + timeout_s
    while any(_lives(process) for process in processes) and time.monotonic() < deadline_s:
        time.sleep(0.05)


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


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


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return True
    return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def main() -> None:
    """The command. Exit status 1 where a part does not start."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / ".site")
    actions = parser.add_subparsers(dest="action", required=True)
    starting = actions.add_parser("up", help="start what is not up")
    for name, port in _PORTS.items():
        starting.add_argument(f"--{name}-port", type=int, help=f"default: {port}")
    starting.add_argument("--free-ports", action="store_true", help="ports that are free now")
    actions.add_parser("down", help="end exactly that")
    sending = actions.add_parser("upload", help="files of a folder into a bucket, which is made")
    sending.add_argument("source", type=Path)
    sending.add_argument("uri", metavar="s3://BUCKET/PREFIX")
    asked = parser.parse_args()
    site = Site(asked.folder)
    if asked.action != "up" and not site.folder.exists():
        print("Nothing was up." if asked.action == "down" else "error: nothing is up here: make up", file=sys.stderr)
        sys.exit(0 if asked.action == "down" else 2)
    site.folder.mkdir(parents=True, exist_ok=True)
    with (site.folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        site = Site(asked.folder)
        try:
            if asked.action == "up":
                _choose(site, asked)
                up(site)
            elif asked.action == "down":
                down(site)
            else:
                upload(site, asked.source, asked.uri)
        except SiteError as error:
            print(f"failed: {error}\nThe other parts stay as they are; `make up` goes on, `make down` ends them.")
            sys.exit(1)


def _choose(site: Site, asked: argparse.Namespace) -> None:
    """A site that has living parts keeps its ports and its store."""
    if any(site.process(name) for name in site.processes):
        return
    given = {name: getattr(asked, f"{name}_port") for name in _PORTS}
    site.ports = {
        name: given[name] or (_free_port() if asked.free_ports else site.ports.get(name, default))
        for name, default in _PORTS.items()
    }
    # A shell that has sourced `env` names our own store.
    site.own_store = not os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ACCESS_KEY_ID") == _STORE_KEY


if __name__ == "__main__":
    main()
