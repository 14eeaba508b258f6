"""`maskmill report` as a person meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import Maskmill
from pictured_table import PicturedTable


def test_limits_of_drift_are_given_and_past_them_the_status_is_4(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, maskmill: Maskmill
) -> None:
    place = PicturedTable(tmp_path)
    monkeypatch.chdir(tmp_path)
    for sure in (0.9, 0.9, 0.6):
        place.night(60, sure=sure)
    status, out, _ = maskmill("drift", "dest", "--json")
    found = json.loads(out)
    assert (status, found["drifted"], found["shifts"][0]["measure"]) == (4, True, "mean_confidence")
    limits = ("--drift", "psi_threshold=99", "--drift", "runs=1")
    found = json.loads(maskmill("drift", "dest", *limits, "--json").out)
    assert (len(found["earlier_runs"]), {one["psi_limit"] for one in found["shifts"]}) == (1, {99})
    many = ("--drift", "least_images=61")
    assert maskmill("drift", "dest", *many).status == 0
    assert maskmill("report", "dest", *many).status == 0
    assert "60 images now and 120 before are too few to compare" in Path("report.html").read_text()
    for wrong, says in (("psi_threshold=-1",) * 2, ("psi=1", "known are runs, psi_"), ("alpha", "is not KEY=VALUE")):
        status, _, err = maskmill("drift", "dest", "--drift", wrong)
        assert status == 2 and says in err, err


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
