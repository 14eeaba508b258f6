"""What tiles say, put together: pixels are tested with real networks in the stream, objects here."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
import pytest
from small_networks import small_card

from models.card import Card
from models.masks import decode_rle
from models.mosaic import DetectionMosaic, Mosaic
from models.overrides import with_settings
from models.pasting import Detections
from models.segmenter import Prediction
from models.tiling import TileGrid, Window

GRID = TileGrid(60, 100, tile_px=60, overlap_px=20)
#: Boxes x1, y1, x2, y2 in the image, with a score and a label: in the left tile only, over the seam, in the right only.
OBJECTS = (((5, 5, 25, 25), 0.9, 1), ((30, 10, 75, 40), 0.8, 2), ((80, 30, 95, 55), 0.7, 1))


@pytest.fixture(scope="module")
def card() -> Card:
    return small_card("maskrcnn_mobilenet_v3_large_fpn")


def seen(window: Window) -> Prediction:
    """What a perfect detector says of one tile: objects cut where the tile ends."""
    boxes, scores, labels = [], [], []
    for (x1, y1, x2, y2), score, label in OBJECTS:
        left, right = max(x1 - window.x, 0), min(x2 - window.x, window.width)
        top, bottom = max(y1 - window.y, 0), min(y2 - window.y, window.height)
        if left < right and top < bottom:
            boxes.append((left, top, right, bottom))
            scores.append(score)
            labels.append(label)
    return prediction(boxes, scores, labels, window)


def prediction(boxes: list[Any], scores: list[float], labels: list[int], window: Window) -> Prediction:
    detections = Detections(
        boxes=np.array(boxes, np.float32).reshape(-1, 4),
        scores=np.array(scores, np.float32),
        labels=np.array(labels, np.int64),
        masks=np.ones((len(boxes), 28, 28), np.float32),
        height=window.height,
        width=window.width,
    )
    mean = float(np.mean(scores)) if scores else 0.0
    nothing = np.zeros(4, np.int64)
    return Prediction(np.empty((0, 0), np.uint8), nothing, nothing.astype(float), mean, 0.25, None, detections)


def test_each_object_is_found_once_whatever_the_order(card: Card) -> None:
    answers = []
    for order in permutations(GRID.windows()):
        mosaic = DetectionMosaic(GRID, card)
        assert [mosaic.add(window, seen(window)) for window in order] == [False] * (len(order) - 1) + [True]
        answers.append(mosaic.found())
    assert all(answer == answers[0] for answer in answers)
    found = answers[0]
    assert [one.class_id for one in found.instances] == [1, 2, 1], "best score first"
    assert found.mean_confidence == pytest.approx(np.mean([score for _, score, _ in OBJECTS]), abs=1e-6)
    assert found.mean_entropy == pytest.approx(0.25)
    over_the_seam = next(one for one in found.instances if one.class_id == 2)
    mask = decode_rle(over_the_seam.rle)
    truth = np.zeros((60, 100), bool)
    truth[10:40, 30:75] = True
    assert (mask & truth).sum() / (mask | truth).sum() > 0.85, "pasting a mask adds a pixel all round"
    assert over_the_seam.area == mask.sum()


def test_top_k_counts_for_the_image_not_for_each_tile(card: Card) -> None:
    card = with_settings(card, {"postprocessing": {"top_k": 2}})
    mosaic = DetectionMosaic(GRID, card)
    for window in GRID.windows():
        mosaic.add(window, seen(window))
    found = mosaic.found()
    assert [one.score for one in found.instances] == pytest.approx([0.9, 0.8]), "each tile saw two, together three"
    assert found.mean_confidence == pytest.approx(0.85)


@pytest.mark.parametrize(("per_class", "classes"), [(True, [1, 2]), (False, [1])])
def test_two_classes_of_one_object_in_two_tiles(card: Card, per_class: bool, classes: list[int]) -> None:
    """Each tile sees the object in the overlap, and calls it otherwise."""
    card = with_settings(card, {"postprocessing": {"nms_per_class": per_class}})
    mosaic = DetectionMosaic(GRID, card)
    for window in GRID.windows():
        box = (42 - window.x, 10, 58 - window.x, 40)
        mosaic.add(window, prediction([box], [0.9 - window.x / 100], [1 if window.x == 0 else 2], window))
    assert [one.class_id for one in mosaic.found().instances] == classes


def test_what_is_missing_or_broken_is_said(card: Card) -> None:
    mosaic = DetectionMosaic(GRID, card)
    first, *rest = GRID.windows()
    mosaic.add(first, seen(first)._replace(mean_confidence=float("nan")))
    with pytest.raises(ValueError, match="tiles are missing"):
        mosaic.found()
    for window in rest:
        mosaic.add(window, seen(window))
    assert np.isnan(mosaic.found().mean_confidence)


def test_each_kind_of_model_has_its_mosaic(card: Card) -> None:
    with pytest.raises(ValueError, match="finds no objects by itself"):
        DetectionMosaic(GRID, small_card("unet"))
    pixels = Mosaic(GRID, small_card("unet"))
    with pytest.raises(ValueError, match="missing"):
        pixels.summary()
