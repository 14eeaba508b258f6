"""YOLO labels, filled as Ultralytics fills them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml
from exported import Exported
from numpy.typing import NDArray
from pictured_table import CARD

from models.masks import decode_mask_png, decode_rle
from pipeline.insight.export.names import file_stem


def filled(line: str, row: Mapping[str, Any]) -> tuple[int, NDArray[np.bool_]]:
    """Class and mask of a line."""
    number, *shares = line.split()
    points = np.array(shares, float).reshape(-1, 2)
    assert len(points) >= 3 and points.min() >= 0 and points.max() <= 1
    canvas = np.zeros((row["height"], row["width"]), np.uint8)
    cv2.fillPoly(canvas, [(points * (row["width"], row["height"])).astype(np.int32)], 1)
    return int(number), canvas.astype(bool)


@pytest.mark.parametrize("task", ["instance", "semantic"])
def test_lines_are_the_masks(task: str, tmp_path: Path) -> None:
    table = Exported(tmp_path, task)
    outcome = table.export("yolo")
    files = table.files()
    assert outcome.annotations == sum(data.count(b"\n") for name, data in files.items() if name.startswith("labels/"))
    for uri, row in table.rows.items():
        lines = files[f"labels/{file_stem(uri)}.txt"].decode().splitlines()
        found = [filled(line, row) for line in lines]
        if task == "instance":
            for (number, mask), one in zip(found, row["instances"], strict=True):
                assert number == one["class_id"] - 1 and (mask == decode_rle(one["rle"])).all()
            continue
        class_ids = decode_mask_png(row["mask"]["bytes"])
        for class_id in np.unique(class_ids[class_ids > 0]):
            regions = [mask for number, mask in found if number == class_id - 1]
            assert (np.logical_or.reduce(regions) == (class_ids == class_id)).all()


def test_every_image_is_in_one_split(tmp_path: Path) -> None:
    table = Exported(tmp_path, "instance", images=30)
    outcome = table.export("yolo", images=True, piece_images=7)
    files = table.files()
    data = yaml.safe_load(files["data.yaml"])
    assert data["names"] == {one["id"] - 1: one["name"] for one in CARD["classes"][1:]}
    train, val = (files[data[split]].decode().splitlines() for split in ("train", "val"))
    assert outcome.images == 29 == len(train) + len(val) and len(val) > 0
    images = {f"./{name}" for name in files if name.startswith("images/")}
    assert {*train, *val} == images
