from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from models.card import Preprocessing
from models.preprocessing import (
    WrongPixelsError,
    histogram_statistics,
    image_statistics,
    normalize,
    picture_statistics,
    select_bands,
)


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (2, 8, 6, 3), dtype=np.uint8)


def test_per_image(images: np.ndarray) -> None:
    statistics = np.array([image_statistics(image) for image in images], dtype=np.float32)
    result = normalize(torch.from_numpy(images), torch.from_numpy(statistics), Preprocessing(), dtype=torch.float32)
    assert result.shape == (2, 3, 8, 6)
    assert result.is_contiguous(memory_format=torch.channels_last)
    for index in range(2):
        assert result[index].mean().item() == pytest.approx(0, abs=1e-5)
        assert result[index].std(correction=0).item() == pytest.approx(1, abs=1e-5)


def test_imagenet(images: np.ndarray) -> None:
    preprocessing = Preprocessing(normalization="imagenet")
    result = normalize(torch.from_numpy(images), torch.zeros(2, 2), preprocessing, dtype=torch.float32)
    expected = (images[1, 3, 4] / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert result[1, :, 3, 4].numpy() == pytest.approx(expected, abs=1e-5)


def test_blank_images_stay_finite() -> None:
    blank = torch.full((1, 4, 4, 3), 9, dtype=torch.uint8)
    result = normalize(blank, torch.tensor([[9.0, 0.0]]), Preprocessing(), dtype=torch.bfloat16)
    assert result.dtype == torch.bfloat16
    assert torch.count_nonzero(result) == 0


def test_statistics_are_those_of_numpy(images: np.ndarray) -> None:
    mean, std = image_statistics(images[0])
    assert mean == pytest.approx(images[0].mean())
    assert std == pytest.approx(images[0].std())
    assert histogram_statistics(np.zeros(3, dtype=np.int64), np.arange(3.0)) == (0.0, 0.0)


@pytest.mark.parametrize(("dtype", "high"), [("uint8", 255), ("uint16", 65535), ("float32", 1)])
def test_unit_and_mean_std_of_any_type(dtype: str, high: float) -> None:
    pixels = (np.random.default_rng(1).uniform(0, high, (1, 4, 5, 2))).astype(dtype)
    before = pixels.copy()
    unit = Preprocessing(normalization="unit", bands=(0, 1), dtype=dtype)  # type: ignore[arg-type]
    result = normalize(torch.from_numpy(pixels), torch.zeros(1, 2), unit, dtype=torch.float32)
    assert result[0, :, 2, 3].numpy() == pytest.approx(pixels[0, 2, 3] / high, abs=1e-6)
    own = unit.model_copy(update={"normalization": "mean_std", "mean": (0.1, 0.2), "std": (0.5, 2.0)})
    result = normalize(torch.from_numpy(pixels), torch.zeros(1, 2), own, dtype=torch.float32)
    expected = (pixels[0, 2, 3] / high - [0.1, 0.2]) / [0.5, 2.0]
    assert result[0, :, 2, 3].numpy() == pytest.approx(expected, abs=1e-5)
    shifted = unit.model_copy(update={"value_range": (high / 10, high / 2)})
    result = normalize(torch.from_numpy(pixels), torch.zeros(1, 2), shifted, dtype=torch.float32)
    assert result[0, :, 2, 3].numpy() == pytest.approx((pixels[0, 2, 3] - high / 10) / (high * 0.4), abs=1e-5)
    assert np.array_equal(pixels, before)


def test_bands_are_selected_in_order() -> None:
    pixels = np.arange(2 * 3 * 5, dtype=np.uint8).reshape(2, 3, 5)
    assert np.shares_memory(select_bands(pixels, Preprocessing()), pixels)
    assert np.shares_memory(select_bands(pixels, Preprocessing(bands=(1, 2, 3))), pixels)
    assert np.array_equal(select_bands(pixels, Preprocessing(bands=(1, 2, 3))), pixels[:, :, 1:4])
    assert np.array_equal(select_bands(pixels, Preprocessing(bands=(4, 0))), pixels[:, :, [4, 0]])
    assert select_bands(pixels[:, :, 0], Preprocessing(bands=(0,))).shape == (2, 3, 1)
    with pytest.raises(WrongPixelsError, match=r"takes bands \[0, 1, 2\] \(counted from 0\), the image has 1 bands"):
        select_bands(pixels[:, :, 0], Preprocessing())


@pytest.mark.parametrize(("dtype", "high"), [("uint8", 255), ("uint16", 65535), ("float32", 1)])
@pytest.mark.parametrize("bands", [1, 3, 4])
def test_picture_statistics(dtype: str, high: float, bands: int) -> None:
    large = (np.random.default_rng(1).uniform(0, high, (9, 8, bands))).astype(dtype)
    pixels = large[1:7, 2:7]
    found = picture_statistics(pixels, (0, high))
    assert found.mean == pytest.approx(pixels.mean(dtype=np.float64), rel=1e-6)
    assert found.std == pytest.approx(pixels.std(dtype=np.float64), rel=1e-5)
    luma = pixels @ [0.299, 0.587, 0.114] if bands == 3 else pixels
    assert found.brightness == pytest.approx(luma.mean(dtype=np.float64) / high, abs=3e-3)
    assert found.contrast == pytest.approx(luma.std(dtype=np.float64) / high, abs=3e-3)


def test_statistics_need_no_torch() -> None:
    code = "import sys, models.preprocessing; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
