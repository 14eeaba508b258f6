"""A process that segments again and again and never ends by itself: what leaks in a driver or a worker piles up here.
Owns: that loop, and a line of figures for every turn. Must not know: who changes the images, what breaks.

    python tests/chaos/resident.py SOURCE DEST MODEL

The worker lives in this very process. After each turn one JSON object goes to stdout: seconds since the start,
bytes in use and resident, images planned, and what went wrong. It ends when its standard input does.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import threading
import time
from pathlib import Path

import psutil
import pyarrow as pa

# The root first: `tests` has a folder `pipeline`, too.
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

from harness import SHAPE, in_process

import pipeline
from pipeline.errors import InfrastructureError

_PAUSE_S = 1.0


class _Mallinfo2(ctypes.Structure):
    """mallinfo(3), glibc 2.33."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"
        )
    ]  # fmt: skip


def bytes_in_use() -> int:
    """What was asked for and not given back: of the C library, which PyTorch, NumPy, OpenCV and the store's client ask,
    of Arrow, and of Python for small objects, each taken for 64 bytes. What DuckDB asks for ends with its connection.

    What is resident is more, by what allocators keep for later: in this process 50 MiB more or less, turn by turn.
    """
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _Mallinfo2
    found = mallinfo2()
    return int(found.uordblks + found.hblkhd + pa.total_allocated_bytes() + 64 * sys.getallocatedblocks())


def main(arguments: list[str]) -> None:
    """SOURCE DEST MODEL; see the module."""
    source, dest, model = arguments
    ends = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ends.set()), daemon=True).start()
    me, began_s = psutil.Process(), time.monotonic()
    with in_process():
        while not ends.is_set():
            turn = {"failed": "", "planned": 0}
            try:
                outcome = pipeline.segment(
                    source=source,
                    dest=dest,
                    model=model,
                    engine="local",
                    shard_size=8,
                    lease_ttl_s=6,
                    max_error_rate=1.0,
                    **SHAPE,
                )
                turn["planned"] = outcome.planned
                with pipeline.connect(dest) as connection:
                    connection.sql("SELECT count(*) FROM images").fetchall()
            except InfrastructureError as error:  # the store's bad day; a later turn continues
                turn["failed"] = str(error)
            gc.collect()
            turn |= {"at_s": time.monotonic() - began_s, "used_bytes": bytes_in_use()}
            turn["rss_bytes"] = me.memory_info().rss
            print(json.dumps(turn), flush=True)
            ends.wait(_PAUSE_S)


if __name__ == "__main__":
    main(sys.argv[1:])
