"""One DEST and the commands given to it, its worker in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from handmade import part_paths, rows_of

import pipeline
from pipeline.engine.outcome import Event, Outcome


class Bench:
    """One DEST and the commands given to it."""

    def __init__(self, dest: Path, model: Path) -> None:
        self.dest = dest
        self.model = model
        self.told: list[Event] = []

    def segment(self, source: Path | str, **settings: Any) -> Outcome:
        self.told = []
        defaults: dict[str, Any] = {
            "model": str(self.model),
            "precision": "fp32",
            "threads": 1,
            "lease_ttl_s": 1.0,
            "report": False,
        }
        should_stop = settings.pop("should_stop", None)
        listen = settings.pop("listen", self.told.append)
        return pipeline.segment(
            source=str(source), dest=str(self.dest), listen=listen, should_stop=should_stop,
            **(defaults | settings),
        )  # fmt: skip

    def interrupted(self, source: Path | str, *, after_parts: int, **settings: Any) -> Outcome:
        """The same, stopped as soon as so many more Parts are there; shards still in flight are finished."""
        enough = len(part_paths(self.dest)) + after_parts
        settings |= {"should_stop": lambda: len(part_paths(self.dest)) >= enough}
        outcome = self.segment(source, **settings)
        assert outcome.state == "interrupted"
        return outcome

    @property
    def done(self) -> list[str]:
        """Names of the images of all rows."""
        return sorted(Path(row["image_uri"]).name for row in rows_of(self.dest))

    def shown(self, column: str) -> list[Any]:
        """Distinct values of a column of the view `images`."""
        connection = pipeline.connect(str(self.dest))
        return [value for (value,) in connection.sql(f"SELECT DISTINCT {column} FROM images ORDER BY 1").fetchall()]

    def texts(self, kind: str) -> str:
        return "\n".join(event.text for event in self.told if event.kind == kind)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())
