"""What the tests of exports share: a table with pictures, and an export of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pictured_table import PicturedTable

import pipeline
from pipeline.insight.export.job import ExportOutcome


class Exported:
    """A table of one night, `rows` of its view `images` by URI, and exports of it into folders beside it."""

    def __init__(self, folder: Path, task: str, *, images: int = 6, errors: int = 2) -> None:
        self.folder = folder
        self.place = PicturedTable(folder)
        self.dest = self.place.dest
        self.place.night(images, errors, task=task)

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        """Those with masks."""
        found = pipeline.connect(self.dest).sql("SELECT * FROM images WHERE status = 'ok'").to_arrow_table()
        return {row["image_uri"]: row for row in found.to_pylist()}

    def export(self, format_: str, name: str = "out", **settings: Any) -> ExportOutcome:
        return pipeline.export(dest=self.dest, out=str(self.folder / name), format=format_, **settings)

    def files(self, name: str = "out") -> dict[str, bytes]:
        """All of an export by path."""
        out = self.folder / name
        return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
