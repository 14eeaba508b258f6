"""The benchmarks of limits and of scale run, and their figures are of what they say."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.engine.limits import read_ceilings

ROOT = Path(__file__).resolve().parents[2]


def benchmark(name: str, *arguments: str) -> str:
    command = [sys.executable, f"benchmarks/{name}.py", *arguments]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("AWS_", "MASKMILL_"))}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment | {"PYTHONPATH": str(ROOT)}, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_scale_benchmark_simulates_every_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    planning, scale = importlib.import_module("planning"), importlib.import_module("scale")
    planning.make_inputs(tmp_path, 20_000)
    options = argparse.Namespace(
        folder=tmp_path, dest=f"file://{tmp_path}/dest", actors=5, start_seconds=0.05, shard_seconds=0.05,
        memory_bytes=1 << 30,
    )  # fmt: skip
    assert scale.first_step(options)["planned"] == 20_000
    assert scale.freeze_step(options)["bytes"] > 0
    fleet = scale.fleet_step(options)
    assert fleet["shards"] == fleet["calls"]["run"] == 20 and fleet["shard_size"] == 1000
    assert fleet["run_seconds"] > fleet["first_receipt_s"] > 0.05 and fleet["sent_bytes"] > 20_000 * 50
    scale.list_step(options)
    assert scale.reconcile_step(options)["rows"] == 20_000


@pytest.mark.s3
@pytest.mark.slow
def test_the_scale_benchmark_counts_requests(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    benchmark("scale", "--millions", "0", "--s3-millions", "0.02", "--json", str(figures))
    sent = {name: step["requests"] for name, step in json.loads(figures.read_text())["s3"].items()}
    assert sent["plan"]["GET"] > 2 and sent["freeze"] == {"PUT": 3}


@pytest.mark.s3
@pytest.mark.slow
def test_the_limits_benchmark_writes_what_a_run_reads(tmp_path: Path) -> None:
    place = tmp_path / "limits.json"
    said = benchmark("limits", "--images", "64", "--seconds", "0.05", "--out", str(place))
    found = read_ceilings(str(place))
    assert found is not None and found.stores.keys() == {"file:///", "s3://photos/"}
    assert "PNG" in said and "RLE" in said
