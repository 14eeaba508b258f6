from __future__ import annotations

import numpy as np
import pytest
import torch

from models.card import Preprocessing
from models.preprocessing import histogram_statistics, image_statistics, normalize


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
