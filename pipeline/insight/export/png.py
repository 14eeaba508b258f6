"""Masks as image files. Owns: `masks/` and `classes.json`. Must not know: other formats, where rows come from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.insight.export.shape import Index, Made, Source, Subject


class Png:
    """A `Format`. Masks are the table's own bytes: 8-bit palette PNGs of class ids."""

    columns = ("mask",)

    def __init__(self, subject: Subject) -> None:
        self._subject = subject

    def make(self, source: Source) -> Made:
        return Made(1, files=((f"masks/{source.stem}.png", source.row["mask"]["bytes"]),))

    def gather(self, records: Sequence[Mapping[str, Any]], digest: str) -> list[tuple[str, bytes]]:
        return []

    def indexes(self) -> list[Index]:
        subject = self._subject
        body: dict[str, Any] = {
            "classes": [{"id": one.class_id, "name": one.name, "color": one.color} for one in subject.classes]
        }
        if subject.background_id is not None:
            body["background_id"] = subject.background_id
        return [Index("classes.json", (json.dumps(body, indent=1, ensure_ascii=False).encode() + b"\n",))]
