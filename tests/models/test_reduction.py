from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from small_networks import small_card
from torch.nn.functional import interpolate

from models import reduction
from models.architectures import card_for
from models.card import ArgmaxPostprocessing, Card
from models.reduction import QUANTUM, reduce_logits, reduce_resampled, resampled_bands

LAYOUTS = [torch.contiguous_format, torch.channels_last]


def card_of(classes: int, task: Any = "semantic") -> Card:
    names = tuple(f"class-{index}" for index in range(classes)) if task == "semantic" else ("background", "nucleus")
    return card_for("tiny", "unet", class_names=names, task=task, canvas_multiple=32)


def reduced(logits_NCHW: torch.Tensor, card: Card, sizes: list[tuple[int, int]]) -> dict[str, np.ndarray]:
    ids = torch.tensor([info.id for info in card.classes], dtype=torch.uint8)
    sizes_N2 = torch.tensor(sizes, dtype=torch.int32)
    maps = reduce_logits(logits_NCHW, ids, card, card.postprocessing, sizes_N2)
    return {name: tensor.numpy() for name, tensor in maps.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("classes", [2, 21, 150])
def test_figures_are_those_of_the_formulas_in_double_precision(layout: torch.memory_format, classes: int) -> None:
    torch.manual_seed(0)
    logits = (torch.randn(2, classes, 21, 19) * 3).contiguous(memory_format=layout)
    sizes = [(21, 19), (13, 8)]
    found = reduced(logits, card_of(classes), sizes)
    chances = logits.double().softmax(dim=1)
    winner, index = (tensor.numpy() for tensor in chances.max(dim=1))
    entropy = (torch.special.entr(chances).sum(dim=1) / np.log(classes)).numpy()
    assert (found["class_ids"] == index).all()
    for slot, (height, width) in enumerate(sizes):
        inside = np.s_[slot, :height, :width]
        counts = np.bincount(index[inside].ravel(), minlength=classes)
        assert found["pixels"][slot].tolist() == counts.tolist()
        sums = np.bincount(index[inside].ravel(), weights=winner[inside].ravel(), minlength=classes)
        # Half a quantum for each pixel, and what float32 adds to it.
        assert np.abs(found["confidence"][slot] / QUANTUM - sums).max() <= counts.max() * 0.6 / QUANTUM
        assert abs(found["entropy"][slot] / QUANTUM - entropy[inside].sum()) <= height * width * 0.6 / QUANTUM
        assert not found["broken"][slot]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("task", ["semantic", "instance"])
def test_a_pixel_is_the_same_wherever_it_lies(layout: torch.memory_format, task: str) -> None:
    """The ends of vectors and of threads' parts fall everywhere."""
    torch.manual_seed(1)
    channels = 3 if task == "instance" else 21
    card = card_of(channels, task)
    pixels_PC = torch.randn(7 * 13 * 360, channels)
    # Each pixel twice: of a single one, torch cannot tell the layouts apart.
    twice = pixels_PC[:, :, None, None].expand(-1, -1, 1, 2).contiguous(memory_format=layout)
    alone = {name: array // 2 for name, array in reduced(twice, card, [(1, 2)] * len(pixels_PC)).items() if array.ndim}
    alone["class_ids"] = reduced(twice, card, [(1, 2)] * len(pixels_PC))["class_ids"][:, :, :1]
    threads = torch.get_num_threads()
    try:
        for number, (height, width) in enumerate([(7, 13), (360, 13), (1, 91), (91, 360), (360, 91), (13, 1)]):
            torch.set_num_threads(1 + number % 3)
            images = pixels_PC.view(-1, height, width, channels).permute(0, 3, 1, 2).contiguous(memory_format=layout)
            found = reduced(images, card, [(height, width)] * len(images))
            assert found["class_ids"].ravel().tolist() == alone["class_ids"].ravel().tolist()
            for name in ("pixels", "confidence", "entropy"):
                expected = alone[name].reshape(len(images), height * width, -1).sum(axis=1)
                assert (found[name].reshape(len(images), -1) == expected).all(), (name, height, width)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("part_bytes", [1, 5_000, 40_000, 1 << 30])
def test_the_size_of_the_parts_does_not_show(monkeypatch: pytest.MonkeyPatch, part_bytes: int) -> None:
    torch.manual_seed(2)
    card = card_of(3, "instance")
    logits = torch.randn(5, 3, 24, 40)
    sizes = [(24, 40), (0, 0), (1, 1), (24, 7), (11, 40)]
    expected = reduced(logits, card, sizes)
    monkeypatch.setattr(reduction, "_PART_BYTES", {"cpu": part_bytes})
    found = reduced(logits, card, sizes)
    assert found.keys() == expected.keys() >= {"class_ids", "interior", "foreground", "broken"}
    for name, array in expected.items():
        assert array.dtype == found[name].dtype
        assert array.tobytes() == found[name].tobytes(), name


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_only_an_image_with_a_broken_logit_that_counts_is_broken(poison: float) -> None:
    logits = torch.randn(3, 4, 16, 16)
    logits[0, 1, 9, 9] = poison
    logits[1, 2, 3, 3] = poison
    found = reduced(logits, card_of(4), [(9, 16), (16, 16), (16, 16)])
    assert found["broken"].tolist() == [False, True, False]
    assert found["pixels"].sum(axis=1).tolist() == [9 * 16, 256, 256]


def test_an_image_in_bands_is_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    card = card_of(5)
    ids = torch.arange(5, dtype=torch.uint8)
    logits = torch.randn(5, 20, 30)
    expected = reduce_resampled(logits, ids, card, card.postprocessing, height=47, width=61)
    monkeypatch.setattr(reduction, "_BAND_BYTES", {"cpu": 4 * 5 * 61 * 9})
    found = reduce_resampled(logits, ids, card, card.postprocessing, height=47, width=61)
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        name: tensor.tolist() for name, tensor in expected.items()
    }


@pytest.mark.parametrize(
    ("source", "target"),
    [((33, 47), (120, 90)), ((20, 30), (20, 30)), ((64, 64), (7, 5)), ((5, 1), (9, 1)), ((1, 1), (3, 4))],
)
@pytest.mark.parametrize("band_bytes", [1, 5000, 1 << 30])
def test_bands_together_are_an_interpolation(
    source: tuple[int, int], target: tuple[int, int], band_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.reduction._BAND_BYTES", {"cpu": band_bytes})
    logits_CHW = torch.randn(4, *source, generator=torch.Generator().manual_seed(1))
    result = torch.cat(list(resampled_bands(logits_CHW, *target)), dim=1)
    expected = interpolate(logits_CHW[None], size=target, mode="bilinear", align_corners=False)[0]
    assert torch.allclose(result, expected, atol=2e-5)


def test_figures_of_bands_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    card, ids = small_card("unet"), torch.arange(4, dtype=torch.uint8)
    logits_CHW = torch.randn(4, 12, 16, generator=torch.Generator().manual_seed(1)) * 4
    settings = ArgmaxPostprocessing()
    whole = reduce_logits(logits_CHW[None], ids, card, settings, torch.tensor([[12, 16]], dtype=torch.int32))
    monkeypatch.setattr("models.reduction._BAND_BYTES", {"cpu": 1000})
    banded = reduce_resampled(logits_CHW, ids, card, settings, height=12, width=16)
    assert whole.keys() == banded.keys()
    for name, value in banded.items():
        assert torch.equal(value, whole[name][0]), name
    assert banded["pixels"].sum() == 12 * 16
    logits_CHW[2, 11, 3] = np.inf
    assert reduce_resampled(logits_CHW, ids, card, settings, height=12, width=16)["broken"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_only_what_counts_can_be_broken(value: float) -> None:
    logits_NCHW = torch.zeros(2, 4, 6, 6)
    logits_NCHW[0, 1, 5, 5] = value
    logits_NCHW[1, 1, 2, 2] = value
    sizes = torch.tensor([[5, 6], [3, 3]], dtype=torch.int32)
    card, ids = small_card("unet"), torch.arange(4, dtype=torch.uint8)
    maps = reduce_logits(logits_NCHW, ids, card, ArgmaxPostprocessing(), sizes)
    assert maps["broken"].tolist() == [False, True]


def test_certain_pixels_are_not_broken() -> None:
    logits_NCHW = torch.zeros(1, 4, 1, 1)
    logits_NCHW[0, 2] = 3e38
    card, ids = small_card("unet"), torch.arange(4, dtype=torch.uint8)
    maps = reduce_logits(logits_NCHW, ids, card, ArgmaxPostprocessing(), torch.ones(1, 2, dtype=torch.int32))
    assert maps["broken"].tolist() == [False]
    assert maps["confidence"][0, 2] == 65535
