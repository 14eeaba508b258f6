"""`maskmill report` as a person meets it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from pictured_table import PicturedTable

from pipeline import cli


def said(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["maskmill", *map(str, arguments)])
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main()
    heard = capfd.readouterr()
    return int(ended.value.code or 0), heard.out, heard.err


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    place = PicturedTable(tmp_path)
    first, second = place.night(3, 1), place.night(3, 1)
    monkeypatch.chdir(tmp_path)
    status, out, _ = said(monkeypatch, capfd, "report", "dest")
    assert status == 0 and out.startswith(f"report.html: run {second}, ")
    assert second in Path("report.html").read_text()
    status, out, _ = said(monkeypatch, capfd, "report", "dest", "--run", first, "--out", "[b] it's.html", "--json")
    body = json.loads(out)
    assert (status, body["run_id"], body["out"]) == (0, first, "[b] it's.html")
    assert Path("[b] it's.html").stat().st_size == body["size_bytes"]
    status, _, err = said(monkeypatch, capfd, "report", "dest", "--run", "nobody")
    assert status == 2 and "no run 'nobody'" in err
    status, _, err = said(monkeypatch, capfd, "report", "photos")
    assert status == 2 and "holds no Maskmill table" in err
