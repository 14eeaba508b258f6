"""Random crops for training: geometry, tone and noise, and the network's targets. Owns: what is varied and by
how much. Must not know: networks, optimisers, folders.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from models.preprocessing import histogram_statistics


class AugmentationConfig(BaseModel):
    """How much training images are varied."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: Pixels, a multiple of the canvas.
    crop_px: int = Field(default=256, ge=32)
    #: Factors of the size, drawn log-uniformly.
    scale: tuple[float, float] = (0.6, 1.7)
    #: Probability of a rotation by any angle; otherwise by a multiple of 90 degrees.
    rotate_probability: float = 0.3
    #: Probability of 255 - x: teaches both polarities (fluorescence, bright field).
    invert_probability: float = 0.15
    #: Gain of each channel and gamma of all: factors up to 1 ± this.
    tone: float = 0.25
    #: Probability of a smooth veil of stray light, and its highest standard deviation in units of the image's
    #: own.
    veil_probability: float = 0.3
    veil: float = 2.0
    #: Highest standard deviation of Gaussian noise, in units of the image's own standard deviation.
    noise: float = 0.15
    #: Probability of a Gaussian blur of up to 1.5 pixels.
    blur_probability: float = 0.15
    #: Additional weight of pixels where two instances meet.
    touching_weight: float = 4.0
    #: Additional weight of the other pixels on the border of an instance.
    border_weight: float = 1.0


class Example(NamedTuple):
    """A training image in memory."""

    name: str
    #: uint8 [h, w, 3].
    pixels: NDArray[np.uint8]
    #: float32 [h, w]: instance labels or class ids. (OpenCV warps float32, and label numbers are exact in
    #: it.)
    labels: NDArray[np.float32]
    #: int64 [3, 256]: histogram of each channel, from which the statistics of any tone curve follow.
    histograms: NDArray[np.int64]


class Crop(NamedTuple):
    """One input of the network with its target."""

    #: float32 [crop, crop, 3], normalised per image.
    inputs: NDArray[np.float32]
    #: int64 [crop, crop]: indices of the network's channels.
    targets: NDArray[np.int64]
    #: float32 [crop, crop], from 1 up.
    weights: NDArray[np.float32]


def make_example(name: str, pixels: NDArray[np.uint8], labels: NDArray[np.generic]) -> Example:
    histograms = np.stack([np.bincount(pixels[:, :, channel].ravel(), minlength=256) for channel in range(3)])
    return Example(name, pixels, labels.astype(np.float32), histograms)


def random_crop(
    example: Example,
    task: Literal["semantic", "instance"],
    config: AugmentationConfig,
    *,
    std_floor: float,
    random: np.random.Generator,
) -> Crop:
    """A random view of the example. Equal generator states give equal crops.

    Normalisation uses the statistics of the whole image under the crop's tone curve, as the Segmenter will.
    """
    pixels, labels = _warp(example, config, random)
    curves = _tone_curves(config, random)
    mean, std = histogram_statistics(example.histograms, curves)
    inputs = np.stack([curves[channel].astype(np.float32)[pixels[:, :, channel]] for channel in range(3)], axis=2)
    if random.random() < config.blur_probability:
        inputs = cv2.GaussianBlur(inputs, (0, 0), random.uniform(0.4, 1.5)).astype(np.float32)
    inputs = (inputs - np.float32(mean)) / np.float32(max(std, std_floor))
    if random.random() < config.veil_probability:
        inputs = _veiled(inputs, random.uniform(0, config.veil), random)
    noise = random.uniform(0, config.noise)
    inputs += np.float32(noise) * random.standard_normal(inputs.shape, dtype=np.float32)
    if task == "semantic":
        return Crop(inputs, labels.astype(np.int64), np.ones(labels.shape, dtype=np.float32))
    targets, touching, border = instance_targets(labels)
    weights = (
        1 + np.float32(config.touching_weight) * touching + np.float32(config.border_weight) * (border & ~touching)
    )
    return Crop(inputs, targets, weights.astype(np.float32))


