"""A Prefect server and worker of the tests' own, on free ports of this machine, in a folder of their own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from harness import MARK, kill_all, marked, runs, wait_until

ROOT = Path(__file__).resolve().parents[1]
FINAL = frozenset({"COMPLETED", "FAILED", "CANCELLED", "CRASHED"})


#: In the path of all of the site's processes: workers take their time while a file says so, so that there is a middle
#: to strike in, however fast the machine.
PACED = """
import os, sys, time
if {"pipeline.engine.crew", "default_worker.py"} & {part.rpartition("/")[2] for part in sys.orig_argv}:
    import pipeline.engine.intake as intake
    peek = intake.peek
    def paced(data):
        if os.path.exists(os.environ["MASKMILL_TEST_PACE"]):
            time.sleep(0.4)
        return peek(data)
    intake.peek = paced
"""


class Site:
    """Starts with `start`, ends with `close`: exactly the processes that it began, and what they have left."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}/api"
        self.mark = uuid.uuid4().hex
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "RAY_"))}
        (folder / "tmp").mkdir(parents=True)
        (folder / "path").mkdir()
        (folder / "path" / "sitecustomize.py").write_text(PACED)
        self._pace = folder / "pace"
        self.environment = clean | {
            MARK: self.mark,
            "TMPDIR": str(folder / "tmp"),
            "PYTHONPATH": os.pathsep.join(map(str, (folder / "path", ROOT, os.environ.get("PYTHONPATH", "")))),
            "MASKMILL_TEST_PACE": str(self._pace),
            "PREFECT_HOME": str(folder / "home"),
            "PREFECT_API_URL": self.url,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "2",
            **environment,
        }
        self.server: subprocess.Popen[bytes] | None = None
        self.worker: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.start_server()
        self.start_worker()
        wait_until(lambda: self.api("work_pools/filter", {}) != [], what="the worker's pool", poll_s=0.1)
        self.prefect("--no-prompt", "deploy", "--all", "--prefect-file", "infra/prefect.yaml")

    @contextmanager
    def paced(self) -> Iterator[None]:
        """Meanwhile an image takes a worker at least 0.4 s."""
        self._pace.touch()
        try:
            yield
        finally:
            self._pace.unlink()

    def start_server(self) -> None:
        server = self._begin("server", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(self.port))
        self.server = server
        wait_until(lambda: self._healthy() or server.poll() is not None, what="the Prefect server", poll_s=0.1)
        assert self._healthy(), self.log("server")

    def start_worker(self) -> None:
        self.worker = self._begin("worker", "prefect", "worker", "start", "--pool", "local", "--type", "process")

    def close(self) -> None:
        for process in (self.worker, self.server):
            if process is not None:
                process.kill()
                process.wait()
        kill_all(marked(self.mark))

    def prefect(self, *arguments: str, status: int | None = 0) -> str:
        """What the command `prefect` says, on both streams. Fails where its exit status is not `status` (None: any)."""
        answer = subprocess.run(
            [sys.executable, "-m", "prefect", *arguments],
            env=self.environment | {"COLUMNS": "200"},
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=150,
            check=False,
        )
        assert status is None or answer.returncode == status, f"exit status {answer.returncode}: {answer.stdout}"
        return answer.stdout

    def api(self, path: str, body: Any = None) -> Any:
        """GET, or POST where there is a body. Asked again while the server's database is locked: SQLite's may be for a
        minute on a busy machine."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/{path}", data, {"Content-Type": "application/json"})
        deadline_s = time.monotonic() + 150
        while True:
            try:
                with urllib.request.urlopen(request, timeout=75) as answer:
                    text = answer.read()
                return json.loads(text) if text else None
            except (urllib.error.HTTPError, TimeoutError) as error:
                if getattr(error, "code", 503) != 503 or time.monotonic() > deadline_s:
                    raise
                time.sleep(0.5)

    def begin(
        self,
        deployment: str,
        *,
        due: str | None = None,
        environment: Mapping[str, str] | None = None,
        **parameters: Any,
    ) -> str:
        """The id of a new flow run of a deployment (of `segment-corpus`, where no flow is named), due now or at a time
        in the past; its process has `environment` too."""
        found = self.api(f"deployments/name/{deployment if '/' in deployment else f'segment-corpus/{deployment}'}")
        details = {"state_details": {"scheduled_time": due}} if due else {}
        once = {"idempotency_key": uuid.uuid4().hex}
        body = {"parameters": parameters, "state": {"type": "SCHEDULED", **details}, **once}
        if environment:
            body["job_variables"] = {"env": {**environment}}
        return str(self.api(f"deployments/{found['id']}/create_flow_run", body)["id"])

    def flow_run(self, run_id: str) -> dict[str, Any]:
        return dict(self.api(f"flow_runs/{run_id}"))

    def state(self, run_id: str) -> tuple[str, str]:
        """(type, message)."""
        state = self.flow_run(run_id)["state"]
        return state["type"], state["message"] or ""

    def end_of(self, run_id: str, *, timeout_s: float = 120.0) -> tuple[str, str]:
        """The final state, when it has come."""
        wait_until(
            lambda: self.state(run_id)[0] in FINAL, timeout_s=timeout_s, what=f"the end of {run_id}", poll_s=0.25
        )
        return self.state(run_id)

    def cancel(self, run_id: str) -> None:
        self.api(f"flow_runs/{run_id}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})

    def process_of(self, run_id: str) -> psutil.Process:
        """The process in which a flow runs."""
        (process,) = [
            one
            for one in marked(self.mark)
            if runs(one, "prefect.engine") and one.environ().get("PREFECT__FLOW_RUN_ID") == run_id
        ]
        return process

    def left_over(self) -> list[str]:
        """Command lines of processes that belong to no server and no worker of the site."""
        kept = {process.pid for process in (self.server, self.worker) if process is not None}
        return [" ".join(one.cmdline()) for one in marked(self.mark) if one.pid not in kept]

    def artifacts(self, run_id: str) -> dict[str, dict[str, Any]]:
        """What a flow run has shown, by key."""
        found = self.api("artifacts/filter", {"flow_runs": {"id": {"any_": [run_id]}}})
        return {one["key"]: one for one in found}

    def logs(self, run_id: str) -> list[str]:
        found = self.api("logs/filter", {"logs": {"flow_run_id": {"any_": [run_id]}}, "limit": 200})
        return [one["message"] for one in found]

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()[-4000:]

    def _begin(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", *arguments],
                env=self.environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _healthy(self) -> bool:
        try:
            return bool(self.api("health"))
        except (urllib.error.URLError, OSError):
            return False


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory, s3_server: str) -> Iterator[Site]:
    """A site whose flows reach `s3_server`."""
    environment = {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "testtest",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }
    site = Site(tmp_path_factory.mktemp("site"), environment)
    try:
        site.start()
        yield site
    finally:
        site.close()


@contextmanager
def client_of(site: Site) -> Iterator[None]:
    """What this process does of flows is told to the site's server, its logs apart: they are sent at its very end, when
    that is gone."""
    from prefect.settings import PREFECT_API_URL, PREFECT_HOME, PREFECT_LOGGING_TO_API_ENABLED, temporary_settings

    home = site.folder / "client"
    with temporary_settings({PREFECT_API_URL: site.url, PREFECT_HOME: home, PREFECT_LOGGING_TO_API_ENABLED: False}):
        yield


def stop(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL, and until it is gone."""
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.2)
