"""COCO. Owns: `annotations.json`. Must not know: other formats, where rows come from.

(Format: cocodataset.org, "Data format", object detection.) Masks are compressed run lengths, exactly those of the
table, since polygons would lose holes. Of a semantic model each class of an image is one annotation, as in COCO-Stuff:
regions of one class are no objects, and one annotation says all of a class whatever its regions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.insight.export.objects import COLUMNS, annotated
from pipeline.insight.export.shape import Index, Made, Source, Stream, Subject


class Coco:
    """A `Format`. Category ids are the class ids of the card, plus 1 where class 0 is one of them: 0 means "none" to
    many readers."""

    columns = COLUMNS

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._first_id = 1 if any(one.class_id == 0 for one in subject.foreground) else 0

    def make(self, source: Source) -> Made:
        row, subject = source.row, self._subject
        image = {
            "id": source.image_id,
            "file_name": source.name,
            "width": row["width"],
            "height": row["height"],
            "coco_url": row["image_uri"],
            "etag": row["image_etag"],
        }
        found = annotated(row, subject)
        lines = []
        for one in found:
            annotation: dict[str, Any] = {
                "image_id": source.image_id,
                "category_id": one.class_id + self._first_id,
                "segmentation": {"size": one.rle["size"], "counts": one.rle["counts"].decode("ascii")},
                "bbox": [round(side, 2) for side in one.bbox],
                "area": one.area,
                "iscrowd": 0,
            }
            if one.score is not None:
                annotation["score"] = round(one.score, 6)
            lines.append(_line(annotation))
        return Made(len(found), lines={"images": [_line(image)], "annotations": lines})

    def gather(self, records: Sequence[Mapping[str, Any]], digest: str) -> list[tuple[str, bytes]]:
        return []

    def indexes(self) -> list[Index]:
        subject = self._subject
        info = {"description": f"Masks of {subject.model}@{subject.version}", "model": subject.model,
                "version": subject.version}  # fmt: skip
        categories = [
            {"id": one.class_id + self._first_id, "name": one.name, "supercategory": "", "color": one.color,
             "isthing": int(subject.task == "instance")}
            for one in subject.foreground
        ]  # fmt: skip
        head = b'{"info": %b,\n"licenses": [],\n"categories": %b,\n"images": [\n' % (_line(info), _line(categories))
        return [
            Index(
                "annotations.json",
                (
                    head,
                    Stream("images", b",\n"),
                    b'],\n"annotations": [\n',
                    Stream("annotations", b",\n", is_numbered=True),
                    b"]}\n",
                ),
            )
        ]


def _line(body: object) -> bytes:
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace")
