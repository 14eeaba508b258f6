from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from models.architectures import build, untrained_card
from models.masks import mask_crc32
from models.overrides import with_settings
from models.segmenter import Segmenter
from pipeline.engine.messages import StreamConfig
from pipeline.engine.stream import Stream
from pipeline.errors import UsageError
from pipeline.learning.dataset import Dataset
from pipeline.learning.evaluation import evaluate, predict
from pipeline.storage import Blob
from pipeline.table.schema import WORK

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


@pytest.mark.parametrize(
    "policy",
    [
        {"kind": "tile", "tile_px": 64, "overlap_px": 16},
        {"kind": "letterbox", "height_px": 64, "width_px": 64},
        {"kind": "resize", "short_side_px": 48},
    ],
)
def test_predicts_as_a_run_does(policy: dict[str, Any], tmp_path: Path) -> None:
    """Through the stream and by hand, an image is cut and resized in the same way."""
    pixels = np.random.default_rng(0).integers(0, 255, (90, 130, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "noise.png")
    card = with_settings(untrained_card("bright", task="instance"), {"size_policy": policy})
    # The stand-in looks at one pixel at a time, which the Segmenter cannot find out of what is no U-Net.
    card = card.model_copy(update={"pools_whole_image": False})
    model = Segmenter(Bright(card.network_channels), card, device="cpu", precision="fp32")
    class_ids, instances = model.postprocess(predict(model, pixels))
    rows: list[Mapping[str, Any]] = []
    stream = Stream(
        model,
        fetch=lambda uri: Blob(Path(uri).read_bytes(), "", 0, None),
        config=StreamConfig(batch_size=1, threads=1),
        stamp={},
    )
    refs = [{"uri": str(tmp_path / "noise.png"), "etag": "", "size_bytes": 1, "attempt": 1}]
    stream.submit(pa.Table.from_pylist(refs, schema=WORK), rows.extend).result()
    stream.close()
    assert rows[0]["status"] == "ok"
    assert len(instances) > 1
    assert rows[0]["mask_crc32"] == mask_crc32(class_ids, [one.rle for one in instances])


def test_a_crowd_is_neither_found_nor_missed(dataset: Dataset) -> None:
    dataset.items = tuple(item for item in dataset.items if item.stratum == "light")
    annotations = dataset.source._images[dataset.items[0].name].objects  # type: ignore[attr-defined]
    annotations[0] = {**annotations[0], "iscrowd": 1}
    figures = evaluate(segmenter("instance"), dataset)
    assert figures["instance_f1"] == figures["foreground_iou"] == figures["ap"] == 1.0


def test_classes_are_the_same_by_name(dataset: Dataset) -> None:
    card = untrained_card("bright", task="semantic", class_names=("ground", "cat"))
    with pytest.raises(UsageError, match="none of the data set's"):
        evaluate(Segmenter(Bright(card.network_channels), card, device="cpu", precision="fp32"), dataset)
