from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest

from models.moments import Moments, moments
from models.preprocessing import picture_statistics


def by_numpy(pixels: np.ndarray) -> Moments:
    luma = cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_RGB2GRAY).astype(np.int64)
    wide = pixels.astype(np.int64)
    return Moments(int(wide.sum()), int((wide**2).sum()), int(luma.sum()), int((luma**2).sum()))


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3)).astype(np.uint8)


def test_every_colour_has_the_luma_that_opencv_gives_it() -> None:
    plane = np.zeros((256, 256, 3), np.uint8)
    plane[..., 1], plane[..., 2] = np.mgrid[:256, :256]
    for red in range(256):
        plane[..., 0] = red
        luma = cv2.cvtColor(plane, cv2.COLOR_RGB2GRAY).astype(np.int64)
        assert moments(plane)[2:] == (luma.sum(), (luma**2).sum())


@pytest.mark.parametrize("pixels", [1, 2, 63, 511, 512, 513, 1023, 1024, 1025, 4099])
def test_sums_do_not_depend_on_where_blocks_end(pixels: int) -> None:
    image = noise(1, pixels)
    assert moments(image) == moments(image.reshape(pixels, 1, 3)) == by_numpy(image)


def test_the_brightest_large_image_overflows_nothing() -> None:
    count = 5000 * 4000
    image = np.full((5000, 4000, 3), 255, np.uint8)
    assert moments(image) == (3 * count * 255, 3 * count * 255**2, count * 255, count * 255**2)


def test_windows_and_pixels_that_may_not_be_written() -> None:
    image = noise(50, 70)
    window = image[3:40, 5:60]
    assert moments(window) == moments(window.copy()) == by_numpy(window)
    assert moments(image[::2, ::3, ::-1]) == by_numpy(image[::2, ::3, ::-1])
    assert moments(np.frombuffer(image.tobytes(), np.uint8).reshape(image.shape)) == moments(image)


def test_threads_add_at_the_same_time() -> None:
    images = [noise(40, width) for width in range(1, 40)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(moments, images)) == [by_numpy(image) for image in images]


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (360, 480), (3000, 4000)])
def test_statistics_are_those_of_opencv_bit_for_bit(shape: tuple[int, int]) -> None:
    image = noise(*shape)
    mean, std = cv2.meanStdDev(image.reshape(shape[0], -1))
    luma_mean, luma_std = cv2.meanStdDev(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))
    assert picture_statistics(image) == (mean.item(), std.item(), luma_mean.item() / 255, luma_std.item() / 255)
