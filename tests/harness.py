"""What the kill and fault tests share: small inputs and their answers, `maskmill segment` as a process to kill, and the
check that nothing was lost or repeated. Must not know: which fault is being tested.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest

import pipeline
from pipeline.engine import run
from pipeline.engine.crew import InlineCrew
from pipeline.engine.outcome import Outcome
from pipeline.errors import WORLD_KINDS
from pipeline.storage import Storage, open_storage

#: An environment variable that every process below a command inherits: its value tells whose processes they are.
MARK = "MASKMILL_TEST_MARK"
#: The frozen batch shape, precision and thread count under which masks must be equal bit for bit; and as flags.
SHAPE: dict[str, Any] = {"batch_size": 4, "threads": 1, "precision": "fp32", "report": False}
SHAPE_FLAGS = ("--batch-size", "4", "--threads", "1", "--precision", "fp32", "--no-report")


def write_tiny_model(path: Path, *, task: str = "semantic", name: str = "tiny", seed: int = 0) -> Path:
    """A model file with random weights, the same for a seed."""
    import torch

    from models.architectures import build, untrained_card
    from models.file import save_model

    torch.manual_seed(seed)
    names = ("background", "object") if task == "instance" else ("background", "red", "green", "blue", "other")
    card = untrained_card(name, task=task, class_names=names)  # type: ignore[arg-type]
    save_model(path, build(card).state_dict(), card)
    return path


def write_images(folder: Path, count: int, *, seed: int = 0, side_px: int = 64) -> Path:
    """`count` distinct images in two sizes and two formats, the same for a seed."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    for i in range(count):
        height, width = (side_px, side_px) if i % 3 else (side_px, side_px + 32)
        coarse = generator.integers(0, 255, (6, 6, 3)).astype(np.uint8)
        pixels = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(folder / f"{i:04d}.{'png' if i % 2 else 'jpg'}"), pixels)
    return folder


class Answer(NamedTuple):
    """One image's terminal row, as far as two runs must agree on it."""

    status: str
    error_kind: str | None
    mask: bytes | None
    crc32: int | None


def terminal_rows(dest: str | Path) -> dict[str, Answer]:
    """Every terminal row under DEST by image name, read from the files alone; fails where a name has two.

    A name with failed attempts only (the world's failures: they may precede a terminal row) has the last of them.
    """
    storage: Storage = open_storage(str(dest))
    found: dict[str, Answer] = {}
    failed: dict[str, tuple[int, Answer]] = {}
    for batch in storage.list(f"{storage.root.rstrip('/')}/segments"):
        for uri in batch["uri"].to_pylist():
            data = storage.get(uri).data
            columns = ["image_uri", "attempt", "status", "error_kind", "mask", "mask_crc32"]
            for row in pq.read_table(_buffer(data), columns=columns).to_pylist():
                name = row["image_uri"].rpartition("/")[2]
                mask = row["mask"]["bytes"] if row["mask"] else None
                answer = Answer(row["status"], row["error_kind"], mask, row["mask_crc32"])
                if answer.error_kind in WORLD_KINDS:
                    if row["attempt"] > failed.get(name, (0, answer))[0]:
                        failed[name] = (row["attempt"], answer)
                    continue
                assert name not in found, f"{name} has two terminal rows in {dest}"
                found[name] = answer
    return {name: answer for name, (_, answer) in failed.items()} | found


def _buffer(data: bytes) -> Any:
    import pyarrow as pa

    return pa.BufferReader(data)


class Case:
    """`count` images in the folder `images`, the file of one `model`, and `calm`: what an undisturbed run on local disk
    makes of them.
    """

    def __init__(self, folder: Path, count: int, *, side_px: int = 64) -> None:
        self.images = write_images(folder / "images", count, side_px=side_px)
        self.model = write_tiny_model(folder / "tiny.safetensors", task="instance")
        self.segment(self.images, folder / "calm", shard_size=7)
        self.calm: dict[str, Answer] = terminal_rows(folder / "calm")
        assert {answer.status for answer in self.calm.values()} == {"ok"} and len(self.calm) == count
        assert len({answer.crc32 for answer in self.calm.values()}) > count // 2, "few masks for all prove little"

    def segment(self, source: str | Path, dest: str | Path, **changes: Any) -> Outcome:
        """The local engine, with its worker in this process."""
        settings = {"shard_size": 3, "lease_ttl_s": 4, "max_error_rate": 0.0} | SHAPE | changes
        with in_process():
            return pipeline.segment(
                source=str(source), dest=str(dest), model=str(self.model), engine="local", **settings
            )


def seeded_chance() -> random.Random:
    """Choices that `MASKMILL_CHAOS_SEED` repeats; says which seed it was."""
    seed = int(os.environ.get("MASKMILL_CHAOS_SEED") or random.SystemRandom().randrange(1 << 32))
    print(f"\nMASKMILL_CHAOS_SEED={seed}")
    return random.Random(seed)


