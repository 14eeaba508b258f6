"""Whole runs on a real S3 store, Ceph's RADOS gateway, behind a proxy that breaks things, with drivers killed as well.

Skipped where Ceph is not installed: `apt-get install -y --no-install-recommends ceph-mon ceph-osd radosgw ceph-common`.
`MASKMILL_CHAOS_SEED` repeats a sequence of choices (which request is struck depends on their order besides).
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
from chaos.ceph import CephStore, missing_programs
from chaos.faultproxy import FaultProxy
from chaos.faulty_store import FAULTS, proxy_environment
from harness import SHAPE_FLAGS, Case, Command, own_processes, part_count, seeded_chance, terminal_rows, upload

import pipeline
from pipeline.engine.ledger import Ledger
from pipeline.engine.run import abandon
from pipeline.storage import open_storage

pytestmark = [
    pytest.mark.slow,
    pytest.mark.s3,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        bool(missing_programs()),
        reason=f"Ceph is not installed: no {', '.join(missing_programs())} (see chaos/ceph.py)",
    ),
]

IMAGES = 160
SHARD_SIZE = 2
SHARDS = IMAGES // SHARD_SIZE
KILLS = 6
FLAGS = ("--engine", "local", *SHAPE_FLAGS, "--shard-size", str(SHARD_SIZE), "--lease-ttl", "6")


class Place(NamedTuple):
    """A bucket with the corpus in it: `client` reaches the store itself, the environment leads to the proxy."""

    proxy: FaultProxy
    client: Any
    bucket: str
    source: str
    dest: str
    chance: random.Random

    def parts(self) -> int:
        return part_count(self.dest, self.client)

    def break_things(self) -> None:
        for kind, settings in FAULTS:
            self.proxy.inject(kind, **settings)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("case"), IMAGES)


@pytest.fixture(scope="module")
def ceph() -> Iterator[CephStore]:
    with CephStore() as store:
        yield store


@pytest.fixture
def place(ceph: CephStore, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    import boto3

    chance = seeded_chance()
    client = boto3.client(
        "s3",
        endpoint_url=ceph.endpoint,
        region_name="us-east-1",
        aws_access_key_id=ceph.ACCESS_KEY,
        aws_secret_access_key=ceph.SECRET_KEY,
    )
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    client.create_bucket(Bucket=bucket)
    source = upload(client, case.images, f"s3://{bucket}/photos")
    with FaultProxy(ceph.port, seed=chance.getrandbits(32)) as proxy:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)
        environment = proxy_environment(proxy.port, ceph.ACCESS_KEY, ceph.SECRET_KEY)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with own_processes():
            yield Place(proxy, client, bucket, source, f"s3://{bucket}/masks", chance)


def _command(case: Case, place: Place, *more: str, source: str | None = None) -> Command:
    return Command(source or place.source, place.dest, "--model", case.model, *FLAGS, *more)


def _hits(place: Place) -> dict[str, int]:
    hits = dict(place.proxy.hits)
    place.proxy.clear()
    return hits


def test_faults_and_killed_drivers(case: Case, place: Place) -> None:
    began_s, killed_at = time.monotonic(), []
    place.break_things()
    for kills_left in range(KILLS, 0, -1):
        before = place.parts()
        target = before + place.chance.randint(1, max(1, (SHARDS - 1 - before) // (kills_left + 1)))
        command = _command(case, place)
        command.until(lambda target=target: place.parts() >= target, what=f"{target} Parts", poll_s=0.02)
        command.kill()
        killed_at.append(place.parts())
    outcome = _command(case, place).outcome(timeout_s=400)
    requests = len(place.proxy.requests)
    hits = _hits(place)
    assert set(hits) == {kind for kind, _ in FAULTS}
    assert outcome["errors"] == 0
    rows = terminal_rows(place.dest)
    print(
        f"{KILLS} kills at {killed_at} of {SHARDS} Parts, {sum(hits.values())} of {requests} requests struck {hits}, "
        f"{len(rows)} rows, {time.monotonic() - began_s:.0f} s"
    )
    assert rows == case.calm
    assert _command(case, place).outcome()["planned"] == 0


def test_the_same_command_thrice_at_once(case: Case, place: Place) -> None:
    began_s = time.monotonic()
    place.break_things()
    patient = [_command(case, place, "--wait") for _ in range(2)]
    hasty = _command(case, place)
    for command in patient:
        assert command.outcome(timeout_s=400)["errors"] == 0
    _, err = hasty.process.communicate(timeout=400)
    assert hasty.process.returncode == 0 or (hasty.process.returncode == 2 and "is being worked on" in err), err
    print(
        f"faults {_hits(place)}, the hasty one: status {hasty.process.returncode}, {time.monotonic() - began_s:.0f} s"
    )
    assert terminal_rows(place.dest) == case.calm


@pytest.mark.parametrize("nightly_lives", [False, True], ids=["nightly is open", "nightly is running"])
def test_an_ad_hoc_run_beside_the_nightly(case: Case, place: Place, nightly_lives: bool) -> None:
    began_s = time.monotonic()
    place.break_things()
    if nightly_lives:  # long enough to be there when the other plans
        place.proxy.inject("latency", match=r"GET /[^?]*/photos/", seconds=0.5)
    nightly = _command(case, place)
    nightly.until(lambda: place.parts() >= 3, what="three Parts", poll_s=0.02)
    if not nightly_lives:
        nightly.kill()
    assert place.parts() < SHARDS
    names = sorted(case.calm)
    new = {f"003{n}-new.png": names[n] for n in range(5)}
    for key, original in new.items():
        body = (case.images / original).read_bytes()
        place.client.put_object(Bucket=place.bucket, Key=f"photos/{key}", Body=body)

    adhoc = _command(case, place, source=f"{place.source}/003*").outcome(timeout_s=400)
    assert adhoc["images"] == len(new) + 10 and adhoc["errors"] == 0
    assert adhoc["planned"] == len(new) and adhoc["held"] + adhoc["skipped"] == 10
    if nightly_lives:
        assert nightly.outcome(timeout_s=400)["errors"] == 0
    last = _command(case, place).outcome(timeout_s=400)
    assert last["errors"] == 0
    print(f"faults {_hits(place)}, held {adhoc['held']}, {time.monotonic() - began_s:.0f} s")
    expected = case.calm | {key: case.calm[original] for key, original in new.items()}
    assert terminal_rows(place.dest) == expected
    assert _command(case, place).outcome()["planned"] == 0


def test_the_late_workers_of_an_abandoned_run_add_nothing(case: Case, place: Place) -> None:
    late = _command(case, place)
    late.until(lambda: place.parts() >= 3, what="three Parts", poll_s=0.02)
    everyone = [psutil.Process(late.pid), *late.family()]
    for process in everyone:
        process.send_signal(signal.SIGSTOP)
    assert place.parts() < SHARDS
    ledger = Ledger(open_storage(place.dest), place.dest)
    (plan,) = ledger.open_plans()
    record = abandon(ledger, plan, ttl_s=2.0)
    assert record.state == "abandoned" and 0 < record.ok < IMAGES

    place.break_things()
    for process in everyone:
        process.send_signal(signal.SIGCONT)
    outcome = _command(case, place).outcome(timeout_s=400)
    late.process.communicate(timeout=400)
    hits = _hits(place)
    assert late.process.returncode in (0, 1)
    assert outcome["ok"] == outcome["planned"] == IMAGES - record.ok
    counts = pipeline.connect(place.dest).execute("SELECT run_id, count(*) FROM segments GROUP BY 1").fetchall()
    assert dict(counts) == {plan.run_id: record.ok, outcome["run_id"]: IMAGES - record.ok}
    print(f"abandoned at {record.ok} rows, the late driver ended with status {late.process.returncode}, faults {hits}")
    assert terminal_rows(place.dest) == case.calm


def test_a_create_only_write_has_one_winner(place: Place) -> None:
    writers, names = 6, 40
    place.proxy.inject("reset_after", probability=0.4, match="PUT ")
    place.proxy.inject("reset_before", probability=0.1)
    place.proxy.inject("unavailable", probability=0.1)
    stores = [open_storage(place.dest) for _ in range(writers)]
    barrier = threading.Barrier(writers)

    def write(writer: int) -> list[bool]:
        won = []
        for n in range(names):
            barrier.wait()
            won.append(stores[writer].put_new(f"{place.dest}/race/{n}", b"%d" % writer * 1000))
        return won

    with ThreadPoolExecutor(writers) as pool:
        won = list(pool.map(write, range(writers)))
    hits = _hits(place)
    owners: Counter[str] = Counter()
    for n in range(names):
        data = stores[0].get(f"{place.dest}/race/{n}").data
        winners = [writer for writer in range(writers) if won[writer][n]]
        assert data in [b"%d" % writer * 1000 for writer in range(writers)]
        # A winner whose answer was lost is told "already there", which is success too: then nobody is told that he won.
        assert winners in ([], [int(data[:1])])
        assert not stores[0].put_new(f"{place.dest}/race/{n}", b"late")
        assert stores[0].get(f"{place.dest}/race/{n}").data == data
        owners["told" if winners else "never told"] += 1
    assert len(owners) == 2, f"chance failed to strike: {owners}"
    print(f"{names} names, {writers} writers each, winners {dict(owners)}, faults {hits}")
