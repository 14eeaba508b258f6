from __future__ import annotations

import numpy as np
import pytest

from models.boundaries import boundary_counts, tolerance_px


def slow_counts(predicted: np.ndarray, actual: np.ndarray, limit: float, ignore_id: int) -> list[list[int]]:
    """The definition, pixel by pixel."""
    height, width = actual.shape

    def around(y: int, x: int) -> list[tuple[int, int]]:
        return [
            (y + dy, x + dx)
            for dy in (-1, 0, 1)
            for dx in (-1, 0, 1)
            if (dy or dx) and 0 <= y + dy < height and 0 <= x + dx < width
        ]

    def edge(ids: np.ndarray, class_id: int) -> list[tuple[int, int]]:
        return [
            (y, x)
            for y in range(height)
            for x in range(width)
            if ids[y, x] == class_id
            and actual[y, x] != ignore_id
            and any(ids[place] != class_id for place in around(y, x))
            and all(actual[place] != ignore_id for place in around(y, x))
        ]

    def near(some: list[tuple[int, int]], others: list[tuple[int, int]]) -> int:
        return sum(any((y - b) ** 2 + (x - a) ** 2 <= limit**2 for b, a in others) for y, x in some)

    rows = []
    for class_id in sorted((set(actual.ravel().tolist()) | set(predicted.ravel().tolist())) - {ignore_id}):
        theirs, ours = edge(actual, class_id), edge(predicted, class_id)
        rows.append([class_id, len(theirs), near(theirs, ours), len(ours), near(ours, theirs)])
    return rows


@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_the_definition(seed: int) -> None:
    random = np.random.default_rng(seed)
    actual, predicted = (np.kron(random.integers(0, 4, (4, 5)), np.ones((6, 5))).astype(np.uint8) for _ in range(2))
    predicted = np.where(random.uniform(size=actual.shape) < 0.8, np.roll(actual, 1, axis=0), predicted)
    actual[2:5, 3:9] = 255
    limit = tolerance_px(*actual.shape)
    assert boundary_counts(predicted, actual, ignore_id=255).tolist() == slow_counts(predicted, actual, limit, 255)


def test_what_is_right_matches_whole_and_a_border_of_the_image_is_none() -> None:
    ids = np.zeros((40, 60), dtype=np.uint8)
    ids[:, 30:] = 1
    assert boundary_counts(ids, ids).tolist() == [[0, 40, 40, 40, 40], [1, 40, 40, 40, 40]]
    assert boundary_counts(ids * 0, ids * 0).tolist() == [[0, 0, 0, 0, 0]]


def test_the_tolerance() -> None:
    assert tolerance_px(10, 10) == 1.0
    assert tolerance_px(360, 480) == pytest.approx(4.5)
    actual = np.zeros((360, 480), dtype=np.uint8)
    actual[:, 200:] = 1
    for shift, matched in ((4, 360), (5, 0)):
        counts = boundary_counts(np.roll(actual, shift, axis=1)[:, 10:], actual[:, 10:])
        assert counts[:, 2].tolist()[1] == matched
    with pytest.raises(ValueError, match="differ in shape"):
        boundary_counts(actual, actual.T)
