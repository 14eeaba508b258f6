"""The pictures of a report. Owns: small images, their masks as layers over them, what a pointer finds under it, and
that all of it together stays below a size.
Must not know: SQL, pages, which images are shown and why.
"""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from pipeline.errors import ImageError, StorageError
from pipeline.insight.original import ReplacedError, original_pixels
from pipeline.insight.overlay import brightened, class_labels, instance_labels

_FETCHES_AT_ONCE = 8
_FILL_ALPHA = 105
_LEAST_EDGE_PX = 96
#: Labels of a palette PNG: each takes a colour for its outline and one for its fill.
_PALETTE_LABELS = 127


class GalleryConfig(BaseModel):
    """How pictures are made."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    edge_px: int = Field(640, ge=_LEAST_EDGE_PX, le=2048, description="Long edge of a picture, at most.")
    quality: int = Field(72, ge=1, le=100, description="Of the WebP.")
    total_bytes: int = Field(3_000_000, ge=100_000, description="All pictures together; edges shrink until they fit.")
    max_pixels: int = Field(50_000_000, ge=1, description="Larger images are not fetched.")
    timeout_s: float = Field(60.0, gt=0, description="What is not there by then is not shown.")
    source_profile: str | None = Field(None, description="AWS profile for the images.")


class Picture(NamedTuple):
    """One image of the gallery. `image`, `overlay`, `labels`: data URLs, empty where there is nothing to show, and then
    `trouble` says why. A pixel of `labels` holds, as 256 * green + red, 0 or 1 + the index in `names` of what is there:
    (class, score or None), the score between 0 and 1."""

    width: int
    height: int
    image: str
    overlay: str
    labels: str
    names: list[tuple[str, float | None]]
    trouble: str = ""
    is_brightened: bool = False

    @property
    def size_bytes(self) -> int:
        """What it adds to a page."""
        return len(self.image) + len(self.overlay) + len(self.labels) + sum(len(name) + 10 for name, _ in self.names)


class _Layers(NamedTuple):
    """Pixels before they are encoded, at the largest size that is asked for."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int32]
    colors: NDArray[np.uint8]
    names: list[tuple[str, float | None]]
    is_brightened: bool


def make_pictures(rows: Sequence[Mapping[str, Any]], config: GalleryConfig) -> dict[str, Picture]:
    """A Picture for each of these rows of `segments` (that are ok, masks included), by URI.

    Never raises for what is wrong with an image or its source: the picture then says it. Memory: `rows`, the pictures
    at their largest, and up to eight decoded images of `max_pixels`.
    """
    drawn: dict[str, _Layers | str] = {}
    deadline_s = time.monotonic() + config.timeout_s
    pool = ThreadPoolExecutor(_FETCHES_AT_ONCE, "gallery")
    try:
        futures: dict[str, Future[_Layers | str]] = {
            row["image_uri"]: pool.submit(_draw, row, config, deadline_s) for row in rows
        }
        done, _ = wait(futures.values(), timeout=config.timeout_s)
        late = f"it was not there after {config.timeout_s:g} s"
        drawn = {uri: future.result() if future in done else late for uri, future in futures.items()}
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    sizes = {row["image_uri"]: (row["width"] or 0, row["height"] or 0) for row in rows}
    edge_px = config.edge_px
    while True:
        made = {uri: _encode(layers, sizes[uri], edge_px, config.quality) for uri, layers in drawn.items()}
        total = sum(picture.size_bytes for picture in made.values())
        if total <= config.total_bytes or edge_px <= _LEAST_EDGE_PX:
            return made
        # Bytes grow a little slower than the area does.
        edge_px = max(_LEAST_EDGE_PX, int(edge_px * 0.95 * (config.total_bytes / total) ** 0.5))


def _draw(row: Mapping[str, Any], config: GalleryConfig, deadline_s: float) -> _Layers | str:
    if time.monotonic() > deadline_s:
        return "there was no time left for it"
    height, width = row["height"], row["width"]
    if height * width > config.max_pixels:
        return f"{height * width / 1e6:,.0f} megapixels are too many to draw here"
    try:
        pixels = original_pixels(row, max_pixels=config.max_pixels, profile=config.source_profile, timeout_s=10.0)
        scale = min(1.0, config.edge_px / max(height, width))
        size = max(1, round(width * scale)), max(1, round(height * scale))
        small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA) if scale < 1 else pixels
        shown = brightened(small.astype(np.uint8, copy=False))
        labels, colors, names = _labels(row)
    except (StorageError, ImageError) as error:
        return f"the image cannot be shown now ({error.kind})"
    except ReplacedError:
        return "the image was replaced since"
    except Exception as error:  # noqa: BLE001 - a picture is not worth a report
        return f"the image cannot be drawn ({type(error).__name__})"
    return _Layers(shown, _resized(labels, size), colors, names, shown is not small)


