"""A command's scratch folder ends with it, or with the next command."""

from __future__ import annotations

import ast
import errno
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.errors import InfrastructureError
from pipeline.table.scratch import scratch_folder

ROOT = Path(__file__).parents[3]
HOLDS_ONE = """
import time
from pipeline.table.scratch import scratch_folder
with scratch_folder() as folder:
    (folder / "list").write_text("much")
    print(folder, flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def test_nothing_is_left(temporary_folder: Path) -> None:
    with pytest.raises(ValueError, match="x"), scratch_folder() as folder:
        (folder / "list").write_text("much")
        assert folder.parent == temporary_folder
        raise ValueError("x")
    assert list(temporary_folder.iterdir()) == []


def test_a_living_process_keeps_its_own_and_a_killed_ones_is_removed(temporary_folder: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLDS_ONE], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    theirs = Path(process.stdout.readline().strip())
    with scratch_folder() as ours:
        assert theirs != ours and (theirs / "list").exists()
    process.kill()
    process.wait()
    process.stdout.close()
    assert (theirs / "list").exists()
    with scratch_folder():
        assert not theirs.exists()
    assert list(temporary_folder.iterdir()) == []


def test_somebody_elses_folders_stay(temporary_folder: Path) -> None:
    names = ["maskmill-demo", "maskmill-run-", "maskmill-run-mine"]
    for name in names:
        (temporary_folder / name).mkdir()
    with scratch_folder():
        pass
    assert sorted(os.listdir(temporary_folder)) == names


def test_one_that_is_made_while_others_are_removed_is_kept(temporary_folder: Path) -> None:
    def hold(_: int) -> bool:
        with scratch_folder() as folder:
            (folder / "list").write_text("much")
            return (folder / "list").exists()

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(hold, range(400)))
    assert list(temporary_folder.iterdir()) == []


def test_a_full_disk_is_said_to_be_full(temporary_folder: Path) -> None:
    with pytest.raises(InfrastructureError, match=f"temporary folder {temporary_folder} is full"), scratch_folder():
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(PermissionError), scratch_folder():
        raise OSError(errno.EACCES, "denied")


def test_the_product_has_no_temporary_folders_of_another_kind() -> None:
    """A kill would leave them for ever."""
    for top in ("models", "pipeline", "flows"):
        for path in (ROOT / top).rglob("*.py"):
            names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
            assert path.name == "scratch.py" or not names & {"TemporaryDirectory", "mkdtemp"}, path
