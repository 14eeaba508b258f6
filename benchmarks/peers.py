"""Side by side with what a user would pick instead: Ray Data, Daft, PyTorch's DataLoader, a plain loop.

    python benchmarks/peers.py [--workloads NAME ...] [--peers NAME ...] [--turns K] [--scale F] [--json FILE]
    python benchmarks/peers.py --chart FILE.json        draws FILE.svg of what was measured, prints it as Markdown

Every peer gets the same files, the same model file, the same precision and batch size, the same number of cores, and
makes the same rows: a palette PNG and figures per class, by the same decoder and encoder. Each is a process of its own,
in turn (A B C A B C), after a warm-up of each before the first workload. All that the first turn wrote is compared with
ours, image by image.

`images/s` counts from the first image that is begun to the end of writing; `whole` is the wall time of the whole
process, its imports and its cluster included. `core-ms`, where groups of processes can be made (cgroups, as root): CPU
time of all of a peer's processes an image, without that of its start; it says the same on a busy machine.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE / "side_by_side"), str(ROOT)]

import chart  # noqa: E402 - beside this script, where the peers find it too
import corpora  # noqa: E402
import slow_store  # noqa: E402
from job import Job  # noqa: E402
from stand_in import write_model_file  # noqa: E402

from models.masks import decode_mask_png  # noqa: E402
from models.segmenter import supports_bf16  # noqa: E402
from pipeline.registry import resolve  # noqa: E402

OURS = "maskmill"
_LIMIT_S = 600


class Peer(NamedTuple):
    """A script in `side_by_side/`, and what it needs to be installed."""

    script: str
    module: str | None = None


PEERS = {
    OURS: Peer("maskmill_run.py"),
    "plain loop": Peer("plain_loop.py"),
    "torch loader": Peer("torch_loader.py"),
    "Ray Data": Peer("ray_data.py", "ray"),
    "Daft": Peer("daft_udf.py", "daft"),
}


class Workload(NamedTuple):
    """What is done: which files, how many, with which model."""

    title: str
    short: str
    write: Callable[[Path, int], list[Path]]
    images: int
    sleeps_s: float | None = 0.0
    batch_size: int = 16
    latency_s: float = 0.0


WORKLOADS = {
    "free": Workload(
        "480×360 JPEG, a model that costs nothing", "A model that costs nothing", corpora.write_photos, 6000
    ),
    "sleeping": Workload(
        "480×360 JPEG, a model that takes 2 ms an image", "A model of 2 ms an image", corpora.write_photos, 4000, 0.002
    ),
    "nuclei-unet": Workload(
        "480×360 JPEG, nuclei-unet on the CPU", "nuclei-unet on the CPU", corpora.write_nuclei, 240, None, 2
    ),
    "large": Workload(
        "12-megapixel JPEG, a model that costs nothing", "12 megapixels", corpora.write_large_photos, 80, 0.0, 1
    ),
    "tiny": Workload("64×64 PNG, a model that costs nothing", "64×64 PNG", corpora.write_tiny, 20000),
    "broken": Workload(
        "480×360 JPEG, a model that costs nothing, and as many broken files between them",
        "As many broken files between them",
        corpora.write_half_broken,
        6000,
    ),
    "broken-sleeping": Workload(
        "480×360 JPEG, a model that takes 2 ms an image, and as many broken files between them",
        "2 ms, and as many broken files",
        corpora.write_half_broken,
        4000,
        0.002,
    ),
    "s3": Workload(
        "480×360 JPEG over S3 with 20 ms of latency, a model that costs nothing",
        "S3 with 20 ms of latency",
        corpora.write_photos,
        4000,
        0.0,
        16,
        0.020,
    ),
}


#: Workloads without broken files, and the same with as many between the good ones.
_WITH_BROKEN = {"free": "broken", "sleeping": "broken-sleeping"}


class Turn(NamedTuple):
    """One run of one peer."""

    wall_s: float
    work_s: float
    #: Of the process and all that it started; None where this system does not let one count.
    core_s: float | None = None


class FailedError(RuntimeError):
    """A peer's process ended badly; the message is the end of what it said."""


def interpreter(peer: Peer) -> str | None:
    """The Python that has what the peer needs: this one, or that of `.venv-peers`. None where neither has."""
    for python in (sys.executable, str(ROOT / ".venv-peers" / "bin" / "python")):
        if Path(python).exists():
            code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({peer.module or 'sys'!r}) is None)"
            if subprocess.run([python, "-c", code], check=False).returncode == 0:
                return python
    return None


