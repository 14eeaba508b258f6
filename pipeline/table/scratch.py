"""A command's scratch folder: lists of millions of images are large. Owns: its name, its end, and what killed commands
have left. Must not know: what lies in it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import InfrastructureError

_PREFIX = "maskmill-run-"
_LOCK_NAME = ".lock"


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for this process, gone at the end. Folders of processes that are no more are removed on the way: each
    is locked by its own while that lives, which containers that share a temporary folder see of each other, too.

    Where the disk turns out to be full meanwhile, raises InfrastructureError, which says so.
    """
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        _remove_if_left(path)
    try:
        folder, lock = _make()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):  # of stores, errors say so by themselves
            raise scratch_is_full() from error
        raise


def _make() -> tuple[Path, int]:
    """A folder and the descriptor that locks it."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
        lock = os.open(folder / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with contextlib.suppress(OSError):  # not every file system has locks: nothing is removed there
            fcntl.flock(lock, fcntl.LOCK_EX)
        if os.fstat(lock).st_nlink:  # else it was taken for one that was left
            return folder, lock
        os.close(lock)


def _remove_if_left(folder: Path) -> None:
    try:
        lock = os.open(folder / _LOCK_NAME, os.O_RDWR | os.O_CLOEXEC)
    except OSError:  # not ours, somebody else's, or gone
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except OSError:
        return  # its process lives
    finally:
        os.close(lock)


def scratch_is_full() -> InfrastructureError:
    """What a person is told where the temporary folder has no room."""
    return InfrastructureError(
        f"the disk of the temporary folder {tempfile.gettempdir()} is full: free some space, or set TMPDIR to a folder "
        "with more, and run the same command again"
    )
