"""Masks drawn over their images. Owns: `overlays/`. Must not know: other formats, where rows come from.

Colours are those of a report: of a semantic model its palette, in which black is left clear; instances one colour each.
"""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from PIL import Image

from pipeline.insight.export.originals import upright_pixels
from pipeline.insight.export.shape import Index, Made, Source, Subject
from pipeline.insight.overlay import brightened, class_labels, instance_labels, painted

#: Images above this are decoded one at a time.
_LARGE_PIXELS = 16_000_000
_MAX_PIXELS = 200_000_000
_QUALITY = 90


class Overlays:
    """A `Format`. JPEGs, their long edge at most `edge_px`; dark images are brightened."""

    columns = ("mask", "instances")

    def __init__(self, subject: Subject, *, edge_px: int) -> None:
        self._edge_px = edge_px
        self._large = threading.Lock()

    def make(self, source: Source) -> Made:
        row = source.row
        assert source.data is not None, "overlays are made with images"
        one_at_a_time = row["height"] * row["width"] > _LARGE_PIXELS
        with self._large if one_at_a_time else contextlib.nullcontext():
            pixels = upright_pixels(row, source.data, max_pixels=_MAX_PIXELS)
            scale = min(1.0, self._edge_px / max(pixels.shape[:2]))
            size = max(1, round(row["width"] * scale)), max(1, round(row["height"] * scale))
            small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA) if scale < 1 else pixels
            del pixels
            if row["task"] == "instance":
                labels, colors = instance_labels(row["instances"] or (), (row["height"], row["width"]))
            else:
                labels, colors = class_labels(row["mask"]["bytes"])
            if scale < 1:  # floats hold labels exactly up to 2**24
                labels = cv2.resize(labels.astype(np.float32), size, interpolation=cv2.INTER_NEAREST).astype(np.int32)
        shown = brightened(small.astype(np.uint8, copy=False))
        buffer = io.BytesIO()
        Image.fromarray(painted(shown, labels, colors)).save(buffer, "JPEG", quality=_QUALITY, subsampling=0)
        return Made(1, files=((f"overlays/{source.stem}.jpg", buffer.getvalue()),))

    def gather(self, records: Sequence[Mapping[str, Any]], digest: str) -> list[tuple[str, bytes]]:
        return []

    def indexes(self) -> list[Index]:
        return []
