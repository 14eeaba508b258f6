"""COCOeval and the table of evaluations, side by side on one annotation file and one list of detections."""

from __future__ import annotations

import contextlib
import copy
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from models.masks import Instance
from pipeline.learning.dataset import Dataset
from pipeline.learning.evaluations import evaluations_table, measure_image
from pipeline.learning.scores import Scores, score

STATS = (
    "ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large",
    "ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large",
)  # fmt: skip


def reference(content: dict[str, Any], detections: list[dict[str, Any]]) -> dict[str, float | None]:
    """The twelve figures of COCOeval, None where it says -1, and the AP of every category."""
    evaluated = run_cocoeval(content, detections, (1, 10, 100))
    with contextlib.redirect_stdout(io.StringIO()):
        evaluated.summarize()
    figures = {name: None if value == -1 else float(value) for name, value in zip(STATS, evaluated.stats, strict=True)}
    for index, category in enumerate(sorted(content["categories"], key=lambda one: one["id"])):
        precision = evaluated.eval["precision"][:, :, index, 0, -1]
        figures[category["name"]] = None if (precision == -1).all() else float(precision[precision > -1].mean())
    return figures


def run_cocoeval(content: dict[str, Any], detections: list[dict[str, Any]], max_detections: tuple[int, ...]) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(content)
        truth.createIndex()
        evaluated = COCOeval(truth, truth.loadRes(copy.deepcopy(detections)), "segm")
        evaluated.params.maxDets = list(max_detections)
        evaluated.evaluate()
        evaluated.accumulate()
    return evaluated


def evaluations(dataset: Dataset, content: dict[str, Any], detections: list[dict[str, Any]]) -> pa.Table:
    """The table for these detections; only what COCO knows is real in it. URIs sort as COCO's image ids do."""
    names = {entry["file_name"]: entry["id"] for entry in content["images"]}
    found: dict[int, list[Instance]] = {image_id: [] for image_id in names.values()}
    classes = {category["id"]: dataset.class_names.index(category["name"]) for category in content["categories"]}
    for one in detections:
        rle = one["segmentation"]
        found[one["image_id"]].append(
            Instance(classes[one["category_id"]], one["score"], (0, 0, 0, 0), int(coco_mask.area(rle)), rle)
        )
    rows = []
    for item in dataset.items:
        nothing = np.zeros((item.height, item.width), dtype=np.uint8)
        measures = measure_image(nothing, found[names[item.name]], dataset.labels(item))
        rows.append({"image_uri": f"{names[item.name]:012d}", "status": "ok", **measures})
    return evaluations_table(rows, dataset.class_names)


def figures_of(scores: Scores) -> dict[str, float | None]:
    assert scores.ap_per_class is not None
    per_class = {name: value for name, value in scores.ap_per_class.items() if name != "background"}
    return {name: getattr(scores, name) for name in STATS} | per_class


def largest_difference(folder: Path, detections: list[dict[str, Any]]) -> tuple[float, Scores]:
    """Over the twelve figures and the AP of each class; infinite where one of them is None and the other is not."""
    content = json.loads((folder / "annotations.json").read_text())
    scores = score(evaluations(Dataset(folder), content, detections), resamples=0)
    ours, theirs = figures_of(scores), reference(content, detections)
    assert ours.keys() == theirs.keys()
    worst = 0.0
    for name, value in theirs.items():
        mine = ours[name]
        if value is None or mine is None:
            worst = worst if value is mine else float("inf")
        else:
            worst = max(worst, abs(value - mine))
    return worst, scores


def truth_as_detections(dataset: Dataset, content: dict[str, Any], *, seed: int = 0) -> list[dict[str, Any]]:
    """Every object that is no crowd, with a score to two places: many are equal."""
    random = np.random.default_rng(seed)
    ids = {entry["file_name"]: entry["id"] for entry in content["images"]}
    categories = sorted(category["id"] for category in content["categories"])
    return [
        {
            "image_id": ids[item.name],
            "category_id": categories[one.class_id - 1],
            "segmentation": one.rle,
            "score": round(float(random.uniform()), 2),
        }
        for item in dataset.items
        for one in dataset.objects(item)
        if not one.is_crowd
    ]


def jittered(dataset: Dataset, content: dict[str, Any], *, seed: int = 0) -> list[dict[str, Any]]:
    """Objects shifted by up to a fifth of their size; some are lost, some are found twice, some are called something
    else; crowds are found, too.
    """
    random = np.random.default_rng(seed)
    ids = {entry["file_name"]: entry["id"] for entry in content["images"]}
    categories = sorted(category["id"] for category in content["categories"])
    detections = []
    for item in dataset.items:
        for one in dataset.objects(item):
            mask = coco_mask.decode(one.rle)
            for _ in range(int(random.choice([0, 1, 1, 1, 2]))):
                reach = max(1, round(0.2 * float(mask.sum()) ** 0.5))
                shift = tuple(random.integers(-reach, reach + 1, 2).tolist())
                moved = np.asfortranarray(np.roll(mask, shift, axis=(0, 1)))
                class_id = one.class_id if random.uniform() < 0.9 else int(random.integers(1, len(categories) + 1))
                detections.append(
                    {
                        "image_id": ids[item.name],
                        "category_id": categories[class_id - 1],
                        "segmentation": coco_mask.encode(moved),
                        "score": round(float(random.uniform()), 2),
                    }
                )
    return detections


def at_random(dataset: Dataset, content: dict[str, Any], *, each: int = 130, seed: int = 0) -> list[dict[str, Any]]:
    """Rectangles anywhere, of any class: in the first images more of one class than COCO looks at."""
    random = np.random.default_rng(seed)
    ids = {entry["file_name"]: entry["id"] for entry in content["images"]}
    categories = sorted(category["id"] for category in content["categories"])
    detections = []
    for number, item in enumerate(dataset.items):
        for _ in range(each):
            mask = np.zeros((item.height, item.width), dtype=np.uint8, order="F")
            height, width = (max(2, int(side * random.uniform(0.02, 0.9) ** 2)) for side in mask.shape)
            top, left = (
                int(random.integers(0, side - size + 1)) for side, size in zip(mask.shape, (height, width), strict=True)
            )
            mask[top : top + height, left : left + width] = 1
            detections.append(
                {
                    "image_id": ids[item.name],
                    "category_id": categories[0] if number < 2 else int(random.choice(categories)),
                    "segmentation": coco_mask.encode(mask),
                    "score": round(float(random.uniform()), 3),
                }
            )
    return detections
