"""Every run leaves its report once; no run fails for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pictured_table import PicturedTable

import pipeline
from pipeline.config import DriftConfig
from pipeline.engine import placement
from pipeline.engine.crew import InlineCrew
from pipeline.engine.outcome import Event
from pipeline.insight import aftermath
from pipeline.insight.drift import DriftReport
from pipeline.insight.report import ReportConfig
from pipeline.storage import local_path

FEW = ReportConfig(random_images=1, uncertain_images=1, rare_images=0, failed_images=1)


def files(dest: str | Path, run_id: str) -> Path:
    return Path(local_path(str(dest)) if "://" in str(dest) else dest, "runs", run_id)


def test_closed_runs_get_both_files_once(tmp_path: Path) -> None:
    place = PicturedTable(tmp_path)
    done, still = place.night(2, 1), place.night(2, 1, state="open")
    assert not aftermath.has_report(place.dest, done)
    assert aftermath.leave_behind(place.dest, [done, still], FEW) == [aftermath.report_uri(place.dest, done)]
    assert done in (files(place.dest, done) / "report.html").read_text()
    found = DriftReport.model_validate_json((files(place.dest, done) / "drift.json").read_text())
    assert (found.run_id, found.state) == (done, "no_earlier_runs")
    assert not (files(place.dest, still) / "report.html").exists() and aftermath.has_report(place.dest, done)
    before = (files(place.dest, done) / "report.html").stat().st_mtime_ns
    assert aftermath.leave_behind(place.dest, [done], FEW) == []
    assert (files(place.dest, done) / "report.html").stat().st_mtime_ns == before


def test_what_goes_wrong_is_a_warning(tmp_path: Path) -> None:
    place = PicturedTable(tmp_path)
    damaged, fine = place.night(2, 0), place.night(2, 0)
    record = files(place.dest, damaged) / "run.json"
    body = json.loads(record.read_text())
    del body["plan"]["card"]
    record.write_text(json.dumps(body))
    heard: list[str] = []
    assert aftermath.leave_behind(place.dest, [damaged, fine], FEW, warn=heard.append) == [
        aftermath.report_uri(place.dest, fine)
    ]
    assert len(heard) == 1 and damaged in heard[0] and "KeyError" in heard[0]


@pytest.fixture
def segment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, semantic_model: Path, image_folder: Callable[..., Path]
) -> Callable[..., tuple[Any, list[Event]]]:
    monkeypatch.setattr(placement, "LocalCrew", InlineCrew)
    monkeypatch.setattr(placement, "gpu_count", lambda: 0)
    source = image_folder(3)

    def call(**changes: Any) -> tuple[Any, list[Event]]:
        heard: list[Event] = []
        settings = {"source": str(source), "dest": str(tmp_path / "dest"), "model": str(semantic_model), "threads": 1}
        return pipeline.segment(**settings, precision="fp32", listen=heard.append, **changes), heard

    return call


def test_a_run_leaves_its_report_unless_it_is_told_not_to(segment: Callable[..., Any], tmp_path: Path) -> None:
    outcome, heard = segment(limit=2)
    folder = files(tmp_path / "dest", outcome.run_id)
    assert outcome.run_id in (folder / "report.html").read_text() and (folder / "drift.json").exists()
    assert [event.text for event in heard if event.text.startswith("report: ")] == [
        f"report: {(folder / 'report.html').as_uri()}"
    ]
    outcome, _ = segment(report=False)
    assert outcome.ok == 1 and not (files(tmp_path / "dest", outcome.run_id) / "report.html").exists()
    assert pipeline.verify(str(tmp_path / "dest"), deep=True) == []


def test_the_limits_of_drift_are_those_of_the_command(segment: Callable[..., Any], tmp_path: Path) -> None:
    asked: list[ReportConfig] = []

    def looked_at(dest: str, run_id: str, config: ReportConfig) -> Any:
        asked.append(config)
        return make_report(dest, run_id, config)

    make_report = aftermath.make_report
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aftermath, "make_report", looked_at)
        segment(drift=DriftConfig(psi_threshold=0.5, runs=3))
    assert [one.drift for one in asked] == [DriftConfig(psi_threshold=0.5, runs=3)]


def test_a_run_whose_report_fails_is_done_all_the_same(
    segment: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no ink")

    monkeypatch.setattr(aftermath, "make_report", broken)
    outcome, heard = segment()
    assert (outcome.state, outcome.ok) == ("done", 3)
    assert any(event.kind == "warning" and "no ink" in event.text for event in heard)
