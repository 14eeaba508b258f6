"""YOLO's segmentation labels. Owns: `labels/`, `data.yaml`, and which image is in which split. Must not know: other
formats, where rows come from.

(Format: docs.ultralytics.com/datasets/segment.) A line is `class x1 y1 x2 y2 …`, as shares of width and height. An
object is one polygon, and so is each region of a class of a semantic model: see `polygons` for holes and parts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from models.masks import decode_rle
from pipeline.insight.export.objects import COLUMNS, class_masks
from pipeline.insight.export.polygons import Points, object_polygon, region_polygons
from pipeline.insight.export.shape import Index, Made, Source, Stream, Subject

_VAL_SHARE = 0.2


class Yolo:
    """A `Format`. Classes are numbered from 0, background left out."""

    columns = COLUMNS

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._number = {one.class_id: index for index, one in enumerate(subject.foreground)}

    def make(self, source: Source) -> Made:
        row = source.row
        lines = [self._line(class_id, points, row) for class_id, points in self._polygons(row)]
        text = "".join(line + "\n" for line in lines).encode()
        listed = f"./images/{source.name}".encode()
        return Made(len(lines), ((f"labels/{source.stem}.txt", text),), {split_of(source.stem): [listed]})

    def gather(self, records: Sequence[Mapping[str, Any]], digest: str) -> list[tuple[str, bytes]]:
        return []

    def indexes(self) -> list[Index]:
        # JSON is YAML, and its strings need no care.
        names = "".join(f"  {self._number[one.class_id]}: {json.dumps(one.name)}\n" for one in self._subject.foreground)
        data = f"train: train.txt\nval: val.txt\nnames:\n{names}"
        return [
            Index("data.yaml", (data.encode(),)),
            Index("train.txt", (Stream("train"),)),
            Index("val.txt", (Stream("val"),)),
        ]

    def _polygons(self, row: Mapping[str, Any]) -> Iterable[tuple[int, Points]]:
        if row["task"] == "instance":
            for one in row["instances"] or ():
                points = object_polygon(decode_rle(one["rle"]))
                if points is not None and one["class_id"] in self._number:
                    yield one["class_id"], points
            return
        for class_id, mask in class_masks(row, self._subject):
            for points in region_polygons(mask):
                yield class_id, points

    def _line(self, class_id: int, points: Points, row: Mapping[str, Any]) -> str:
        shares = (points / (row["width"], row["height"])).ravel().tolist()
        return " ".join([str(self._number[class_id]), *(f"{share:.6f}" for share in shares)])


def split_of(stem: str) -> str:
    """`train` or, for one image in five, `val`: by the name alone, so that images that join later move no other."""
    chance = int.from_bytes(hashlib.sha256(stem.encode()).digest()[:8], "big") / 2**64
    return "val" if chance < _VAL_SHARE else "train"
