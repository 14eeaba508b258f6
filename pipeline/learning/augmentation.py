"""Random views of an image and of what is marked on it: geometry, colour, noise. Owns: how each is varied, and that all
maps move together. Must not know: data sets, cards, targets of networks.

What is done is what the kernels of torchvision's `transforms.v2` do, and tests hold it against them. The numbers come
from a generator that the caller gives: torchvision's own classes draw from torch's global state, which threads would
share. Beside a network on the same cores every pass over the pixels counts, so: pixels lie channel by channel in each
pixel, as torchvision resizes them fastest; colours go through one table; turning and bending are one warp, of the crop
alone.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.transforms.v2 import functional as kernels

from pipeline.learning.recipe import AugmentationConfig

Pixels = NDArray[np.uint8]
#: uint8 or int32.
Maps = NDArray[Any]

_GREY = 127
_IDENTITY = np.arange(256, dtype=np.uint8)
#: How much each of red, green and blue is seen (ITU-R BT.601).
_LUMA = np.array([0.299, 0.587, 0.114])


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
    image_HWC: Pixels,
    maps_KHW: Maps,
    window: Window,
    config: AugmentationConfig,
    random: np.random.Generator,
    *,
    outside: int,
    size: tuple[int, int],
) -> tuple[Pixels, Maps]:
    """The view of an image (uint8 [h, w, C], bilinear) and of maps on it ([K, h, w], uint8 or int32; the nearest pixel,
    no new values): [crop_height, crop_width, C] and [K, crop_height, crop_width], both contiguous.

    Both hold what `window.source(*size)` names of an image of `size`. `outside`: what the maps say beyond the image,
    where that is not its mirror image.
    """
    source_y, source_x = window.source(*size)
    inner_y, before_y = _placed(window.top, source_y, window.scale_y, window.height)
    inner_x, before_x = _placed(window.left, source_x, window.scale_x, window.width)
    inner = inner_y, inner_x
    if inner != image_HWC.shape[:2]:
        image_HWC, maps_KHW = _resized(image_HWC, inner), _nearest(maps_KHW, inner)
    if inner != (window.height, window.width):
        rows, columns = (before_y, window.height - inner_y - before_y), (before_x, window.width - inner_x - before_x)
        if config.beyond == "mirror":
            image_HWC = _mirrored(image_HWC, rows, columns)
            maps_KHW = np.stack([_mirrored(one, rows, columns) for one in maps_KHW])
        else:
            image_HWC = np.pad(image_HWC, (rows, columns, (0, 0)), constant_values=_GREY)
            maps_KHW = np.pad(maps_KHW, ((0, 0), rows, columns), constant_values=outside)
    height, width = window.crop_height, window.crop_width
    middle = (width, height) if window.quarter_turns % 2 else (height, width)
    if window.angle or window.elastic_px:
        image_HWC, maps_KHW = _warped(
            image_HWC, maps_KHW, window, random, size=middle, length_px=config.elastic_length_px, outside=outside
        )
    elif middle != (window.height, window.width):
        top, left = _middle(window, middle)
        image_HWC = image_HWC[top : top + middle[0], left : left + middle[1]]
        maps_KHW = maps_KHW[:, top : top + middle[0], left : left + middle[1]]
    if window.quarter_turns:
        image_HWC = np.rot90(image_HWC, window.quarter_turns)
        maps_KHW = np.rot90(maps_KHW, window.quarter_turns, (1, 2))
    if window.flip_vertical:
        image_HWC, maps_KHW = image_HWC[::-1], maps_KHW[:, ::-1]
    if window.flip_horizontal:
        image_HWC, maps_KHW = image_HWC[:, ::-1], maps_KHW[:, :, ::-1]
    return np.ascontiguousarray(image_HWC), np.ascontiguousarray(maps_KHW)


def recolored(
    pixels: Pixels, sample: Pixels, config: AugmentationConfig, random: np.random.Generator
) -> tuple[Pixels, Pixels]:
    """Colours uint8 [h, w, 3] under another light, and a sample of the image that they are of, [n, 1, 3], under the
    same. Contrast turns about the mean of the sample.
    """
    light = _Light(pixels, sample)
    if random.random() < config.invert_probability:
        light.by_table(255.0 - _IDENTITY)
    if random.random() < config.channel_order_probability:
        light.mix(np.eye(3)[random.permutation(3)])
    if random.random() < config.color_probability:
        if config.brightness:
            light.by_table(_IDENTITY * _factor(config.brightness, random))
        if config.contrast:
            factor = _factor(config.contrast, random)
            light.by_table(factor * _IDENTITY + (1 - factor) * light.sample_luma())
        if config.saturation:
            factor = _factor(config.saturation, random)
            light.mix(factor * np.eye(3) + (1 - factor) * _LUMA)
        if config.hue:
            light.turn_hue(random.uniform(-config.hue, config.hue))
        if config.gamma:
            light.by_table(255 * (_IDENTITY / 255) ** _factor(config.gamma, random))
        if config.channel_gain:
            gains = [_factor(config.channel_gain, random) for _ in range(3)]
            light.by_table(_IDENTITY[:, None] * np.array(gains))
    return light.pixels(), light.sample


class _Light:
    """Steps over the colours of an image, each rounded to uint8; those that look at one channel at a time are gathered
    in a table. The sample is always up to date.
    """

    def __init__(self, pixels: Pixels, sample: Pixels) -> None:
        self.sample = sample
        self._pixels = pixels
        self._table: Pixels | None = None

    def by_table(self, values: NDArray[Any]) -> None:
        """float [256] or, for each channel its own, [256, 3]: what becomes of each value."""
        table = np.rint(values).clip(0, 255).astype(np.uint8)
        self.sample = _looked_up(self.sample, table)
        if self._table is None:
            self._table = table
        elif self._table.ndim == table.ndim == 1:
            self._table = table[self._table]
        else:
            first, second = (np.broadcast_to(one.reshape(256, -1), (256, 3)) for one in (self._table, table))
            self._table = np.take_along_axis(second, first, axis=0)

    def mix(self, matrix: NDArray[Any]) -> None:
        """float [3, 3]: what each channel becomes of all."""
        self.sample = np.asarray(cv2.transform(self.sample, matrix), dtype=np.uint8)
        self._pixels = np.asarray(cv2.transform(self.pixels(), matrix), dtype=np.uint8)

    def turn_hue(self, share: float) -> None:
        turned = [
            kernels.adjust_hue(torch.from_numpy(one).permute(2, 0, 1), share).permute(1, 2, 0).contiguous().numpy()
            for one in (self.pixels(), self.sample)
        ]
        self._pixels, self.sample = turned

    def sample_luma(self) -> float:
        """Mean brightness of the sample, 0..255."""
        return float(cv2.mean(cv2.cvtColor(self.sample, cv2.COLOR_RGB2GRAY))[0])

    def pixels(self) -> Pixels:
        if self._table is not None:
            self._pixels, self._table = _looked_up(self._pixels, self._table), None
        return self._pixels


def blurred(image_HWC: Pixels, config: AugmentationConfig, random: np.random.Generator) -> Pixels:
    """uint8 [h, w, C], as often and as much as the settings say."""
    if not config.blur_px or random.random() >= config.blur_probability:
        return image_HWC
    sigma = max(0.1, random.uniform(0, config.blur_px))
    size = 2 * math.ceil(2 * sigma) + 1
    if size // 2 >= min(image_HWC.shape[:2]):
        return image_HWC
    return np.asarray(cv2.GaussianBlur(image_HWC, (size, size), sigma, borderType=cv2.BORDER_REFLECT_101), np.uint8)


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
        channels, height, width = inputs_CHW.shape
        noise_HWC = torch.randn(height, width, channels, generator=generator)
        inputs_CHW = inputs_CHW.add(noise_HWC.permute(2, 0, 1), alpha=random.uniform(0, config.noise))
    return inputs_CHW


def _factor(spread: float, random: np.random.Generator) -> float:
    return 1 + random.uniform(-spread, spread)


def _looked_up(pixels: Pixels, table: Pixels) -> Pixels:
    return np.asarray(cv2.LUT(pixels, table if table.ndim == 1 else table[None]), dtype=np.uint8)


def _span(start: float, cut: float, length: int) -> slice:
    first = min(max(0, math.floor(start + 1e-6)), length - 1)
    return slice(first, min(max(first + 1, math.ceil(start + cut - 1e-6)), length))


def _placed(start: float, source: slice, scale: float, cut: int) -> tuple[int, int]:
    """How many pixels of the view show the image, and how many lie before them."""
    if start >= 0 and source.stop - source.start >= math.floor(cut / scale):
        return cut, 0
    inner = min(cut, max(1, round((source.stop - source.start) * scale)))
    return inner, min(cut - inner, max(0, round(-start * scale)))


def _resized(image_HWC: Pixels, size: tuple[int, int]) -> Pixels:
    """Bilinear; a smaller image is the mean of what it leaves out. OpenCV has nothing that does this."""
    image_CHW = torch.from_numpy(np.ascontiguousarray(image_HWC)).permute(2, 0, 1)
    resized: Pixels = kernels.resize(image_CHW, list(size), antialias=True).permute(1, 2, 0).contiguous().numpy()
    return resized


def _nearest(maps_KHW: Maps, size: tuple[int, int]) -> Maps:
    """The pixel under the middle of each, as torchvision's NEAREST_EXACT."""
    rows, columns = (
        ((np.arange(side) + 0.5) * (length / side)).astype(np.int64)
        for side, length in zip(size, maps_KHW.shape[1:], strict=True)
    )
    return maps_KHW.take(rows, axis=1).take(columns, axis=2)


