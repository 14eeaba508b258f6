from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torchvision.transforms.v2 import functional as kernels

from pipeline.learning.augmentation import Window, blurred, disturbed, draw_window, look, recolored
from pipeline.learning.recipe import AugmentationConfig

#: Nothing changes but where the view lies.
PLAIN = AugmentationConfig(
    scale=(1, 1), flip_horizontal=0, color_probability=0, blur_probability=0, noise_probability=0, beyond="nothing"
)
OUTSIDE = 255


def seen(
    image: torch.Tensor, crop: tuple[int, int] | None, config: AugmentationConfig, seed: int, **how: object
) -> tuple[torch.Tensor, torch.Tensor, Window]:
    """A view of the image, and of a map that is its first channel."""
    random = np.random.default_rng(seed)
    size = (image.shape[1], image.shape[2])
    window = draw_window(size, crop, config, random, **how)  # type: ignore[arg-type]
    rows, columns = window.source(*size)
    cut = image[:, rows, columns]
    pixels, maps = look(
        cut.permute(1, 2, 0).contiguous().numpy(), cut[:1].numpy(), window, config, random, outside=OUTSIDE, size=size
    )
    return torch.from_numpy(pixels).permute(2, 0, 1), torch.from_numpy(maps), window


@pytest.fixture
def image() -> torch.Tensor:
    """A ramp along each axis, below 200."""
    rows, columns = torch.meshgrid(torch.arange(60), torch.arange(90), indexing="ij")
    return torch.stack([rows * 3, columns * 2, rows + columns]).to(torch.uint8)


def test_a_plain_view_is_a_part_of_the_image(image: torch.Tensor) -> None:
    places = set()
    for seed in range(20):
        view, maps, _ = seen(image, (32, 64), PLAIN, seed)
        top, left = int(view[0, 0, 0]) // 3, int(view[1, 0, 0]) // 2
        assert torch.equal(view, image[:, top : top + 32, left : left + 64])
        assert torch.equal(maps[0], view[0])
        places.add((top, left))
    assert len(places) > 15


def test_the_whole_image_is_a_view(image: torch.Tensor) -> None:
    view, maps, _ = seen(image, None, PLAIN, 0)
    assert torch.equal(view, image)
    assert torch.equal(maps[0], image[0])


@pytest.mark.parametrize(
    "changes",
    [
        {"flip_horizontal": 0.5, "flip_vertical": 0.5, "quarter_turns": True},
        {"scale": (0.5, 2.0), "stretch": 1.5},
        {"rotate_probability": 1.0, "rotate_degrees": 40.0},
        {"elastic_probability": 1.0, "elastic_px": 3.0},
        {"scale": (0.3, 0.4), "rotate_probability": 1.0, "beyond": "mirror", "quarter_turns": True},
    ],
)
@pytest.mark.parametrize("crop", [(32, 64), None])
def test_image_and_maps_move_together(changes: dict[str, object], crop: tuple[int, int] | None) -> None:
    """A bright square on a dark ground, labelled: what is bright in a view is what its map says."""
    image = torch.full((3, 60, 90), 20, dtype=torch.uint8)
    image[:, 20:40, 30:60] = 220
    config = PLAIN.model_copy(update=changes)
    shown = 0
    for seed in range(12):
        view, maps, _ = seen(image, crop, config, seed)
        assert view.shape[1:] == maps.shape[1:]
        assert view.dtype == torch.uint8
        if crop:
            assert view.shape == (3, *crop)
        assert set(maps.unique().tolist()) <= {20, 220, OUTSIDE}
        inside = maps[0] != OUTSIDE
        bright, labelled = (view[0] > 120) & inside, (maps[0] == 220) & inside
        differ = (bright != labelled).sum()
        # Along the square's outline the nearest pixel and the mean of its neighbours may differ.
        assert differ <= 0.1 * labelled.sum() + 12
        shown += int(labelled.sum() > 0)
    assert shown >= 8


def test_beyond_the_image(image: torch.Tensor) -> None:
    _, maps, _ = seen(image, (128, 128), PLAIN, 0)
    assert (maps != OUTSIDE).sum() == 60 * 90
    mirrored = PLAIN.model_copy(update={"beyond": "mirror"})
    view, maps, window = seen(image, (128, 128), mirrored, 0)
    assert not (maps == OUTSIDE).any()
    top, left = -int(window.top), -int(window.left)
    expected = np.pad(
        image.numpy(), ((0, 0), (top, 128 - 60 - top), (left, 128 - 90 - left)), mode="reflect"
    )  # fmt: skip
    assert np.array_equal(view.numpy(), expected)


