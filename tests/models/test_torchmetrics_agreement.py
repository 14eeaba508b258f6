"""Confusion counts and the scores made of them against torchmetrics, which computes scores in float32."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torchmetrics import classification

from models.masks import decode_mask_png
from models.metrics import ClassCounts, confusion_matrix, mean_of_present, sparse_confusion

CLASSES = 7
Pair = tuple[np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    """Six images of several sizes. Class 5 is nowhere, class 6 only predicted; a tenth is ignored."""
    random = np.random.default_rng(0)
    found = []
    for index in range(6):
        shape = (40 + index, 50)
        actual = random.integers(0, 5, shape).astype(np.uint8)
        predicted = np.where(random.uniform(size=shape) < 0.6, actual, random.choice([0, 1, 2, 3, 6], shape))
        actual[random.uniform(size=shape) < 0.1] = 255
        found.append((predicted.astype(np.uint8), actual))
    return found


def theirs(metric: torch.nn.Module, pairs: list[Pair]) -> np.ndarray:
    for predicted, actual in pairs:
        metric.update(torch.from_numpy(predicted).long()[None], torch.from_numpy(actual).long()[None])  # type: ignore[operator]
    return np.asarray(metric.compute())  # type: ignore[operator]


def counts_of(pairs: list[Pair]) -> ClassCounts:
    """From the sparse counts, added up image by image."""
    matrix = np.zeros((CLASSES, CLASSES), dtype=np.int64)
    for predicted, actual in pairs:
        for row, column, pixels in sparse_confusion(predicted, actual, ignore_id=255):
            matrix[row, column] += pixels
    return ClassCounts(np.diag(matrix), matrix.sum(axis=0), matrix.sum(axis=1))


def test_confusion_counts_are_equal(pairs: list[Pair]) -> None:
    ours = sum(confusion_matrix(*pair, CLASSES, ignore_id=255) for pair in pairs)
    expected = theirs(classification.MulticlassConfusionMatrix(CLASSES, ignore_index=255), pairs)
    assert np.array_equal(ours, expected)
    sparse = np.zeros_like(expected)
    for pair in pairs:
        rows = sparse_confusion(*pair, ignore_id=255)
        assert rows[:, 2].min() > 0
        np.add.at(sparse, (rows[:, 0], rows[:, 1]), rows[:, 2])
    assert np.array_equal(sparse, expected)


@pytest.mark.parametrize(
    ("score", "metric"),
    [
        ("iou", classification.MulticlassJaccardIndex),
        ("dice", classification.MulticlassF1Score),
        ("precision", classification.MulticlassPrecision),
        ("recall", classification.MulticlassRecall),
    ],
)
def test_scores_of_each_class_are_equal(pairs: list[Pair], score: str, metric: type[torch.nn.Module]) -> None:
    ours = getattr(counts_of(pairs), score)
    expected = theirs(metric(CLASSES, average=None, ignore_index=255), pairs)
    # Where we say that a score does not apply, they say 0.
    assert np.isnan(ours[5])
    assert np.array_equal(np.nan_to_num(ours).astype(np.float32), expected)


def test_means(pairs: list[Pair]) -> None:
    counts = counts_of(pairs)
    accuracy = classification.MulticlassAccuracy(CLASSES, average="micro", ignore_index=255)
    assert counts.pixel_accuracy == pytest.approx(float(theirs(accuracy, pairs)), rel=1e-6)
    weighted = classification.MulticlassJaccardIndex(CLASSES, average="weighted", ignore_index=255)
    assert counts.frequency_weighted_iou == pytest.approx(float(theirs(weighted, pairs)), rel=1e-6)
    mean = classification.MulticlassJaccardIndex(CLASSES, average="macro", ignore_index=255)
    assert mean_of_present(counts.iou) == pytest.approx(float(theirs(mean, pairs)), rel=1e-6)


@pytest.mark.slow
def test_confusion_counts_of_street_scenes_are_equal() -> None:
    root = os.environ.get("MASKMILL_TEST_DATA")
    masks = sorted(Path(root, "camvid", "masks").glob("*.png")) if root else []
    if not masks:
        pytest.skip("MASKMILL_TEST_DATA names no folder with camvid/masks")
    random = np.random.default_rng(0)
    metric = classification.MulticlassConfusionMatrix(11, ignore_index=255)
    ours = np.zeros((11, 11), dtype=np.int64)
    for path in masks:
        actual = decode_mask_png(path.read_bytes())
        predicted = np.roll(actual, tuple(random.integers(-9, 10, 2).tolist()), axis=(0, 1))
        predicted = np.where(predicted == 255, 3, predicted).astype(np.uint8)
        metric.update(torch.from_numpy(predicted).long()[None], torch.from_numpy(actual).long()[None])
        rows = sparse_confusion(predicted, actual, ignore_id=255)
        np.add.at(ours, (rows[:, 0], rows[:, 1]), rows[:, 2])
    assert np.array_equal(ours, metric.compute().numpy())
    assert ours.sum() > 10_000_000
