"""`make up` and `make down`: all that Maskmill needs beside itself, on this machine and without containers.

Owns: the site's processes and its state. Must not know: what the parts are (`local_parts` does), flows, tables.
Everything lies in one folder, `.site/` by default: `site.json` (ports, process ids and their start times), `logs/`,
`env` (for your shell), the server's database, Ray's files. Nothing listens beyond 127.0.0.1.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import secrets
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from local_parts import HOST, PORTS, ROOT, STORE_KEY, Layout, Part, free_port, is_taken

#: In the environment of every process of a site, whose mark is its value: so `down` finds what a killed part left.
MARK = "MASKMILL_SITE"
#: What the user may have of their own.
_STORE_URL = "AWS_ENDPOINT_URL"
_DATABASE_URL = "PREFECT_SERVER_DATABASE_CONNECTION_URL"
_HEALTHY_TIMEOUT_S = 120.0
_END_TIMEOUT_S = 20.0


class SiteError(Exception):
    """A part does not start. The message says which, why, and what to do."""


class Site:
    """What `folder` says of a site, and what is true of it now."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self._state_path = self.folder / "site.json"
        state: dict[str, Any] = json.loads(self._state_path.read_text()) if self._state_path.exists() else {}
        self.mark: str = state.get("mark") or secrets.token_hex(16)
        self.ports: dict[str, int] = state.get("ports") or dict(PORTS)
        self.own_store: bool = state.get("own_store", True)
        #: The server's is in this folder, not at a URL that the user gave.
        self.own_database: bool = state.get("own_database", True)
        self.processes: dict[str, dict[str, Any]] = state.get("processes") or {}

    @property
    def layout(self) -> Layout:
        return Layout(self.folder, self.mark, self.ports, self.own_store)

    def save(self) -> None:
        names = ("mark", "ports", "own_store", "own_database", "processes")
        state = {name: getattr(self, name) for name in names}
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

    def prepare(self) -> None:
        """The folder, with the token that Ray asks of everybody and the variables for a shell."""
        (self.folder / "logs").mkdir(parents=True, exist_ok=True)
        token = self.folder / "ray-token"
        if not token.exists():
            token.touch(mode=0o600)
            token.write_text(secrets.token_hex(32))
        lines = [f"export {name}={shlex.quote(value)}" for name, value in self.layout.variables().items()]
        (self.folder / "env").write_text("\n".join(lines) + "\n")
        self.save()

    def start(self, part: Part) -> None:
        """Raises SiteError where a port is taken, or where it does not become healthy at any of its tries."""
        if part.name == "ray":
            self.layout.make_ray_folder()
        for name in part.ports:
            if is_taken(self.ports[name]):
                raise SiteError(
                    f"{part.name}: port {self.ports[name]} of {HOST} is taken by another program: "
                    f"make up ARGS='--{name}-port N'"
                )
        for _ in range(part.tries):
            if _becomes_healthy(part, self._launch(part)):
                return
            self.stop(part.name)
            _kill(self.strangers())
        log = self._log(part.name)
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise SiteError(f"{part.name} does not come up; the end of {log}:\n{tail}")

    def _log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"

    def _launch(self, part: Part) -> psutil.Process:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "RAY_"))}
        database = {name: value for name, value in os.environ.items() if name.startswith("PREFECT_SERVER_DATABASE_")}
        # Jobs of the Ray cluster are told to run `python`.
        path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
        with self._log(part.name).open("ab") as out:
            started = subprocess.Popen(
                part.command,
                env=inherited | database | self.layout.variables() | {MARK: self.mark, "PATH": path},
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        process = psutil.Process(started.pid)
        self.processes[part.name] = {"pid": process.pid, "started": process.create_time()}
        self.save()
        return process

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


def up(site: Site) -> None:
    """Starts what is not up. Raises SiteError; what is up by then stays up."""
    site.prepare()
    began = 0
    for part in site.layout.parts():
        process = site.process(part.name)
        if process is not None and _becomes_healthy(part, process, timeout_s=10.0):
            print(f"  {part.name:15} is up already, process {process.pid}")
            continue
        if part.name in site.processes:
            print(f"  {part.name:15} was {'not healthy' if process else 'gone'}: started again")
            site.stop(part.name)
            if part.ports:  # what it has left may hold them
                _kill(site.strangers())
        began_s = time.monotonic()
        site.start(part)
        began += 1
        print(f"  {part.name:15} is up, process {site.processes[part.name]['pid']}, {time.monotonic() - began_s:.0f} s")
    print(f"\nUp{'' if began else ' already'}. Logs: {site.folder / 'logs'}; end: make down")
    database = "" if site.own_database else ", on your database"
    print(f"  Prefect {site.layout.api_url.removesuffix('/api')}{database}")
    print(f"  Ray     http://{HOST}:{site.ports['dashboard']}, which asks for the token in {site.folder / 'ray-token'}")
    if site.own_store:
        print(f"  S3      {site.layout.store_url} (moto: for a tour only; it keeps everything in memory)")
    else:
        print(f"  S3      {os.environ[_STORE_URL]}, yours")
    print(f"In your shell: source {site.folder / 'env'}")


def down(site: Site) -> None:
    """Ends what `up` has started, and nothing else."""
    order = [part.name for part in site.layout.parts()]
    ended = [name for name in reversed(order) if site.stop(name)]
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

    os.environ.update(site.layout.variables())
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


def main() -> None:
    """The command. Exit status 1 where a part does not start."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / ".site")
    actions = parser.add_subparsers(dest="action", required=True)
    starting = actions.add_parser("up", help="start what is not up")
    for name, port in PORTS.items():
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
    """A site that has living parts keeps its ports, its store and its database. Raises SiteError where this shell does
    not name those that it had of the user: they may hold passwords, so nothing here remembers them."""
    if any(site.process(name) for name in site.processes):
        for own, name in ((site.own_store, _STORE_URL), (site.own_database, _DATABASE_URL)):
            if not own and not os.environ.get(name):
                raise SiteError(f"this site was started with {name} set: set it again, or make down first")
        return
    given = {name: getattr(asked, f"{name}_port") for name in PORTS}
    site.ports = {
        name: given[name] or (free_port() if asked.free_ports else site.ports.get(name, default))
        for name, default in PORTS.items()
    }
    # A shell that has sourced `env` names our own store.
    site.own_store = not os.environ.get(_STORE_URL) or os.environ.get("AWS_ACCESS_KEY_ID") == STORE_KEY
    site.own_database = not os.environ.get(_DATABASE_URL)


if __name__ == "__main__":
    main()
