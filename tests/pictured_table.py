"""A DEST of several nights with small pictures, masks, objects, errors, and a name that wants to be markup."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from handmade import CREATED_AT, make_row, picture
from tables import HOUR, Table

from models.masks import encode_mask_png, encode_rle
from pipeline.storage import normalize_uri, open_storage

HOSTILE = "\"><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
COLORS = [(0, 0, 0), (200, 40, 40), (40, 160, 220), (120, 200, 60)]
NAMES = ["background", "road", "car", f"bus {HOSTILE}"]
CARD: dict[str, Any] = {
    "name": "tiny-semantic",
    "architecture": f"unet {HOSTILE}",
    "background_id": 0,
    "classes": [{"id": index, "name": NAMES[index], "color": list(color)} for index, color in enumerate(COLORS)],
    "metrics": {"val": {"fp32": {"miou": 0.6125}, "bf16": {"miou": 0.5}}},
    "provenance": {"dataset": HOSTILE, "images": 100},
}
WIDTH, HEIGHT = 64, 48


class PicturedTable:
    """`dest`, and a folder `photos` beside it."""

    def __init__(self, folder: Path, *, dest: str | None = None) -> None:
        self.photos = folder / "photos"
        self.photos.mkdir(parents=True)
        self.table = Table(normalize_uri(dest or str(folder / "dest")))
        self.dest = self.table.dest

    def night(
        self, images: int = 8, errors: int = 3, *, task: str = "semantic", sure: float = 0.9, **changes: Any
    ) -> str:
        """A run; gives its id. Image 1 has the hostile name, image 2 is gone, and errors have hostile messages."""
        number = self.table.runs
        random = np.random.default_rng(number)
        rows = []
        for index in range(images):
            stem = f"{number}-{index:03d}" + (HOSTILE.replace("/", "∕") if index == 1 else "")
            path = self.photos / f"{stem}.png"
            picture(index, width=WIDTH, height=HEIGHT).save(path)
            rows.append(self._row(path, random, index, task, sure))
            if index == 2:
                path.unlink()
        rows += [
            make_row(f"file:///gone/{number}-{index}{HOSTILE}.jpg", "e", ("corrupt", "missing")[index % 2],
                     error_message=f"because {HOSTILE}")
            for index in range(errors)
        ]  # fmt: skip
        start = CREATED_AT + (self.table.runs + 1) * HOUR
        for index, row in enumerate(rows):
            row["processed_at"] = start + HOUR / 60 * index
        record = {"seconds": 60.0, "images_per_s": images / 60, "model_busy_fraction": 0.4, "workers": [
            {"node": HOSTILE, "device": "cpu", "name": "x86_64"}]}  # fmt: skip
        plan = self.table.run(*rows, record=record, **({"card": CARD, "source": f"file://{self.photos}"} | changes))
        return plan.run_id

    def _row(self, path: Path, random: np.random.Generator, index: int, task: str, sure: float) -> dict[str, Any]:
        ids = np.zeros((HEIGHT, WIDTH), np.uint8)
        ids[HEIGHT // 2 :] = 1
        ids[30:40, 10:30] = 2
        if index in (3, 4):
            ids[:10, :20] = 3
        uri = f"file://{path}"
        counts = np.bincount(ids.ravel(), minlength=4)
        classes = [
            {"class_id": id_, "name": NAMES[id_], "pixels": int(count), "fraction": count / ids.size,
             "mean_confidence": 0.75, "regions": 1}
            for id_, count in enumerate(counts) if count
        ]  # fmt: skip
        facts: dict[str, Any] = {
            "task": task, "width": WIDTH, "height": HEIGHT, "image_format": "PNG", "classes": classes,
            "mask": {"bytes": encode_mask_png(ids, COLORS), "path": None},
            "mean_confidence": sure + 0.05 * float(random.random()), "mean_entropy": 0.1, "foreground_fraction": 0.5,
            "brightness": 0.5, "contrast": 0.2, "fetch_ms": 9.0, "decode_ms": 2.0, "infer_ms": 4.0, "encode_ms": 1.0,
        }  # fmt: skip
        if task == "instance":
            facts["instances"] = [
                {"class_id": id_, "name": NAMES[id_], "score": 0.5 + id_ / 10, "bbox": [0.0, 0.0, 1.0, 1.0],
                 "area": int(counts[id_]), "rle": encode_rle(ids == id_)}
                for id_ in (1, 2)
            ]  # fmt: skip
        return make_row(uri, open_storage(uri).get(uri).etag, **facts)
