"""Label Studio's tasks with pre-annotations. Owns: `tasks.json` and `config.xml`. Must not know: other formats, where
rows come from.

(Format: labelstud.io/guide/predictions.) Masks are polygons, which Label Studio edits and exports as COCO; points are
percent of width and height. An object is one polygon, and so is each region of a class of a semantic model, simplified
by a third of a pixel: see `polygons` for holes and parts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from xml.sax.saxutils import quoteattr

from models.masks import decode_rle
from pipeline.insight.export.objects import COLUMNS, class_masks
from pipeline.insight.export.polygons import Points, object_polygon, region_polygons
from pipeline.insight.export.shape import Index, Made, Source, Stream, Subject
from pipeline.storage import join_uri

_FINER = 2
# About half the points of an exact outline, for a person to move.
_TOLERANCE_PX = 0.35


class LabelStudio:
    """A `Format`. A task's image is its URI; with images, the copy in OUT: by its URI in a bucket, and on a disk as
    Label Studio serves files below its document root, which is then to be OUT."""

    columns = (*COLUMNS, "mean_confidence")

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._names = {one.class_id: one.name for one in subject.classes}

    def make(self, source: Source) -> Made:
        row = source.row
        result = [
            self._region(f"{source.image_id}-{number}", class_id, points, score, row)
            for number, (class_id, points, score) in enumerate(self._polygons(row), start=1)
        ]
        prediction: dict[str, Any] = {
            "model_version": f"{self._subject.model}@{self._subject.version}",
            "result": result,
        }
        if row["mean_confidence"] is not None:
            prediction["score"] = round(row["mean_confidence"], 6)
        task = {
            "id": source.image_id,
            "data": {"image": self._image(source), "source": row["image_uri"]},
            "predictions": [prediction],
        }
        line = json.dumps(task, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace")
        return Made(len(result), lines={"tasks": [line]})

    def gather(self, records: Sequence[Mapping[str, Any]], digest: str) -> list[tuple[str, bytes]]:
        return []

    def indexes(self) -> list[Index]:
        labels = "".join(
            f"    <Label value={quoteattr(one.name)} background={quoteattr(_css(one.color))}/>\n"
            for one in self._subject.foreground
        )
        config = (
            '<View>\n  <Image name="image" value="$image" zoom="true"/>\n'
            f'  <PolygonLabels name="label" toName="image">\n{labels}  </PolygonLabels>\n</View>\n'
        )
        return [
            Index("tasks.json", (b"[\n", Stream("tasks", b",\n"), b"]\n")),
            Index("config.xml", (config.encode(),)),
        ]

    def _image(self, source: Source) -> str:
        if not self._subject.with_images:
            return str(source.row["image_uri"])
        if self._subject.out.startswith("file://"):
            return f"/data/local-files/?d=images/{source.name}"
        return join_uri(self._subject.out, "images", source.name)

    def _polygons(self, row: Mapping[str, Any]) -> Iterable[tuple[int, Points, float | None]]:
        if row["task"] == "instance":
            for one in row["instances"] or ():
                points = object_polygon(decode_rle(one["rle"]), finer=_FINER, tolerance_px=_TOLERANCE_PX)
                if points is not None:
                    yield one["class_id"], points, one["score"]
            return
        for class_id, mask in class_masks(row, self._subject):
            for points in region_polygons(mask, finer=_FINER, tolerance_px=_TOLERANCE_PX):
                yield class_id, points, None

    def _region(
        self, region_id: str, class_id: int, points: Points, score: float | None, row: Mapping[str, Any]
    ) -> dict[str, Any]:
        percent = (points * 100 / (row["width"], row["height"])).round(4).tolist()
        region: dict[str, Any] = {
            "id": region_id, "type": "polygonlabels", "from_name": "label", "to_name": "image",
            "original_width": row["width"], "original_height": row["height"], "image_rotation": 0,
            "value": {"points": percent, "closed": True, "polygonlabels": [self._names[class_id]]},
        }  # fmt: skip
        return region if score is None else region | {"score": round(score, 6)}


def _css(color: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)