def run(name: str, job: Job, scratch: Path, environment: dict[str, str]) -> Turn:
    """One turn. Raises FailedError."""
    Path(job.dest).mkdir(parents=True)
    job_path = scratch / "job.json"
    job_path.write_text(job.model_dump_json())
    python = interpreter(PEERS[name])
    assert python is not None
    log_path = scratch / "log"
    group = cpu_account(scratch.name)
    began_s = time.time()
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [python, str(HERE / "side_by_side" / PEERS[name].script), str(job_path)],
            env=environment, cwd=scratch, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            if group:
                (group / "cgroup.procs").write_text(str(process.pid))
            process.wait(_LIMIT_S)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    wall_s = time.time() - began_s
    core_s = None
    if group:
        core_s = int((group / "cpuacct.usage").read_text()) / 1e9
        with contextlib.suppress(OSError):  # what the peer left behind is still in it
            group.rmdir()
    said = log_path.read_text(errors="replace")
    ended = [line for line in said.splitlines() if line.startswith("ended ")]
    if process.returncode or not ended:
        raise FailedError(f"{name} ended with status {process.returncode} after {wall_s:.0f} s:\n{said[-2000:]}")
    return Turn(wall_s, float(ended[-1].split()[1]) - begun_at(Path(job.dest)), core_s)


def cpu_account(name: str) -> Path | None:
    """A new group of processes whose CPU time is counted, daemons included; None without such groups, or the right."""
    group = Path("/sys/fs/cgroup/cpuacct") / f"{name}-{time.monotonic_ns()}"
    try:
        group.mkdir()
    except OSError:
        return None
    return group


def begun_at(dest: Path) -> float:
    """When the first image was begun. Of ours: when the run was frozen, its workers ready and nothing given to them."""
    frozen = list(dest.glob("runs/*/manifest.parquet"))
    if frozen:
        return frozen[0].stat().st_mtime
    return min(pq.read_table(path, columns=["begun_at"])["begun_at"].to_numpy().min() for path in parts(dest))


def parts(dest: Path) -> list[Path]:
    """The Parquet files of a table, whoever wrote it."""
    folder = dest / "segments" if (dest / "segments").exists() else dest
    return sorted(path for path in folder.rglob("*.parquet") if pq.read_metadata(path).num_rows)


_COMPARED = [
    "image_uri", "status", "error_kind", "width", "height", "image_format", "brightness", "contrast",
    "mean_confidence", "mean_entropy", "foreground_fraction", "classes", "mask", "mask_crc32", "instances",
]  # fmt: skip


def rows_of(dest: Path) -> dict[str, dict[str, Any]]:
    """Rows by the name of their file."""
    tables = [pq.ParquetFile(path).read(columns=_COMPARED) for path in parts(dest)]
    rows: dict[str, dict[str, Any]] = {}
    for table in tables:
        for row in table.to_pylist():
            name = row.pop("image_uri").rpartition("/")[2]
            if name in rows:
                raise FailedError(f"two rows of {name} in {dest}")
            rows[name] = row
    return rows


class Agreement(NamedTuple):
    """`rows` that are equal in everything, of `of`; `pixels`: the share of all pixels that have the same class."""

    rows: int
    of: int
    pixels: float


def agreement(ours: dict[str, dict[str, Any]], theirs: dict[str, dict[str, Any]]) -> Agreement:
    """Raises FailedError where the images or what is wrong with them differ."""
    if ours.keys() != theirs.keys():
        raise FailedError(f"{len(ours.keys() ^ theirs.keys())} of {len(ours)} images are in one of the tables only")
    equal = same = pixels = 0
    for name, mine in ours.items():
        other = theirs[name]
        if (mine["status"], mine["error_kind"]) != (other["status"], other["error_kind"]):
            raise FailedError(f"{name}: {mine['status']} {mine['error_kind']}, {other['status']} {other['error_kind']}")
        whole = mine == other
        equal += whole
        if mine["status"] == "ok":
            area = mine["width"] * mine["height"]
            pixels += area
            same += area if whole else int((_mask(mine) == _mask(other)).sum())
    return Agreement(equal, len(ours), same / max(1, pixels))


def _mask(row: dict[str, Any]) -> Any:
    return decode_mask_png(row["mask"]["bytes"])


def environment() -> dict[str, str]:
    """What all peers get: where the steps are, and no thread pools beyond the cores."""
    cores = str(len(os.sched_getaffinity(0)))
    return os.environ | {
        "PYTHONPATH": os.pathsep.join((str(HERE / "side_by_side"), str(ROOT))),
        "OMP_NUM_THREADS": cores,
        "RAY_USAGE_STATS_ENABLED": "0",
        "DO_NOT_TRACK": "1",
        "SCARF_NO_ANALYTICS": "true",
    }


