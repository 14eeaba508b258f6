"""Tables of evaluations of images that are drawn, with predictions of any quality."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from models.masks import Instance, encode_rle
from pipeline.learning.evaluations import evaluations_table, measure_image
from pipeline.learning.labels.truth import IGNORE_ID, LabelledObject, Labels

NAMES = ("ground", "cat", "dog", "nowhere")
SIZE = (24, 32)


def semantic_rows(error: float | dict[int, float], *, images: int = 12, seed: int = 0) -> list[dict[str, Any]]:
    """Each pixel is called another class with the probability `error`, which may differ by class."""
    rows = []
    for index in range(images):
        truth_of, noise = np.random.default_rng([seed, index]), np.random.default_rng([seed, index, 1])
        actual = np.kron(truth_of.integers(0, 3, (3, 4)), np.ones((8, 8))).astype(np.uint8)
        rate = error if isinstance(error, float) else np.vectorize(lambda one: error.get(one, 0.0))(actual)
        wrong = noise.uniform(size=SIZE) < rate
        predicted = np.where(wrong, (actual + noise.integers(1, 3, SIZE)) % 3, actual).astype(np.uint8)
        actual[0, :5] = IGNORE_ID
        rows.append(_row(index) | measure_image(predicted, None, Labels(*SIZE, class_ids=actual)))
    return rows


def instance_rows(found: float, *, images: int = 12, seed: int = 0) -> list[dict[str, Any]]:
    """Each of six objects is found with the probability `found`, a pixel off; two more are found that are not there."""
    rows = []
    for index in range(images):
        truth_of, noise = np.random.default_rng([seed, index]), np.random.default_rng([seed, index, 1])
        objects, instances = [], []
        predicted = np.zeros(SIZE, dtype=np.uint8)
        for number in range(8):
            mask = np.zeros(SIZE, dtype=bool)
            top, left = 12 * (number // 4), 8 * (number % 4)
            side = int(truth_of.integers(4, 8))
            mask[top : top + side, left : left + side] = True
            class_id = 1 + number % 2
            chance, shift, confidence = noise.uniform(), int(noise.integers(0, 2)), float(noise.uniform())
            if number < 6:
                objects.append(LabelledObject(class_id, encode_rle(mask), float(mask.sum())))
            if number >= 6 or chance < found:
                moved = np.roll(mask, shift, axis=0)
                predicted[moved] = class_id
                instances.append(Instance(class_id, confidence, (0, 0, 0, 0), int(moved.sum()), encode_rle(moved)))
        rows.append(_row(index) | measure_image(predicted, instances, Labels(*SIZE, objects=tuple(objects))))
    return rows


def table_of(rows: list[dict[str, Any]]) -> pa.Table:
    return evaluations_table(rows, NAMES)


def _row(index: int) -> dict[str, Any]:
    folder = "night" if index % 3 == 0 else "day"
    return {
        "image_uri": f"s3://bucket/{folder}/{index:03d}.png",
        "status": "ok",
        "width": SIZE[1],
        "height": SIZE[0],
        "brightness": index / 100,
    }
