"""The same command for half an hour on a store that fails, with its workers, nodes and drivers killed at random and
images that come, change and go meanwhile. Owns: chance, arrivals, kills and the verdict. Must not know: how rows are
counted (`accounts`), how the project works.

    make soak                       30 minutes; on Ceph where it is installed (see ceph.py), else on moto
    make soak ARGS="--minutes 3 --seed 7"

Some commands run on a Ray cluster of three nodes (`machines`), some on the local engine; each meets the store through
a proxy that breaks things (`faulty_store`). When one ends or was killed, the next begins. Beside them a `resident`
process segments a corpus of its own and is never killed: its memory is measured. At the end nothing arrives or breaks
any more, the command runs until it finds nothing to do, and then, from the files alone:

    lost 0 · duplicated 0 · rows that differ from an undisturbed run's 0 · leaked processes 0 · memory slopes 0

else the exit status is 1. `--seed` (or MASKMILL_CHAOS_SEED) repeats the choices, as far as the machine's scheduling
lets it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console
from rich.table import Table

# The root first: `tests` has a folder `pipeline`, too.
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

from chaos.accounts import Accounts, Slope, account, answers_of, download, slope
from chaos.ceph import CephStore, missing_programs
from chaos.faultproxy import FaultProxy
from chaos.faulty_store import FAULTS, proxy_environment
from chaos.machines import Machines
from harness import (
    SHAPE,
    SHAPE_FLAGS,
    Command,
    in_process,
    kill_all,
    marked,
    own_processes,
    part_count,
    ray_actors,
    runs,
    seeded_chance,
    write_images,
    write_tiny_model,
)

import pipeline

CONTENTS = 400
BROKEN = 12
FIRST_IMAGES = 200
ARRIVALS_PER_S = 2.0
RESIDENT_IMAGES = 32
RESIDENT_CHANGES_PER_S = 1.0
SHARD_SIZE = 4
FLAGS = (*SHAPE_FLAGS, "--shard-size", str(SHARD_SIZE), "--lease-ttl", "6", "--max-error-rate", "1")
#: Of the commands; the others run on the cluster.
LOCAL_SHARE = 0.3
EARLY_SHARE = 0.3
EARLY_S = 8.0
MEAN_S_BETWEEN_KILLS = 5.0
#: Of the kills, once a command has committed something; the others are of workers and nodes.
DRIVER_SHARE = 0.25
#: Nothing more arrives while so many images wait, more or less: a slow machine must come to its end, too.
MOST_WAITING = 300
#: A command that commits nothing for so long hangs. (On a machine with much else to do workers take minutes to come.)
HANG_S = 600.0
#: Memory is level where a slope of zero is within the line's 95 % interval, or the line gains less than such a share in
#: half an hour: of what is in use, which is the same turn by turn, and of what is resident, where allocators keep now
#: more, now less for later, for minutes on end.
USED_SHARE, RESIDENT_SHARE = 0.02, 0.05
_TELL_EVERY_S = 30.0
_LAST_COMMANDS = 6
_MIB = 1 << 20


class Moto:
    """An S3 store in memory, where Ceph is not installed."""

    ACCESS_KEY, SECRET_KEY = "test", "testtest"

    def __init__(self) -> None:
        from conftest import free_port

        self.port = free_port()
        self.endpoint = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Moto:
        server = Path(__file__).parents[1] / "s3_server.py"
        self._process = subprocess.Popen(
            [sys.executable, str(server), "-H", "127.0.0.1", "-p", str(self.port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(3.0)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


class Corpus:
    """Images of a prefix that come, change and go. Every content is one of `contents`, so that its answer is known."""

    def __init__(self, client: Any, uri: str, contents: dict[str, bytes], chance: random.Random) -> None:
        self.uri = uri
        self._client = client
        self._bucket, _, self._prefix = uri.removeprefix("s3://").partition("/")
        self._contents = contents
        self._names = list(contents)
        chance.shuffle(self._names)
        self._chance = chance
        self._next = 0
        self._keys: list[str] = []
        self.events: Counter[str] = Counter()

    def add(self) -> None:
        """A new image."""
        name = self._draw()
        key = f"{self.events['new']:06d}{Path(name).suffix}"
        self._put(key, name)
        self._keys.append(key)
        self.events["new"] += 1

    def change(self) -> None:
        """Other bytes under a name that is there."""
        self._put(self._chance.choice(self._keys), self._draw())
        self.events["changed"] += 1

    def remove(self) -> None:
        """An image goes."""
        key = self._keys.pop(self._chance.randrange(len(self._keys)))
        self._client.delete_object(Bucket=self._bucket, Key=f"{self._prefix}/{key}")
        self.events["deleted"] += 1

    def anything(self) -> None:
        """One of the three."""
        self._chance.choices([self.add, self.change, self.remove], [60, 25, 15])[0]()

    @property
    def written(self) -> int:
        """Images that were put, changed ones again."""
        return self.events["new"] + self.events["changed"]

    def listing(self) -> dict[str, str]:
        """Etags by URI, as the store has them."""
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=f"{self._prefix}/")
        return {
            f"s3://{self._bucket}/{found['Key']}": found["ETag"].strip('"')
            for page in pages
            for found in page.get("Contents", [])
        }

    def _draw(self) -> str:
        self._next += 1
        return self._names[self._next % len(self._names)]

    def _put(self, key: str, name: str) -> None:
        self._client.put_object(Bucket=self._bucket, Key=f"{self._prefix}/{key}", Body=self._contents[name])


@contextmanager
def arrivals(changes: list[tuple[Any, float]]) -> Iterator[None]:
    """Calls each function so many times a second, from threads of their own."""
    ends = threading.Event()

    def repeat(change: Any, per_s: float) -> None:
        while not ends.wait(1.0 / per_s):
            change()

    threads = [threading.Thread(target=repeat, args=one, daemon=True) for one in changes]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ends.set()
        for thread in threads:
            thread.join(30)


def make_contents(folder: Path, chance: random.Random) -> dict[str, bytes]:
    """Images by name, some of them broken."""
    write_images(folder, CONTENTS, side_px=192)
    contents = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    for number, name in enumerate(chance.sample(sorted(contents), BROKEN)):
        data = contents[name]
        contents[name] = [data[: len(data) // 2], b"no image " * (number + 1), data[:40] + bytes(number)][number % 3]
        (folder / name).write_bytes(contents[name])
    return contents


class Siege:
    """The commands and what is done to them."""

    def __init__(self, chance: random.Random, machines: Machines, mark: str, parts: Any) -> None:
        self._chance = chance
        self._machines = machines
        self._mark = mark
        self.parts = parts
        self.kills: Counter[str] = Counter()
        self.ends: Counter[str] = Counter()
        self.unexpected: list[str] = []
        #: Last words of commands that the store's bad day has ended.
        self.reasons: list[str] = []
        self.longest_wait_s = 0.0
        #: Called every moment.
        self.tell: Callable[[], None] = lambda: None
        self._progress = (0, time.monotonic())

    @property
    def commands(self) -> int:
        """How many have ended, one way or the other."""
        return self.ends.total() + self.kills["driver"]

    def live(self, arguments: tuple[str, ...], until_s: float) -> None:
        """One command, from its start to its end or its violent death."""
        local = self._chance.random() < LOCAL_SHARE
        engine = ("local",) if local else ("ray", "--ray-address", self._machines.address)
        command = Command(*arguments, "--engine", *engine)
        began_s, first_parts = time.monotonic(), self.parts()
        self._progress = (first_parts, began_s)
        early_s = began_s + self._chance.uniform(0, EARLY_S) if self._chance.random() < EARLY_SHARE else math.inf
        due_s = math.inf
        reader = Reader(command)
        while command.process.poll() is None:
            now_s = time.monotonic()
            if now_s > early_s or now_s > until_s:
                self._kill_driver(command)
                break
            self._watch(command, now_s)
            self.tell()
            if due_s == math.inf and self._progress[0] > first_parts:
                due_s = now_s + self._chance.expovariate(1 / MEAN_S_BETWEEN_KILLS)
            if now_s > due_s:
                if self._chance.random() < DRIVER_SHARE:
                    self._kill_driver(command)
                    break
                self._kill_worker(local)
                due_s = time.monotonic() + self._chance.expovariate(1 / MEAN_S_BETWEEN_KILLS)
            time.sleep(0.25)
        else:
            self._judge(command, reader.text())
        reader.text()

    def _watch(self, command: Command, now_s: float) -> None:
        parts = self.parts()
        if parts != self._progress[0]:
            self._progress = (parts, now_s)
        waited_s = now_s - self._progress[1]
        self.longest_wait_s = max(self.longest_wait_s, waited_s)
        if waited_s > HANG_S:
            self.unexpected.append(f"no Part for {waited_s:.0f} s from a command that goes on: taken for hung")
            self._kill_driver(command)

    def _kill_driver(self, command: Command) -> None:
        command.process.kill()
        command.process.wait()
        self.kills["driver"] += 1

    def _kill_worker(self, local: bool) -> None:
        """One of those that are there; nobody where all are still coming."""
        if local:
            there = [process for process in marked(self._mark) if runs(process, "pipeline.engine.crew")]
            kind = "local worker"
        elif self._chance.random() < 0.5:
            nodes = self._machines.at_work()
            if nodes:
                self._machines.kill(self._chance.choice(nodes))
                self.kills["node"] += 1
            return
        else:
            there, kind = ray_actors(self._mark), "actor"
        if there:
            kill_all(self._chance.sample(there, 1))
            self.kills[kind] += 1

    def _judge(self, command: Command, text: str) -> None:
        status = command.process.returncode
        self.ends[f"exit {status}"] += 1
        if status == 1:
            self.reasons.append(text.strip().rpartition("\n")[2][:300])
        # 1: the world failed, and it does here.
        if status not in (0, 1) or "Traceback" in text:
            self.unexpected.append(f"exit {status}: {text[-1500:]}")


class Reader:
    """Both outputs of a command, read as they come: a full pipe would stop it. `outcome` of stdout."""

    def __init__(self, command: Command) -> None:
        self._parts: dict[str, str] = {}
        self._threads = [
            threading.Thread(target=self._read, args=(name, getattr(command.process, name)), daemon=True)
            for name in ("stdout", "stderr")
        ]
        for thread in self._threads:
            thread.start()

    def _read(self, name: str, pipe: Any) -> None:
        self._parts[name] = pipe.read()

    def text(self) -> str:
        """What went to stderr, once the command and those that share its pipe have ended (10 s at most)."""
        for thread in self._threads:
            thread.join(10)
        return self._parts.get("stderr", "")


class Resident:
    """The process that is never killed, and its figures."""

    def __init__(self, source: str, dest: str, model: Path) -> None:
        self.dest = dest
        self.turns: list[dict[str, Any]] = []
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("resident.py")), source, dest, str(model)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._errors: list[str] = []
        self._threads = [threading.Thread(target=self._read, daemon=True), threading.Thread(target=self._read_errors)]
        for thread in self._threads:
            thread.start()

    def _read(self) -> None:
        for line in self._process.stdout or ():
            self.turns.append(json.loads(line))

    def _read_errors(self) -> None:
        self._errors = list(self._process.stderr or ())

    def wait_for_a_quiet_turn(self, limit_s: float = 240.0) -> bool:
        """Whether, from now on, it soon finds nothing to do twice in a row."""
        seen, deadline_s = len(self.turns), time.monotonic() + limit_s
        while time.monotonic() < deadline_s and self._process.poll() is None:
            late = self.turns[seen + 1 :]
            if any(not a["planned"] and not a["failed"] and not b["planned"] and not b["failed"]
                   for a, b in itertools.pairwise(late)):  # fmt: skip
                return True
            time.sleep(0.5)
        return False

    def end(self) -> str:
        """What it said besides, if it ended badly."""
        if self._process.stdin:
            self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return "it did not end when told to"
        for thread in self._threads:
            thread.join(10)
        return "".join(self._errors)[-2000:] if self._process.returncode else ""

    def slope(self, figure: str) -> Slope | None:
        """Of its memory after each turn."""
        if len(self.turns) < 9:
            return None
        return slope([turn["at_s"] for turn in self.turns], [turn[figure] for turn in self.turns])


class Verdict:
    """The table at the end."""

    def __init__(self) -> None:
        self._table = Table("what", "counted", "must be", "", title="soak", title_justify="left")
        self.failed = 0

    def must(self, what: str, faults: Sequence[str], number: int | None = None) -> None:
        """There must be none. `faults`: the first of them are shown; `number` of all."""
        number = len(faults) if number is None else number
        self._line(what, f"{number:,}", "0", number == 0)
        for fault in faults[:5]:
            print(f"{what}: {fault}")

    def tell(self, what: str, figure: str) -> None:
        """A figure that is not judged."""
        self._table.add_row(what, figure, "", "")

    def of(self, name: str, counts: Accounts) -> None:
        """The accounts of a table."""
        figures = f"{counts.rows:,}; {counts.terminal:,}; {counts.closed_runs:,}"
        self.tell(f"{name}: rows; terminal; closed runs", figures)
        self.tell(f"{name}: errors by kind", _listed(counts.error_kinds))
        for what in ("lost", "duplicated", "unaccounted", "different"):
            examples = [text for text in counts.examples if text.startswith(what)]
            self.must(f"{name}: {what}", examples, getattr(counts, what))

    def level(self, what: str, line: Slope | None, *, most_share: float) -> None:
        """Memory must not grow: see USED_SHARE."""
        if line is None:
            self._line(what, "too few samples", "0", False)
            return
        fine = line.lowest_bytes_per_min <= 0 or line.bytes_per_min * 30 <= most_share * line.median_bytes
        self._line(what, line.text, f"0, or under {most_share:.0%} in 30 min", fine)

    def show(self) -> None:
        Console(width=150).print(self._table)

    def _line(self, what: str, figure: str, wanted: str, fine: bool) -> None:
        self._table.add_row(what, figure, wanted, "ok" if fine else "FAILED")
        self.failed += not fine


def soak(minutes: float, store_name: str) -> int:
    """The exit status."""
    chance = seeded_chance()
    with ExitStack() as stack:
        # The store's processes are not to be taken for ours: it starts before the mark.
        store: Any = stack.enter_context(CephStore() if store_name == "ceph" else Moto())
        mark = stack.enter_context(own_processes())
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-", dir="/tmp")))
        verdict = Verdict()
        verdict.tell("store, minutes of faults and kills", f"{store_name}, {minutes:g}")
        _Soak(store, chance, mark, home).run(minutes, stack, verdict)
        verdict.show()
        return min(verdict.failed, 1)


class _Soak:
    """Two corpora, `many` for the commands that are killed and `few` for the resident, and their tables."""

    def __init__(self, store: Any, chance: random.Random, mark: str, home: Path) -> None:
        import boto3

        self._store = store
        self._chance = chance
        self._mark = mark
        self._home = home
        self._began_s = time.monotonic()
        self._model = write_tiny_model(home / "tiny.safetensors", task="instance")
        self._client = boto3.client(
            "s3",
            endpoint_url=store.endpoint,
            region_name="us-east-1",
            aws_access_key_id=store.ACCESS_KEY,
            aws_secret_access_key=store.SECRET_KEY,
        )
        self._dests = {name: f"s3://soak/masks/{name}" for name in ("many", "few")}
        self._requests = 0
        self._head_rss: dict[str, list[tuple[float, float]]] = {}

    def run(self, minutes: float, stack: ExitStack, verdict: Verdict) -> None:
        """All of it. What `stack` is given ends with the soak."""
        contents = make_contents(self._home / "contents", self._chance)
        answers = self._undisturbed(contents)
        corpora = self._upload(contents)
        proxy = stack.enter_context(FaultProxy(self._store.port, seed=self._chance.getrandbits(32)))
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in proxy_environment(proxy.port, self._store.ACCESS_KEY, self._store.SECRET_KEY).items():
            patch.setenv(name, value)
        machines = Machines(self._mark)
        stack.callback(machines.close)
        resident = Resident(corpora["few"].uri, self._dests["few"], self._model)
        stack.callback(resident.end)
        for kind, settings in FAULTS:
            proxy.inject(kind, **settings)

        siege = Siege(self._chance, machines, self._mark, lambda: part_count(self._dests["many"], self._client))
        arguments = (corpora["many"].uri, self._dests["many"], "--model", str(self._model), *FLAGS)
        until_s = time.monotonic() + 60 * minutes

        def arrive() -> None:
            if corpora["many"].written - SHARD_SIZE * siege.parts() < MOST_WAITING:
                corpora["many"].anything()

        changes = [(arrive, ARRIVALS_PER_S), (corpora["few"].change, RESIDENT_CHANGES_PER_S)]
        with arrivals(changes):
            self._besiege(siege, arguments, until_s, machines, proxy, resident)
        hits, self._requests = dict(proxy.hits), self._requests + len(proxy.requests)
        proxy.clear()
        self._say("nothing arrives or breaks any more")

        commands = siege.commands + self._finish(siege, arguments, machines)
        quiet = resident.wait_for_a_quiet_turn()
        said = resident.end()
        folders = [path.name for path in Path(os.environ["TMPDIR"]).glob("maskmill-*")]
        leaked = _leaks(self._mark)
        machines.close()
        leaked += [_name(process) for process in _after_a_while(lambda: marked(self._mark))]

        verdict.tell("commands; kills", f"{commands}; {_listed(siege.kills)}")
        verdict.tell("ends of those not killed", _listed(siege.ends))
        for reason, count in Counter(siege.reasons).most_common():
            print(f"exit 1, {count} times: {reason}")
        verdict.tell("requests; struck", f"{self._requests:,}; {sum(hits.values()):,}")
        verdict.tell("struck by", _listed(hits))
        verdict.tell("images of many", _listed(corpora["many"].events))
        verdict.tell("longest wait for a Part", f"{siege.longest_wait_s:.0f} s")
        for name, corpus in corpora.items():
            folder = download(self._client, self._dests[name], self._home / name)
            verdict.of(name, account(folder, corpus.listing(), answers))
        self._verify(verdict)
        verdict.must("unexpected ends", siege.unexpected)
        verdict.must("leaked processes", leaked)
        verdict.must("scratch folders left", folders)
        turns = f"{len(resident.turns)}, {sum(bool(turn['failed']) for turn in resident.turns)}"
        verdict.tell("resident: turns, failed by the store", turns)
        verdict.must("resident: ended badly", [said] if said else [] if quiet else ["it always finds something to do"])
        verdict.level("resident: memory in use", resident.slope("used_bytes"), most_share=USED_SHARE)
        verdict.level("resident: memory resident", resident.slope("rss_bytes"), most_share=RESIDENT_SHARE)
        for name, samples in self._head_rss.items():
            if len(samples) >= 9:
                line = slope([at_s for at_s, _ in samples], [rss for _, rss in samples])
                verdict.tell(f"memory of Ray's {name}", line.text)

    def _say(self, text: str) -> None:
        print(f"{time.monotonic() - self._began_s:7.0f} s  {text}", flush=True)

    def _undisturbed(self, contents: dict[str, bytes]) -> Any:
        with in_process():
            pipeline.segment(
                source=str(self._home / "contents"),
                dest=str(self._home / "calm"),
                model=str(self._model),
                engine="local",
                shard_size=50,
                max_error_rate=1.0,
                **SHAPE,
            )
        self._say(f"the undisturbed run: {len(contents)} images, {BROKEN} of them broken")
        return answers_of(self._home / "calm", contents)

    def _upload(self, contents: dict[str, bytes]) -> dict[str, Corpus]:
        self._client.create_bucket(Bucket="soak")
        corpora = {}
        for name, number in (("many", FIRST_IMAGES), ("few", RESIDENT_IMAGES)):
            chance = random.Random(self._chance.getrandbits(32))
            corpora[name] = Corpus(self._client, f"s3://soak/photos/{name}", contents, chance)
            for _ in range(number):
                corpora[name].add()
        return corpora

    def _besiege(self, siege: Siege, arguments: tuple[str, ...], until_s: float, *beside: Any) -> None:
        """One command after the other."""
        machines, proxy, resident = beside
        head = {name: psutil.Process(pid) for name, pid in machines.head_processes().items()}
        told_s = time.monotonic()

        def tell() -> None:
            nonlocal told_s
            if time.monotonic() - told_s < _TELL_EVERY_S:
                return
            told_s = time.monotonic()
            self._requests += len(proxy.requests)
            proxy.requests.clear()
            for name, process in head.items():
                sample = (time.monotonic() - self._began_s, float(process.memory_info().rss))
                self._head_rss.setdefault(name, []).append(sample)
            rss = resident.turns[-1]["rss_bytes"] / _MIB if resident.turns else 0
            self._say(
                f"{siege.commands} commands, kills {_listed(siege.kills)}, ends {_listed(siege.ends)}, "
                f"{siege.parts()} Parts, resident: {len(resident.turns)} turns, {rss:.0f} MiB"
            )

        siege.tell = tell
        while time.monotonic() < until_s:
            siege.live(arguments, until_s)

    def _finish(self, siege: Siege, arguments: tuple[str, ...], machines: Machines) -> int:
        """The command until it finds nothing to do; how often that was."""
        for number in range(1, _LAST_COMMANDS + 1):
            command = Command(*arguments, "--engine", "ray", "--ray-address", machines.address)
            out, err = command.process.communicate(timeout=1800)
            if command.process.returncode:
                siege.unexpected.append(f"exit {command.process.returncode} on a calm sea: {err[-1500:]}")
            elif json.loads(out)["planned"] == 0:
                return number
        siege.unexpected.append(f"{_LAST_COMMANDS} commands in a row found something to do")
        return _LAST_COMMANDS

    def _verify(self, verdict: Verdict) -> None:
        """The project's own audit must agree."""
        done = subprocess.run(
            [sys.executable, "-m", "pipeline.cli", "verify", self._dests["many"], "--deep"],
            capture_output=True,
            text=True,
            check=False,
        )
        verdict.must("maskmill verify --deep", [done.stdout[-2000:] + done.stderr[-500:]] if done.returncode else [])


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{what} {count:,}" for what, count in sorted(counts.items())) or "none"