@contextmanager
def served(workload: Workload, folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Where the peers find the images, and what they must be told to get there."""
    if not workload.latency_s:
        yield str(folder), {}
        return
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    script = HERE / "side_by_side" / "slow_store.py"
    command = [sys.executable, str(script), str(port), str(folder), str(workload.latency_s)]
    store = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        _wait_for(port, store)
        yield (
            f"s3://{slow_store.BUCKET}/{slow_store.PREFIX}",
            {
                "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
                "AWS_ACCESS_KEY_ID": "test",
                "AWS_SECRET_ACCESS_KEY": "testtest",
                "AWS_REGION": "us-east-1",
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_EC2_METADATA_DISABLED": "true",
            },
        )
    finally:
        store.kill()
        store.wait()


def _wait_for(port: int, store: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        if store.poll() is not None:
            break
        time.sleep(0.1)
    raise FailedError("the store did not start")


def measure(key: str, names: list[str], *, turns: int, scale: float, warm_up: bool, console: Console) -> dict[str, Any]:
    """All turns of one workload. A peer that fails is left out from then on."""
    workload = WORKLOADS[key]
    cores = len(os.sched_getaffinity(0))
    installed = [name for name in names if interpreter(PEERS[name])]
    found: dict[str, list[Turn]] = {name: [] for name in names}
    agreements: dict[str, Agreement] = {}
    failures: dict[str, str] = {}
    few: dict[str, Turn] = {}
    ours: dict[str, dict[str, Any]] = {}
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="maskmill-peers-") as temporary:
        scratch = Path(temporary)
        (scratch / "images").mkdir()
        (scratch / "few").mkdir()
        images = len(workload.write(scratch / "images", max(8, int(workload.images * scale))))
        workload.write(scratch / "few", 8)
        os.sync()  # else the disk is still at it while the first of them works
        model = scratch / "model.safetensors"
        if workload.sleeps_s is None:
            model.write_bytes(resolve("nuclei-unet").data)
        else:
            write_model_file(model)
        job = Job(
            source="", dest="", model=str(model), sleeps_s=workload.sleeps_s, batch_size=workload.batch_size,
            precision="bf16" if supports_bf16("cpu") else "fp32", cores=cores,
            copies=cores if workload.sleeps_s is None else 1, reads=32 if workload.latency_s else cores,
        )  # fmt: skip
        for turn in range(-1 if warm_up else 0, turns):
            with served(workload, scratch / ("few" if turn < 0 else "images")) as (source, extra):
                for name in (name for name in installed if name not in failures):
                    dest = scratch / f"{turn}-{name.replace(' ', '-')}"
                    given = job.model_copy(update={"source": source, "dest": str(dest)})
                    try:
                        done = run(name, given, scratch, environment() | extra)
                        if turn == 0:
                            rows = rows_of(dest)
                            ours = rows if name == OURS else ours
                            if ours:
                                agreements[name] = agreement(ours, rows)
                    except FailedError as error:
                        failures[name] = str(error)
                        console.print(failures[name], style="red", markup=False)
                        continue
                    finally:
                        shutil.rmtree(dest, ignore_errors=True)
                    if turn < 0:
                        few[name] = done
                    else:
                        found[name].append(done)
                        console.print(f"{key} {turn} {name}: {images / done.work_s:.1f}/s, whole {done.wall_s:.1f} s")
    return {
        "title": workload.title,
        "images": images,
        "batch_size": workload.batch_size,
        "date": dt.date.today().isoformat(),
        "cores": cores,
        "load": round(load, 1),
        "peers": {
            name: {
                "installed": name in installed,
                "turns": [turn._asdict() for turn in found[name]],
                "few": few[name]._asdict() if name in few else None,
                "agreement": agreements[name]._asdict() if name in agreements else None,
                "failure": failures.get(name),
            }
            for name in names
        },
    }


def joined(before: dict[str, Any] | None, now: dict[str, Any]) -> dict[str, Any]:
    """The turns of two calls together, where they had the same files; else those of the second."""
    if before is None or before["images"] != now["images"]:
        return now
    peers = dict(before["peers"])
    for name, peer in now["peers"].items():
        earlier = peers.get(name, {"turns": [], "few": None, "agreement": None})
        peers[name] = peer | {
            "turns": [*earlier["turns"], *peer["turns"]],
            "few": peer["few"] or earlier["few"],
            "agreement": peer["agreement"] or earlier["agreement"],
        }
    return now | {"peers": peers, "load": max(before["load"], now["load"])}


_COLUMNS = ("", "images/s", "ours is", "whole, s", "ours takes", "core-ms", "rows equal", "pixels equal")


def rows(result: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """A workload as a table: columns as in `_COLUMNS`."""
    rates, walls = medians(result)
    for name, peer in result["peers"].items():
        if name not in rates:
            yield (name, "failed" if peer["installed"] else "not installed", *[""] * (len(_COLUMNS) - 2))
            continue
        agreed = peer["agreement"]
        yield (
            name,
            f"{rates[name]:,.0f}" if rates[name] >= 100 else f"{rates[name]:.1f}",
            f"{rates[OURS] / rates[name]:.2f} ×" if OURS in rates else "",
            f"{walls[name]:.1f}",
            f"{walls[OURS] / walls[name]:.2f} ×" if OURS in walls else "",
            f"{core_ms(result, name):.2f}" if core_ms(result, name) else "",
            f"{agreed['rows']:,} of {agreed['of']:,}" if agreed else "",
            f"{agreed['pixels']:.4%}" if agreed else "",
        )


def show(result: dict[str, Any], console: Console) -> None:
    """To a terminal."""
    table = Table(title=heading(result))
    for column in _COLUMNS:
        table.add_column(column, justify="right" if column else "left")
    for row in rows(result):
        table.add_row(*row)
    console.print(table)


def markdown(results: dict[str, dict[str, Any]]) -> str:
    """To a page."""
    lines = []
    for result in results.values():
        lines += [f"**{heading(result)}** (load {result['load']} at the start)", ""]
        lines += [f"| {' | '.join(_COLUMNS)} |", "|---" * len(_COLUMNS) + "|"]
        lines += [f"| {' | '.join(row)} |" for row in rows(result)]
        lines.append("")
    return "\n".join(lines)


def heading(result: dict[str, Any]) -> str:
    turns = max((len(peer["turns"]) for peer in result["peers"].values()), default=0)
    return f"{result['title']}: {result['images']:,} files, batches of {result['batch_size']}, medians of {turns}"


def broken_costs(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By workload and peer, what as many broken files add to the time of the good ones."""
    costs = {}
    for key, with_broken in _WITH_BROKEN.items():
        if {key, with_broken} <= results.keys():
            good, mixed = medians(results[key])[0], medians(results[with_broken])[0]
            # Half of the files of the latter are good.
            costs[with_broken] = {name: 2 * good[name] / mixed[name] - 1 for name in good if name in mixed}
    return costs


def core_ms(result: dict[str, Any], name: str) -> float:
    """Of all cores, an image: what the whole process took more than one of a few images. 0 where that is not known."""
    peer = result["peers"][name]
    spent = [turn["core_s"] for turn in peer["turns"] if turn["core_s"] is not None]
    if not (spent and peer["few"] and peer["few"]["core_s"]):
        return 0.0
    return 1e3 * (statistics.median(spent) - peer["few"]["core_s"]) / result["images"]


def medians(result: dict[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Images/s and whole wall time by peer, of those that ran."""
    ran = {name: peer["turns"] for name, peer in result["peers"].items() if peer["turns"] and not peer["failure"]}
    rates = {name: result["images"] / statistics.median(t["work_s"] for t in turns) for name, turns in ran.items()}
    walls = {name: statistics.median(t["wall_s"] for t in turns) for name, turns in ran.items()}
    return rates, walls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument(
        "--peers",
        nargs="+",
        choices=list(PEERS),
        default=list(PEERS),
        help="ours runs anyway: all are compared with it",
    )
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of images")
    parser.add_argument("--json", type=Path, help="results are added to those in this file, turn by turn")
    parser.add_argument("--no-warm-up", dest="warm_up", action="store_false", help="after another call")
    parser.add_argument(
        "--chart",
        type=Path,
        metavar="JSON",
        help="measure nothing: draw this file as SVG beside it, print it as Markdown",
    )
    options = parser.parse_args()
    console = Console(width=140)
    results: dict[str, dict[str, Any]] = {}
    file = options.chart or options.json
    if file and file.exists():
        results = json.loads(file.read_text())
    if options.chart:
        results = {key: results[key] for key in WORKLOADS if key in results}
        panels = [(WORKLOADS[key].short, medians(result)[0]) for key, result in results.items()]
        options.chart.with_suffix(".svg").write_text(chart.draw(panels, ours=OURS))
        print(markdown(results))
    names = [name for name in PEERS if name in {OURS, *options.peers}]
    for key in () if options.chart else options.workloads:
        warm_up = options.warm_up and key == options.workloads[0]
        result = measure(key, names, turns=options.turns, scale=options.scale, warm_up=warm_up, console=console)
        results[key] = joined(results.get(key), result)
        show(results[key], console)
        if options.json:
            options.json.write_text(json.dumps(results, indent=1) + "\n")
    for key, costs in broken_costs(results).items():
        said = ", ".join(f"{name} {cost:.0%}" for name, cost in costs.items())
        print(f"{key}: as many broken files add to the time of the good ones: {said}")


if __name__ == "__main__":
    main()
