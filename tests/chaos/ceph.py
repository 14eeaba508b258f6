"""Ceph's RADOS gateway as a real S3 store of the tests' own: one monitor, one OSD, one gateway, on loopback only.
Owns: their configuration, start, health and end. Must not know: what is stored, faults, the project.

Needs Ceph's daemons, version 16 or newer, and no privileges beyond a folder. On Debian and Ubuntu:

    apt-get install -y --no-install-recommends ceph-mon ceph-osd radosgw ceph-common

    with CephStore() as store:
        ...                 # S3 at store.endpoint, path style, keys CephStore.ACCESS_KEY and CephStore.SECRET_KEY

Starting takes 10 to 30 s. Nothing is replicated and there is no manager daemon, so `ceph health` warns. The data goes
away with `stop`.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path

_PROGRAMS = ("ceph", "ceph-mon", "ceph-osd", "ceph-authtool", "monmaptool", "radosgw", "radosgw-admin")
_START_LIMIT_S = 240.0
_CONFIGURATION = """
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{mon_port},v1:127.0.0.1:{mon_v1_port}]
mon initial members = a
public addr = 127.0.0.1
public network = 127.0.0.0/8
ms bind ipv4 = true
ms bind ipv6 = false
keyring = {folder}/keyring
auth allow insecure global id reclaim = false
mon data avail warn = 2
mon data avail crit = 1
mon allow pool size one = true
mon warn on pool no redundancy = false
mon max pg per osd = 1000
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pgp num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
run dir = {folder}/run
pid file = {folder}/run/$name.pid
admin socket = {folder}/run/$name.asok
crash dir = {folder}/run
log file = {folder}/log/$name.log
mon data = {folder}/mon
osd data = {folder}/osd
[osd]
osd objectstore = bluestore
bluestore block size = 8589934592
bluestore block create = true
bluestore cache autotune = false
bluestore cache size = 67108864
osd memory target = 939524096
[client.rgw.a]
rgw frontends = beast endpoint=127.0.0.1:{port}
rgw data = {folder}/run
rgw thread pool size = 64
rgw run sync thread = false
rgw enable usage log = false
rgw enable apis = s3, admin
rgw dynamic resharding = false
"""


def missing_programs() -> list[str]:
    """Ceph's programs that this machine lacks."""
    return [name for name in _PROGRAMS if shutil.which(name) is None]


class CephStore:
    """One store with one user, in a folder of its own. A context manager; starts once."""

    ACCESS_KEY = "test"
    SECRET_KEY = "testtest"

    def __init__(self) -> None:
        # Not pytest's folder: the path of a Unix socket has 107 characters at most.
        self._folder = Path(tempfile.mkdtemp(prefix="ceph-"))
        self.port, self._mon_port, self._mon_v1_port = _free_ports(3)
        self._daemons: list[subprocess.Popen[bytes]] = []

    @property
    def endpoint(self) -> str:
        """Where S3 is."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> CephStore:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Returns once the gateway answers. Raises RuntimeError with the end of the log of what failed."""
        for name in ("mon", "osd", "run", "log"):
            (self._folder / name).mkdir()
        fsid = str(uuid.uuid4())
        text = _CONFIGURATION.format(
            fsid=fsid, folder=self._folder, port=self.port, mon_port=self._mon_port, mon_v1_port=self._mon_v1_port
        )
        self._configuration.write_text(text)
        self._make_keys()
        address = f"[v2:127.0.0.1:{self._mon_port},v1:127.0.0.1:{self._mon_v1_port}]"
        self._do("monmaptool", "--create", "--clobber", "--addv", "a", address, "--fsid", fsid, self._folder / "monmap")
        self._do("ceph-mon", "-i", "a", "--mkfs", "--monmap", self._folder / "monmap")
        self._daemon("ceph-mon", "-i", "a")
        osd = str(uuid.uuid4())
        self._do("ceph", "osd", "new", osd)
        self._do("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
        self._daemon("ceph-osd", "-i", "0")
        self._wait_for("the OSD", self._osd_is_up)
        self._do(
            "radosgw-admin", "user", "create", "--uid", "test", "--display-name", "test",
            "--access-key", self.ACCESS_KEY, "--secret-key", self.SECRET_KEY,
        )  # fmt: skip
        self._daemon("radosgw", "-n", "client.rgw.a")
        self._wait_for("the gateway", self._gateway_answers)

    def stop(self) -> None:
        """Ends the daemons by their process ids and removes all data. Twice is fine."""
        for daemon in reversed(self._daemons):
            daemon.kill()
            daemon.wait()
        self._daemons = []
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def _configuration(self) -> Path:
        return self._folder / "ceph.conf"

    def _make_keys(self) -> None:
        keyring = self._folder / "keyring"
        self._do("ceph-authtool", "--create-keyring", keyring, "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
        for name in ("client.admin", "client.rgw.a", "osd.0"):
            caps = ("--cap", "mon", "allow *", "--cap", "osd", "allow *", "--cap", "mgr", "allow *")
            self._do("ceph-authtool", keyring, "--gen-key", "-n", name, *caps)

    def _do(self, program: str, *arguments: str | Path) -> str:
        own_tools = program in ("ceph-authtool", "monmaptool")
        configuration = [] if own_tools else ["-c", str(self._configuration)]
        done = subprocess.run(
            [program, *configuration, *map(str, arguments)],
            capture_output=True, text=True, timeout=_START_LIMIT_S, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{program} {arguments[0]} ended with status {done.returncode}: {done.stderr[-2000:]}")
        return done.stdout

    def _daemon(self, program: str, *arguments: str) -> None:
        with (self._folder / "log" / f"{program}.out").open("wb") as output:
            daemon = subprocess.Popen(
                [program, "-c", str(self._configuration), *arguments, "-f"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._daemons.append(daemon)

    def _wait_for(self, what: str, ready: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + _START_LIMIT_S
        while not ready():
            ended = [daemon.args for daemon in self._daemons if daemon.poll() is not None]
            if ended or time.monotonic() > deadline_s:
                logs = "\n".join(path.read_text()[-1500:] for path in sorted((self._folder / "log").glob("*.out")))
                raise RuntimeError(f"Ceph did not start, waiting for {what}; ended early: {ended}\n{logs}")
            time.sleep(0.1)

    def _osd_is_up(self) -> bool:
        return int(json.loads(self._do("ceph", "osd", "stat", "--format", "json"))["num_up_osds"]) == 1

    def _gateway_answers(self) -> bool:
        try:
            with urllib.request.urlopen(self.endpoint, timeout=5):
                return True
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()
