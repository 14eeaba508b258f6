"""What of this machine a process may use: cores, memory, GPUs. Owns: asking Linux, containers' limits included.
Must not know: who uses them, and for what.

A container sees all cores and all memory of its machine; what it may take of them is said by its control groups alone
(`cgroups(7)`, versions 1 and 2): a process beyond that is slowed down, or killed.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_OWN_GROUPS = Path("/proc/self/cgroup")
_ALL_GROUPS = Path("/sys/fs/cgroup")
_GPUS = Path("/proc/driver/nvidia/gpus")


def cores() -> int:
    """CPU cores that this process may use, at least 1: those that it may run on, or as many as it gets the time of,
    rounded up, where that is fewer."""
    allowed = len(os.sched_getaffinity(0))
    for found in (*_limits("", "cpu.max"), *_limits("cpu", "cpu.cfs_quota_us", "cpu.cfs_period_us")):
        if len(found) == 2 and found[1]:
            allowed = min(allowed, math.ceil(found[0] / found[1]))
    return max(1, allowed)


def memory_bytes() -> int:
    """Physical memory of this machine, or as much of it as this process may take."""
    most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for found in (*_limits("", "memory.max"), *_limits("memory", "memory.limit_in_bytes")):
        most = min([most, *found])
    return most


def gpu_count() -> int:
    """NVIDIA GPUs of this machine, asked of the driver without loading CUDA into this process."""
    try:
        return len(os.listdir(_GPUS))
    except OSError:
        return 0


def _limits(controller: str, *files: str) -> Iterator[list[int]]:
    """The numbers in `files` of every control group that this process is in, its own and those around it, as far as it
    can see them. `controller`: of version 1; "" for version 2. No limit is no number: "max", or "-1"."""
    for group in _groups(controller):
        # A container may be told of its group by the name that this has outside, and sees it as the root.
        for name in (group, *group.parents):
            folder = _ALL_GROUPS / controller / name
            with contextlib.suppress(OSError):
                words = [word for file in files for word in (folder / file).read_text().split()]
                yield [int(word) for word in words if word.isdecimal()]


def _groups(controller: str) -> Iterator[PurePosixPath]:
    """Of this process, relative to the root of all groups. None where there are no control groups."""
    with contextlib.suppress(OSError):
        for line in _OWN_GROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controller in controllers.split(","):
                yield PurePosixPath(path.lstrip("/"))
