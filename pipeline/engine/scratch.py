"""A command's scratch folder: lists of millions of images are large. Owns: its name, its end, and what killed commands
of this machine have left. Must not know: what lies in it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pipeline.engine.lease import process_start

_PREFIX = "maskmill-run-"


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for this process, gone at the end. Folders of processes that are no more are removed on the way."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        pid, _, rest = path.name.removeprefix(_PREFIX).partition("-")
        if pid.isdigit() and process_start(int(pid)) != rest.partition("-")[0]:
            shutil.rmtree(path, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{_PREFIX}{os.getpid()}-{process_start(os.getpid())}-") as folder:
        yield Path(folder)
