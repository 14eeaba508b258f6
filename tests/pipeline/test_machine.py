from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import machine
from pipeline.engine.crew import LocalCrew

PHYSICAL = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
NO_LIMIT = "9223372036854771712"  # what version 1 says where there is none

Groups = Callable[..., None]


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Groups:
    """Makes this process's control groups what `own` (a `/proc/self/cgroup`) and `files` say; eight cores."""
    monkeypatch.setattr(machine, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(machine, "_ALL_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))

    def made(own: str, files: dict[str, str]) -> None:
        (tmp_path / "own").write_text(own)
        for name, text in files.items():
            path = tmp_path / "groups" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n")

    return made


def test_a_machine_without_control_groups_is_all_ours(groups: Groups) -> None:
    assert (machine.cores(), machine.memory_bytes()) == (8, PHYSICAL)


@pytest.mark.parametrize(
    ("own", "files", "cores", "mib"),
    [
        # Version 2, as in a container of today: the group is the root that one sees.
        ("0::/\n", {"cpu.max": "200000 100000", "memory.max": "1073741824"}, 2, 1024),
        ("0::/\n", {"cpu.max": "max 100000", "memory.max": "max"}, 8, None),
        # Half a core more is one; a tenth of one is one, too.
        ("0::/\n", {"cpu.max": "150000 100000"}, 2, None),
        ("0::/\n", {"cpu.max": "10000 100000"}, 1, None),
        # More than there is.
        ("0::/\n", {"cpu.max": "9900000 100000", "memory.max": NO_LIMIT}, 8, None),
        # A group within groups is held by the least of them.
        (
            "0::/pod/worker\n",
            {"pod/cpu.max": "300000 100000", "pod/worker/cpu.max": "max 100000", "pod/memory.max": "536870912",
             "pod/worker/memory.max": "1073741824", "other/memory.max": "1048576"},
            3, 512,
        ),
        # Version 1, with controllers that are one; Docker tells the name that the group has outside.
        (
            "5:memory:/docker/f00\n4:cpu,cpuacct:/docker/f00\n0::/\n",
            {"memory/memory.limit_in_bytes": "268435456", "cpu/cpu.cfs_quota_us": "400000",
             "cpu/cpu.cfs_period_us": "100000"},
            4, 256,
        ),
        (
            "5:memory:/a\n4:cpu:/a\n",
            {"memory/a/memory.limit_in_bytes": NO_LIMIT, "cpu/a/cpu.cfs_quota_us": "-1",
             "cpu/a/cpu.cfs_period_us": "100000"},
            8, None,
        ),
        # What cannot be made sense of holds nobody.
        ("0::/\n", {"cpu.max": "", "memory.max": "lots"}, 8, None),
        ("0::/\n", {"cpu.max": "100000 0"}, 8, None),
    ],
)  # fmt: skip
def test_a_container_gets_what_its_groups_allow(
    groups: Groups, own: str, files: dict[str, str], cores: int, mib: int | None
) -> None:
    groups(own, files)
    assert machine.cores() == cores
    assert machine.memory_bytes() == (mib << 20 if mib else PHYSICAL)


def test_as_many_workers_as_a_container_holds(groups: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.engine.crew.gpu_count", lambda: 0)
    groups("0::/\n", {"cpu.max": "600000 100000", "memory.max": str(9 << 30)})
    crew = LocalCrew()
    assert (crew.default_actors, crew.threads) == (2, 3), "4 GiB for each, and six cores between them"


def test_a_real_group_is_found() -> None:
    """Where this system lets one be made."""
    group = Path("/sys/fs/cgroup/memory") / f"maskmill-test-{os.getpid()}"
    if not group.parent.exists():
        group = Path("/sys/fs/cgroup") / group.name
    try:
        group.mkdir()
        limits = [group / "memory.limit_in_bytes", group / "memory.max"]
        limit = next(path for path in limits if path.exists())
        limit.write_text(str(1 << 30))
    except (OSError, StopIteration) as error:
        if group.exists():
            group.rmdir()
        pytest.skip(f"no control group of memory can be made here: {error!r}")
    code = "import sys; sys.stdin.read(); from pipeline.machine import memory_bytes; print(memory_bytes())"
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        (group / "cgroup.procs").write_text(str(process.pid))
        assert process.communicate(timeout=60)[0] == f"{1 << 30}\n"
    finally:
        group.rmdir()
