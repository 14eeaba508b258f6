"""What is annotated in an image. Owns: the objects of a row, instances as they are and classes as one object each.
Must not know: formats.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from models.masks import decode_mask_png, encode_label_rles
from pipeline.insight.export.shape import Subject

#: Columns of the table that objects are made of.
COLUMNS = ("mask", "instances")


class Annotated(NamedTuple):
    """One object, or of a semantic model all pixels of a class."""

    class_id: int
    #: COCO compressed run lengths: {"size": [h, w], "counts": bytes}.
    rle: dict[str, Any]
    #: x, y, width, height in pixels.
    bbox: tuple[float, float, float, float]
    #: Pixels.
    area: int
    #: 0..1; None of a semantic model.
    score: float | None


def annotated(row: Mapping[str, Any], subject: Subject) -> list[Annotated]:
    """What is in a row of `segments`: its instances in their order, or, of a semantic model, its classes in the order
    of their ids. Background is none of them."""
    if row["task"] == "instance":
        return [
            Annotated(
                one["class_id"],
                {"size": [int(side) for side in one["rle"]["size"]], "counts": one["rle"]["counts"]},
                tuple(one["bbox"]),
                one["area"],
                one["score"],
            )
            for one in row["instances"] or ()
        ]
    class_ids = decode_mask_png(row["mask"]["bytes"])
    known = [one.class_id for one in subject.foreground]
    present = np.flatnonzero(np.bincount(class_ids.ravel(), minlength=256)).tolist()
    wanted = [class_id for class_id in present if class_id in known]
    labels = np.zeros(256, np.int32)
    labels[wanted] = np.arange(1, len(wanted) + 1)
    rles = encode_label_rles(labels[class_ids], len(wanted))
    return [
        Annotated(class_id, rle, tuple(coco_mask.toBbox(rle).tolist()), int(coco_mask.area(rle)), None)
        for class_id, rle in zip(wanted, rles, strict=True)
    ]


def class_masks(row: Mapping[str, Any], subject: Subject) -> list[tuple[int, NDArray[np.bool_]]]:
    """(class id, bool [h, w]) of every class that is in a semantic mask, background left out, by id."""
    class_ids = decode_mask_png(row["mask"]["bytes"])
    return [(one.class_id, here) for one in subject.foreground if (here := class_ids == one.class_id).any()]
