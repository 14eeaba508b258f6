"""Masks as files, as our own reader of labels sees them."""

from __future__ import annotations

from pathlib import Path

from exported import Exported

from models.masks import decode_mask_png
from pipeline.insight.export.names import file_stem
from pipeline.learning.dataset import Dataset


def test_masks_are_the_tables_own(tmp_path: Path) -> None:
    table = Exported(tmp_path, "semantic")
    outcome = table.export("png")
    assert (outcome.images, outcome.annotations, outcome.skipped) == (6, 6, {"error": 1})
    files = table.files()
    masks = {f"masks/{file_stem(uri)}.png": row["mask"]["bytes"] for uri, row in table.rows.items()}
    assert {name: data for name, data in files.items() if name.startswith("masks/")} == masks
    assert files.keys() - masks.keys() == {"classes.json", "export.json"}


def test_it_comes_back_as_labels(tmp_path: Path) -> None:
    table = Exported(tmp_path, "semantic")
    table.export("png", images=True)
    labels = Dataset(str(tmp_path / "out"))
    rows = {file_stem(uri): row for uri, row in table.rows.items()}
    assert len(labels) == 5 and labels.background_id == 0 and labels.class_names[1:3] == ("road", "car")
    for item in labels.items:
        row = rows[item.name.rpartition(".")[0]]
        assert (labels.class_ids(item) == decode_mask_png(row["mask"]["bytes"])).all()
        assert labels.image(item).shape[:2] == (row["height"], row["width"])
