"""What 100 million images and 1,000 actors ask of one driver, with simulated actors; and what it all costs.

    python benchmarks/scale.py [--millions 100] [--actors 1000] [--shard-seconds 20] [--scratch DIR]
                               [--s3-millions 4] [--gpu-images-per-s 500] [--gpu-hour 1.0] ...

The driver's own code is real: planning over real Parts, freezing the list, cutting it into shards, the Fleet with all
its polling, and counting the rows of the Parts at the end. Simulated are the actors: a member answers as told by one
clock, after `--start-seconds` and then `--shard-seconds` a shard (both drawn between half and one and a half of it),
and a shard that is handed to it is pickled, as it would be on its way to another process. The driver sees as many
shards, calls and receipts as it would.

Each step is measured in a process of its own: seconds, CPU time, peak memory. Steps on S3 go to moto's server through a
proxy that counts requests, with fewer images, since that server keeps all in memory; requests grow with the Parts.

Costs are arithmetic on what was counted. All prices are options, and none is fetched.
"""

from __future__ import annotations

import argparse
import datetime as dt
import heapq
import itertools
import json
import os
import pickle
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1]))  # before the tests of `pipeline`, which lie in a folder of that name

import planning

from pipeline.engine.fleet import Fleet, FleetProgress
from pipeline.engine.ledger import Command, Ledger, Plan, WorkCounts
from pipeline.engine.messages import Device, Receipt, ShardTask, StreamConfig, StreamCounts, WorkerSpec
from pipeline.engine.plan import Question, choose_shard_size, shard_lists, work_left
from pipeline.engine.reconciliation import Session, reconcile
from pipeline.storage import open_storage

ROW_BYTES = 8 << 10
CORES_PER_NODE = 8


# ── actors that only say that they work ──────────────────────────────────────────────────────────────────────────────


class Clock:
    """Answers futures when they are due, from one thread, whose CPU time is not the driver's."""

    def __init__(self) -> None:
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self.cpu_s = 0.0
        threading.Thread(target=self._run, name="clock", daemon=True).start()

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        with self._changed:
            heapq.heappush(self._due, (time.monotonic() + seconds, next(self._numbers), action))
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._due or self._due[0][0] > time.monotonic():
                    self._changed.wait(self._due[0][0] - time.monotonic() if self._due else None)
                action = heapq.heappop(self._due)[2]
            action()
            self.cpu_s = time.thread_time()


class SimulatedMember:
    """One actor."""

    def __init__(self, crew: SimulatedCrew, number: int) -> None:
        self._crew = crew
        self._number = number
        self._rows = 0
        self._busy_until_s = 0.0

    def call(self, method: str, *args: Any) -> Future[Any]:
        crew = self._crew
        answer: Future[Any] = Future()
        crew.calls[method] += 1
        if method == "run":
            (task,) = args
            crew.sent_bytes += len(pickle.dumps(task))
            now_s = time.monotonic()
            self._busy_until_s = max(now_s, self._busy_until_s) + crew.draw(crew.shard_s)
            crew.clock.after(self._busy_until_s - now_s, lambda: answer.set_result(self._receipt(task)))
        elif method == "describe":
            device = Device(f"node-{self._number // CORES_PER_NODE}", "cuda:0", "simulated", True, CORES_PER_NODE, {})
            crew.clock.after(crew.draw(crew.start_s), lambda: answer.set_result(device))
        elif method == "load":
            crew.clock.after(crew.draw(crew.start_s / 10), lambda: answer.set_result(None))
        else:
            answer.set_result([] if method == "logged" else self._counts())
        return answer

    def _receipt(self, task: ShardTask) -> Receipt:
        self._rows += len(task.refs)
        return Receipt(task.ordinal, len(task.refs), len(task.refs) * ROW_BYTES, True, "node", self._counts())

    def _counts(self) -> StreamCounts:
        return StreamCounts(self._rows, 0, self._rows * 0.002, self._rows * 0.002)

    def stop(self) -> None:
        pass


class SimulatedCrew:
    """1,000 actors in one process."""

    label = "simulated"
    threads = 2
    has_gpus = True

    def __init__(self, actors: int, *, start_s: float, shard_s: float) -> None:
        self.default_actors = actors
        self.start_s, self.shard_s = start_s, shard_s
        self.clock = Clock()
        self.calls: Counter[str] = Counter()
        self.sent_bytes = 0
        self._random = random.Random(1)
        self._started = 0

    def draw(self, mean_s: float) -> float:
        return mean_s * self._random.uniform(0.5, 1.5)

    def start(self) -> SimulatedMember:
        self._started += 1
        return SimulatedMember(self, self._started)

    def share(self, model: bytes) -> bytes:
        return model

    def close(self) -> None:
        pass


