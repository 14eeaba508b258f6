"""Rows of the table `segments`, made from what is known of one image. Owns: which column gets what.
Must not know: threads, batches, files.
"""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from models.masks import Instance, count_pixels_by_class, count_regions_by_class, encode_mask_png, mask_crc32
from pipeline.storage import Blob

_MESSAGE_CHARS = 500


class Ref(NamedTuple):
    """An image as it was listed."""

    uri: str
    etag: str
    attempt: int
    size_bytes: int | None


class Picture(NamedTuple):
    """An image as it was decoded."""

    height: int
    width: int
    image_format: str
    brightness: float
    contrast: float


class Interpreter(Protocol):
    """What turns a prediction into class ids and instances."""

    @property
    def card(self) -> Any: ...
    def postprocess(self, prediction: Any) -> tuple[np.ndarray, Sequence[Instance]]: ...


class RowMaker:
    """Makes rows; `stamp` holds the columns that all rows of a run share. Safe from several threads."""

    def __init__(self, interpreter: Interpreter, stamp: Mapping[str, Any]) -> None:
        self._interpreter = interpreter
        self._stamp = dict(stamp)
        self._names = {info.id: info.name for info in interpreter.card.classes}
        self._background_id = interpreter.card.background_id
        self._palette = interpreter.card.palette

    def ok(self, ref: Ref, blob: Blob, picture: Picture, prediction: Any) -> dict[str, Any]:
        """The row of an image with a mask. Post-processing happens here; whatever it raises is raised.

        Raises ValueError where the network put out NaN.
        """
        if not math.isfinite(prediction.mean_confidence):
            raise ValueError("the network's output holds NaN or infinity")
        class_ids, instances = self._interpreter.postprocess(prediction)
        if class_ids is prediction.class_ids and self._interpreter.card.task == "semantic":
            pixels = dict(zip(self._names, prediction.pixels.tolist(), strict=True))
        else:
            counts = count_pixels_by_class(class_ids)
            pixels = {class_id: counts.get(class_id, 0) for class_id in self._names}
        total = class_ids.size
        background = 0 if self._background_id is None else pixels[self._background_id]
        row = self._common(ref, blob) | picture._asdict()
        row |= {
            "status": "ok",
            "mean_confidence": float(prediction.mean_confidence),
            "mean_entropy": float(prediction.mean_entropy),
            "foreground_fraction": 1.0 - background / total,
            "classes": self._classes(class_ids, pixels, prediction.confidence),
            "mask": {"bytes": encode_mask_png(class_ids, self._palette), "path": None},
            "mask_crc32": mask_crc32(class_ids, [one.rle for one in instances]),
        }
        if self._interpreter.card.task == "instance":
            row["instances"] = [self._instance(one) for one in instances]
        return row

    def error(self, ref: Ref, blob: Blob | None, kind: str, message: str) -> dict[str, Any]:
        """The row of an image that failed, whether or not its bytes were read."""
        row = self._common(ref, blob)
        row["processed_at"] = dt.datetime.now(dt.UTC)
        row |= {"status": "error", "error_kind": kind, "error_message": message[:_MESSAGE_CHARS]}
        return row

    def _common(self, ref: Ref, blob: Blob | None) -> dict[str, Any]:
        row = dict(self._stamp)
        row["image_uri"] = ref.uri
        row["listed_etag"] = ref.etag
        row["attempt"] = ref.attempt
        row["image_etag"] = blob.etag if blob else None
        row["image_bytes"] = blob.size_bytes if blob else ref.size_bytes
        row["image_modified"] = blob.modified if blob else None
        return row

    def _classes(
        self, class_ids: np.ndarray, pixels: Mapping[int, int], confidence: np.ndarray
    ) -> list[dict[str, Any]]:
        regions = count_regions_by_class(class_ids)
        return [
            {
                "class_id": class_id,
                "name": self._names[class_id],
                "pixels": count,
                "fraction": count / class_ids.size,
                "mean_confidence": float(mean) if np.isfinite(mean) else None,
                "regions": regions[class_id],
            }
            for (class_id, count), mean in zip(pixels.items(), confidence, strict=True)
            if count
        ]

    def _instance(self, one: Instance) -> dict[str, Any]:
        return {
            "class_id": one.class_id,
            "name": self._names[one.class_id],
            "score": one.score,
            "bbox": list(one.bbox),
            "area": one.area,
            "rle": one.rle,
        }
