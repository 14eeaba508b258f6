from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from models.tally import Tally, tally

SHAPES = st.tuples(st.integers(1, 24), st.integers(1, 24))
FEW_CLASSES = SHAPES.flatmap(lambda shape: arrays(np.uint8, shape, elements=st.sampled_from([0, 1, 255])))


def by_opencv(class_ids: np.ndarray) -> Tally:
    ids, pixels = np.unique(class_ids, return_counts=True)
    regions = {i: cv2.connectedComponents((class_ids == i).view(np.uint8), connectivity=8)[0] - 1 for i in ids.tolist()}
    return Tally(dict(zip(ids.tolist(), pixels.tolist(), strict=True)), regions)


def spiral(side: int) -> np.ndarray:
    """One line of a pixel's width that winds to the middle, and the background, which is one region as well."""
    grid = np.zeros((side, side), np.uint8)
    y = x = turn = 0
    for length in (side - 1, *(n for n in range(side - 1, 1, -2) for _ in range(2))):
        down, right = ((0, 1), (1, 0), (0, -1), (-1, 0))[turn % 4]
        grid[
            min(y, y + down * length) : max(y, y + down * length) + 1,
            min(x, x + right * length) : max(x, x + right * length) + 1,
        ] = 1
        y, x, turn = y + down * length, x + right * length, turn + 1
    return grid


def test_regions_are_8_connected() -> None:
    class_ids = np.array([[1, 0, 0, 1], [0, 1, 0, 0], [2, 0, 0, 1]], dtype=np.uint8)
    assert tally(class_ids) == Tally({0: 7, 1: 4, 2: 1}, {0: 1, 1: 3, 2: 1})


@given(FEW_CLASSES)
@settings(max_examples=300, deadline=None)
def test_counts_are_those_of_each_class_alone(class_ids: np.ndarray) -> None:
    assert tally(class_ids) == by_opencv(class_ids)


def large_shapes() -> dict[str, np.ndarray]:
    random = np.random.default_rng(5)
    diagonal = np.full((300, 200), 7, np.uint8)
    diagonal[np.arange(200), np.arange(200)] = 0
    comb = np.zeros((101, 301), np.uint8)
    comb[:-1, ::2] = 3  # teeth of which the last row makes one
    comb[-1] = 3
    return {
        "noise": random.integers(0, 3, (211, 307)).astype(np.uint8),
        "every id": random.integers(0, 256, (64, 1000)).astype(np.uint8),
        "blocks": np.kron(random.integers(0, 4, (30, 20)), np.ones((7, 7))).astype(np.uint8),
        "chessboard": (np.indices((99, 101)).sum(axis=0) % 2).astype(np.uint8),
        "diagonal": diagonal,
        "comb": comb,
        "comb upside down": np.ascontiguousarray(comb[::-1]),
        "spiral": spiral(101),
        "nested": np.minimum(np.minimum(*np.indices((90, 90))), np.minimum(*np.indices((90, 90)))[::-1, ::-1]).astype(
            np.uint8
        ),
        "all one": np.full((33, 70), 255, np.uint8),
        "a column": random.integers(0, 2, (4000, 1)).astype(np.uint8),
        "a row": random.integers(0, 2, (1, 4000)).astype(np.uint8),
    }


@pytest.mark.parametrize("name", large_shapes())
def test_counts_of_shapes_that_wind(name: str) -> None:
    class_ids = large_shapes()[name]
    expected = by_opencv(class_ids)
    assert tally(class_ids) == expected
    assert tally(class_ids.T) == Tally(*(dict(sorted(one.items())) for one in expected)), "the same, lying otherwise"


def test_what_the_shapes_are() -> None:
    shapes = large_shapes()
    assert tally(shapes["spiral"]).regions[1] == 1 and tally(shapes["comb"]).regions == {0: 150, 3: 1}
    assert tally(shapes["chessboard"]).regions == {0: 1, 1: 1} and tally(shapes["diagonal"]).regions == {0: 1, 7: 1}


def test_masks_as_they_come_from_elsewhere() -> None:
    class_ids = np.random.default_rng(1).integers(0, 3, (40, 60)).astype(np.uint8)
    read_only = np.frombuffer(class_ids.tobytes(), np.uint8).reshape(class_ids.shape)
    assert not read_only.flags.writeable
    assert tally(read_only) == by_opencv(class_ids)
    part = class_ids[3:31:2, 5:50]
    assert tally(part) == by_opencv(np.ascontiguousarray(part))
    assert tally(np.empty((0, 5), np.uint8)) == tally(np.empty((5, 0), np.uint8)) == Tally({}, {})


def test_threads_count_at_the_same_time() -> None:
    masks = list(large_shapes().values()) * 3
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(tally, masks)) == [tally(mask) for mask in masks]
