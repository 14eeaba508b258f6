from __future__ import annotations

import random

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from models.detections import TileDetections, merge_detections, place_mask
from models.masks import Instance, decode_rle, encode_rle
from models.tiling import TileGrid, Window

HEIGHT, WIDTH = 90, 120
GRID = TileGrid(HEIGHT, WIDTH, tile_px=50, overlap_px=20)


def disc(y: float, x: float, radius: float) -> np.ndarray:
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    return (rows - y) ** 2 + (columns - x) ** 2 < radius**2


def seen(window: Window, mask: np.ndarray, *, score: float = 0.9, class_id: int = 1) -> Instance | None:
    """What a faultless detector finds of `mask` in a tile."""
    crop = mask[window.y : window.y + window.height, window.x : window.x + window.width]
    if not crop.any():
        return None
    rle = place_mask(crop, y=window.y, x=window.x, height=HEIGHT, width=WIDTH)
    x, y, w, h = (float(value) for value in coco_mask.toBbox(rle))
    return Instance(class_id, score, (x, y, w, h), int(crop.sum()), rle)


def detect(masks: list[np.ndarray], classes: list[int] | None = None) -> list[TileDetections]:
    tiles = []
    for window in GRID.windows():
        found = [
            seen(window, mask, score=0.5 + 0.01 * index + 0.001 * window.column, class_id=(classes or [1] * 99)[index])
            for index, mask in enumerate(masks)
        ]
        tiles.append(TileDetections(window, [one for one in found if one is not None]))
    return tiles


def merge(tiles: list[TileDetections]) -> list[Instance]:
    return merge_detections(tiles, height=HEIGHT, width=WIDTH)


def test_a_mask_is_placed_as_if_it_had_been_drawn_there() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        y, x = int(rng.integers(0, 60)), int(rng.integers(0, 80))
        crop = rng.random((int(rng.integers(1, 30)), int(rng.integers(1, 40)))) < 0.6
        crop[0, 0] = True
        drawn = np.zeros((HEIGHT, WIDTH), bool)
        drawn[y : y + crop.shape[0], x : x + crop.shape[1]] = crop
        assert place_mask(crop, y=y, x=x, height=HEIGHT, width=WIDTH) == encode_rle(drawn)
    with pytest.raises(ValueError, match="not inside"):
        place_mask(np.ones((5, 5), bool), y=88, x=0, height=HEIGHT, width=WIDTH)


def test_each_object_is_found_once_and_whole() -> None:
    masks = [disc(45, 60, 25), disc(12, 40, 8), disc(40, 20, 6), disc(70, 104, 12), disc(15, 100, 5)]
    tiles = detect(masks)
    assert sum(len(tile.instances) for tile in tiles) > 12
    merged = merge(tiles)
    assert len(merged) == len(masks)
    for instance in merged:
        (match,) = [mask for mask in masks if np.array_equal(decode_rle(instance.rle), mask)]
        assert instance.area == match.sum()
        assert instance.bbox == tuple(coco_mask.toBbox(encode_rle(match)))
    assert [one.bbox[1] for one in merged] == sorted(one.bbox[1] for one in merged)
    big = max(merged, key=lambda one: one.area)
    assert big.score == pytest.approx(0.5 + 0.001 * (len(GRID.columns.starts) - 1))


def test_the_order_of_tiles_does_not_matter() -> None:
    tiles = detect([disc(45, 60, 25), disc(12, 40, 8), disc(20, 44, 7), disc(70, 104, 12)])
    expected = merge(tiles)
    for seed in range(5):
        shuffled = tiles[:]
        random.Random(seed).shuffle(shuffled)
        assert merge(shuffled) == expected


def test_neighbours_and_other_classes_stay_apart() -> None:
    left, right = disc(40, 34, 9), disc(40, 51, 9) & ~disc(40, 34, 9)
    assert len(merge(detect([left, right]))) == 2
    same_place = [disc(40, 40, 8), disc(40, 40, 8)]
    assert sorted(one.class_id for one in merge(detect(same_place, [1, 2]))) == [1, 2]


def test_a_poor_fragment_at_the_edge_joins_the_whole_object() -> None:
    whole, (first, second) = disc(25, 50, 12), GRID.windows()[:2]
    assert first.x + first.width == 50 and second.x == 30
    fragment = whole & disc(25, 48, 5)
    fragment[:, 50:] = False
    cut, complete = seen(first, fragment, score=0.4), seen(second, whole)
    assert cut is not None and complete is not None
    (merged,) = merge([TileDetections(first, [cut]), TileDetections(second, [complete])])
    assert merged.area == whole.sum() and merged.score == 0.9
    inner = whole & disc(25, 45, 3)
    inside = seen(first, inner, score=0.4)
    assert inside is not None
    assert len(merge([TileDetections(first, [inside]), TileDetections(second, [complete])])) == 2


def test_the_tile_that_sees_a_place_whole_decides() -> None:
    """At the edge of a tile there may be slivers that are nothing, or no more than the rest of something."""
    first, second = GRID.windows()[:2]
    assert first.x + first.width == 50 and second.x == 30
    sliver, other = np.zeros((2, HEIGHT, WIDTH), bool)
    sliver[20:27, 45:49] = True
    other[10:40, 20:48] = True
    cut = seen(first, sliver, score=0.6)
    assert cut is not None
    assert merge([TileDetections(first, [cut]), TileDetections(second, [])]) == []
    # Where it is inside its own tile, or inside no other, nobody knows better.
    assert merge([TileDetections(second, [cut]), TileDetections(first, [])]) == [cut]
    large = seen(first, other)
    assert large is not None
    assert merge([TileDetections(first, [large]), TileDetections(second, [])]) == [large]
    # Of what one tile sees whole the other's part adds nothing, however poor it is.
    whole = seen(second, disc(24, 46, 7))
    assert whole is not None
    assert merge([TileDetections(first, [cut]), TileDetections(second, [whole])]) == [whole]


def test_nothing_found() -> None:
    assert merge([]) == []
    assert merge([TileDetections(window, []) for window in GRID.windows()]) == []
