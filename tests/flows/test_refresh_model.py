"""The flows of models as plain functions: trained, measured, promoted or not, segmented again."""

from __future__ import annotations

import json
import sys
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import in_process, terminal_rows, wait_until
from prefect_site import Site, client_of

pytest.importorskip("prefect")

from prefect import tags

import pipeline
from flows.evaluate_model import evaluate_model
from flows.refresh_model import refresh_model
from flows.train_model import train_model
from pipeline.config import SegmentConfig
from pipeline.errors import UsageError
from pipeline.learning.configuration import TrainConfig
from pipeline.learning.promotion import Gate
from pipeline.registry import resolve

sys.path.insert(0, str(Path(__file__).parents[1] / "pipeline" / "learning"))
from tiny_nuclei import write_dataset

pytestmark = pytest.mark.prefect

QUICK = {"engine": "local", "threads": 1, "precision": "fp32"}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("labelled") / "discs")


@pytest.fixture(autouse=True)
def server(site: Site, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Task runs of this process are told to the site's server."""
    monkeypatch.delenv("MASKMILL_REGISTRY", raising=False)
    with client_of(site), in_process():
        yield


def training(dataset: Path, registry: Path | None, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "dataset": str(dataset), "registry": str(registry) if registry else "", "name": "discs", "arch": "unet",
        "args": {"encoder_depth": 3, "decoder_channels": [16, 8, 8]}, "augmentation": {"crop_px": 32}, "batch_size": 2,
        "precision": "fp32", "use_gpu": False, "threads": 1, "steps": 2, "seed": 1,
    }  # fmt: skip
    return TrainConfig(**settings | changes)


GATE = Gate(evaluation=QUICK)


@pytest.mark.timeout(420, func_only=True)
def test_a_model_is_refreshed(site: Site, dataset: Path, tmp_path: Path) -> None:
    registry, out = tmp_path / "models", tmp_path / "out"
    segmentation = SegmentConfig(source=str(dataset / "images"), dest=str(out), model="discs@champion", **QUICK)
    first = refresh_model.fn(training(dataset, registry), GATE)
    assert (first.state, first.why) == ("promoted", "discs had no champion")
    with tags("promoted"):
        second = refresh_model(training(dataset, registry, steps=60, batch_size=4), GATE, segmentation)
    assert (second.state, second.champion, second.champion_before) == ("promoted", second.version, first.version)
    assert len(terminal_rows(out)) == 6
    assert {run["model_version"] for run in pipeline.list_runs(str(out))} == {second.version}
    with tags("kept"):
        third = refresh_model(training(dataset, registry, seed=2), GATE, segmentation)
    assert third.state == "kept" and "95.0% is asked for" in third.why
    assert resolve("discs", registry=str(registry)).version == second.version != third.version
    assert len(pipeline.list_runs(str(out))) == 1, "nothing is segmented without a new champion"
    told = pipeline.model_history("discs", str(registry))
    assert [entry.action for entry in told] == ["push", "promote", "push", "promote", "push", "keep"]

    shown = {}
    for tag in ("kept", "promoted"):
        runs = site.api("flow_runs/filter", {"flow_runs": {"tags": {"all_": [tag]}}})
        (run,) = [one for one in runs if one["parent_task_run_id"] is None]
        assert run["state_type"] == "COMPLETED"
        shown[tag] = site.artifacts(run["id"])
        assert {"train-outcome", "train-curves", "promotion"} <= shown[tag].keys()
        assert shown[tag]["train-curves"]["data"].startswith("data:image/png;base64,")
    figures = {row["figure"]: row["value"] for row in json.loads(shown["kept"]["promotion"]["data"])}
    assert (figures["state"], figures["metric"], figures["champion"]) == ("kept", "pq", second.version)
    wait_until(lambda: len(promotions(site, second.version)) == 1, what="the event", poll_s=0.2)
    (event,) = promotions(site, second.version)
    assert event["resource"]["prefect.resource.id"] == "maskmill.model.discs"
    assert event["payload"]["champion_before"] == first.version


def promotions(site: Site, version: str) -> list[dict[str, Any]]:
    events = site.api("events/filter", {"filter": {"event": {"name": ["maskmill.model.promoted"]}}})["events"]
    return [event for event in events if event["payload"]["version"] == version]


@pytest.mark.timeout(420, func_only=True)
def test_a_model_is_trained_then_measured(site: Site, dataset: Path, tmp_path: Path) -> None:
    registry = str(tmp_path / "models")
    settings = training(dataset, tmp_path / "models").model_dump(exclude_unset=True)
    trained = train_model.fn(**settings)
    assert trained.state == "trained" and resolve("discs", registry=registry).version == trained.version
    assert train_model.fn(**settings).state == "already"
    with tags("measured"):
        found = evaluate_model(dataset=str(dataset), model="discs", registry=registry, resamples=50, **QUICK)
    assert found.scores is not None and found.scores.images == 2
    assert found.dest.startswith(f"file://{registry}/_evaluations/discs/{trained.version}")
    (run,) = site.api("flow_runs/filter", {"flow_runs": {"tags": {"all_": ["measured"]}}})
    rows = {row["score"]: row for row in json.loads(site.artifacts(run["id"])["evaluate-scores"]["data"])}
    assert rows["miou"]["value"] == f"{found.scores.miou:.4f}" and " to " in rows["miou"]["interval"]


@pytest.mark.timeout(60, func_only=True)
def test_what_cannot_work_fails_before_any_work(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no registry is named"):
        refresh_model.fn(training(dataset, None))
    with pytest.raises(UsageError, match="/no/such"):
        refresh_model.fn(training(Path("/no/such"), tmp_path / "models"))
    with pytest.raises(UsageError, match="no model is called 'nobody'"):
        evaluate_model.fn(dataset=str(dataset), model="nobody", registry=str(tmp_path), **QUICK)
    assert not (tmp_path / "models").exists()


@pytest.mark.slow
@pytest.mark.timeout(600, func_only=True)
def test_a_worker_runs_what_is_deployed(site: Site, dataset: Path, tmp_path: Path) -> None:
    registry = tmp_path / "models"
    asked = training(dataset, registry).model_dump(mode="json", exclude_unset=True)
    refreshed = site.begin(
        "refresh-model/weekly", training=asked, gate=GATE.model_dump(mode="json", exclude_unset=True)
    )
    assert site.end_of(refreshed, timeout_s=300)[0] == "COMPLETED"
    champion = resolve("discs@champion", registry=str(registry)).version
    assert "promotion" in site.artifacts(refreshed)
    measured = site.begin(
        "evaluate-model/weekly", dataset=str(dataset), model="discs", registry=str(registry), resamples=50, **QUICK
    )
    trained = site.begin("train-model/adhoc", **asked | {"seed": 2})
    assert site.end_of(measured, timeout_s=300)[0] == "COMPLETED"
    assert "evaluate-scores" in site.artifacts(measured)
    assert site.end_of(trained, timeout_s=300)[0] == "COMPLETED"
    told = pipeline.model_history("discs", str(registry))
    assert [entry.action for entry in told] == ["push", "promote", "push"], "a model by hand is not promoted"
    assert resolve("discs", registry=str(registry)).version == champion


def test_the_weekly_ones_are_deployed_and_refuse_what_is_no_parameter(site: Site, dataset: Path) -> None:
    for name in ("refresh-model/weekly", "evaluate-model/weekly"):
        found = site.api(f"deployments/name/{name}")
        assert [one["active"] for one in found["schedules"]] == [True], name
        assert found["global_concurrency_limit"]["limit"] == 1, name
        assert found["concurrency_options"]["collision_strategy"] == "CANCEL_NEW", name
    refresh = site.api("deployments/name/refresh-model/weekly")
    good = {"dataset": str(dataset), "name": "discs", "registry": "x", "steps": 2}
    for parameters, words in (
        ({"training": good | {"batch_size": 0}}, "batch_size"),
        ({"training": good, "gate": {"confidence": 2}}, "confidence"),
        ({"training": good, "segmentation": {"source": "a"}}, "segmentation"),
    ):
        with pytest.raises(urllib.error.HTTPError) as refusal:
            site.api(f"deployments/{refresh['id']}/create_flow_run", {"parameters": parameters})
        assert refusal.value.code == 409
        assert words in refusal.value.read().decode()
