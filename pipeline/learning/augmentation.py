"""Random views of an image and of what is marked on it: geometry, colour, noise. Owns: how each is varied, and that all
maps move together. Must not know: data sets, cards, targets of networks.

Kernels are torchvision's (`transforms.v2.functional`), the numbers for them come from a generator that the caller
gives: torchvision's own classes draw from torch's global state, which threads would share.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as kernels

from pipeline.learning.recipe import AugmentationConfig

_NEAREST = InterpolationMode.NEAREST_EXACT
_GREY = 127


class Window(NamedTuple):
    """Where a view lies in its image, before it is turned; all that is random about geometry. Pixels of the image, and
    `height`, `width` in those of the view.
    """

    top: float
    left: float
    #: View pixels for one of the image.
    scale_y: float
    scale_x: float
    #: What is cut out, of which the middle is left after turning and bending.
    height: int
    width: int
    #: Degrees, counter-clockwise.
    angle: float
    #: Standard deviation in view pixels; 0: none.
    elastic_px: float
    quarter_turns: int
    flip_horizontal: bool
    flip_vertical: bool
    #: Of the finished view.
    crop_height: int
    crop_width: int

    def source(self, height: int, width: int) -> tuple[slice, slice]:
        """Rows and columns of the image, of size `height` by `width`, which the view shows; at least one of each."""
        return (
            _span(self.top, self.height / self.scale_y, height),
            _span(self.left, self.width / self.scale_x, width),
        )


def draw_window(
    size: tuple[int, int],
    crop: tuple[int, int] | None,
    config: AugmentationConfig,
    random: np.random.Generator,
    *,
    scale: float = 1.0,
    focus: tuple[int, int] | None = None,
) -> Window:
    """A view of an image of `size` (height, width). `crop`: its height and width, None for all of the image. `scale`:
    view pixels for one of the image, before it is varied. `focus`: row and column of a pixel to show.
    """
    height, width = size
    factor = scale * math.exp(random.uniform(math.log(config.scale[0]), math.log(config.scale[1])))
    stretch = math.exp(random.uniform(-1, 1) * math.log(config.stretch) / 2)
    scale_y, scale_x = factor * stretch, factor / stretch
    turns = int(random.integers(4)) if config.quarter_turns else 0
    if crop is None:
        crop = max(1, round(height * scale_y)), max(1, round(width * scale_x))
        cut_height, cut_width = crop
        crop = crop[::-1] if turns % 2 else crop
    else:
        cut_height, cut_width = crop[::-1] if turns % 2 else crop
    middle_height, middle_width = cut_height, cut_width
    angle = random.uniform(-1, 1) * config.rotate_degrees if random.random() < config.rotate_probability else 0.0
    elastic_px = config.elastic_px if random.random() < config.elastic_probability else 0.0
    if angle:
        sine, cosine = abs(math.sin(math.radians(angle))), abs(math.cos(math.radians(angle)))
        cut_height, cut_width = (
            math.ceil(middle_height * cosine + middle_width * sine) + 2,
            math.ceil(middle_width * cosine + middle_height * sine) + 2,
        )
    cut_height, cut_width = cut_height + 2 * math.ceil(elastic_px), cut_width + 2 * math.ceil(elastic_px)
    positions = []
    for axis, (length, cut) in enumerate(((height, cut_height / scale_y), (width, cut_width / scale_x))):
        slack = length - cut
        start = random.uniform(min(slack, 0), max(slack, 0))
        if focus is not None:
            start = focus[axis] + 0.5 - cut * random.uniform(0.25, 0.75)
            start = min(max(start, min(slack, 0)), max(slack, 0))
        # Whole pixels of the image: a view at its own scale then shows them as they are.
        positions.append(float(round(start)))
    return Window(
        positions[0], positions[1], scale_y, scale_x, cut_height, cut_width, angle, elastic_px, turns,
        bool(random.random() < config.flip_horizontal), bool(random.random() < config.flip_vertical), *crop,
    )  # fmt: skip


def look(
    image_CHW: torch.Tensor,
    maps_KHW: torch.Tensor,
    window: Window,
    config: AugmentationConfig,
    random: np.random.Generator,
    *,
    outside: int,
    size: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The view of an image (uint8 [C, h, w], bilinear) and of maps on it ([K, h, w], the nearest pixel, no new
    values): [C, crop_height, crop_width] and [K, crop_height, crop_width].

    Both hold what `window.source(*size)` names of an image of `size`. `outside`: what the maps say beyond the image,
    where that is not its mirror image.
    """
    source_y, source_x = window.source(*size)
    inner_y, before_y = _placed(window.top, source_y, window.scale_y, window.height)
    inner_x, before_x = _placed(window.left, source_x, window.scale_x, window.width)
    inner = [inner_y, inner_x]
    if inner != list(image_CHW.shape[1:]):
        image_CHW = kernels.resize(image_CHW, inner, antialias=True)
        maps_KHW = kernels.resize(maps_KHW, inner, interpolation=_NEAREST)
    if inner != [window.height, window.width]:
        if config.beyond == "mirror":
            rows = _mirrored(window.height, before_y, inner_y)
            columns = _mirrored(window.width, before_x, inner_x)
            image_CHW, maps_KHW = image_CHW[:, rows][:, :, columns], maps_KHW[:, rows][:, :, columns]
        else:
            padding = [
                before_x, before_y, window.width - inner_x - before_x, window.height - inner_y - before_y,
            ]  # fmt: skip
            image_CHW = kernels.pad(image_CHW, padding, fill=_GREY)
            maps_KHW = kernels.pad(maps_KHW, padding, fill=outside)
    if window.angle:
        image_CHW = kernels.rotate(image_CHW, window.angle, interpolation=InterpolationMode.BILINEAR, fill=_GREY)
        maps_KHW = kernels.rotate(maps_KHW, window.angle, fill=outside)
    if window.elastic_px:
        displacement = _displacement(window, config.elastic_length_px, random)
        image_CHW = kernels.elastic(image_CHW, displacement, fill=_GREY)
        maps_KHW = kernels.elastic(maps_KHW, displacement, interpolation=InterpolationMode.NEAREST, fill=outside)
    middle = [window.crop_height, window.crop_width]
    middle = middle[::-1] if window.quarter_turns % 2 else middle
    if middle != [window.height, window.width]:
        image_CHW, maps_KHW = kernels.center_crop(image_CHW, middle), kernels.center_crop(maps_KHW, middle)
    axes = [axis for axis, wanted in ((1, window.flip_vertical), (2, window.flip_horizontal)) if wanted]
    if window.quarter_turns:
        image_CHW = image_CHW.rot90(window.quarter_turns, (1, 2))
        maps_KHW = maps_KHW.rot90(window.quarter_turns, (1, 2))
    return image_CHW.flip(axes), maps_KHW.flip(axes)


