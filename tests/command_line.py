"""`maskmill` in this process: what it said. The fixture `maskmill` gives it to the tests of the pipeline."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from pipeline import cli


class Said(NamedTuple):
    """What one command came to."""

    status: int
    out: str
    err: str


Maskmill = Callable[..., Said]


def speaker(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Maskmill:
    """`speaker(...)(*arguments)` runs one command. Fails where it ends in a traceback."""

    def run(*arguments: str | Path) -> Said:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["maskmill", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capfd.readouterr()
        assert "Traceback" not in said.err
        return Said(int(ended.value.code or 0), said.out, said.err)

    return run
