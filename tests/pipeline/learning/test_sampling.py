from __future__ import annotations

import numpy as np
import pytest

from pipeline.learning.recipe import SamplingConfig
from pipeline.learning.sampling import class_weights, epoch_order, image_chances


def test_small_strata_are_not_drowned() -> None:
    strata = ["dark"] * 2 + ["light"] * 6
    alike = image_chances(strata, None, SamplingConfig(stratum_power=0))
    assert alike[:2].sum() == pytest.approx(0.5)
    assert image_chances(strata, None, SamplingConfig(stratum_power=1)) == pytest.approx([1 / 8] * 8)
    between = image_chances(strata, None, SamplingConfig(stratum_power=0.5))
    assert between[:2].sum() / between[2:].sum() == pytest.approx((2 / 6) ** 0.5)


def test_images_of_rare_classes_are_seen_more_often() -> None:
    """Class 0 is everywhere, class 1 on one image of 16: repeated sqrt(0.25 / (1 / 16)) = 2 times."""
    pixels = np.array([[10, 5]] + [[10, 0]] * 15)
    chances = image_chances([""] * 16, pixels, SamplingConfig(rare_image_share=0.25))
    assert chances[0] / chances[1] == pytest.approx(2)
    assert chances[1:] == pytest.approx([1 / 17] * 15)


def test_equal_chances_show_each_image_once_an_epoch() -> None:
    order = epoch_order(np.full(50, 1 / 50), seed=3, epoch=2)
    assert sorted(order) == list(range(50))
    assert np.array_equal(order, epoch_order(np.full(50, 1 / 50), seed=3, epoch=2))
    assert not np.array_equal(order, epoch_order(np.full(50, 1 / 50), seed=3, epoch=3))
    assert not np.array_equal(order, epoch_order(np.full(50, 1 / 50), seed=4, epoch=2))


def test_unequal_chances_are_met_to_one_image_in_every_epoch() -> None:
    chances = np.array([0.25, 0.125, 0.05, *[0.575 / 17] * 17])
    total = np.zeros(20)
    for epoch in range(200):
        seen = np.bincount(epoch_order(chances, seed=0, epoch=epoch), minlength=20)
        assert (np.abs(seen - 20 * chances) < 1).all()
        total += seen
    assert total / 200 == pytest.approx(20 * chances, abs=0.15)


def test_class_weights() -> None:
    # Class 2 is on the second image only; class 3 nowhere.
    pixels = np.array([[60, 40, 0, 0], [80, 100, 20, 0]])
    assert class_weights(pixels, "none") is None
    inverse = np.array([300 / 140, 300 / 140, 300 / 20])
    assert class_weights(pixels, "inverse") == pytest.approx([*inverse / inverse.mean(), 1])
    shares = np.array([140 / 300, 140 / 300, 20 / 200])
    assert class_weights(pixels, "median") == pytest.approx([*np.median(shares) / shares, 1])
    assert class_weights(pixels, "median", 0.5) == pytest.approx([*(np.median(shares) / shares) ** 0.5, 1])
    assert class_weights(np.zeros((2, 3), dtype=np.int64), "median") == (1, 1, 1)