def test_a_focus_is_in_the_view(image: torch.Tensor) -> None:
    for seed in range(20):
        for row, column in ((0, 0), (59, 89), (30, 5)):
            view, _, _ = seen(image, (32, 32), PLAIN, seed, focus=(row, column))
            assert ((view[0] == 3 * row) & (view[1] == 2 * column)).sum() == 1


def test_scale_is_a_factor_of_the_cards_size(image: torch.Tensor) -> None:
    view, _, _ = seen(image, None, PLAIN, 0, scale=0.5)
    assert view.shape == (3, 30, 45)
    sizes = {seen(image, None, PLAIN.model_copy(update={"scale": (0.5, 2.0)}), seed)[0].shape[1] for seed in range(20)}
    assert min(sizes) >= 30
    assert max(sizes) <= 120
    assert len(sizes) > 10


def colors() -> NDArray[np.uint8]:
    """uint8 [n, 1, 3], neither grey nor near black or white."""
    return np.random.default_rng(0).integers(60, 190, (400, 1, 3)).astype(np.uint8)


def test_colors_change_alike_and_labels_do_not() -> None:
    pixels, random = colors(), np.random.default_rng
    assert np.array_equal(recolored(pixels, pixels, PLAIN, random(0))[0], pixels)
    inverted = PLAIN.model_copy(update={"invert_probability": 1.0})
    assert np.array_equal(recolored(pixels, pixels, inverted, random(0))[0], 255 - pixels)
    reordered = PLAIN.model_copy(update={"channel_order_probability": 1.0})
    orders = {tuple(recolored(pixels, pixels, reordered, random(seed))[0][0, 0].tolist()) for seed in range(40)}
    assert orders == set(itertools.permutations(pixels[0, 0].tolist()))
    wild = {name: 0.3 for name in ("brightness", "contrast", "saturation", "gamma", "hue", "channel_gain")}
    config = PLAIN.model_copy(
        update=wild | {"color_probability": 1.0, "invert_probability": 0.5, "channel_order_probability": 0.5}
    )
    for seed in range(20):
        changed, sample = recolored(pixels[:100], pixels[50:], config, random(seed))
        assert changed.dtype == sample.dtype == np.uint8
        # A colour becomes the same colour in the image and in the sample.
        assert np.array_equal(changed[50:], sample[:50])
        assert not np.array_equal(changed, pixels[:100])


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("brightness", kernels.adjust_brightness),
        ("contrast", kernels.adjust_contrast),
        ("saturation", kernels.adjust_saturation),
        ("gamma", kernels.adjust_gamma),
        ("hue", kernels.adjust_hue),
    ],
)
def test_colors_are_those_of_torchvision(name: str, kernel: Callable[..., torch.Tensor]) -> None:
    still = dict.fromkeys(("brightness", "contrast", "saturation"), 0.0)
    config = PLAIN.model_copy(update={**still, "color_probability": 1.0, name: 0.4})
    pixels = colors()
    for seed in range(10):
        changed, _ = recolored(pixels, pixels, config, np.random.default_rng(seed))
        random = np.random.default_rng(seed)
        random.random(3)  # whether to invert, to change the order, and to change the light
        amount = random.uniform(-0.4, 0.4) if name == "hue" else 1 + random.uniform(-0.4, 0.4)
        expected = kernel(torch.from_numpy(pixels).permute(2, 0, 1), amount).permute(1, 2, 0).numpy()
        # Rounded here, cut off there.
        assert np.abs(changed.astype(int) - expected).max() <= 1
        assert np.abs(changed.astype(int) - pixels).max() > 1


