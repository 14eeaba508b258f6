"""The way back, as docs/export.md tells it: exported, corrected by a person, checked, trained on."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from exported import Exported
from PIL import Image

import pipeline
from pipeline.learning.dataset import Dataset
from pipeline.learning.labels.check import check_labels

sys.path.insert(0, str(Path(__file__).parents[2] / "learning"))
from tiny_training import tiny


def errors(folder: Path) -> list[str]:
    return [one.detail for one in check_labels(str(folder), used=("train",)).problems if one.severity == "error"]


def trained(folder: Path) -> dict[str, Any]:
    """The provenance of a model after one step on what was corrected."""
    threads = torch.get_num_threads()
    try:
        outcome = pipeline.train(tiny(folder, folder.parent / "models", steps=1, val_split=None))
    finally:
        torch.set_num_threads(threads)
    assert outcome.steps == 1
    provenance: dict[str, Any] = pipeline.registry.resolve(outcome.uri).card.provenance
    return provenance


def test_corrected_png_masks(tmp_path: Path) -> None:
    table = Exported(tmp_path, "semantic")
    table.export("png", images=True)
    out = tmp_path / "out"
    # Of images that are gone there is a mask alone.
    pictured = {path.stem for path in (out / "images").iterdir()}
    for path in (out / "masks").iterdir():
        if path.stem not in pictured:
            path.unlink()
    first, second, third = sorted((out / "masks").iterdir())[:3]
    for path, mode in ((first, "P"), (second, "L")):
        with Image.open(path) as mask:
            assert mask.mode == "P"
            ids = np.array(mask)
            ids[:4, :6] = 2
            edited = Image.fromarray(ids) if mode == "L" else mask.copy()
            if mode == "P":
                edited.putdata(ids.ravel().tolist())
        edited.save(path)
    with Image.open(third) as mask:
        whole = mask.copy()
        mask.convert("RGB").save(third)
    assert errors(out) == [f"label {third.stem}.png has mode RGB: it must be gray or palette, with an id in each pixel"]
    whole.save(third)
    assert errors(out) == []
    labels = Dataset(str(out))
    by_stem = {item.name.rpartition(".")[0]: item for item in labels.items}
    for path in (first, second):
        assert (labels.class_ids(by_stem[path.stem])[:4, :6] == 2).all()
    assert trained(out)["data_sha256"] == Dataset(str(out), "train").digest()


def test_corrected_in_label_studio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what its converter writes: names with folders, polygons, its own ids."""
    table = Exported(tmp_path, "instance")
    table.export("labelstudio", images=True)
    task = tmp_path / "task"
    (tmp_path / "out").rename(task)
    tasks = json.loads((task / "tasks.json").read_text())
    classes = re.findall(r'<Label value="([^"]+)"', (task / "config.xml").read_text())
    images, annotations = [], []
    for number, entry in enumerate(tasks):
        name = str(entry["data"]["image"]).rpartition("/")[2]
        found = [one for one in entry["predictions"][0]["result"] if "points" in one["value"]]
        height, width = found[0]["original_height"], found[0]["original_width"]
        images.append({"id": number, "file_name": f"images/0/{name}", "width": width, "height": height})
        for one in found:
            value = one["value"]
            points = np.array(value["points"]) * [width, height] / 100
            category = classes.index(value["polygonlabels"][0])
            box, area = cv2.boundingRect(points.astype(np.float32)), cv2.contourArea(points.astype(np.float32))
            annotations.append(
                {
                    "id": len(annotations), "image_id": number, "category_id": category, "iscrowd": 0, "ignore": 0,
                    "segmentation": [points.ravel().tolist()], "bbox": list(box), "area": area,
                }
            )  # fmt: skip
    removed = annotations.pop()  # by the person
    categories = [{"id": number, "name": name} for number, name in enumerate(classes)]
    body = {"images": images, "categories": categories, "annotations": annotations, "info": {"contributor": "LS"}}
    (tmp_path / "result.json").write_text(json.dumps(body))
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[4] / "docs" / "export.md").read_text()
    code = page[page.index("## The 200 most uncertain") :].partition("```python\n")[2].partition("```")[0]
    exec(compile(code, "docs/export.md", "exec"), {})
    assert errors(task) == []
    labels = Dataset(str(task))
    counts = [len(labels.objects(item)) for item in labels.items]
    assert sum(counts) == len(annotations)
    assert labels.items[removed["image_id"]].name == images[removed["image_id"]]["file_name"].rpartition("/")[2]
    trained(task)
