from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from models.file import load_module, read_card
from models.segmenter import Segmenter
from pipeline.learning import training
from pipeline.learning.augmentation import AugmentationConfig
from pipeline.learning.dataset import Dataset
from pipeline.learning.evaluation import evaluate
from pipeline.learning.training import TrainingConfig, TrainingError, learning_rate_factor, train

sys.path.insert(0, str(Path(__file__).parent))
from tiny_nuclei import write_dataset


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "discs")


def tiny(folder: Path, out: Path, **changes: object) -> TrainingConfig:
    settings: dict[str, object] = {
        "dataset": folder,
        "out": out,
        "name": "discs",
        "decoder_channels": (16, 8, 8),
        "steps": 3,
        "batch_size": 2,
        "augmentation": AugmentationConfig(crop_px=32),
        "precision": "fp32",
        "device": "cpu",
        "val_split": None,
    }
    return TrainingConfig(**{**settings, **changes})  # type: ignore[arg-type]


def test_saved_model_loads_segments_and_tells_its_origin(folder: Path, tmp_path: Path) -> None:
    out = train(tiny(folder, tmp_path / "discs.safetensors", val_split="val"))
    card, module = load_module(out.read_bytes())
    assert card.class_names() == {0: "background", 1: "disc"}
    assert card.provenance["data_sha256"] == Dataset(folder, "train").digest()
    assert card.provenance["steps"] == 3
    assert card.provenance["settings"]["seed"] == 0  # type: ignore[index, call-overload]
    assert str(tmp_path) not in card.model_dump_json()
    segmenter = Segmenter(module, card, device="cpu", precision="fp32")
    figures = evaluate(segmenter, Dataset(folder, "val"))
    assert figures["images"] == 2
    measured = card.metrics["val"]["fp32"]  # type: ignore[index, call-overload]
    assert measured == {name: round(value, 4) for name, value in figures.items()}


def test_equal_configs_give_equal_weights(folder: Path, tmp_path: Path) -> None:
    states = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        _, module = load_module(train(tiny(folder, tmp_path / name, seed=seed)).read_bytes())
        states.append(module.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["encoder.conv1.weight"], states[2]["encoder.conv1.weight"])


@pytest.mark.parametrize("task", ["instance", "semantic"])
def test_learns_to_find_discs(folder: Path, tmp_path: Path, task: str) -> None:
    changes = {"task": task, "steps": 40, "batch_size": 4, "learning_rate": 5e-3, "ema_decay": 0.8}
    plain = AugmentationConfig(
        crop_px=64, scale=(0.9, 1.1), rotate_probability=0, noise=0, blur_probability=0, veil_probability=0
    )
    out = train(tiny(folder, tmp_path / "discs", augmentation=plain, **changes))
    card, module = load_module(out.read_bytes())
    figures = evaluate(Segmenter(module, card, device="cpu", precision="fp32"), Dataset(folder, "train"))
    assert figures["foreground_iou" if task == "instance" else "mean_iou"] > 0.6


def test_minutes_end_a_run(folder: Path, tmp_path: Path) -> None:
    out = train(tiny(folder, tmp_path / "discs", steps=None, minutes=0.01))
    assert read_card(out).provenance["steps"] >= 1  # type: ignore[operator]


def test_non_finite_loss_names_the_images(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "cross_entropy_dice", lambda logits, *_: logits.sum() * math.nan)
    with pytest.raises(TrainingError, match=r"became nan at step 0, on images disc-\d\.png, disc-\d\.png"):
        train(tiny(folder, tmp_path / "never"))
    assert not (tmp_path / "never").exists()


def test_learning_rate_rises_then_falls() -> None:
    factors = [learning_rate_factor(step / 100, 0.1) for step in range(100)]
    assert max(factors) == factors[10] == 1.0
    assert factors[:11] == sorted(factors[:11])
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[-1] < 0.01
    assert all(factor > 0 for factor in factors)


def test_needs_one_end(folder: Path, tmp_path: Path) -> None:
    for changes in ({"steps": None}, {"minutes": 1.0}):
        with pytest.raises(ValidationError, match="either steps or minutes"):
            tiny(folder, tmp_path / "x", **changes)


def test_command_line_says_what_it_needs() -> None:
    command = [sys.executable, "-m", "pipeline.learning.training", "--help"]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "--minutes" in result.stdout
    assert "--out" in result.stdout
