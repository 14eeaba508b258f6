"""What a Prefect flow adds to the command that it stands for: seconds of wall time, one over the other.

    python benchmarks/flow.py [--images N] [--repeat K]

N tiny images are segmented by `maskmill segment` and by the flow `segment-corpus`, each in a process of its own, turn
by turn in one sitting, into a new DEST each time (medians of K). The flow talks to a Prefect server that runs before
the first turn, as a worker's flow does. Goal: 1,000 images cost it under 15 s more.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from models.architectures import build, untrained_card
from models.file import save_model

SIDE_PX = 64
START_TIMEOUT_S = 120.0

FLOW = """
import sys
from flows.segment_corpus import segment_corpus
source, dest, model, images = sys.argv[1:]
assert segment_corpus(source=source, dest=dest, model=model, engine="local").ok == int(images)
"""


def write_images(folder: Path, count: int) -> None:
    """Noise as JPEG, each image another."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(count):
        pixels = random.integers(0, 256, (SIDE_PX, SIDE_PX, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f"{number:05d}.jpg"), pixels)


def write_model(path: Path) -> None:
    """A U-Net of random weights: what it says does not matter."""
    torch.manual_seed(0)
    card = untrained_card("tiny", task="semantic", class_names=("background", "thing"), decoder_channels=(8, 8, 8, 8))
    save_model(path, build(card).state_dict(), card)


@contextlib.contextmanager
def server(folder: Path) -> Iterator[dict[str, str]]:
    """The environment of who talks to a Prefect server that lives as long as this."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    environment = os.environ | {
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
    }
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while True:
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(f"{environment['PREFECT_API_URL']}/health", timeout=5).close()
                break
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise SystemExit(f"the Prefect server does not come up:\n{(folder / 'server.log').read_text()[-2000:]}")
            time.sleep(0.2)
        yield environment
    finally:
        process.terminate()
        process.wait()


def seconds(command: list[str], environment: dict[str, str]) -> float:
    """Of wall time, from nothing to the end of the process."""
    started = time.monotonic()
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"exit status {done.returncode} of {command}:\n{done.stdout[-4000:]}")
    return time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    console = Console()
    console.print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    taken: dict[str, list[float]] = {"command": [], "flow": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder / "images", arguments.images)
        write_model(folder / "tiny.safetensors")
        with server(folder) as environment:
            for turn in range(arguments.repeat):
                for kind, values in taken.items():
                    told = [str(folder / "images"), str(folder / f"{kind}-{turn}"), str(folder / "tiny.safetensors")]
                    if kind == "command":
                        command = [sys.executable, "-m", "pipeline.cli", "segment", *told[:2], "--model", told[2]]
                        command += ["--engine", "local"]
                    else:
                        command = [sys.executable, "-c", FLOW, *told, str(arguments.images)]
                    values.append(seconds(command, environment))
    table = Table(title=f"{arguments.images} images of {SIDE_PX}×{SIDE_PX}, medians of {arguments.repeat}")
    for column in ("", "seconds", "all turns"):
        table.add_column(column)
    medians = {kind: statistics.median(values) for kind, values in taken.items()}
    for kind, values in taken.items():
        table.add_row(kind, f"{medians[kind]:.1f}", ", ".join(f"{value:.1f}" for value in values))
    table.add_row("the flow's more", f"{medians['flow'] - medians['command']:.1f}", "goal: under 15")
    console.print(table)


if __name__ == "__main__":
    main()
