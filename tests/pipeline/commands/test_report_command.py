"""`maskmill report` as a person meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import Maskmill
from pictured_table import PicturedTable


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, maskmill: Maskmill) -> None:
    place = PicturedTable(tmp_path)
    first, second = place.night(3, 1), place.night(3, 1)
    monkeypatch.chdir(tmp_path)
    status, out, _ = maskmill("report", "dest")
    assert status == 0 and out.startswith(f"report.html: run {second}, ")
    assert second in Path("report.html").read_text()
    status, out, _ = maskmill("report", "dest", "--run", first, "--out", "[b] it's.html", "--json")
    body = json.loads(out)
    assert (status, body["run_id"], body["out"]) == (0, first, "[b] it's.html")
    assert Path("[b] it's.html").stat().st_size == body["size_bytes"]
    status, _, err = maskmill("report", "dest", "--run", "nobody")
    assert status == 2 and "no run 'nobody'" in err
    status, _, err = maskmill("report", "photos")
    assert status == 2 and "holds no Maskmill table" in err
