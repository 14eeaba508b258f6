"""What training will see, for the eye: augmented views with their labels over them. Owns: the sheet and how labels are
drawn. Must not know: how views are made, losses, command lines.
"""

from __future__ import annotations

import io
from itertools import count

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.v2.functional import to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from models.card import Card
from models.losses import IGNORED
from models.palettes import distinct_color
from pipeline.learning.examples import Batch, Examples

_MARGIN_PX = 6
_CAPTION_PX = 14
_LEGEND_PX = 18
#: Share of a label's colour over the picture.
_TINT = 0.5
_INK = (40, 40, 40)
#: Of what is left out of the loss.
_IGNORED_COLOR = (255, 255, 255)


def draw_preview(examples: Examples, *, views: int = 24, columns: int = 4, width_px: int = 320) -> bytes:
    """A PNG of the first `views` views of training, each beside itself with its labels: classes in the card's colours,
    objects each in one of its own with its box, what is ignored in white; and below, how much of the views each class
    has. Deterministic.

    `width_px`: of one view, and of one with its labels; `columns` of such pairs. Views are shown normalised, their
    range stretched to grey levels. Raises what `Examples.batch` raises.
    """
    tiles: list[Image.Image] = []
    pixels_of_channels = np.zeros(256, dtype=np.int64)
    for step in count():
        batch = examples.batch(step)
        for index in range(len(batch.names)):
            if len(tiles) < views:
                tiles.append(_pair(batch, index, examples.card, width_px))
                pixels_of_channels += _channel_pixels(batch, index)
        if len(tiles) >= views:
            break
    return _sheet(tiles, min(columns, len(tiles)), examples.card, pixels_of_channels)


def _pair(batch: Batch, index: int, card: Card, width_px: int) -> Image.Image:
    picture_CHW = _visible(batch.inputs[index])
    target = batch.targets[index]
    if isinstance(target, torch.Tensor):
        labelled_CHW = _with_channels(picture_CHW, target, card)
    else:
        labelled_CHW = _with_objects(picture_CHW, target, card)
    height_px = max(1, round(picture_CHW.shape[1] * width_px / picture_CHW.shape[2]))
    tile = Image.new("RGB", (2 * width_px, height_px + _CAPTION_PX), "white")
    for left, pixels_CHW in ((0, picture_CHW), (width_px, labelled_CHW)):
        pixels = to_pil_image(pixels_CHW).resize((width_px, height_px), Image.Resampling.BILINEAR)
        tile.paste(pixels, (left, 0))
    # What is longer than the tile shows its end, where names differ.
    name = batch.names[index] if len(batch.names[index]) <= 60 else f"...{batch.names[index][-57:]}"
    ImageDraw.Draw(tile).text((2, height_px), name, fill=_INK, font=ImageFont.load_default(11))
    return tile


def _visible(inputs_CHW: torch.Tensor) -> torch.Tensor:
    """uint8 [3, h, w]: the first and last percent are black and white."""
    values_CHW = inputs_CHW if len(inputs_CHW) >= 3 else inputs_CHW[:1].expand(3, -1, -1)
    low, high = np.percentile(values_CHW[:3].numpy(), (1, 99))
    return ((values_CHW[:3] - low) / max(high - low, 1e-6)).clamp(0, 1).mul(255).round().to(torch.uint8)


def _with_channels(picture_CHW: torch.Tensor, channels_HW: torch.Tensor, card: Card) -> torch.Tensor:
    shown = [
        (channel, color)
        for channel, (_, color) in enumerate(_legend(card))
        if card.background_id is None or channel > 0
    ] + [(IGNORED, _IGNORED_COLOR)]
    masks_KHW = torch.stack([channels_HW == channel for channel, _ in shown])
    return draw_segmentation_masks(picture_CHW, masks_KHW, alpha=_TINT, colors=[color for _, color in shown])


def _with_objects(picture_CHW: torch.Tensor, target: dict[str, torch.Tensor], card: Card) -> torch.Tensor:
    masks_KHW = torch.cat([target["ignored"][None], target["masks"] > 0])
    colors = [_IGNORED_COLOR, *(distinct_color(1 + index % 18) for index in range(len(target["masks"])))]
    drawn_CHW = draw_segmentation_masks(picture_CHW, masks_KHW, alpha=_TINT, colors=colors)
    if not len(target["boxes"]):
        return drawn_CHW
    # With one class its name says nothing.
    names = [card.classes[index].name for index in target["labels"].tolist()] if len(card.classes) > 2 else None
    return draw_bounding_boxes(drawn_CHW, target["boxes"], names, colors=list(colors[1:]))


def _legend(card: Card) -> list[tuple[str, tuple[int, int, int]]]:
    """Name and colour by channel."""
    if card.postprocessing.kind == "watershed":
        return [("background", (0, 0, 0)), ("interior", (0, 170, 90)), ("boundary", (255, 150, 0))]
    return [(info.name, info.color) for info in card.classes]


def _channel_pixels(batch: Batch, index: int) -> NDArray[np.int64]:
    """int64 [256]: pixels by channel, IGNORED among them; overlapping objects count each."""
    target = batch.targets[index]
    if isinstance(target, torch.Tensor):
        return np.bincount(target.numpy().ravel(), minlength=256)
    pixels = np.zeros(256, dtype=np.int64)
    np.add.at(pixels, target["labels"].numpy(), target["masks"].flatten(1).sum(dim=1).numpy())
    pixels[IGNORED] = int(target["ignored"].sum())
    pixels[0] = int((~(target["masks"] > 0).any(dim=0) & ~target["ignored"]).sum())
    return pixels


def _sheet(tiles: list[Image.Image], columns: int, card: Card, pixels: NDArray[np.int64]) -> bytes:
    width = columns * (tiles[0].width + _MARGIN_PX) + _MARGIN_PX
    rows = [tiles[first : first + columns] for first in range(0, len(tiles), columns)]
    heights = [max(tile.height for tile in row) + _MARGIN_PX for row in rows]
    shares = pixels / max(1, int(pixels.sum()))
    entries = [
        (f"{name} {100 * shares[channel]:.2g} %", color)
        for channel, (name, color) in enumerate(_legend(card))
        if pixels[channel]
    ]
    entries.append((f"ignored {100 * shares[IGNORED]:.2g} %", _IGNORED_COLOR))
    font = ImageFont.load_default(12)
    places, x, y = [], _MARGIN_PX, sum(heights) + _MARGIN_PX
    for text, color in entries:
        length = int(font.getlength(text)) + 30
        if x + length > width:
            x, y = _MARGIN_PX, y + _LEGEND_PX
        places.append((x, y, text, color))
        x += length
    sheet = Image.new("RGB", (width, y + _LEGEND_PX + _MARGIN_PX), "white")
    top = _MARGIN_PX
    for row, height in zip(rows, heights, strict=True):
        for column, tile in enumerate(row):
            sheet.paste(tile, (_MARGIN_PX + column * (tiles[0].width + _MARGIN_PX), top))
        top += height
    pen = ImageDraw.Draw(sheet)
    for x, y, text, color in places:
        pen.rectangle((x, y + 2, x + 12, y + 14), fill=color, outline=_INK)
        pen.text((x + 17, y), text, fill=_INK, font=font)
    png = io.BytesIO()
    sheet.save(png, "PNG")
    return png.getvalue()
