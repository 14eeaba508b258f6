from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models.architectures import card_for, untrained_card
from models.card import Card
from pipeline.learning.dataset import Dataset
from pipeline.learning.examples import Examples
from pipeline.learning.preview import draw_preview
from pipeline.learning.recipe import AugmentationConfig, SamplingConfig

sys.path.insert(0, str(Path(__file__).parent))
from tiny_nuclei import write_dataset


def cards() -> dict[str, Card]:
    names = ("background", "disc")
    return {
        "classes": untrained_card("discs", class_names=names),
        "boundaries": untrained_card("discs", task="instance", class_names=names),
        "detection": card_for("boxes", "maskrcnn_mobilenet_v3_large_fpn", class_names=names, canvas_multiple=1),
    }


@pytest.mark.parametrize("kind", ["classes", "boundaries", "detection"])
def test_views_beside_their_labels(kind: str, tmp_path: Path) -> None:
    dataset = Dataset(write_dataset(tmp_path / "discs"), "train")
    still = AugmentationConfig(scale=(1, 1), color_probability=0, blur_probability=0, noise_probability=0)
    examples = Examples(dataset, cards()[kind], augmentation=still, sampling=SamplingConfig(), batch_size=2, seed=0)
    png = draw_preview(examples, views=3, columns=2, width_px=64)
    assert png == draw_preview(examples, views=3, columns=2, width_px=64)
    sheet = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
    assert sheet.shape[1] == 2 * (128 + 6) + 6
    # The first pair: grey without labels, coloured where the discs are with them, and nowhere else.
    plain, labelled = sheet[6:70, 6:70], sheet[6:70, 70:134]
    colored = np.abs(plain - labelled).max(axis=2) > 8
    batch = examples.batch(0)
    target = batch.targets[0]
    discs = ((target["masks"] > 0).any(dim=0) if isinstance(target, dict) else target > 0).numpy()
    assert colored[discs].mean() > 0.95
    boxes = 0.1 if kind == "detection" else 0.0
    assert colored[~discs].mean() <= boxes
    # The fourth place is empty.
    assert (sheet[6 + 64 + 14 + 6 + 10, 134 + 20 : -20] == 255).all()
