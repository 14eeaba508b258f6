"""Benchmarks must not rot: those that no run on this machine would show are run small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
#: What a machine that is lent for a GPU has not: any import of these fails.
WITHOUT = ("ray", "prefect", "moto", "duckdb", "obstore", "arro3", "boto3", "botocore", "fsspec", "aiohttp")
BLOCKED = """
import runpy, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names}:
            raise ModuleNotFoundError(f"no {{name}} here", name=name)
sys.meta_path.insert(0, Blocked())
sys.argv = ["gpu.py", *{arguments}]
sys.path.insert(0, "benchmarks")
runpy.run_path("benchmarks/gpu.py", run_name="__main__")
"""


def run(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)


def gpu_benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = BLOCKED.format(names=set(WITHOUT), arguments=list(arguments))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return run([sys.executable, "-c", code], environment)


def test_the_gpu_benchmark_runs_without_ray_stores_and_databases(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    names = ["unet", "maskrcnn_mobilenet_v3_large_fpn"]
    done = gpu_benchmark("--threads", "1", "--models", *names, "--json", str(figures))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No CUDA device" in done.stdout
    cases = json.loads(figures.read_text())["cases"]
    assert [case["network"] for case in cases] == names
    for case in cases:
        for name in ("flops_per_image", "fp32_eager", "fp32_strict", "network_alone", "forward", "stream", "of_peak"):
            assert case[name] > 0, name
        assert case["stream_images"] == 8
        assert {"upload", "cpu read", "cpu decode", "cpu rows"} <= case["stages_ms"].keys()


@pytest.mark.slow
def test_the_architectures_benchmark_runs() -> None:
    command = [sys.executable, "benchmarks/architectures.py", "lraspp_mobilenet_v3_large", "--size-px", "64"]
    command += ["--repeat", "1", "--precision", "bf16"]
    done = run(command, os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    name, library, ours, ratio, *_ = done.stdout.splitlines()[0].split()
    assert name == command[2]
    assert float(library) > 0 and float(ours) > 0 and float(ratio) > 0


@pytest.mark.gpu
def test_the_gpu_benchmark_runs_on_a_gpu() -> None:
    assert torch.cuda.is_available()
    command = [sys.executable, "benchmarks/gpu.py", "--models", "unet", "--sizes", "128", "--seconds", "0.1"]
    command += ["--batch-pixels", str(4 * 128 * 128), "--max-images", "16", "--compile"]
    done = run(command, os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout + done.stderr
