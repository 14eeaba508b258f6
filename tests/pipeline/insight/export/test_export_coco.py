"""COCO, as pycocotools and our own reader of labels see it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exported import Exported
from pictured_table import CARD
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from models.masks import decode_mask_png, decode_rle, encode_mask_png
from pipeline.insight.export.coco import Coco
from pipeline.insight.export.shape import ClassInfo, Source, Subject
from pipeline.learning.dataset import Dataset
from pipeline.learning.labels.check import check_labels


def average_precision(path: Path) -> float:
    """Of the annotations as results, against themselves."""
    truth = COCO(str(path))
    results = [{"score": 1.0} | annotation for annotation in json.loads(path.read_text())["annotations"]]
    evaluation = COCOeval(truth, truth.loadRes(results), "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return float(evaluation.stats[0])


@pytest.mark.parametrize("task", ["instance", "semantic"])
def test_it_scores_one_against_itself(task: str, tmp_path: Path) -> None:
    table = Exported(tmp_path, task)
    outcome = table.export("coco")
    assert (outcome.images, outcome.skipped) == (6, {"error": 1})
    path = tmp_path / "out" / "annotations.json"
    assert average_precision(path) == 1.0
    coco = COCO(str(path))
    assert len(coco.imgs) == 6 and len(coco.anns) == outcome.annotations
    assert sorted(coco.anns) == list(range(1, outcome.annotations + 1))
    assert [one["name"] for one in coco.cats.values()] == [one["name"] for one in CARD["classes"][1:]]
    for annotation in coco.anns.values():
        segmentation = annotation["segmentation"]
        assert annotation["area"] == coco_mask.area(segmentation) > 0 and annotation["iscrowd"] == 0


@pytest.mark.parametrize("task", ["instance", "semantic"])
def test_it_comes_back_as_labels(task: str, tmp_path: Path) -> None:
    table = Exported(tmp_path, task)
    outcome = table.export("coco", images=True)
    assert outcome.skipped == {"error": 1, "gone": 1}
    # Of so few images none may be drawn for val.
    assert {one.kind for one in check_labels(str(tmp_path / "out")).problems} <= {"empty_split"}
    labels = Dataset(str(tmp_path / "out"))
    uris = {one["file_name"]: one["coco_url"] for one in _body(tmp_path)["images"]}
    assert len(labels) == 5
    for item in labels.items:
        row = table.rows[uris[item.name]]
        assert labels.image(item).shape == (row["height"], row["width"], 3)
        if task == "semantic":
            assert (labels.class_ids(item) == decode_mask_png(row["mask"]["bytes"])).all()
        else:
            pairs = zip(labels.objects(item), row["instances"], strict=True)
            assert all((decode_rle(mine.rle) == decode_rle(its["rle"])).all() for mine, its in pairs)


def _body(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "out" / "annotations.json").read_text()))


def test_a_class_0_that_is_something_has_another_id() -> None:
    classes = (ClassInfo(0, "sky", (1, 2, 3)), ClassInfo(1, "road", (4, 5, 6)))
    subject = Subject("street", "0123456789ab", "semantic", classes, None, False, "file:///out")
    ids = np.array([[0, 0], [1, 0]], np.uint8)
    row = {"task": "semantic", "mask": {"bytes": encode_mask_png(ids, [(0, 0, 0)] * 2)}, "width": 2, "height": 2,
           "image_uri": "s3://b/x", "image_etag": "e"}  # fmt: skip
    made = Coco(subject).make(Source(row, 7, "x", "x.jpg", None))
    found = [json.loads(line) for line in made.lines["annotations"]]
    assert [(one["category_id"], one["area"], one["image_id"]) for one in found] == [(1, 3, 7), (2, 1, 7)]
