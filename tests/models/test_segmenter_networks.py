"""Every architecture through the Segmenter, against the library's own forward and the documented steps after it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from small_networks import HEAVY, SEMANTIC, distinct_network, make_image, run, small_card

from models.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from models.segmenter import Prediction, Segmenter

IMAGENET = {"normalization": "imagenet"}


def names(which: tuple[str, ...]) -> list[Any]:
    return [pytest.param(name, marks=[pytest.mark.slow] if name in HEAVY else []) for name in which]


def library_logits(network: Any, pixels: np.ndarray) -> torch.Tensor:
    """[C, h, w] as a user of the library gets them: scaled, normalised, forward."""
    image_CHW = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.inference_mode():
        answer = network(((image_CHW - mean) / std)[None])
    return (answer["out"] if isinstance(answer, dict) else answer)[0]


def assert_same(left: Prediction, right: Prediction) -> None:
    for one, other in zip(left, right, strict=True):
        if isinstance(one, dict):
            for name, evidence in one.items():
                assert evidence.tobytes() == other[name].tobytes()
        elif isinstance(one, tuple):
            for mine, theirs in zip(one, other, strict=True):
                assert np.asarray(mine).tobytes() == np.asarray(theirs).tobytes()
        elif one is not None:
            assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@pytest.mark.parametrize("name", names(SEMANTIC))
def test_class_ids_are_those_of_the_library(name: str) -> None:
    card = small_card(name, preprocessing=IMAGENET)
    network = distinct_network(card)
    pixels = make_image(64, 96, seed=1)
    logits_CHW = library_logits(network, pixels)
    expected = logits_CHW.argmax(dim=0).numpy()
    assert len(np.unique(expected)) >= 3
    exact = run(Segmenter(network, card, device="cpu", precision="fp32"), [pixels, None])[0]
    assert np.mean(exact.class_ids == expected) >= 0.9999
    rounded = run(Segmenter(network, card, device="cpu", precision="bf16"), [pixels, None])[0]
    # Random weights leave many pixels undecided between two classes, which any rounding tips over.
    best, second = logits_CHW.topk(2, dim=0).values
    decided = ((best - second) > 0.1 * logits_CHW.std()).numpy()
    assert decided.mean() > 0.7
    assert np.mean((rounded.class_ids == expected)[decided]) >= 0.995


@pytest.mark.parametrize("name", names(SEMANTIC))
def test_neighbours_and_slots_do_not_matter(name: str) -> None:
    card = small_card(name)
    segmenter = Segmenter(distinct_network(card), card, device="cpu", precision="bf16")
    step = card.canvas_multiple
    height, width = (64, 96) if step == 1 else (64 - 3, 96 - 5)
    image = make_image(height, width, seed=0)
    canvas = segmenter.canvas(height, width)
    others = [make_image(*canvas, 1), make_image(*(canvas if step == 1 else (canvas[0] - 1, canvas[1] - 2)), 2)]
    alone = run(segmenter, [None, image, None])[0]
    for slot in range(3):
        assert_same(run(segmenter, [*others[:slot], image, *others[slot:]], canvas)[slot], alone)
