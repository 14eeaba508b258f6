"""`make up` and `make down`: in order, on loopback only, repaired, and ending its own processes and no others."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from harness import wait_until, write_images, write_tiny_model

from infra.local_parts import PORTS, Layout

ROOT = Path(__file__).resolve().parents[2]
PARTS = ["store", "prefect-server", "ray", "prefect-worker"]


@pytest.fixture(autouse=True)
def own_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For what a site leaves there, and its killed processes. With a short name: Ray's sockets need that."""
    folder = tempfile.mkdtemp(prefix="s-")
    monkeypatch.setenv("TMPDIR", folder)
    yield
    shutil.rmtree(folder)


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


def test_ray_has_a_short_folder_which_only_its_start_makes(tmp_path: Path) -> None:
    mark = uuid.uuid4().hex
    deep = Layout(tmp_path / ("n" * 100), mark, dict(PORTS), own_store=True)
    deep.folder.mkdir()
    deep.parts()
    assert deep.ray_folder == Path(tempfile.gettempdir(), f"maskmill-{mark[:8]}") and not deep.ray_folder.exists()
    try:
        for _ in range(2):
            deep.make_ray_folder()
        assert deep.folder.joinpath("ray").resolve() == deep.ray_folder / "ray"
        assert deep.ray_folder.joinpath("ray").stat().st_mode & 0o777 == 0o700
    finally:
        shutil.rmtree(deep.ray_folder)
    assert Layout(Path("/home/me/.site"), mark, dict(PORTS), own_store=True).ray_folder == Path("/home/me/.site")


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


def environment_of(folder: Path) -> dict[str, str]:
    """What a shell has that has sourced the site's `env`, with this Python's programs before all others."""
    sourced = subprocess.run(
        ["bash", "-c", f"set -a; source '{folder}/env'; env -0"], env={}, capture_output=True, text=True, check=True
    )
    found = dict(line.split("=", 1) for line in sourced.stdout.split("\0") if "=" in line)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "PREFECT_", "RAY_"))}
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    return clean | found | {"PATH": path, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}


