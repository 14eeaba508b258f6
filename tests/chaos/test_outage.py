"""The store stands still: for a while, and for ever. It is a server that is really stopped, which takes connections and
answers none; the patience with it is that of a run, made shorter by `MASKMILL_STORAGE_TIMEOUT_S`."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from harness import SHAPE_FLAGS, Case, Command, own_processes, part_count, terminal_rows, upload

IMAGES = 24
FLAGS = ("--engine", "local", "--actors", "1", "--shard-size", "1", *SHAPE_FLAGS, "--lease-ttl", "4")

pytestmark = [pytest.mark.slow, pytest.mark.s3, pytest.mark.timeout(900)]


class Site(NamedTuple):
    """A corpus on a server that can be stopped."""

    source: str
    dest: str
    client: Any
    server: subprocess.Popen[bytes]

    def parts(self) -> int:
        return part_count(self.dest, self.client)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("case"), IMAGES)


@pytest.fixture
def site(case: Case, stoppable_s3: tuple[str, subprocess.Popen[bytes]]) -> Iterator[Site]:
    import boto3

    endpoint, server = stoppable_s3
    client = boto3.client("s3", endpoint_url=endpoint)
    client.create_bucket(Bucket="outage")
    source = upload(client, case.images, "s3://outage/photos")
    with own_processes():
        yield Site(source, "s3://outage/masks", client, server)
    server.send_signal(signal.SIGCONT)


def _stopped_in_the_middle(case: Case, site: Site, *, timeout_s: float) -> Command:
    """A command that has committed some Parts when the store stops."""
    environment = {"MASKMILL_STORAGE_TIMEOUT_S": str(timeout_s)}
    command = Command(site.source, site.dest, "--model", case.model, *FLAGS, environment=environment)
    command.until(lambda: site.parts() >= 3, what="three Parts", poll_s=0.02)
    assert site.parts() < IMAGES, "there was to be a middle"
    os.kill(site.server.pid, signal.SIGSTOP)
    return command


def test_for_a_while(case: Case, site: Site) -> None:
    command = _stopped_in_the_middle(case, site, timeout_s=10)
    time.sleep(60)  # six times the patience with one request
    assert command.process.poll() is None
    os.kill(site.server.pid, signal.SIGCONT)
    assert command.outcome(timeout_s=300)["ok"] == IMAGES
    assert terminal_rows(site.dest) == case.calm


def test_for_ever(case: Case, site: Site) -> None:
    command = _stopped_in_the_middle(case, site, timeout_s=0.5)
    began_s = time.monotonic()
    out, err = command.process.communicate(timeout=600)
    print(f"\ngave up after {time.monotonic() - began_s:.0f} s")
    assert (command.process.returncode, out) == (1, "")
    assert "Traceback" not in err and err.count("failed: ") == 1, err
    os.kill(site.server.pid, signal.SIGCONT)
    kept = site.parts()
    assert 3 <= kept < IMAGES
    again = Command(site.source, site.dest, "--model", case.model, *FLAGS)
    assert again.outcome(timeout_s=300)["ok"] == IMAGES
    assert terminal_rows(site.dest) == case.calm


def test_for_ever_from_the_start(case: Case, site: Site, tmp_path: Path) -> None:
    """Nothing was there yet, and nothing is left."""
    os.kill(site.server.pid, signal.SIGSTOP)
    command = Command(
        site.source, tmp_path / "dest", "--model", case.model, *FLAGS, environment={"MASKMILL_STORAGE_TIMEOUT_S": "0.5"}
    )
    out, err = command.process.communicate(timeout=600)
    assert (command.process.returncode, out) == (1, "")
    assert "Traceback" not in err and re.match(r"failed: could not \w+( at)? 's3://outage/photos", err), err
    assert not (tmp_path / "dest").exists()