def recolored(pixels_CN: torch.Tensor, config: AugmentationConfig, random: np.random.Generator) -> torch.Tensor:
    """Colours uint8 [3, n] under another light. Give all that is to change alike at once: contrast turns about the mean
    of what is given.
    """
    pixels_C1N = pixels_CN.unsqueeze(1)
    if random.random() < config.invert_probability:
        pixels_C1N = kernels.invert(pixels_C1N)
    if random.random() < config.channel_order_probability:
        pixels_C1N = pixels_C1N[torch.from_numpy(random.permutation(3))]
    if random.random() < config.color_probability:
        if config.brightness:
            pixels_C1N = kernels.adjust_brightness(pixels_C1N, _factor(config.brightness, random))
        if config.contrast:
            pixels_C1N = kernels.adjust_contrast(pixels_C1N, _factor(config.contrast, random))
        if config.saturation:
            pixels_C1N = kernels.adjust_saturation(pixels_C1N, _factor(config.saturation, random))
        if config.hue:
            pixels_C1N = kernels.adjust_hue(pixels_C1N, random.uniform(-config.hue, config.hue))
        if config.gamma:
            pixels_C1N = kernels.adjust_gamma(pixels_C1N, _factor(config.gamma, random))
        if config.channel_gain:
            gains = torch.tensor([_factor(config.channel_gain, random) for _ in range(3)], dtype=torch.float32)
            pixels_C1N = (pixels_C1N * gains[:, None, None]).round_().clamp_(0, 255).to(torch.uint8)
    return pixels_C1N.squeeze(1)