def _leaks(mark: str) -> list[str]:
    """Maskmill's own processes that are there though no command is."""

    def there() -> list[psutil.Process]:
        return [p for p in marked(mark) if runs(p, "pipeline.") or runs(p, "ray::Host") or runs(p, "resident.py")]

    return [_name(process) for process in _after_a_while(there)]


def _after_a_while(there: Any, limit_s: float = 30.0) -> list[psutil.Process]:
    deadline_s = time.monotonic() + limit_s
    while (found := there()) and time.monotonic() < deadline_s:
        time.sleep(0.2)
    return list(found)


def _name(process: psutil.Process) -> str:
    try:
        return f"{process.pid} {' '.join(process.cmdline())[:200]}"
    except psutil.Error:
        return f"{process.pid}, gone meanwhile"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Segment under fire; see the head of this file.")
    parser.add_argument("--minutes", type=float, default=30.0, help="how long things break (default 30)")
    parser.add_argument("--seed", type=int, help="repeats the choices of an earlier soak")
    parser.add_argument("--store", choices=("auto", "ceph", "moto"), default="auto")
    given = parser.parse_args()
    for interruption in (signal.SIGINT, signal.SIGTERM):  # in the background the first is ignored
        signal.signal(interruption, signal.default_int_handler)
    if given.seed is not None:
        os.environ["MASKMILL_CHAOS_SEED"] = str(given.seed)
    store_name = given.store
    if store_name == "auto":
        store_name = "moto" if missing_programs() else "ceph"
        if store_name == "moto":
            print(f"Ceph is not installed ({', '.join(missing_programs())}): an S3 store in memory (moto) stands in")
    sys.exit(soak(given.minutes, store_name))


if __name__ == "__main__":
    main()