def _labels(row: Mapping[str, Any]) -> tuple[NDArray[np.int32], NDArray[np.uint8], list[tuple[str, float | None]]]:
    """Labels [h, w], from 1 on, their colours, and by label less 1 what it is."""
    if row["task"] == "instance":
        found = row["instances"] or []
        labels, colors = instance_labels(found, (row["height"], row["width"]))
        return labels, colors, [(one["name"], one["score"]) for one in found]
    labels, colors = class_labels(row["mask"])
    of_id = {one["class_id"]: (one["name"], one["mean_confidence"]) for one in row["classes"] or []}
    # The label of a class is its id plus 1; those that are left clear are named too.
    return labels, colors, [of_id.get(class_id, ("", None)) for class_id in range(len(colors) - 1)]


def _resized(labels: NDArray[np.int32], size: tuple[int, int]) -> NDArray[np.int32]:
    if (labels.shape[1], labels.shape[0]) == size:
        return labels
    # Floats hold labels exactly up to 2**24.
    return cv2.resize(labels.astype(np.float32), size, interpolation=cv2.INTER_NEAREST).astype(np.int32)


def _encode(layers: _Layers | str, size: tuple[int, int], edge_px: int, quality: int) -> Picture:
    if isinstance(layers, str):
        return Picture(*size, "", "", "", [], trouble=layers)
    pixels, labels = layers.pixels, layers.labels
    scale = edge_px / max(pixels.shape[:2])
    if scale < 1:
        smaller = max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale))
        pixels = cv2.resize(pixels, smaller, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)
        labels = _resized(labels, smaller)
    return Picture(
        *size,
        _webp(pixels, quality),
        _overlay(labels, layers.colors) if labels.any() else "",
        _label_map(labels) if labels.any() else "",
        _used(layers.names, labels),
        is_brightened=layers.is_brightened,
    )


def _used(names: list[tuple[str, float | None]], labels: NDArray[np.int32]) -> list[tuple[str, float | None]]:
    """Up to the last that is there."""
    last = int(labels.max())
    return [(name, None if score is None else round(float(score), 3)) for name, score in names[:last]]


def _overlay(labels: NDArray[np.int32], colors: NDArray[np.uint8]) -> str:
    """A PNG: each label filled with its colour, half clear, within an outline of that colour."""
    padded = np.pad(labels, 1, mode="edge")
    middle = padded[1:-1, 1:-1]
    edge = np.zeros(labels.shape, bool)
    for other in (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]):
        edge |= middle != other
    count = int(labels.max())
    if count <= _PALETTE_LABELS:
        # 0 clear, 1 .. n fills, n+1 .. 2n outlines.
        image = Image.fromarray(np.where(edge & (labels > 0), labels + count, labels).astype(np.uint8))
        paint = colors[1 : count + 1]
        image.putpalette(np.concatenate([np.zeros((1, 3), np.uint8), paint, paint]).tobytes())
        return _png(image, transparency=bytes([0] + [_FILL_ALPHA] * count + [255] * count))
    alpha = np.where(labels > 0, np.where(edge, 255, _FILL_ALPHA), 0).astype(np.uint8)
    rgba = np.dstack([np.where(labels[..., None] > 0, colors[labels], 0).astype(np.uint8), alpha])
    return _png(Image.fromarray(rgba))


def _label_map(labels: NDArray[np.int32]) -> str:
    """A PNG of labels, at half the size: a pointer is no finer."""
    half = labels[::2, ::2]
    if half.max() < 256:
        image = Image.fromarray(half.astype(np.uint8))
        image.putpalette(bytes(value for red in range(256) for value in (red, 0, 0)))
        return _png(image)
    return _png(Image.fromarray(np.dstack([half & 255, half >> 8, np.zeros_like(half)]).astype(np.uint8)))


def _webp(pixels: NDArray[np.uint8], quality: int) -> str:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "WEBP", quality=quality, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _png(image: Image.Image, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=9, **options)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
