from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from models.architectures import build, untrained_card
from models.masks import Instance, encode_rle
from models.segmenter import Segmenter
from pipeline.learning.dataset import Dataset
from pipeline.learning.evaluation import evaluate, label_map, predict

sys.path.insert(0, str(Path(__file__).parent))
from tiny_nuclei import write_dataset


class Bright(torch.nn.Module):
    """Says interior (or class 1) where the pixel is brighter than its image's mean. Right for light discs."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.gain = torch.nn.Parameter(torch.tensor(20.0))

    def forward(self, inputs_NCHW: torch.Tensor) -> torch.Tensor:
        bright = inputs_NCHW.mean(dim=1) * self.gain
        never = torch.full_like(bright, -50.0)
        return torch.stack([-bright, bright, *[never] * (self.channels - 2)], dim=1)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return Dataset(write_dataset(tmp_path / "discs"), "train")


def segmenter(task: str) -> Segmenter:
    card = untrained_card("bright", task=task, class_names=("background", "disc"))
    return Segmenter(Bright(card.network_channels), card, device="cpu", precision="fp32")


def test_instance_figures(dataset: Dataset) -> None:
    dataset.items = tuple(item for item in dataset.items if item.stratum == "light")
    figures = evaluate(segmenter("instance"), dataset)
    assert figures["images"] == 2
    assert figures["instance_f1"] == figures["foreground_iou"] == figures["foreground_iou_per_image"] == 1.0


def test_wrong_answers_cost(dataset: Dataset) -> None:
    figures = evaluate(segmenter("instance"), dataset)
    assert figures["instance_f1"] < 0.9
    assert 0 < figures["foreground_iou"] < 0.9


def test_semantic_figures(dataset: Dataset) -> None:
    dataset.items = tuple(item for item in dataset.items if item.stratum == "light")
    assert evaluate(segmenter("semantic"), dataset) == {"mean_iou": 1.0, "pixel_accuracy": 1.0, "images": 2}


def test_predicts_images_of_any_size() -> None:
    tiny = untrained_card("tiny")
    prediction = predict(
        Segmenter(build(tiny), tiny, device="cpu", precision="fp32"), np.zeros((33, 7, 3), dtype=np.uint8)
    )
    assert prediction.class_ids.shape == (33, 7)


def test_label_map() -> None:
    masks = [np.zeros((4, 5), dtype=bool) for _ in range(2)]
    masks[0][0, :2] = masks[1][3, 4] = True
    instances = [Instance(1, 1.0, (0, 0, 1, 1), 1, encode_rle(mask)) for mask in masks]
    assert label_map(instances, 4, 5).tolist() == [[1, 1, 0, 0, 0], [0] * 5, [0] * 5, [0, 0, 0, 0, 2]]