@pytest.mark.parametrize("size", [(30, 45), (90, 135), (47, 61)])
def test_sizes_change_as_in_torchvision(size: tuple[int, int]) -> None:
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (60, 90, 3)).astype(np.uint8)
    maps = random.integers(0, 1000, (2, 60, 90)).astype(np.int32)
    whole = Window(0, 0, size[0] / 60, size[1] / 90, *size, 0, 0, 0, False, False, *size)
    view, seen_maps = look(image, maps, whole, PLAIN, random, outside=-1, size=(60, 90))
    expected = kernels.resize(torch.from_numpy(image).permute(2, 0, 1).contiguous(), list(size), antialias=True)
    assert np.array_equal(view, expected.permute(1, 2, 0).numpy())
    nearest = kernels.resize(torch.from_numpy(maps), list(size), interpolation=kernels.InterpolationMode.NEAREST_EXACT)
    assert np.array_equal(seen_maps, nearest.numpy())


@pytest.mark.parametrize("angle", [17.0, -40.0])
def test_turns_are_those_of_torchvision(angle: float) -> None:
    """All that is cut out is turned; the crop is the middle of it."""
    random = np.random.default_rng(0)
    image = cv2.GaussianBlur(random.integers(0, 256, (96, 96, 3)).astype(np.uint8), (0, 0), 2)
    maps = (image[None, :, :, 0] > 128).astype(np.int32)
    window = Window(0, 0, 1, 1, 96, 96, angle, 0, 0, False, False, 64, 48)
    view, seen_maps = look(image, maps, window, PLAIN, random, outside=-1, size=(96, 96))
    bilinear, nearest = kernels.InterpolationMode.BILINEAR, kernels.InterpolationMode.NEAREST
    turned = kernels.rotate(torch.from_numpy(image).permute(2, 0, 1), angle, interpolation=bilinear, fill=127)
    expected = kernels.center_crop(turned, [64, 48]).permute(1, 2, 0).numpy()
    assert np.abs(view.astype(int) - expected).max() <= 2
    turned = kernels.rotate(torch.from_numpy(maps), angle, interpolation=nearest, fill=-1)
    assert (seen_maps == kernels.center_crop(turned, [64, 48]).numpy()).mean() > 0.998


def test_blur_is_that_of_torchvision() -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3)).astype(np.uint8)
    config = PLAIN.model_copy(update={"blur_probability": 1.0})
    changes = []
    for seed in range(8):
        random = np.random.default_rng(seed)
        random.random()  # whether to blur
        sigma = max(0.1, random.uniform(0, config.blur_px))
        size = 2 * math.ceil(2 * sigma) + 1
        expected = kernels.gaussian_blur(torch.from_numpy(image).permute(2, 0, 1), [size, size], [sigma, sigma])
        found = blurred(image, config, np.random.default_rng(seed)).astype(int)
        assert np.abs(found - expected.permute(1, 2, 0).numpy()).max() <= 2
        changes.append(np.abs(found - image).max())
    assert max(changes) > 60


def test_noise_and_stray_light_have_the_strength_that_they_say() -> None:
    inputs = torch.randn(3, 96, 96, generator=torch.Generator().manual_seed(0))
    noisy = PLAIN.model_copy(update={"noise_probability": 1.0, "noise": 0.2})
    strengths = [float((disturbed(inputs, noisy, np.random.default_rng(seed)) - inputs).std()) for seed in range(30)]
    assert 0.15 < max(strengths) < 0.21
    assert min(strengths) < 0.08
    veiled = PLAIN.model_copy(update={"veil_probability": 1.0})
    deviations = [float(disturbed(inputs, veiled, np.random.default_rng(seed)).std()) for seed in range(20)]
    assert deviations == pytest.approx([1.0] * 20, abs=0.1)
    sharp = (inputs * 40 + 128).clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    blurry = PLAIN.model_copy(update={"blur_probability": 1.0})
    left = [float(blurred(sharp, blurry, np.random.default_rng(seed)).astype(float).std()) for seed in range(20)]
    # Gaussian noise under a blur of s pixels keeps 1 / (2 s sqrt(pi)) of its deviation: 0.19 for 1.5.
    assert 0.17 * 40 < min(left) < 0.25 * 40
    assert max(left) > 0.7 * 40


def test_numbers_come_from_the_generator_alone(image: torch.Tensor) -> None:
    wild = AugmentationConfig(rotate_probability=1, elastic_probability=1, quarter_turns=True, stretch=1.3)
    torch.manual_seed(0)
    first = seen(image, (32, 64), wild, 7)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    second = seen(image, (32, 64), wild, 7)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], seen(image, (32, 64), wild, 8)[0])
