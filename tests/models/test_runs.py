from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from models.masks import Instance, encode_rle
from models.refinement import CleanupSettings
from models.runs import clean_instances, crop_mask, decode_runs, moved, paint

MASKS = arrays(np.bool_, st.tuples(st.integers(1, 40), st.integers(1, 40)))


def instance(mask: np.ndarray, *, score: float = 0.5, class_id: int = 1) -> Instance:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = (columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1)
    bbox = (float(box[0]), float(box[1]), float(box[2]), float(box[3]))
    return Instance(class_id, score, bbox, int(mask.sum()), encode_rle(mask))


def drawn(mask: np.ndarray) -> np.ndarray:
    again = np.zeros_like(mask)
    for x, top, bottom in zip(*decode_runs(encode_rle(mask)).columns(), strict=True):
        assert top < bottom and not again[top:bottom, x].any()
        again[top:bottom, x] = True
    return again


@settings(max_examples=200, deadline=None)
@given(MASKS)
def test_runs_are_what_pycocotools_encoded(mask: np.ndarray) -> None:
    assert np.array_equal(drawn(mask), mask)


def test_long_runs_and_large_masks() -> None:
    for mask in (np.ones((1000, 700), bool), np.eye(900, dtype=bool), np.zeros((800, 900), bool)):
        assert np.array_equal(drawn(mask), mask)
    wide = np.zeros((3000, 3000), bool)
    wide[10, 5] = wide[2990, 2995] = True
    assert np.array_equal(drawn(wide), wide)


def test_counts_that_are_cut_or_do_not_fit_are_refused() -> None:
    rle = encode_rle(np.eye(900, dtype=bool))
    with pytest.raises(ValueError, match="middle of a number"):
        decode_runs({"size": rle["size"], "counts": b"\x60"})
    with pytest.raises(ValueError, match="do not fit"):
        decode_runs({"size": [3, 3], "counts": rle["counts"]})


def test_a_crop_has_a_margin_only_where_the_image_goes_on() -> None:
    mask = np.zeros((20, 30), bool)
    mask[1:4, 10:13] = True
    crop, y, x = crop_mask(encode_rle(mask), margin_px=2)
    assert (y, x) == (0, 8) and np.array_equal(crop, mask[0:6, 8:15])


def test_a_tiles_instance_in_its_image() -> None:
    mask = np.zeros((16, 16), bool)
    mask[3:6, 4:9] = True
    placed = moved(instance(mask), y=100, x=50, height=300, width=200)
    whole = np.zeros((300, 200), bool)
    whole[103:106, 54:59] = True
    assert placed == instance(whole)


def test_the_best_score_lies_above() -> None:
    low, high = np.zeros((9, 9), bool), np.zeros((9, 9), bool)
    low[0:5, 0:5], high[3:8, 3:8] = True, True
    ids = paint(
        [instance(high, score=0.9, class_id=2), instance(low, score=0.3, class_id=1)],
        height=9,
        width=9,
        background_id=0,
    )
    expected = np.where(high, 2, np.where(low, 1, 0))
    assert np.array_equal(ids, expected)


def test_cleaning_drops_specks_and_takes_from_nobody() -> None:
    large, speck, neighbour = (np.zeros((30, 30), bool) for _ in range(3))
    large[5:15, 5:15], large[9, 9] = True, False
    speck[25, 25] = True
    neighbour[5:15, 16:20] = True
    large[8:12, 15] = True
    found = [instance(large), instance(speck), instance(neighbour)]
    taken = paint(found, height=30, width=30, background_id=0)
    cleaned = clean_instances(
        found,
        CleanupSettings(max_hole_area_px=4, min_region_area_px=5, closing_radius_px=3),
        taken=taken,
        background_id=0,
    )
    assert len(cleaned) == 2
    masks = [drawn_rle(one) for one in cleaned]
    assert masks[0][9, 9] and not (masks[0] & neighbour).any() and not (masks[1] & large).any()
    assert cleaned[0].area == masks[0].sum()


def drawn_rle(one: Instance) -> np.ndarray:
    from models.masks import decode_rle

    return decode_rle(one.rle)