def in_shell(folder: Path, command: str) -> str:
    """What a command of the README says, in the checkout."""
    answer = subprocess.run(
        ["bash", "-c", command.replace("infra/local_site.py", f"infra/local_site.py --folder '{folder}'")],
        env=environment_of(folder), cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert answer.returncode == 0, f"{command}: exit status {answer.returncode}: {answer.stdout}"
    return answer.stdout


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.prefect
@pytest.mark.timeout(900)
def test_the_tour_of_the_readme(tmp_path: Path) -> None:
    """Command for command, but for the folder and the ports."""
    section = (ROOT / "README.md").read_text().partition("## Ten minutes")[2].partition("\n## ")[0]
    blocks = [block.replace("\\\n", " ") for block in section.split("```")[1::2]]
    commands = [line.strip() for block in blocks for line in block.splitlines() if line.strip()]
    assert commands.pop(0).startswith("make up ") and commands.pop(0).startswith("source .site/env ")
    assert commands.pop().startswith("make down ")
    folder = tmp_path / "site"

    def nightly_is_done() -> bool:
        images = in_shell(folder, 'maskmill query s3://tour/masks "SELECT count(*) FROM images" --format csv')
        return images.split()[-1] == "56" and in_shell(folder, "maskmill runs list s3://tour/masks").count("done") >= 2

    said: list[str] = []
    try:
        site(folder, "up", "--free-ports")
        mark = json.loads((folder / "site.json").read_text())["mark"]
        for command in commands:
            if "a minute later" in command:
                wait_until(nightly_is_done, timeout_s=300, what="the nightly", poll_s=3)
            said.append(in_shell(folder, command))
    finally:
        site(folder, "down")
    assert marked(mark) == []
    uploaded, deployed, by_hand, nuclei, _, _, flow_runs, runs = said
    assert "29 files are in s3://tour/photos" in uploaded and "segment-corpus/nightly" in deployed
    assert "Completed" in by_hand
    assert re.search(r"28\D+1,?0\d\d", nuclei), nuclei
    assert flow_runs.count("segment-corpus") >= 2 and "COMPLETED" in flow_runs
    assert runs.count("done") >= 2, runs


@pytest.fixture
def postgres() -> Iterator[str]:
    """The URL of a new, empty database, of a Postgres of this test's own."""
    found = shutil.which("pg_ctl")
    folders = [Path(found).resolve().parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not folders:
        pytest.skip("no Postgres: pg_ctl is neither on PATH nor below /usr/lib/postgresql")
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    # It refuses to be root's.
    user = "postgres" if os.getuid() == 0 else None
    if user:
        shutil.chown(folder, user)

    def command(program: str, *arguments: str) -> None:
        done = subprocess.run(
            [folders[-1] / program, *arguments], user=user, cwd=folder, env={"PGPASSWORD": "letters", "TZ": "UTC"},
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
        assert done.returncode == 0, (folder / "log").read_text()

    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    with (folder / "log").open("wb") as log:
        try:
            (folder / "password").write_text("letters")
            (folder / "password").chmod(0o644)
            command("initdb", "-D", "data", "-U", "prefect", "--auth=scram-sha-256", "--pwfile=password")
            options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder}"
            command("pg_ctl", "-D", "data", "-w", "-o", options, "start")
            try:
                command("createdb", "-h", "127.0.0.1", "-p", port, "-U", "prefect", "prefect")
                yield f"postgresql+asyncpg://prefect:letters@127.0.0.1:{port}/prefect"
            finally:
                command("pg_ctl", "-D", "data", "-m", "immediate", "stop")
        finally:
            shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.prefect
@pytest.mark.timeout(600)
def test_the_server_is_on_a_postgres_that_is_given(tmp_path: Path, postgres: str) -> None:
    folder, photos = tmp_path / "site", write_images(tmp_path / "photos", 3)
    given = {"PREFECT_SERVER_DATABASE_CONNECTION_URL": postgres}
    try:
        said = site(folder, "up", "--free-ports", environment=given)
        assert "on your database" in said
        mark = json.loads((folder / "site.json").read_text())["mark"]
        assert "letters" not in said + "".join(path.read_text() for path in (folder / "env", folder / "site.json"))
        in_shell(folder, f"python infra/local_site.py upload {photos} s3://tour/photos")
        in_shell(folder, "prefect --no-prompt deploy --all --prefect-file infra/prefect.yaml")
        run = "prefect deployment run segment-corpus/adhoc -p source=s3://tour/photos -p dest=s3://tour/masks"
        model = write_tiny_model(tmp_path / "tiny.safetensors")
        assert "Completed" in in_shell(folder, f"{run} -p model={model} --watch")
        kept = flow_runs(postgres)
        assert kept.count(("segment-corpus", "COMPLETED")) == 1 and ("segment-corpus", "SCHEDULED") in kept
        assert not list((folder / "prefect").glob("*.db"))

        # A server that was killed comes back on it, and not on one of its own.
        psutil.Process(json.loads((folder / "site.json").read_text())["processes"]["prefect-server"]["pid"]).kill()
        refused = site(folder, "up", status=1)
        assert "PREFECT_SERVER_DATABASE_CONNECTION_URL set: set it again" in refused
        assert "prefect-server  was gone" in site(folder, "up", environment=given)
        assert "segment-corpus" in in_shell(folder, "prefect flow-run ls")
    finally:
        site(folder, "down")
    assert marked(mark) == []
    assert ("segment-corpus", "COMPLETED") in flow_runs(postgres), "what is not the site's goes on"


def flow_runs(url: str) -> list[tuple[str, str]]:
    """Flow and state of every flow run in Prefect's database."""
    import asyncpg

    async def ask() -> list[tuple[str, str]]:
        connection = await asyncpg.connect(url.replace("+asyncpg", ""))
        try:
            found = await connection.fetch(
                "SELECT flow.name, state_type::text FROM flow_run JOIN flow ON flow.id = flow_run.flow_id"
            )
        finally:
            await connection.close()
        return [tuple(row) for row in found]

    return asyncio.run(ask())


@pytest.mark.slow
@pytest.mark.prefect
@pytest.mark.timeout(300)
def test_a_server_without_its_database_says_so(tmp_path: Path) -> None:
    url = "postgresql+asyncpg://nobody:secret@127.0.0.1:1/prefect"
    environment = {"PREFECT_SERVER_DATABASE_CONNECTION_URL": url}
    said = site(tmp_path / "site", "up", "--free-ports", status=1, environment=environment)
    assert "prefect-server does not come up" in said and "make down" in said
    assert "store ended" in site(tmp_path / "site", "down")
