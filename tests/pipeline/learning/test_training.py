from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import duckdb
import pytest
import torch
from chaos.faulty_storage import Call, Event, Stage
from dying_storage import KilledError
from PIL import Image

from models.file import load_module
from models.segmenter import Segmenter
from pipeline.errors import StoppedError, UsageError
from pipeline.learning import loop
from pipeline.learning.dataset import Dataset
from pipeline.learning.evaluation import evaluate
from pipeline.learning.loop import EpochEvent, StepEvent
from pipeline.learning.training import BrokenLabelsError, Note, TrainingError, preview, train
from pipeline.storage import local_path

sys.path.insert(0, str(Path(__file__).parent))
from tiny_nuclei import write_dataset
from tiny_training import NORMLESS, equal, tiny, weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "discs")


@pytest.fixture(autouse=True)
def _threads_as_they_were() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def undisturbed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Weights after three epochs of two steps."""
    return weights(train(tiny(folder, tmp_path_factory.mktemp("undisturbed"), epochs=3)).uri)


def test_the_model_serves_and_tells_its_origin(folder: Path, tmp_path: Path) -> None:
    heard: list[Any] = []
    outcome = train(tiny(folder, tmp_path), listen=heard.append)
    assert outcome.state == "trained"
    assert outcome.uri == f"file://{tmp_path}/discs/{outcome.version}.safetensors"
    card, module = load_module(Path(local_path(outcome.uri)).read_bytes())
    assert card.class_names() == {0: "background", 1: "disc"}
    assert card.task == "instance"
    told = card.provenance
    assert told["data_sha256"] == Dataset(folder, "train").digest()
    assert (told["steps"], told["epochs"], told["images"]) == (4, 2, 4)
    assert told["settings"]["seed"] == 1  # type: ignore[index, call-overload]
    assert told["initial_weights"] == "random"
    assert str(tmp_path) not in card.model_dump_json()
    assert str(folder) not in card.model_dump_json()
    figures = evaluate(Segmenter(module, card, device="cpu", precision="fp32"), Dataset(folder, "val"))
    assert outcome.metrics["val"]["fp32"] == {name: round(value, 4) for name, value in figures.items()}
    assert [type(event) for event in heard if not isinstance(event, Note)] == [
        StepEvent, StepEvent, EpochEvent, StepEvent, StepEvent, EpochEvent,
    ]  # fmt: skip


def test_trace_and_curves_stay_and_checkpoints_go(folder: Path, tmp_path: Path) -> None:
    outcome = train(tiny(folder, tmp_path))
    run = Path(local_path(outcome.folder))
    rows = duckdb.sql(f"SELECT * FROM read_parquet('{run}/trace/*.parquet') ORDER BY epoch").fetchall()
    names = [column[0] for column in duckdb.sql(f"SELECT * FROM read_parquet('{run}/trace/*.parquet')").description]
    first = dict(zip(names, rows[0], strict=True))
    assert [row[names.index("step")] for row in rows] == [2, 4]
    assert first["loss"] == pytest.approx(sum(first[name] for name in names if name.startswith("loss_")), rel=1e-5)
    assert first["images_per_s"] > 0
    assert 0 <= first["val_panoptic_quality"] <= 1
    assert Image.open(run / "curves.png").size[0] > 500
    assert not list(run.glob("checkpoint-*"))
    assert json.loads((run / "outcome.json").read_text())["version"] == outcome.version


def test_the_loss_that_people_see_is_always_a_number(folder: Path, tmp_path: Path) -> None:
    heard: list[Any] = []
    train(tiny(folder, tmp_path, steps=5, val_split=None), listen=heard.append)
    seen = [event.loss for event in heard if isinstance(event, StepEvent)]
    means = [event.row["loss"] for event in heard if isinstance(event, EpochEvent)]
    # Each step is told with the loss of the one before, the first with its own; the last is in its epoch's mean.
    losses = [*seen[1:], means[2]]
    assert seen[0] == losses[0]
    assert means == pytest.approx([sum(losses[:2]) / 2, sum(losses[2:4]) / 2, losses[4]], rel=1e-6)


def test_the_same_again_has_nothing_to_do(folder: Path, tmp_path: Path) -> None:
    first = train(tiny(folder, tmp_path, steps=1))
    again = train(tiny(folder, tmp_path, steps=1, out=str(tmp_path / "copy.safetensors")))
    assert (again.state, again.version) == ("already", first.version)
    assert (tmp_path / "copy.safetensors").read_bytes() == Path(local_path(first.uri)).read_bytes()
    assert train(tiny(folder, tmp_path, steps=1, restart=True)).state == "trained"


def test_equal_settings_give_equal_weights(folder: Path, tmp_path: Path, undisturbed: dict[str, torch.Tensor]) -> None:
    assert equal(weights(train(tiny(folder, tmp_path / "a", epochs=3)).uri), undisturbed)
    assert not equal(weights(train(tiny(folder, tmp_path / "b", epochs=3, seed=2)).uri), undisturbed)


def test_stopped_on_request_and_continued(folder: Path, tmp_path: Path, undisturbed: dict[str, torch.Tensor]) -> None:
    seen: list[Any] = []
    with pytest.raises(StoppedError, match="same command continues"):
        train(
            tiny(folder, tmp_path, epochs=3),
            listen=seen.append,
            should_stop=lambda: sum(isinstance(event, StepEvent) for event in seen) == 5,
        )
    outcome = train(tiny(folder, tmp_path, epochs=3))
    assert outcome.resumed_step == 4
    assert equal(weights(outcome.uri), undisturbed)


def test_killed_and_continued_by_the_same_command(
    folder: Path, tmp_path: Path, undisturbed: dict[str, torch.Tensor]
) -> None:
    recipe = tmp_path / "recipe.json"
    config = tiny(folder, tmp_path / "registry", epochs=3)
    recipe.write_text(config.model_dump_json(exclude={"dataset"}))
    command = [sys.executable, "-m", "pipeline.cli", "train", str(folder), "--recipe", str(recipe), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline_s = time.monotonic() + 120
    # After the first checkpoint, wherever the second epoch then is.
    while not list(tmp_path.glob("registry/_training/*/checkpoint-*")) and time.monotonic() < deadline_s:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    outcome = json.loads(result.stdout)
    assert outcome["resumed_step"] >= 2
    assert equal(weights(outcome["uri"]), undisturbed)


@pytest.mark.s3
def test_killed_and_continued_from_a_bucket(
    folder: Path, tmp_path: Path, s3_bucket: str, s3_client: Any, undisturbed: dict[str, torch.Tensor]
) -> None:
    recipe = tmp_path / "recipe.json"
    config = tiny(folder, tmp_path, epochs=3).model_copy(update={"registry": f"{s3_bucket}/models"})
    recipe.write_text(config.model_dump_json(exclude={"dataset"}))
    command = [sys.executable, "-m", "pipeline.cli", "train", str(folder), "--recipe", str(recipe), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def keys(kind: str) -> list[str]:
        listed = s3_client.list_objects_v2(Bucket=s3_bucket.removeprefix("s3://"), Prefix="models/")
        return [entry["Key"] for entry in listed.get("Contents", ()) if kind in entry["Key"]]

    deadline_s = time.monotonic() + 120
    while not keys("/checkpoint-") and time.monotonic() < deadline_s:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert keys("/checkpoint-")
    assert not keys("outcome.json")
    outcome = train(config)
    assert outcome.resumed_step >= 2
    assert outcome.uri.startswith(f"{s3_bucket}/models/discs/")
    assert equal(weights(outcome.uri), undisturbed)
    assert not keys("/checkpoint-")


@pytest.mark.parametrize("last", ["trace/00003.parquet", "outcome.json", "checkpoint-00000006.safetensors"])
def test_killed_at_its_end_it_leaves_one_model_and_nothing_that_it_needs_no_more(
    folder: Path, tmp_path: Path, last: str, undisturbed: dict[str, torch.Tensor]
) -> None:
    """Before the last row of the trace, after the model was published, and while it was clearing up."""
    config = tiny(folder, tmp_path, epochs=3)

    def script(call: Call) -> Event:
        writes = {"trace/00003.parquet": "put_new", "outcome.json": "put"}.get(last, "delete")
        return "kill" if call.method == writes and call.name.endswith(last) else None

    with Stage(script).set(), pytest.raises(KilledError):
        train(config)
    outcome = train(config)
    assert equal(weights(outcome.uri), undisturbed)
    run = Path(local_path(outcome.folder))
    names = {path.name for path in run.rglob("*.*")}
    assert names == {"00001.parquet", "00002.parquet", "00003.parquet", "curves.png", "outcome.json"}
    assert [path.stem for path in (tmp_path / "discs").glob("*.safetensors")] == [outcome.version]


def test_sgd_learns_and_continues_bit_for_bit(
    folder: Path, tmp_path: Path, undisturbed: dict[str, torch.Tensor]
) -> None:
    sgd: dict[str, Any] = {"epochs": 3, "val_split": None, "optimizer": "sgd", "learning_rate": 0.05}
    heard: list[Any] = []
    whole = weights(train(tiny(folder, tmp_path / "whole", **sgd), listen=heard.append).uri)
    losses = [event.row["loss"] for event in heard if isinstance(event, EpochEvent)]
    assert losses[2] < losses[0]
    assert not equal(whole, undisturbed)
    seen: list[Any] = []
    with pytest.raises(StoppedError):
        train(
            tiny(folder, tmp_path / "cut", **sgd),
            listen=seen.append,
            should_stop=lambda: sum(isinstance(event, StepEvent) for event in seen) == 3,
        )
    outcome = train(tiny(folder, tmp_path / "cut", **sgd))
    assert outcome.resumed_step == 2
    assert equal(weights(outcome.uri), whole)


def test_portions_of_a_step_come_to_the_step_of_the_whole(folder: Path, tmp_path: Path) -> None:
    """To 1e-5, with a loss that is a mean over pixels, and a network that looks at each image alone."""
    found = {}
    for accumulate in (1, 4):
        rows: list[dict[str, Any]] = []
        config = tiny(
            folder, tmp_path / str(accumulate), steps=3, batch_size=4, epoch_images=4, accumulate=accumulate,
            task="semantic", loss={"terms": [{"kind": "cross_entropy"}]}, optimizer="sgd", learning_rate=0.05,
            val_split=None, ema_decay=0, **NORMLESS,
        )  # fmt: skip
        outcome = train(
            config, listen=lambda event, rows=rows: rows.append(event.row) if isinstance(event, EpochEvent) else None
        )
        figures = [(row["loss"], row["loss_cross_entropy"], row["gradient_norm"]) for row in rows]
        found[accumulate] = figures, weights(outcome.uri)
    whole, end = found[1]
    assert whole[2][0] < whole[0][0]
    figures, reached = found[4]
    for mine, theirs in zip(figures, whole, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
    for name, tensor in end.items():
        assert torch.allclose(reached[name], tensor, rtol=1e-4, atol=1e-5), name


def test_learns_and_keeps_the_best(folder: Path, tmp_path: Path) -> None:
    plain = {"crop_px": 64, "scale": (0.9, 1.1), "color_probability": 0, "noise_probability": 0, "blur_probability": 0}
    heard: list[Any] = []
    config = tiny(
        folder, tmp_path, steps=60, batch_size=4, learning_rate=5e-3, ema_decay=0.8, epoch_images=60,
        augmentation=plain, task="semantic", sampling={"stratum_power": 1},
    )  # fmt: skip
    outcome = train(config, listen=heard.append)
    scores = {event.row["step"]: event.row["val_mean_iou"] for event in heard if isinstance(event, EpochEvent)}
    assert outcome.kept_step == max(scores, key=lambda step: scores[step])
    assert outcome.metrics["val"]["fp32"]["mean_iou"] == pytest.approx(max(scores.values()), abs=1e-4)
    assert max(scores.values()) > 0.6


def test_stops_early(folder: Path, tmp_path: Path) -> None:
    outcome = train(tiny(folder, tmp_path, epochs=50, patience=1, learning_rate=1e-9))
    assert outcome.epochs < 5


@pytest.mark.parametrize("seed", [20_261_120, 2**70])
def test_any_whole_number_is_a_seed(folder: Path, tmp_path: Path, seed: int) -> None:
    assert train(tiny(folder, tmp_path, seed=seed, steps=1, val_split=None)).steps == 1


def test_minutes_end_a_run(folder: Path, tmp_path: Path) -> None:
    outcome = train(tiny(folder, tmp_path, minutes=0.01))
    assert outcome.steps >= 1
    assert outcome.minutes >= 0.01


def test_non_finite_loss_names_step_and_images(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = loop.Objective.parts, []

    def third_is_broken(self: Any, module: Any, batch: Any) -> Any:
        calls.append(batch.names)
        return {
            name: part * (float("nan") if len(calls) == 3 else 1) for name, part in real(self, module, batch).items()
        }

    monkeypatch.setattr(loop.Objective, "parts", third_is_broken)
    with pytest.raises(TrainingError, match="became nan at step 3") as caught:
        train(tiny(folder, tmp_path))
    assert ", ".join(calls[2]) in str(caught.value)
    assert not list(tmp_path.glob("discs/*"))


def test_broken_labels_are_refused(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "broken")
    Image.new("RGB", (9, 9)).save(folder / "images" / "disc-0.png")
    with pytest.raises(BrokenLabelsError, match="1 errors") as caught:
        train(tiny(folder, tmp_path / "registry"))
    assert "size_mismatch" in caught.value.report.text()
    assert not (tmp_path / "registry").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 1, "minutes": 1.0}, "give one of epochs"),
        ({"batch_size": 3, "accumulate": 2}, "multiple of workers x accumulate"),
        ({"patience": 1, "val_split": None}, "val_split"),
        ({"workers": 2, "engine": "local"}, "one worker"),
    ],
)
def test_settings_that_contradict_each_other(folder: Path, tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(folder, tmp_path, **changes)


def test_what_does_not_fit_is_told_in_a_sentence(folder: Path, tmp_path: Path) -> None:
    for changes, message in (
        ({"arch": "unett"}, "did you mean unet"),
        ({"encoder": "resnet19"}, "did you mean resnet1"),
        ({"augmentation": {"crop_px": 33}}, "multiples of the network's"),
        ({"train_split": "learn"}, "no split 'learn'"),
        ({"dataset": str(tmp_path / "nothing")}, "nothing"),
    ):
        with pytest.raises(UsageError, match=message):
            train(tiny(**{"dataset": folder, "registry": tmp_path, **changes}))


def test_preview_draws_what_would_be_seen(folder: Path, tmp_path: Path) -> None:
    picture = Image.open(io.BytesIO(preview(tiny(folder, tmp_path))))
    assert picture.size[0] > 300
    assert not list(tmp_path.iterdir())
