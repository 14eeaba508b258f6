"""Label Studio's tasks, drawn as COCO's tools draw what it exports."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from exported import Exported
from pictured_table import CARD
from pycocotools import mask as coco_mask

from models.masks import decode_mask_png, decode_rle
from pipeline.insight.export.names import file_stem


@pytest.mark.parametrize("task", ["instance", "semantic"])
def test_polygons_are_the_masks(task: str, tmp_path: Path) -> None:
    table = Exported(tmp_path, task)
    outcome = table.export("labelstudio")
    tasks = json.loads(table.files()["tasks.json"])
    assert {one["data"]["image"] for one in tasks} == set(table.rows) and len(tasks) == outcome.images
    names = {one["id"]: one["name"] for one in CARD["classes"]}
    for one in tasks:
        row = table.rows[one["data"]["image"]]
        (prediction,) = one["predictions"]
        assert prediction["model_version"] == "tiny-semantic@0123456789ab"
        size = row["height"], row["width"]
        found: dict[str, list[np.ndarray]] = {}
        for region in prediction["result"]:
            points = np.array(region["value"]["points"]) * (row["width"], row["height"]) / 100
            mask = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects([points.ravel().tolist()], *size)))
            found.setdefault(region["value"]["polygonlabels"][0], []).append(mask.astype(bool))
        if task == "instance":
            truth = {names[its["class_id"]]: decode_rle(its["rle"]) for its in row["instances"]}
        else:
            class_ids = decode_mask_png(row["mask"]["bytes"])
            truth = {names[id_]: class_ids == id_ for id_ in np.unique(class_ids[class_ids > 0]).tolist()}
        assert found.keys() == truth.keys()
        for name, mask in truth.items():
            both = np.logical_or.reduce(found[name])
            assert (both & mask).sum() / (both | mask).sum() > 0.97


def test_the_labelling_interface_has_every_class(tmp_path: Path) -> None:
    table = Exported(tmp_path, "instance", images=1, errors=0)
    table.export("labelstudio", images=True)
    files = table.files()
    labels = ElementTree.fromstring(files["config.xml"]).iter("Label")
    expected = [(one["name"], "#{:02x}{:02x}{:02x}".format(*one["color"])) for one in CARD["classes"][1:]]
    assert [(one.get("value"), one.get("background")) for one in labels] == expected
    (task,) = json.loads(files["tasks.json"])
    (uri,) = table.rows
    assert task["data"]["image"] == f"/data/local-files/?d=images/{file_stem(uri)}.png"
    assert f"images/{file_stem(uri)}.png" in files
