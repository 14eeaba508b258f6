"""Fuzzes readers for a while: `make fuzz`, or

    python tests/fuzz [--seconds 600] [--seed 0] [--at-once 1] [--findings DIR] [TARGET ...]

Each target (`targets.TARGETS`; all by default) has a process of its own for so many seconds. With
atheris (coverage-guided; `pip install atheris`, which has wheels for Linux on x86-64 and some Pythons only) each input
that reaches new code is kept and mutated further; without it, inputs are mutations of the corpus that Hypothesis
draws. A finding is an exception that is none of the project's, a crash, 20 s without an answer, or (with atheris) more
than 4 GiB of memory; its input is written to DIR, and the exit status is 1. `python tests/fuzz --input FILE TARGET`
tries it again.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

_HANG_S = 20
_MEMORY_MIB = 4096
_LONGEST_INPUT_BYTES = 16384
_INSTRUMENTED = ["pipeline", "models", "tifffile", "safetensors"]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Fuzz what reads bytes; see the head of this file.")
    parser.add_argument("targets", nargs="*", metavar="TARGET")
    parser.add_argument("--seconds", type=int, default=600, help="for each target (default 600)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at-once", type=int, default=1, help="so many targets beside each other (default 1)")
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"))
    parser.add_argument("--input", type=Path, help="try this one input, and nothing else")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--corpus", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        return _child(given)
    from fuzz.targets import TARGETS

    names = given.targets or list(TARGETS)
    if unknown := set(names) - set(TARGETS):
        parser.error(f"no target {', '.join(sorted(unknown))}: there are {', '.join(TARGETS)}")
    if given.input:
        for name in names:
            TARGETS[name].run(given.input.read_bytes())
        return None
    sys.exit(_all(given, names))


def _all(given: argparse.Namespace, names: list[str]) -> int:
    """Each target in a process of its own. The exit status."""
    with_atheris = importlib.util.find_spec("atheris") is not None
    print(f"seed {given.seed}, {given.seconds} s each, by {'atheris' if with_atheris else 'Hypothesis (no atheris)'}")
    given.findings.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(given.at_once) as pool:
        return max(pool.map(lambda name: _one(given, name), names))


def _one(given: argparse.Namespace, name: str) -> int:
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-corpus-") as corpus:
        process = subprocess.run(
            [sys.executable, __file__, "--child", "--seconds", str(given.seconds), "--seed", str(given.seed),
             "--findings", str(given.findings), "--corpus", corpus, name],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False,
        )  # fmt: skip
    counts = re.findall(r"^#(\d+)|^Done (\d+) runs|^(\d+) executions", process.stdout, re.MULTILINE)
    executions = max((int("".join(count)) for count in counts), default=0)
    verdict = "nothing found" if process.returncode == 0 else f"FOUND (exit {process.returncode})"
    print(f"{name:12} {executions:10,} executions in {time.monotonic() - began_s:5.0f} s: {verdict}", flush=True)
    if process.returncode:
        print(process.stdout[-4000:], flush=True)
    return min(process.returncode, 1) if process.returncode >= 0 else 1


def _child(given: argparse.Namespace) -> None:
    (name,) = given.targets
    if importlib.util.find_spec("atheris") is not None:
        _by_atheris(name, given)
    else:
        _by_hypothesis(name, given)


def _by_atheris(name: str, given: argparse.Namespace) -> None:
    import atheris
    from fuzz.mutation import json_mutated, json_of

    with atheris.instrument_imports(include=_INSTRUMENTED):
        from fuzz.targets import TARGETS
    target = TARGETS[name]
    for number, data in enumerate(target.seeds()):
        (given.corpus / f"seed-{number:03d}").write_bytes(data)
    options = [
        f"-max_total_time={given.seconds}",
        f"-seed={given.seed + 1}",  # 0 would mean: by the clock
        f"-timeout={_HANG_S}",
        f"-rss_limit_mb={_MEMORY_MIB}",
        f"-max_len={_LONGEST_INPUT_BYTES}",
        f"-artifact_prefix={given.findings}/{name}-",
        "-print_final_stats=1",
    ]

    def mutate(data: bytes, most_bytes: int, seed: int) -> bytes:
        if seed % 2 and json_of(data):
            return json_mutated(data, seed)[:most_bytes]
        return bytes(atheris.Mutate(data, most_bytes))

    atheris.Setup([sys.argv[0], *options, str(given.corpus)], target.run, custom_mutator=mutate)
    atheris.Fuzz()


def _by_hypothesis(name: str, given: argparse.Namespace) -> None:
    import faulthandler

    from fuzz.mutation import mutations
    from fuzz.targets import TARGETS
    from hypothesis import HealthCheck, Phase, seed, settings
    from hypothesis import given as drawn

    target = TARGETS[name]
    seeds = target.seeds()
    until_s = time.monotonic() + given.seconds
    executions = 0
    last = given.findings / f"{name}-last"

    def run(data: bytes) -> None:
        nonlocal executions
        executions += 1
        last.write_bytes(data)  # what a crash of the process leaves behind
        faulthandler.dump_traceback_later(_HANG_S, exit=True)
        target.run(data)

    for number in range(sys.maxsize):
        if time.monotonic() > until_s:
            break
        calm = settings(
            max_examples=2000, database=None, deadline=None, phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        seed(given.seed * 1_000_003 + number)(calm(drawn(mutations(seeds))(run)))()
    faulthandler.cancel_dump_traceback_later()
    os.unlink(last)
    print(f"{executions} executions")


if __name__ == "__main__":
    main()