def blurred(image_CHW: torch.Tensor, config: AugmentationConfig, random: np.random.Generator) -> torch.Tensor:
    """uint8 [C, h, w], as often and as much as the settings say."""
    if not config.blur_px or random.random() >= config.blur_probability:
        return image_CHW
    sigma = max(0.1, random.uniform(0, config.blur_px))
    size = 2 * math.ceil(2 * sigma) + 1
    if size // 2 >= min(image_CHW.shape[1:]):
        return image_CHW
    return kernels.gaussian_blur(image_CHW, [size, size], [sigma, sigma])


def disturbed(inputs_CHW: torch.Tensor, config: AugmentationConfig, random: np.random.Generator) -> torch.Tensor:
    """Normalised float32 [C, h, w] under stray light and noise. Stray light keeps the deviation at 1."""
    if config.veil and random.random() < config.veil_probability:
        strength = random.uniform(0, config.veil)
        height, width = inputs_CHW.shape[1:]
        coarse = random.standard_normal((3, 3), dtype=np.float32)
        field = np.asarray(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC))
        field = np.float32(strength) * (field - field.mean()) / max(float(field.std()), 1e-6)
        inputs_CHW = (inputs_CHW + torch.from_numpy(field)) / math.sqrt(1 + strength**2)
    if config.noise and random.random() < config.noise_probability:
        generator = torch.Generator().manual_seed(int(random.integers(2**63)))
        noise = torch.randn(inputs_CHW.shape, generator=generator)
        inputs_CHW = inputs_CHW + random.uniform(0, config.noise) * noise
    return inputs_CHW


def _factor(spread: float, random: np.random.Generator) -> float:
    return 1 + random.uniform(-spread, spread)


def _span(start: float, cut: float, length: int) -> slice:
    first = min(max(0, math.floor(start + 1e-6)), length - 1)
    return slice(first, min(max(first + 1, math.ceil(start + cut - 1e-6)), length))


def _placed(start: float, source: slice, scale: float, cut: int) -> tuple[int, int]:
    """How many pixels of the view show the image, and how many lie before them."""
    if start >= 0 and source.stop - source.start >= math.floor(cut / scale):
        return cut, 0
    inner = min(cut, max(1, round((source.stop - source.start) * scale)))
    return inner, min(cut - inner, max(0, round(-start * scale)))


def _mirrored(length: int, before: int, inner: int) -> torch.Tensor:
    """int64 [length]: which of `inner` pixels is shown where, reflected at both ends as often as needed."""
    position = (torch.arange(length) - before) % max(1, 2 * inner - 2)
    return torch.minimum(position, (2 * inner - 2 - position).clamp_min(0))


def _displacement(window: Window, length_px: float, random: np.random.Generator) -> torch.Tensor:
    """float32 [1, h, w, 2] as torchvision's `elastic` takes it: in halves of the view's size."""
    size = window.height, window.width
    coarse = tuple(max(2, round(side / length_px)) for side in size)
    fields: list[NDArray[np.float32]] = []
    for side in (size[1], size[0]):
        field = random.standard_normal(coarse, dtype=np.float32)
        field = np.asarray(cv2.resize(field, size[::-1], interpolation=cv2.INTER_CUBIC))
        fields.append(field * np.float32(2 * window.elastic_px / side))
    return torch.from_numpy(np.stack(fields, axis=-1))[None]
