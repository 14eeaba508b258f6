"""A Ray cluster of the tests' own, with its Jobs API: a head without CPUs and a node, as `make up` has them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from harness import MARK, kill_all, marked, wait_until
from prefect_site import PACED

ROOT = Path(__file__).resolve().parents[1]


class RaySite:
    """Lives in a folder with a short name: Ray's sockets need that."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ray-"))
        port, dashboard_port, metrics_port = _free_ports(3)
        self.jobs_address = f"http://127.0.0.1:{dashboard_port}"
        self.mark = uuid.uuid4().hex
        self._pace = self.folder / "pace"
        (self.folder / "sitecustomize.py").write_text(PACED)
        (self.folder / "tmp").mkdir()
        #: Also what somebody needs who calls the Jobs API.
        self.access = {"RAY_AUTH_MODE": "disabled", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PREFECT_"))}
        environment = clean | self.access | {
            MARK: self.mark,
            "TMPDIR": str(self.folder / "tmp"),
            "MASKMILL_TEST_PACE": str(self._pace),
            "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
            "PYTHONPATH": os.pathsep.join(map(str, (self.folder, ROOT, os.environ.get("PYTHONPATH", "")))),
            "RAY_metrics_report_interval_ms": "500",
            "RAY_USAGE_STATS_ENABLED": "0",
        }  # fmt: skip
        options = {
            "port": port,
            "dashboard-port": dashboard_port,
            "metrics-port": metrics_port,
            "folder": self.folder,
        }
        command = [sys.executable, str(ROOT / "infra" / "local_ray.py")]
        command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
        with (self.folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        wait_until(lambda: self._is_up() or self.process.poll() is not None, what="the Ray cluster", poll_s=0.1)
        assert self._is_up(), (self.folder / "log").read_text()

    @contextmanager
    def paced(self) -> Iterator[None]:
        """Meanwhile an image takes a worker at least 0.4 s."""
        self._pace.touch()
        try:
            yield
        finally:
            self._pace.unlink()

    def metrics(self) -> str:
        """What every node's metrics port says now: those that Ray tells Prometheus of."""
        found = json.loads((self.folder / "ray" / "prom_metrics_service_discovery.json").read_text())
        text = ""
        for target in (target for one in found for target in one["targets"]):
            try:
                with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as answer:
                    text += answer.read().decode()
            except OSError:
                continue
        return text

    def close(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        kill_all(marked(self.mark))
        shutil.rmtree(self.folder, ignore_errors=True)

    def _is_up(self) -> bool:
        return "Ray at" in (self.folder / "log").read_text(errors="replace")


def _free_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@pytest.fixture(scope="session")
def ray_site() -> Iterator[RaySite]:
    site = RaySite()
    try:
        yield site
    finally:
        site.close()
