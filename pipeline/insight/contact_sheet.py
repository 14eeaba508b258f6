"""A contact sheet: masks drawn over their images, from the table alone. Owns: which rows are shown, and how.
Must not know: networks, runs, how masks came about.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from pydantic import BaseModel, ConfigDict, Field

from pipeline.errors import ImageError, StorageError, UsageError
from pipeline.insight.original import ReplacedError, original_pixels
from pipeline.insight.overlay import brightened, class_labels, instance_labels, painted
from pipeline.storage import given_path, uri_name
from pipeline.table.catalog import connect

_MARGIN_PX = 12
_HEADER_PX = 52
_CAPTION_PX = 40
_FETCHES_AT_ONCE = 8
_BACKGROUND = (18, 20, 26)
_TILE = (54, 57, 66)
_TEXT = (236, 238, 242)
_FAINT = (150, 156, 168)
_ALERT = (244, 140, 120)


class SheetConfig(BaseModel):
    """What a contact sheet shows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    columns: int = Field(default=6, ge=1, le=24, description="Tiles in a row.")
    tile_px: int = Field(default=320, ge=96, le=1024, description="Edge of a tile; images are fitted into it.")
    limit: int = Field(default=60, ge=1, le=600, description="Tiles at most; the same sample in every call.")
    model: str | None = Field(default=None, description="Whose masks. Default: the model of the newest run.")
    max_pixels: int = Field(default=200_000_000, ge=1, description="Larger images are not drawn.")
    source_profile: str | None = Field(default=None, description="AWS profile for the images.")
    dest_profile: str | None = Field(default=None, description="AWS profile for the table.")


