"""Rows of the table `segments`, made from what is known of one image. Owns: which column gets what.
Must not know: threads, batches, files.
"""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from models.masks import Instance, encode_mask_png, mask_crc32
from models.tally import Tally, tally
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
        counted = tally(class_ids)
        background = 0 if self._background_id is None else counted.pixels.get(self._background_id, 0)
        row = self._common(ref, blob) | picture._asdict()
        row |= {
            "status": "ok",
            "mean_confidence": float(prediction.mean_confidence),
            "mean_entropy": float(prediction.mean_entropy),
            "foreground_fraction": 1.0 - background / class_ids.size,
            "classes": self._classes(counted, class_ids.size, prediction.confidence),
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

    def _classes(self, counted: Tally, total: int, confidence: np.ndarray) -> list[dict[str, Any]]:
        return [
            {
                "class_id": class_id,
                "name": name,
                "pixels": counted.pixels[class_id],
                "fraction": counted.pixels[class_id] / total,
                "mean_confidence": mean if math.isfinite(mean) else None,
                "regions": counted.regions[class_id],
            }
            for (class_id, name), mean in zip(self._names.items(), confidence.tolist(), strict=True)
            if class_id in counted.pixels
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
