from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from models.architectures import build, untrained_card
from models.card import WatershedPostprocessing
from models.segmenter import Segmenter
from pipeline.learning import tuning
from pipeline.learning.dataset import Dataset
from pipeline.learning.tuning import Evidence, panoptic_quality, tune_watershed

sys.path.insert(0, str(Path(__file__).parent))
from tiny_nuclei import write_dataset


def faint_discs(dataset: Dataset) -> Evidence:
    """Two discs that only a low threshold finds, and specks that only an area limit removes."""
    actual = dataset.instance_labels(dataset.items[0])
    actual[actual > 2] = 0
    foreground = np.where(actual > 0, 110, 0).astype(np.uint8)
    foreground[50:54, 10:60:6] = 255
    return Evidence(foreground, foreground, actual)


def test_finds_the_settings_that_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = Dataset(write_dataset(tmp_path / "discs", images=3), "train")
    evidence = faint_discs(dataset)
    card = untrained_card("discs", task="instance", class_names=("background", "disc"))
    segmenter = Segmenter(build(card), card, device="cpu", precision="fp32")
    prediction = tuning.predict(segmenter, dataset.image(dataset.items[0]))
    maps = {"interior": evidence.interior, "foreground": evidence.foreground}
    monkeypatch.setattr(tuning, "predict", lambda *_: prediction._replace(instance_evidence=maps))
    monkeypatch.setattr(dataset, "instance_labels", lambda _: evidence.actual)
    best = tune_watershed(segmenter, dataset)
    assert best.foreground_threshold < 0.45
    assert best.min_area_px > 4
    assert panoptic_quality([evidence], best) == 1.0
    assert panoptic_quality([evidence], WatershedPostprocessing()) < 0.5


def test_semantic_models_have_nothing_to_tune(tmp_path: Path) -> None:
    dataset = Dataset(write_dataset(tmp_path / "discs", images=3), "train")
    card = untrained_card("discs")
    with pytest.raises(ValueError, match="no watershed to tune"):
        tune_watershed(Segmenter(build(card), card, device="cpu", precision="fp32"), dataset)