def _mirrored(pixels: Any, rows: tuple[int, int], columns: tuple[int, int]) -> Any:
    """[h, w] or [h, w, C] with so many more before and after, reflected as often as needed."""
    return cv2.copyMakeBorder(pixels, *rows, *columns, cv2.BORDER_REFLECT_101)


def _middle(window: Window, size: tuple[int, int]) -> tuple[int, int]:
    """Where the crop begins in what was cut out."""
    return round((window.height - size[0]) / 2), round((window.width - size[1]) / 2)


def _warped(
    image_HWC: Pixels,
    maps_KHW: Maps,
    window: Window,
    random: np.random.Generator,
    *,
    size: tuple[int, int],
    length_px: float,
    outside: int,
) -> tuple[Pixels, Maps]:
    """The middle, of `size`, of what was cut out, bent and turned about its own."""
    (top, left), (height, width) = _middle(window, size), size
    y = np.arange(top, top + height, dtype=np.float32)[:, None] - np.float32((window.height - 1) / 2)
    x = np.arange(left, left + width, dtype=np.float32)[None] - np.float32((window.width - 1) / 2)
    if window.elastic_px:
        coarse = tuple(max(2, round(side / length_px)) for side in size)
        shift_y, shift_x = (
            cv2.resize(
                np.float32(window.elastic_px) * random.standard_normal(coarse, dtype=np.float32),
                (width, height),
                interpolation=cv2.INTER_CUBIC,
            )
            for _ in range(2)
        )
        y, x = y + shift_y, x + shift_x
    sine, cosine = np.float32(math.sin(math.radians(window.angle))), np.float32(math.cos(math.radians(window.angle)))
    from_y = x * sine + y * cosine + np.float32((window.height - 1) / 2)
    from_x = x * cosine - y * sine + np.float32((window.width - 1) / 2)
    warped = cv2.remap(image_HWC, from_x, from_y, cv2.INTER_LINEAR, borderValue=(_GREY,) * 4)
    rows, columns = np.rint(from_y).astype(np.int64), np.rint(from_x).astype(np.int64)
    beyond = (rows < 0) | (rows >= window.height) | (columns < 0) | (columns >= window.width)
    flat = rows.clip(0, window.height - 1) * window.width + columns.clip(0, window.width - 1)
    found = maps_KHW.reshape(len(maps_KHW), -1).take(flat, axis=1)
    found[:, beyond] = outside
    return np.asarray(warped, dtype=np.uint8), found
