from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from models.machine_code import machine_code

ROOT = Path(__file__).parents[2]


def _total(pixels: np.ndarray, sums: np.ndarray) -> None:
    for pixel in pixels:
        sums[0] += pixel


def test_a_loop_holds_no_lock_and_may_be_given_pixels_that_nobody_may_write() -> None:
    sums = np.zeros(1, np.int64)
    compiled = machine_code(_total, (np.uint8, 1), (np.int64, 1))
    compiled(np.frombuffer(b"\x05\xff", np.uint8), sums)
    assert sums.tolist() == [260]
    assert compiled.targetoptions["nogil"] is True  # type: ignore[attr-defined]
    assert machine_code(_total, (np.uint8, 1), (np.int64, 1)) is compiled
    with pytest.raises(TypeError):
        compiled(np.zeros(3, np.float32), sums)


def test_machine_code_is_not_kept(tmp_path: Path) -> None:
    """Files of it are believed unseen: of another processor's, or damaged, one may crash, or count wrong."""
    code = "import numpy as np; from models.tally import tally; print(tally(np.eye(3, dtype=np.uint8)).regions)"
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "{0: 1, 1: 1}\n"
    assert not list(tmp_path.rglob("*"))
