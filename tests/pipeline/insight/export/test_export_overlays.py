"""Overlays: the mask is where it should be, and what cannot be drawn is named."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from exported import Exported
from handmade import picture, touch_later
from pictured_table import COLORS, HEIGHT, WIDTH
from PIL import Image

from pipeline.insight.export.names import file_stem


def test_classes_have_their_colours(tmp_path: Path) -> None:
    table = Exported(tmp_path, "semantic")
    table.export("overlay")
    uri = next(uri for uri in table.rows if uri.endswith("0-000.png"))
    with Image.open(io.BytesIO(table.files()[f"overlays/{file_stem(uri)}.jpg"])) as drawn:
        pixels = np.asarray(drawn).astype(int)
    assert pixels.shape == (HEIGHT, WIDTH, 3)
    # The outline of class 2 is its colour in full, as near as JPEG comes to it.
    edge = pixels[30:40, 10]
    assert np.abs(edge[2:-2] - COLORS[2]).mean() < 30
    road = pixels[45:, 50:].mean(axis=(0, 1))
    assert road[0] > road[1] + 15, "the road is red"


def test_images_that_are_another_now_are_named(tmp_path: Path) -> None:
    table = Exported(tmp_path, "instance", images=6, errors=1)
    photos = table.place.photos
    touch_later(photos / "0-003.png")
    broken = photos / "0-004.png"
    before = broken.stat()
    broken.write_bytes(broken.read_bytes()[:-1] + b"?")
    picture(9, width=20, height=20).save(photos / "0-005.png")
    outcome = table.export("overlay")
    assert before.st_size == broken.stat().st_size
    assert (outcome.images, outcome.skipped) == (2, {"error": 1, "gone": 1, "replaced": 3})
    files = table.files()
    named = [json.loads(line) for line in files["skipped.jsonl"].splitlines()]
    reasons = {one["image_uri"].rpartition("/")[2]: one["reason"] for one in named}
    assert reasons == {"0-002.png": "gone", **{f"0-00{n}.png": "replaced" for n in (3, 4, 5)}}
    assert sum(name.startswith("overlays/") for name in files) == 2


def test_large_images_are_drawn_small(tmp_path: Path) -> None:
    table = Exported(tmp_path, "instance", images=1, errors=0)
    table.export("overlay", edge_px=32)
    [(_, data)] = [item for item in table.files().items() if item[0].startswith("overlays/")]
    with Image.open(io.BytesIO(data)) as drawn:
        assert drawn.size == (32, 24)
