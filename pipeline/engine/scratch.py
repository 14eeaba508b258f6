"""A command's scratch folder: lists of millions of images are large. Owns: its name, its end, and what killed commands
of this machine have left. Must not know: what lies in it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pipeline.engine.lease import process_start
from pipeline.table.catalog import scratch_is_full

_PREFIX = "maskmill-run-"


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for this process, gone at the end. Folders of processes that are no more are removed on the way.

    Where the disk turns out to be full meanwhile, raises InfrastructureError, which says so.
    """
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        pid, _, rest = path.name.removeprefix(_PREFIX).partition("-")
        if pid.isdigit() and process_start(int(pid)) != rest.partition("-")[0]:
            shutil.rmtree(path, ignore_errors=True)
    try:
        with tempfile.TemporaryDirectory(prefix=f"{_PREFIX}{os.getpid()}-{process_start(os.getpid())}-") as folder:
            yield Path(folder)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):  # of stores, errors say so by themselves
            raise scratch_is_full() from error
        raise