def draw_contact_sheet(dest: str, out_path: str | Path, config: SheetConfig | None = None) -> int:
    """Writes a PNG to `out_path` (replacing it), a file on this machine, and returns the number of its tiles.

    One tile per row of the view `images`, in the order of their URIs: instances in colours of their own, classes in
    the colours of the mask's palette (black is left clear), over the image as it is now. A dark image is brightened
    for the eye. A row that is an error, and an image that is gone or was replaced since, is a grey tile that says so.
    Memory: the sheet, and a few images. Raises UsageError where DEST holds no rows or `out_path` cannot be written,
    StorageError where DEST cannot be read. Safe to retry.
    """
    config = config or SheetConfig()
    out_path = Path(given_path(out_path) if isinstance(out_path, str) else out_path)
    rows, title = _select(dest, config)
    columns = min(config.columns, len(rows))
    pitch_x, pitch_y = config.tile_px + _MARGIN_PX, config.tile_px + _CAPTION_PX + _MARGIN_PX
    lines = -(-len(rows) // columns)
    sheet = Image.new("RGB", (columns * pitch_x + _MARGIN_PX, lines * pitch_y + _MARGIN_PX + _HEADER_PX), _BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    pen.text((_MARGIN_PX, 16), _cut(title, pen, _font(20), sheet.width - 2 * _MARGIN_PX), _TEXT, _font(20))
    with ThreadPoolExecutor(_FETCHES_AT_ONCE) as pool:
        for index, tile in enumerate(pool.map(lambda row: _draw_tile(row, config), rows)):
            at = (_MARGIN_PX + index % columns * pitch_x, _HEADER_PX + _MARGIN_PX + index // columns * pitch_y)
            sheet.paste(tile, at)
    _write(sheet, out_path)
    return len(rows)


def _select(dest: str, config: SheetConfig) -> tuple[list[dict[str, Any]], str]:
    """The rows to draw, and a line about all of them."""
    connection = connect(dest, profile=config.dest_profile)
    try:
        model = config.model or connection.sql("SELECT max_by(model, run_id) FROM images").fetchall()[0][0]
        [(images, instances, errors, version)] = connection.sql(
            "SELECT count(*), coalesce(sum(len(instances)), 0), count(*) FILTER (status = 'error'), max(version) "
            "FROM images WHERE model = ?",
            params=[model],
        ).fetchall()
        if not images:
            wanted = f" of model {config.model!r}" if config.model else ""
            raise UsageError(f"{dest} has no finished rows{wanted} to draw: run `maskmill segment` to its end first")
        rows = connection.sql(
            "SELECT * FROM (SELECT image_uri, image_etag, width, height, task, status, error_kind, error_message, "
            "mean_confidence, foreground_fraction, mask.bytes AS mask, instances FROM images WHERE model = ? "
            "ORDER BY md5(image_uri) LIMIT ?) ORDER BY image_uri",
            params=[model, config.limit],
        ).to_arrow_table()
    finally:
        connection.close()
    counts = [
        f"{images:,} images",
        f"{int(instances):,} instances" if instances else "",
        f"{errors:,} errors" if errors else "",
    ]
    shown = f"{len(rows):,} of them shown" if len(rows) < images else ""
    return rows.to_pylist(), "  ·  ".join([f"{model} {version}", *filter(None, [*counts, shown])])


def _draw_tile(row: Mapping[str, Any], config: SheetConfig) -> Image.Image:
    """A tile with its caption. Never raises for what is wrong with an image: the tile says it."""
    size_px = config.tile_px
    tile = Image.new("RGB", (size_px, size_px + _CAPTION_PX), _BACKGROUND)
    pen = ImageDraw.Draw(tile)
    pen.rectangle((0, 0, size_px - 1, size_px - 1), fill=_TILE)
    trouble = f"{row['error_kind']}: {row['error_message']}" if row["status"] != "ok" else ""
    facts = "no mask"
    if not trouble:
        try:
            picture = _picture(row, config)
            pen.rectangle((0, 0, size_px - 1, size_px - 1), fill=_BACKGROUND)
            tile.paste(picture, ((size_px - picture.width) // 2, (size_px - picture.height) // 2))
            facts = _facts(row)
        except (StorageError, ImageError) as error:
            trouble = f"the image cannot be shown now ({error.kind})"
        except ReplacedError:
            trouble = "the image was replaced since"
    if trouble:
        _write_lines(pen, plain_text(trouble), (14, 14), width_px=size_px - 28, lines=8)
    pen.text(
        (2, size_px + 4), _cut(plain_text(uri_name(row["image_uri"])), pen, _font(14), size_px - 4), _TEXT, _font(14)
    )
    pen.text((2, size_px + 22), _cut(facts, pen, _font(13), size_px - 4), _ALERT if trouble else _FAINT, _font(13))
    return tile


def _picture(row: Mapping[str, Any], config: SheetConfig) -> Image.Image:
    """The image with its mask, fitted into a tile."""
    pixels = original_pixels(row, max_pixels=config.max_pixels, profile=config.source_profile)
    scale = config.tile_px / max(row["height"], row["width"])
    size = max(1, round(row["width"] * scale)), max(1, round(row["height"] * scale))
    small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    small = brightened(small.astype(np.uint8, copy=False))
    if row["instances"]:
        labels, colors = instance_labels(row["instances"], (row["height"], row["width"]))
    elif row["task"] == "instance":
        return Image.fromarray(small)
    else:
        labels, colors = class_labels(row["mask"])
    labels = cv2.resize(labels.astype(np.float32), size, interpolation=cv2.INTER_NEAREST).astype(np.int32)
    return Image.fromarray(painted(small, labels, colors))


def _facts(row: Mapping[str, Any]) -> str:
    share = f"{row['foreground_fraction']:.0%} foreground" if row["foreground_fraction"] is not None else ""
    number = len(row["instances"] or [])
    count = f"{number} instance{'' if number == 1 else 's'}" if row["task"] == "instance" else ""
    sure = f"confidence {row['mean_confidence']:.2f}" if row["mean_confidence"] is not None else ""
    return "  ·  ".join(filter(None, [count, share, sure]))


def plain_text(text: str) -> str:
    """`text` with control characters, and all that the sheet's font lacks, written as `\\x1b` or `\\u4e2d`."""
    return "".join(
        char if char.isprintable() and ord(char) < 0x180 else char.encode("unicode_escape").decode() for char in text
    )


def _cut(text: str, pen: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont, width_px: int) -> str:
    """`text`, with its middle left out where it is too wide."""
    if pen.textlength(text, font) <= width_px:
        return text
    keep = len(text)
    while keep > 2:
        keep -= 1
        cut = text[: -(-keep // 2)] + "…" + text[len(text) - keep // 2 :]
        if pen.textlength(cut, font) <= width_px:
            return cut
    return "…"


def _write_lines(pen: ImageDraw.ImageDraw, text: str, at: tuple[int, int], *, width_px: int, lines: int) -> None:
    font = _font(15)
    x, y = at
    for _ in range(lines):
        if not text:
            return
        end = len(text)
        while end > 1 and pen.textlength(text[:end], font) > width_px:
            end -= 1
        if end < len(text):
            end = text.rfind(" ", 1, end + 1) + 1 or end
        pen.text((x, y), text[:end].strip(), _ALERT, font)
        text, y = text[end:], y + 19


def _font(size_px: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size_px)
    assert isinstance(font, ImageFont.FreeTypeFont)  # Pillow's own font; only a Pillow without FreeType has another
    return font


def _write(sheet: Image.Image, out_path: Path) -> None:
    try:
        out_path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=out_path.parent, suffix=".png", delete=False) as file:
            try:
                sheet.save(file, "PNG", compress_level=3)
                os.chmod(file.name, 0o644)
                os.replace(file.name, out_path)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as error:
        raise UsageError(f"{out_path} cannot be written: {error.strerror or error}") from error
