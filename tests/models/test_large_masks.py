from __future__ import annotations

import cv2
import numpy as np
import pytest

from models import large_masks, masks

PALETTE = [(0, 0, 0), (200, 0, 0), (0, 200, 0)]


@pytest.fixture(autouse=True)
def _small_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_masks, "_BAND_BYTES", 900)


def mask_of(seed: int, height: int, width: int, smooth_px: float) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=(height, width)).astype(np.float32)
    if smooth_px:
        noise = cv2.GaussianBlur(noise, (0, 0), smooth_px)
    return np.digitize(noise / noise.std(), [-0.5, 0.5]).astype(np.uint8)


CASES = [(0, 60, 75, 3.0), (1, 60, 75, 0.0), (2, 100, 31, 6.0), (3, 1, 40, 0.0), (4, 50, 1, 0.0), (5, 90, 2000, 1.0)]


@pytest.mark.parametrize("case", CASES)
def test_bands_say_what_the_whole_says(case: tuple[int, int, int, float]) -> None:
    mask = mask_of(*case)
    assert large_masks.encode_mask_png(mask, PALETTE) == masks.encode_mask_png(mask, PALETTE)
    assert large_masks.count_regions_by_class(mask) == masks.count_regions_by_class(mask)
    assert np.array_equal(large_masks.count_pixels(mask), np.bincount(mask.ravel(), minlength=256))


def test_ids_up_to_255_and_regions_that_meet_below() -> None:
    mask = np.zeros((40, 30), np.uint8)
    mask[:, 2] = mask[:, 20] = mask[39, 2:21] = 255
    mask[5, 5] = mask[6, 6] = mask[7, 5] = 7
    assert large_masks.count_regions_by_class(mask) == masks.count_regions_by_class(mask) == {0: 3, 7: 1, 255: 1}
    assert np.array_equal(masks.decode_mask_png(large_masks.encode_mask_png(mask, PALETTE)), mask)


def test_other_arrays_are_refused() -> None:
    with pytest.raises(ValueError, match="uint8"):
        large_masks.encode_mask_png(np.zeros((3, 3)), PALETTE)
