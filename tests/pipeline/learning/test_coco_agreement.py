"""Average precision against pycocotools: on a set made here, and (slow) on all of COCO and nuclei that are at hand."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from pipeline.learning.dataset import Dataset
from pipeline.learning.scores import score

sys.path.insert(0, str(Path(__file__).parent))
from coco_agreement import (
    at_random,
    evaluations,
    jittered,
    largest_difference,
    run_cocoeval,
    truth_as_detections,
)

Maker = Callable[..., list[dict[str, Any]]]
MAKERS: tuple[Maker, ...] = (truth_as_detections, jittered, at_random)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images of ellipses in all of COCO's sizes, four categories of which one never occurs, crowds, objects in
    one another, areas that are not the masks', an image with nothing, and one category that is a crowd only.
    """
    folder = tmp_path_factory.mktemp("drawn")
    random = np.random.default_rng(7)
    images, annotations = [], []
    for index in range(1, 13):
        height, width = int(random.integers(150, 260)), int(random.integers(150, 260))
        images.append({"id": index, "file_name": f"{index}.png", "height": height, "width": width})
        for _ in range(0 if index == 5 else int(random.integers(2, 14))):
            mask = np.zeros((height, width), dtype=np.uint8)
            axes = tuple(int(one) for one in random.choice([4, 8, 15, 30, 55, 70], 2))
            center = int(random.integers(0, width)), int(random.integers(0, height))
            cv2.ellipse(mask, center, axes, float(random.uniform(0, 180)), 0, 360, 1, -1)
            category = int(random.choice([3, 3, 3, 8, 8, 20]))
            crowd = int(category == 20 or random.uniform() < 0.15)
            rle = coco_mask.encode(np.asfortranarray(mask))
            annotations.append(
                {
                    "id": len(annotations) + 1, "image_id": index, "category_id": category, "iscrowd": crowd,
                    "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
                    "area": float(mask.sum()) * float(random.uniform(0.95, 1.05)),
                    "bbox": coco_mask.toBbox(rle).tolist(),
                }
            )  # fmt: skip
    categories = [{"id": number, "name": f"kind-{number}"} for number in (20, 3, 11, 8)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_twelve_figures_and_each_class(drawn: Path, maker: Maker, seed: int) -> None:
    content = json.loads((drawn / "annotations.json").read_text())
    difference, scores = largest_difference(drawn, maker(Dataset(drawn), content, seed=seed))
    assert difference <= 1e-9
    assert scores.ap is not None
    if maker is truth_as_detections:
        assert scores.ap == pytest.approx(1.0, abs=1e-9)
    else:
        assert 0 < scores.ap < 0.9
    assert scores.ap_per_class is not None
    assert scores.ap_per_class["kind-20"] is None  # a crowd only
    assert scores.ap_per_class["kind-11"] is None  # nowhere


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("most", [3, 120])
def test_other_numbers_of_detections(drawn: Path, maker: Maker, most: int) -> None:
    content = json.loads((drawn / "annotations.json").read_text())
    dataset = Dataset(drawn)
    detections = maker(dataset, content, seed=2)
    found = score(evaluations(dataset, content, detections), resamples=0, max_detections=most)
    theirs = run_cocoeval(content, detections, (1, 2, most)).eval
    areas = {"": 0, "_small": 1, "_medium": 2, "_large": 3}
    expected = {f"ap{name}": theirs["precision"][:, :, :, area, 2] for name, area in areas.items()}
    expected |= {f"ar{name}": theirs["recall"][:, :, area, 2] for name, area in areas.items() if name}
    expected |= {"ap50": theirs["precision"][0, :, :, 0, 2], "ap75": theirs["precision"][5, :, :, 0, 2]}
    expected |= {"ar1": theirs["recall"][:, :, 0, 0]}
    for name, values in expected.items():
        assert getattr(found, name) == pytest.approx(values[values > -1].mean(), abs=1e-9), name
    if most == 3 and maker is not at_random:
        usual = score(evaluations(dataset, content, detections), resamples=0)
        assert found.ap < 0.95 * usual.ap  # type: ignore[operator]


def test_one_detection_in_all(drawn: Path) -> None:
    content = json.loads((drawn / "annotations.json").read_text())
    detections = truth_as_detections(Dataset(drawn), content)[:1]
    difference, scores = largest_difference(drawn, detections)
    assert difference <= 1e-9
    assert 0 < scores.ap < 0.2  # type: ignore[operator]


def real(name: str) -> Path:
    root = os.environ.get("MASKMILL_TEST_DATA")
    if not root or not (Path(root) / name / "annotations.json").exists():
        pytest.skip(f"MASKMILL_TEST_DATA names no folder with {name}/annotations.json")
    return Path(root) / name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["coco", "nuclei"])
@pytest.mark.parametrize("maker", MAKERS)
def test_real_annotations(name: str, maker: Maker, capsys: pytest.CaptureFixture[str]) -> None:
    folder = real(name)
    content = json.loads((folder / "annotations.json").read_text())
    difference, scores = largest_difference(folder, maker(Dataset(folder), content))
    with capsys.disabled():
        print(f"\n{name} {maker.__name__}: ap {scores.ap:.6f} ap50 {scores.ap50:.6f}, off by {difference:.1e}")
    assert difference <= 1e-9
    if maker is truth_as_detections and name == "coco":
        assert scores.ap == pytest.approx(1.0, abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("maker", [truth_as_detections, jittered])
def test_more_detections_than_a_hundred(maker: Maker, capsys: pytest.CaptureFixture[str]) -> None:
    folder = real("nuclei")
    content = json.loads((folder / "annotations.json").read_text())
    dataset = Dataset(folder)
    detections = maker(dataset, content)
    scores = score(evaluations(dataset, content, detections), resamples=0, max_detections=1000)
    theirs = run_cocoeval(content, detections, (1, 10, 1000)).eval["precision"][:, :, 0, 0, -1].mean()
    with capsys.disabled():
        print(f"\nnuclei {maker.__name__} maxDets 1000: ap {scores.ap:.6f}, off by {abs(scores.ap - theirs):.1e}")
    assert scores.ap == pytest.approx(theirs, abs=1e-9)
    if maker is truth_as_detections:
        assert scores.ap == pytest.approx(1.0, abs=1e-9)