# ── steps, each in a process of its own ──────────────────────────────────────────────────────────────────────────────


def plan_step(options: Any) -> dict[str, Any]:
    """The work left of a usual night: 1 % new, 1 % changed."""
    return planning.plan_once(options.folder, "usual", options.memory_bytes, dest=options.dest)


def first_step(options: Any) -> dict[str, Any]:
    """A first night: everything is left, and is listed."""
    storage = open_storage(options.dest + "-new")
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        listing = options.folder / "corpus.parquet"
        rows = pq.read_metadata(listing).num_rows
        question = Question(f"read_parquet('{listing}')", rows, True, {}, {}, planning.DIGEST)
        counts = work_left(
            question, storage, scratch=Path(scratch), list_path=options.folder / "work.parquet",
            memory_bytes=options.memory_bytes,
        )  # fmt: skip
    return {"planned": counts.planned}


def freeze_step(options: Any) -> dict[str, Any]:
    """The list of a first night, put beside its plan."""
    plan = first_plan(options)
    ledger = Ledger(open_storage(plan.dest), plan.dest)
    data = (options.folder / "work.parquet").read_bytes()
    assert ledger.freeze(plan, data)
    return {"bytes": len(data)}


def fleet_step(options: Any) -> dict[str, Any]:
    """All shards of a first night over simulated actors."""
    plan = first_plan(options)
    crew = SimulatedCrew(options.actors, start_s=options.start_seconds, shard_s=options.shard_seconds)
    fleet = Fleet(crew, actors=options.actors, should_stop=lambda: False, say=lambda text: None)
    receipts: list[float] = []
    seen: list[FleetProgress] = []
    spec = WorkerSpec(
        code_digest="", dest="", create_only=True, source_profile=None, dest_profile=None, model_name="bench",
        model_version=planning.VERSION, settings_digest=planning.DIGEST, run_id=plan.run_id, precision="bf16",
        threads=1, stream=StreamConfig(),
    )  # fmt: skip
    tasks = (
        ShardTask(ordinal, refs, plan.part_uri(ordinal))
        for ordinal, refs in shard_lists(plan, options.folder / "work.parquet", without=set())
    )
    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    fleet.load(spec, b"")
    fleet.run(
        tasks, shards=len(plan.bounds()), on_receipt=lambda receipt: receipts.append(time.perf_counter()),
        on_progress=seen.append,
    )  # fmt: skip
    seconds, cpu_s = time.perf_counter() - began_s, time.process_time() - began_cpu_s - crew.clock.cpu_s
    shards = len(plan.bounds())
    assert len(receipts) == shards and seen[-1].rows == plan.counts.planned
    # What the actors themselves needed at least, from the first start to the last shard.
    ideal_s = shards * options.shard_seconds / options.actors
    return {
        "shards": shards, "shard_size": plan.shard_size, "run_seconds": seconds, "driver_cpu_s": cpu_s,
        "first_receipt_s": receipts[0] - began_s, "calls": dict(crew.calls), "sent_bytes": crew.sent_bytes,
        "ideal_s": ideal_s,
    }  # fmt: skip


def list_step(options: Any) -> dict[str, Any]:
    """The list that the Parts of `planning.make_inputs` answer, where their run has it; what comes before the end."""
    path = options.folder / "listed.parquet"
    with duckdb.connect() as connection:
        connection.execute(
            "COPY (SELECT uri, etag, size_bytes, modified, 1::SMALLINT AS attempt "
            f"FROM read_parquet('{options.folder / 'corpus.parquet'}')) TO '{path}' (FORMAT parquet, COMPRESSION zstd)"
        )
    storage = open_storage(options.dest)
    storage.put(Ledger(storage, options.dest).uri(planning.RUN_ID, "manifest.parquet"), path.read_bytes())
    return {}


def reconcile_step(options: Any) -> dict[str, Any]:
    """The rows of all Parts counted against the frozen list, as a run ends."""
    plan = first_plan(options).model_copy(
        update={"dest": options.dest, "run_id": planning.RUN_ID, "shard_size": planning.ROWS_PER_PART}
    )
    ledger = Ledger(open_storage(plan.dest), plan.dest)
    record = reconcile(ledger, plan, Session(1.0, FleetProgress(0, 0, 0, 0.0, 0.0), []))
    return {"rows": record.ok, "parts": record.parts}


