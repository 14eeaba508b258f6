"""Fixtures for all tests: a throwaway S3 server, buckets in it, and a proxy that breaks things."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

# Test modules have unique names and no packages; what they share is imported from here, such as
# chaos.faultproxy.
sys.path.insert(0, str(Path(__file__).parent))

from chaos.faultproxy import FaultProxy

_START_LIMIT_S = 60.0


#: Tests of the Prefect server are in one folder.
_ON_SERVER = "tests/flows/"


def _scope(nodeid: str) -> str:
    """What stays with one worker where several share the tests: a file, and all that need the Prefect server, which is
    started once then."""
    path = nodeid.partition("::")[0]
    return _ON_SERVER if path.startswith(_ON_SERVER) else path


# The groups of `--dist loadgroup` are not seen any more: xdist 3.8 writes them where pytest 9.2 does not read.
@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _scope(nodeid)

    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long comes first, or files with few long tests would be last and leave the other workers idle."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    sizes = Counter(_scope(item.nodeid) for item in items)
    on_ray = {_scope(item.nodeid) for item in items if item.get_closest_marker("ray")}

    def order(item: pytest.Item) -> tuple[bool, bool, int, str]:
        scope = _scope(item.nodeid)
        return scope != _ON_SERVER, scope not in on_ray, -sizes[scope], scope

    items.sort(key=order)


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def run_s3_server() -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The endpoint, `http://127.0.0.1:PORT`, and the process of an S3 server (moto: everything in memory)."""
    endpoint = ""
    process: subprocess.Popen[bytes] | None = None
    started_s = time.monotonic()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    while True:
        if process is None or process.poll() is not None:  # the port may have been taken meanwhile
            port = free_port()
            endpoint = f"http://127.0.0.1:{port}"
            process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("s3_server.py")), "-H", "127.0.0.1", "-p", str(port)],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment,
            )
        try:
            with urllib.request.urlopen(endpoint + "/moto-api/", timeout=2):
                break
        except OSError:
            if time.monotonic() - started_s > _START_LIMIT_S:
                process.kill()
                process.wait()
                pytest.fail("the S3 server did not start; is moto[server] installed?")
            time.sleep(0.05)
    try:
        yield endpoint, process
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The endpoint of an S3 server of this session's own."""
    with run_s3_server() as (endpoint, _):
        yield endpoint


@pytest.fixture
def stoppable_s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The endpoint and the process of an S3 server of this test's own, to which the environment leads."""
    with run_s3_server() as (endpoint, process):
        _use_endpoint(monkeypatch, endpoint)
        yield endpoint, process


def _use_endpoint(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    values = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "testtest",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def s3_environment(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Environment variables that lead every AWS tool to `s3_server`; gives its endpoint."""
    _use_endpoint(monkeypatch, s3_server)
    return s3_server


@pytest.fixture(scope="session")
def s3_client(s3_server: str) -> Any:
    """A boto3 client of `s3_server`, whatever the environment says: what other people's tools see."""
    import boto3

    return boto3.client(
        "s3",
        endpoint_url=s3_server,
        region_name="us-east-1",
        aws_access_key_id="test",
        aws_secret_access_key="testtest",
    )


@pytest.fixture
def s3_bucket(s3_environment: str, s3_client: Any) -> str:
    """`s3://bucket` of a fresh bucket, with the environment set for it."""
    bucket = f"test-{uuid.uuid4().hex[:16]}"
    s3_client.create_bucket(Bucket=bucket)
    return f"s3://{bucket}"


@pytest.fixture
def fault_proxy(s3_bucket: str, s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A FaultProxy before `s3_server`; from here on the environment leads every AWS tool to the proxy."""
    with FaultProxy(int(s3_server.rpartition(":")[2])) as proxy:
        _use_endpoint(monkeypatch, f"http://127.0.0.1:{proxy.port}")
        yield proxy
