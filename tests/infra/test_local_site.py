"""`make up` and `make down`: in order, on loopback only, repaired, and ending its own processes and no others."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
PARTS = ["store", "prefect-server", "ray", "prefect-worker"]


def site(folder: Path, *arguments: str, status: int = 0, environment: dict[str, str] | None = None) -> str:
    """What the command says."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "PREFECT_", "RAY_"))}
    answer = subprocess.run(
        [sys.executable, str(ROOT / "infra" / "local_site.py"), "--folder", str(folder), *arguments],
        env=clean | {"PYTHONPATH": str(ROOT)} | (environment or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert answer.returncode == status, answer.stdout
    return answer.stdout


def marked(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("MASKMILL_SITE") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "300"], start_new_session=True)
    yield process
    process.kill()
    process.wait()


def note(folder: Path, process: psutil.Process, *, started: float, mark: str = "none") -> None:
    noted = {"prefect-server": {"pid": process.pid, "started": started}}
    folder.mkdir(exist_ok=True)
    (folder / "site.json").write_text(json.dumps({"mark": mark, "processes": noted}))


def test_down_ends_by_process_id_and_start_time(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    process = psutil.Process(sleeper.pid)
    note(tmp_path / "site", process, started=process.create_time() - 1)
    assert "Nothing was up" in site(tmp_path / "site", "down")
    assert sleeper.poll() is None, "its process id was another's before"
    note(tmp_path / "site", process, started=process.create_time())
    assert "prefect-server ended" in site(tmp_path / "site", "down")
    assert sleeper.wait(timeout=5) != 0
    assert "Nothing was up" in site(tmp_path / "nowhere", "down")


def test_down_ends_what_a_killed_part_left(tmp_path: Path) -> None:
    mark = uuid.uuid4().hex
    orphan = subprocess.Popen(["sleep", "300"], env=os.environ | {"MASKMILL_SITE": mark}, start_new_session=True)
    note(tmp_path / "site", psutil.Process(orphan.pid), started=0.0, mark=mark)
    assert "1 processes" in site(tmp_path / "site", "down")
    assert orphan.wait(timeout=5) != 0


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = site(tmp_path / "site", "up", "--free-ports", "--store-port", str(port), status=1)
    assert f"port {port}" in said and "--store-port" in said
    assert "Nothing was up" in site(tmp_path / "site", "down")


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.prefect
@pytest.mark.timeout(600)
def test_up_again_repaired_and_down(tmp_path: Path) -> None:
    folder = tmp_path / "site"
    try:
        said = site(folder, "up", "--free-ports")
        assert [line.split()[0] for line in said.splitlines() if " is up, " in line] == PARTS
        state = json.loads((folder / "site.json").read_text())
        family = marked(state["mark"])
        assert len(family) > 10
        for process in family:
            for one in process.net_connections("inet"):
                assert one.status != psutil.CONN_LISTEN or one.laddr.ip.rpartition(":")[2] == "127.0.0.1", process
        variables = (folder / "env").read_text()
        assert f"RAY_ADDRESS=127.0.0.1:{state['ports']['ray']}" in variables
        assert (folder / "ray-token").stat().st_mode & 0o077 == 0

        again = site(folder, "up")
        assert again.count("is up already") == len(PARTS) and "Up already" in again
        psutil.Process(state["processes"]["prefect-server"]["pid"]).kill()
        (raylet, *_) = [process for process in family if process.name() == "raylet"]
        raylet.kill()
        repaired = site(folder, "up")
        assert repaired.count("started again") >= 2 and "store           is up already" in repaired
        assert site(folder, "up").count("is up already") == len(PARTS)
    finally:
        down = site(folder, "down")
    assert [line.split()[0] for line in down.splitlines() if line.endswith(" ended")][: len(PARTS)] == PARTS[::-1]
    assert marked(state["mark"]) == []


@pytest.mark.slow
@pytest.mark.prefect
@pytest.mark.timeout(300)
def test_a_server_without_its_database_says_so(tmp_path: Path) -> None:
    url = "postgresql+asyncpg://nobody:secret@127.0.0.1:1/prefect"
    environment = {"PREFECT_SERVER_DATABASE_CONNECTION_URL": url}
    said = site(tmp_path / "site", "up", "--free-ports", status=1, environment=environment)
    assert "prefect-server does not come up" in said and "make down" in said
    assert "store ended" in site(tmp_path / "site", "down")