def first_plan(options: Any) -> Plan:
    """The plan of a first night, whose list is `work.parquet`."""
    images = pq.read_metadata(options.folder / "work.parquet").num_rows
    size = choose_shard_size(images, actors=options.actors, row_bytes=ROW_BYTES)
    command = Command(
        source=planning.FOLDER, model_version=planning.VERSION, precision="bf16", suffixes=(), max_pixels=1, limit=None,
        retry_errors=False, force=False,
    )  # fmt: skip
    return Plan(
        run_id="20260102T000000Z-000000", sequence=1, created_at=dt.datetime(2026, 1, 2, tzinfo=dt.UTC),
        run_date=dt.date(2026, 1, 1), dest=options.dest + "-new", command=command, model_name="bench",
        model_version=planning.VERSION, card={}, settings={}, settings_digest=planning.DIGEST, precision="bf16",
        batch_size=32, batch_pixels=1 << 23, threads=1, shard_size=size, canary=0, code_digest="",
        counts=WorkCounts(images=images, left=images, new=images, planned=images),
    )  # fmt: skip


STEPS = {
    "plan": plan_step,
    "first": first_step,
    "freeze": freeze_step,
    "fleet": fleet_step,
    "list": list_step,
    "reconcile": reconcile_step,
}


def step_alone(name: str, options: Any, folder: Path, dest: str) -> dict[str, Any]:
    """Runs one step in a process of its own, and adds what that took."""
    command = [sys.executable, __file__, "--step", name, "--folder", str(folder), "--dest", dest]
    for key in ("actors", "shard_seconds", "start_seconds", "memory_gib"):
        command += [f"--{key.replace('_', '-')}", str(getattr(options, key))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the step {name} failed: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


# ── the table ────────────────────────────────────────────────────────────────────────────────────────────────────────


def on_disk(options: Any, scratch: Path, add: Callable[..., None]) -> dict[str, dict[str, Any]]:
    images = int(options.millions * 1e6)
    folder = options.inputs or scratch / "disk"
    if not (folder / "corpus.parquet").exists():
        planning.make_inputs(folder, images)
    dest = f"file://{folder / 'dest'}"
    found = {}
    for name in ("plan", "first", "freeze", "fleet", "list", "reconcile"):
        found[name] = step_alone(name, options, folder, dest)
        add("disk", images, name, found[name])
    return found


def on_s3(options: Any, scratch: Path, add: Callable[..., None]) -> dict[str, dict[str, Any]]:
    from chaos.faultproxy import FaultProxy
    from s3_client import lead_to, moto

    images = int(options.s3_millions * 1e6)
    folder = scratch / "s3"
    planning.make_inputs(folder, images)
    found = {}
    with moto() as port:
        import boto3

        boto3.client("s3").create_bucket(Bucket="table")
        storage = open_storage("s3://table")
        for path in sorted((folder / "dest").rglob("*")):
            if path.is_file():
                storage.put(f"s3://table/dest/{path.relative_to(folder / 'dest')}", path.read_bytes())
        with FaultProxy(port) as proxy:
            lead_to(proxy.port)
            for name in ("plan", "first", "freeze", "list", "reconcile"):
                proxy.clear()
                found[name] = step_alone(name, options, folder, "s3://table/dest")
                sent = Counter(request.split()[0] for request in proxy.requests)
                found[name]["requests"] = dict(sent)
                add("S3", images, name, found[name])
    return found


def cost_table(options: Any, fleet: dict[str, Any]) -> Table:
    """Dollars for a million images: requests to the store, and the machines."""
    images = 1e6
    shards = images / fleet["shard_size"]
    gets = images * options.get_price / 1e3
    lists = images / 1000 * options.put_price / 1e3
    puts = shards * options.put_price / 1e3
    hours = images / options.gpu_images_per_s / 3600
    table = Table(title="cost of a million images, by the prices given")
    for column in ("what", "how many", "price", "dollars"):
        table.add_column(column, justify="left" if column == "what" else "right")
    table.add_row(
        "LIST of the corpus, 1,000 keys each", f"{images / 1000:,.0f}", f"{options.put_price:g} / 1,000", f"{lists:.4f}"
    )
    table.add_row("GET of the images", f"{images:,.0f}", f"{options.get_price:g} / 1,000", f"{gets:.2f}")
    table.add_row("PUT of Parts", f"{shards:,.0f}", f"{options.put_price:g} / 1,000", f"{puts:.4f}")
    table.add_row(
        f"GPU, {options.gpu_images_per_s:g} images/s",
        f"{hours:.2f} h",
        f"{options.gpu_hour:g} / h",
        f"{hours * options.gpu_hour:.2f}",
    )
    kept_gb = images * ROW_BYTES / 1e9
    table.add_row(
        "Parts kept for a month", f"{kept_gb:.1f} GB", f"{options.gb_month:g} / GB", f"{kept_gb * options.gb_month:.2f}"
    )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=float, default=100)
    parser.add_argument("--s3-millions", type=float, default=4)
    parser.add_argument("--actors", type=int, default=1000)
    parser.add_argument("--start-seconds", type=float, default=20.0)
    parser.add_argument("--shard-seconds", type=float, default=20.0)
    parser.add_argument("--memory-gib", type=float, default=3.0)
    parser.add_argument("--scratch", type=Path, default=None)
    parser.add_argument("--inputs", type=Path, default=None, help="a folder of inputs made before; kept")
    parser.add_argument("--call-ms", type=float, default=0.15, help="driver's CPU for one call of a Ray actor")
    parser.add_argument("--get-price", type=float, default=0.0004, help="dollars for 1,000 GET")
    parser.add_argument("--put-price", type=float, default=0.005, help="dollars for 1,000 PUT or LIST")
    parser.add_argument("--gpu-hour", type=float, default=1.0, help="dollars for a machine with one GPU for an hour")
    parser.add_argument("--gpu-images-per-s", type=float, default=500.0)
    parser.add_argument("--gb-month", type=float, default=0.023, help="dollars for a GB kept for a month")
    parser.add_argument("--json", type=Path, default=None)
    for hidden in ("--step", "--dest"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.memory_bytes = int(options.memory_gib * (1 << 30))
    if options.step:
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        found = STEPS[options.step](options)
        found = {"seconds": time.perf_counter() - began_s, "cpu_s": time.process_time() - began_cpu_s} | found
        print(json.dumps(found | {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10}))
        return
    console = Console(width=130)
    table = Table(title=f"one driver, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    for column in ("where", "images", "step", "seconds", "CPU s", "peak memory", "requests"):
        table.add_column(column, justify="left" if column in ("where", "step", "requests") else "right")

    def add(where: str, images: int, name: str, found: dict[str, Any]) -> None:
        sent = ", ".join(f"{count:,} {kind}" for kind, count in sorted(found.get("requests", {}).items()))
        table.add_row(
            where, f"{images:,}", name, f"{found['seconds']:.1f}", f"{found['cpu_s']:.1f}",
            f"{found['peak_bytes'] / 2**30:.2f} GiB", sent,
        )  # fmt: skip

    scratch = Path(tempfile.mkdtemp(prefix="maskmill-bench-", dir=options.scratch))
    figures: dict[str, Any] = {}
    try:
        if options.millions:
            figures["disk"] = on_disk(options, scratch, add)
        if options.s3_millions:
            figures["s3"] = on_s3(options, scratch, add)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    console.print(table)
    if "disk" in figures:
        fleet = figures["disk"]["fleet"]
        calls = sum(fleet["calls"].values())
        shards = fleet["shards"]
        lines = Table(title=f"{options.actors:,} simulated actors, {shards:,} shards of {fleet['shard_size']:,} images")
        lines.add_column("what")
        lines.add_column("", justify="right")
        for what, value in (
            ("actors alone would need", f"{fleet['ideal_s']:.0f} s"),
            ("the run took, start of the actors included", f"{fleet['run_seconds']:.0f} s"),
            ("first commit after the start of the fleet", f"{fleet['first_receipt_s']:.1f} s"),
            ("driver's CPU for a shard", f"{fleet['driver_cpu_s'] / shards * 1e3:.1f} ms"),
            ("its share of one core", f"{fleet['driver_cpu_s'] / fleet['run_seconds']:.0%}"),
            ("calls to actors", f"{calls:,}: {calls / fleet['run_seconds']:,.0f}/s"),
            (
                f"their CPU at {options.call_ms} ms each",
                f"{calls * options.call_ms / 1e3 / fleet['run_seconds']:.0%} of a core",
            ),
            ("sent to actors", f"{fleet['sent_bytes'] / 1e6 / shards:.2f} MB a shard"),
        ):
            lines.add_row(what, value)
        console.print(lines)
        console.print(cost_table(options, fleet))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
