"""Parquet, as Hugging Face's own library opens it."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from exported import Exported
from PIL import Image

from models.masks import decode_mask_png


@pytest.mark.parametrize(("task", "images"), [("semantic", True), ("instance", False)])
def test_datasets_shows_images_and_masks(
    task: str, images: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    table = Exported(tmp_path, task)
    outcome = table.export("hf", images=images, piece_images=2)
    loaded = datasets.load_dataset("parquet", data_dir=str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert list(loaded) == ["train"] and len(loaded["train"]) == outcome.images == (5 if images else 6)
    for one in loaded["train"]:
        row = table.rows[one["image_uri"]]
        assert isinstance(one["mask"], Image.Image)
        assert (np.asarray(one["mask"]) == decode_mask_png(row["mask"]["bytes"])).all()
        assert [kept["name"] for kept in one["classes"]] == [its["name"] for its in row["classes"]]
        assert len(one["instances"] or ()) == len(row["instances"] or ())
        assert one["model"] == row["model"] and one["width"] == row["width"]
        if images:
            assert one["image"].size == (row["width"], row["height"])
            buffer = io.BytesIO(Path(row["image_uri"].removeprefix("file://")).read_bytes())
            assert (np.asarray(one["image"]) == np.asarray(Image.open(buffer))).all()
        else:
            assert "image" not in one