def instance_targets(
    labels: NDArray[np.float32],
) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.bool_]]:
    """Channel indices, where instances meet, and where borders are; each [h, w].

    Channels: 0 background, 1 interior, 2 boundary. Boundary is the outermost pixel of an instance
    (8-neighbourhood), two pixels deep where another instance is within two pixels.
    """
    small, large = np.ones((3, 3), dtype=np.uint8), np.ones((5, 5), dtype=np.uint8)
    inside = labels > 0
    edge = cv2.dilate(labels, small) != cv2.erode(labels, small)
    nothing = np.float32(2**24)
    lowest = cv2.erode(np.where(inside, labels, nothing), large)
    highest = cv2.dilate(labels, large)
    touching = (highest > 0) & (lowest != highest)
    boundary = inside & (edge | touching)
    return inside.astype(np.int64) + boundary, touching, edge


def _warp(
    example: Example, config: AugmentationConfig, random: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    height, width = example.labels.shape
    scale = math.exp(random.uniform(math.log(config.scale[0]), math.log(config.scale[1])))
    freely = random.random() < config.rotate_probability
    angle = random.uniform(0, 2 * math.pi) if freely else 0.5 * math.pi * random.integers(4)
    mirrored = -1.0 if random.random() < 0.5 else 1.0
    size = config.crop_px
    # The crop's centre in the image: anywhere that keeps the crop inside, as far as the image is large
    # enough.
    slack_y, slack_x = max(0.0, height - size / scale), max(0.0, width - size / scale)
    center_y = height / 2 + slack_y * random.uniform(-0.5, 0.5)
    center_x = width / 2 + slack_x * random.uniform(-0.5, 0.5)
    cosine, sine = math.cos(angle) / scale, math.sin(angle) / scale
    to_image = np.array([[cosine * mirrored, -sine, 0.0], [sine * mirrored, cosine, 0.0]])
    middle = (size - 1) / 2
    to_image[:, 2] = np.array([center_x - 0.5, center_y - 0.5]) - to_image[:, :2] @ np.array([middle, middle])
    pixels = _sampled(example.pixels, to_image, size, cv2.INTER_LINEAR)
    labels = _sampled(example.labels, to_image, size, cv2.INTER_NEAREST)
    return pixels, labels


def _sampled(array: NDArray[Any], to_image: NDArray[np.float64], size: int, interpolation: int) -> NDArray[Any]:
    flags = interpolation | cv2.WARP_INVERSE_MAP
    return np.asarray(cv2.warpAffine(array, to_image, (size, size), flags=flags, borderMode=cv2.BORDER_REFLECT_101))


def _veiled(inputs: NDArray[np.float32], strength: float, random: np.random.Generator) -> NDArray[np.float32]:
    """Adds a field that varies over thirds of the crop, and restores the deviation that normalisation would
    give.
    """
    size = inputs.shape[:2]
    coarse = random.standard_normal((3, 3), dtype=np.float32)
    field = np.asarray(cv2.resize(coarse, (size[1], size[0]), interpolation=cv2.INTER_CUBIC))
    field = np.float32(strength) * (field - field.mean()) / max(float(field.std()), 1e-6)
    return (inputs + field[:, :, None]) / np.float32((1 + strength**2) ** 0.5)


def _tone_curves(config: AugmentationConfig, random: np.random.Generator) -> NDArray[np.float64]:
    """float64 [3, 256]: what each grey level of each channel becomes."""
    levels = np.arange(256) / 255
    if random.random() < config.invert_probability:
        levels = 1 - levels
    gamma = math.exp(random.uniform(-1, 1) * 2 * config.tone)
    gains = 1 + random.uniform(-config.tone, config.tone, size=(3, 1))
    curves: NDArray[np.float64] = 255 * gains * levels[None, :] ** gamma
    return curves[random.permutation(3)]
