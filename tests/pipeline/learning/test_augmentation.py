from __future__ import annotations

import numpy as np
import pytest

from models.preprocessing import image_statistics
from pipeline.learning.augmentation import AugmentationConfig, instance_targets, make_example, random_crop

PLAIN = AugmentationConfig(
    crop_px=64,
    scale=(1.0, 1.0),
    rotate_probability=0,
    invert_probability=0,
    tone=0,
    noise=0,
    blur_probability=0,
    veil_probability=0,
)


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


@pytest.fixture
def labels() -> np.ndarray:
    labels = np.zeros((64, 64), dtype=np.int32)
    labels[10:20, 10:20] = 1
    labels[10:20, 20:30] = 2
    labels[40:50, 40:60] = 3
    return labels


def test_equal_generators_give_equal_crops(pixels: np.ndarray, labels: np.ndarray) -> None:
    example = make_example("a", pixels, labels)
    config = AugmentationConfig(crop_px=32)
    first, second, other = (
        random_crop(example, "instance", config, std_floor=1.0, random=np.random.default_rng(seed))
        for seed in (4, 4, 5)
    )
    for left, right in zip(first, second, strict=True):
        assert np.array_equal(left, right)
    assert not np.array_equal(first.inputs, other.inputs)
    assert first.inputs.shape == (32, 32, 3)
    assert first.inputs.dtype == np.float32
    assert first.targets.dtype == np.int64


def test_without_variation_only_turns_and_mirrors(pixels: np.ndarray, labels: np.ndarray) -> None:
    pixels[:] = labels[:, :, None] * 80
    mean, std = image_statistics(pixels)
    for seed in range(12):
        crop = random_crop(
            make_example("a", pixels, labels), "semantic", PLAIN, std_floor=1.0, random=np.random.default_rng(seed)
        )
        assert np.array_equal(np.bincount(crop.targets.ravel()), np.bincount(labels.ravel()))
        assert np.allclose(crop.inputs * std + mean, crop.targets[:, :, None] * 80, atol=1e-3)


def test_crops_show_every_part_of_a_large_image() -> None:
    labels = np.arange(200 * 300, dtype=np.int32).reshape(200, 300)
    example = make_example("a", np.zeros((200, 300, 3), dtype=np.uint8), labels)
    seen = np.zeros(labels.size, dtype=bool)
    for seed in range(150):
        crop = random_crop(example, "semantic", PLAIN, std_floor=1.0, random=np.random.default_rng(seed))
        assert len(np.unique(crop.targets)) == 64 * 64
        seen[crop.targets] = True
    assert seen.mean() > 0.9


def test_inversion_changes_the_sign(pixels: np.ndarray, labels: np.ndarray) -> None:
    example = make_example("a", pixels, labels)
    inverted = PLAIN.model_copy(update={"invert_probability": 1.0})
    plain, other = (
        random_crop(example, "instance", config, std_floor=1.0, random=np.random.default_rng(3))
        for config in (PLAIN, inverted)
    )
    assert np.allclose(plain.inputs, -other.inputs, atol=1e-3)


def test_targets(labels: np.ndarray) -> None:
    targets, touching, border = instance_targets(labels.astype(np.float32))
    assert np.array_equal(targets > 0, labels > 0)
    assert targets[15, 10] == targets[15, 19] == targets[15, 18] == 2
    assert targets[15, 11] == targets[15, 17] == 1
    assert targets[45, 40] == 2
    assert targets[45, 41] == 1
    assert touching[15, 18:22].all()
    assert not touching[15, 10]
    assert not touching[40:50, 40:60].any()
    assert border[15, 9]
    assert border[15, 10]


def test_weights_are_highest_where_instances_meet(pixels: np.ndarray, labels: np.ndarray) -> None:
    crop = random_crop(
        make_example("a", pixels, labels), "instance", PLAIN, std_floor=1.0, random=np.random.default_rng(0)
    )
    assert np.unique(crop.weights).tolist() == [1.0, 2.0, 5.0]