def file_digests(folder: Path) -> dict[str, tuple[int, str]]:
    """Time of change in ns and SHA-256 of every file below `folder`, by its path in it."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def part_count(dest: str | Path, client: Any = None) -> int:
    """Parts under DEST now. On S3 by a boto3 `client`, which may pass by the proxy that the environment leads to."""
    if "://" not in str(dest):
        return sum(1 for _ in Path(dest).glob("segments/**/*.parquet"))
    bucket, _, prefix = str(dest).removeprefix("s3://").partition("/")
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/segments/")
    return sum(page["KeyCount"] for page in pages)


def upload(client: Any, folder: Path, prefix_uri: str) -> str:
    """Puts every file of `folder` under `prefix_uri`, and returns that."""
    bucket, _, prefix = prefix_uri.removeprefix("s3://").partition("/")
    for path in sorted(folder.iterdir()):
        client.put_object(Bucket=bucket, Key=f"{prefix}/{path.name}", Body=path.read_bytes())
    return prefix_uri


@contextmanager
def in_process() -> Iterator[None]:
    """`pipeline.segment` keeps its worker in this process, whatever engine is asked for: saves the start of one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "open_crew", lambda *_: InlineCrew(actors=1, threads=1))
        yield


class Command:
    """`maskmill segment` in a process of its own, to be watched and killed."""

    def __init__(self, *arguments: str | Path, environment: Mapping[str, str] | None = None) -> None:
        self.started_s = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.cli", "segment", *map(str, arguments), "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=dict(os.environ) | dict(environment or {}),
            text=True,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def family(self) -> list[psutil.Process]:
        """The driver's descendants."""
        try:
            return psutil.Process(self.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def until(self, condition: Callable[[], bool], *, what: str, poll_s: float = 0.005) -> None:
        """Waits for `condition`; fails at once where the command ends before."""
        wait_until(lambda: condition() or self.process.poll() is not None, what=what, poll_s=poll_s)
        if self.process.returncode is not None and not condition():
            _, err = self.process.communicate()
            raise AssertionError(f"exit status {self.process.returncode} before {what}: {err[-3000:]}")

    def kill(self, *, family: bool = True) -> None:
        """SIGKILL to the driver, and afterwards, for tidiness, to what it leaves behind."""
        left = self.family()
        self.process.kill()
        self.process.communicate()
        if family:
            time.sleep(0.2)
            kill_all(left)

    def outcome(self, *, timeout_s: float = 150.0, status: int = 0) -> dict[str, Any]:
        """Waits for the end and returns what was printed."""
        left = self.family()
        out, err = self.process.communicate(timeout=timeout_s)
        kill_all(left)
        assert self.process.returncode == status, f"exit status {self.process.returncode}: {err[-3000:]}"
        return dict(json.loads(out)) if out.strip() else {}


@contextmanager
def own_processes() -> Iterator[str]:
    """Gives a mark that all processes started meanwhile carry in their environment, children and orphans too, with a
    TMPDIR for what killed ones cannot remove. At the end those that still live are killed.
    """
    mark = uuid.uuid4().hex
    scratch = tempfile.mkdtemp(prefix="chaos-")  # not pytest's: Ray's sockets need a short path
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(MARK, mark)
        patch.setenv("TMPDIR", scratch)
        try:
            yield mark
        finally:
            kill_all(marked(mark))
            shutil.rmtree(scratch, ignore_errors=True)


def marked(mark: str) -> list[psutil.Process]:
    """The living processes that were started with `MARK` = `mark` in their environment, orphans too."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def ray_actors(mark: str) -> list[psutil.Process]:
    """The living processes of Maskmill's actors on the Ray cluster that was started with this mark."""
    return [process for process in marked(mark) if runs(process, "ray::Host")]


def actors_on(node: Any, mark: str) -> list[psutil.Process]:
    """Those of them that `node`, of a `ray.cluster_utils.Cluster`, hosts: the children of its raylet."""
    (raylet,) = node.all_processes["raylet"]
    return [actor for actor in ray_actors(mark) if _parent_id(actor) == raylet.process.pid]


def runs(process: psutil.Process, name: str) -> bool:
    """Whether `name` is in the command line of a process that still lives."""
    try:
        return any(name in part for part in process.cmdline())
    except psutil.Error:
        return False


def _parent_id(process: psutil.Process) -> int | None:
    try:
        return process.ppid()
    except psutil.Error:
        return None


def kill_all(processes: list[psutil.Process]) -> None:
    """SIGKILL to processes that a test started, as far as they still live."""
    for process in processes:
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue


def wait_until(
    condition: Callable[[], bool], *, timeout_s: float = 120.0, what: str = "condition", poll_s: float = 0.005
) -> None:
    """Polls every `poll_s`; fails after `timeout_s`."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"timed out waiting for {what}"
        time.sleep(poll_s)
