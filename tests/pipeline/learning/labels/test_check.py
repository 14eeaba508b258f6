from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import UsageError
from pipeline.learning.labels.check import check_labels

sys.path.insert(0, str(Path(__file__).parent))
from small_datasets import (
    SIZE,
    picture,
    save,
    save_json,
    squares,
    write_cityscapes,
    write_coco,
    write_mask_folder,
    write_voc,
)


def test_nothing_is_wrong(tmp_path: Path) -> None:
    report = check_labels(write_mask_folder(tmp_path))
    assert report.ok
    assert report.problems == ()
    assert report.images_by_split == {"train": 2, "val": 2}
    tree = next(one for one in report.classes if one.name == "tree")
    assert tree.pixels == sum(int(squares(index)[1].sum()) for index in range(4))
    assert tree.images_by_split == {"train": 2, "val": 2}
    assert tree.objects is None
    assert report.ignored_pixels == 4 * 2 * SIZE[0]
    assert sum(one.share for one in report.classes) == pytest.approx(1)
    lines = report.text().splitlines()
    assert lines[-1] == "0 errors, 0 warnings"
    assert any(line.startswith("tree") and line.split()[2] == "4" for line in lines)


def test_a_split_without_images(tmp_path: Path) -> None:
    """What training would refuse is an error; a split that it does not look at may be meant so."""
    folder = write_mask_folder(tmp_path)
    names = json.loads((folder / "splits.json").read_text())
    (folder / "splits.json").write_text(json.dumps(names | {"val": [], "test": []}))
    found = {
        used: [(one.kind, one.severity, one.name) for one in check_labels(folder, used=used).problems]
        for used in (("train", "val"), ("train",))
    }
    test = ("empty_split", "warning", "test")
    assert found == {
        ("train", "val"): [("empty_split", "error", "val"), test],
        ("train",): [("empty_split", "warning", "val"), test],
    }
    assert not check_labels(folder).ok


@pytest.mark.parametrize("write", [write_coco, write_voc, write_cityscapes])
def test_other_layouts_are_fine_too(tmp_path: Path, write: object) -> None:
    # Of four images whose split is drawn, none may be in val.
    report = check_labels(write(tmp_path), used=("train",))  # type: ignore[operator]
    assert report.ok, report.text()
    assert sum(one.objects or 0 for one in report.classes) == {"coco": 4, "voc": 6, "cityscapes": 3}[report.layout]


def test_everything_is_wrong_with_a_mask_folder(tmp_path: Path) -> None:
    folder = write_mask_folder(tmp_path, count=4)
    for index in range(4, 10):
        save(folder / "images" / f"{index}.png", picture(index))
        save(folder / "masks" / f"{index}.png", np.zeros(SIZE, dtype=np.uint8))
    save(folder / "images" / "4.png", picture(4, (24, 30)))
    save(folder / "masks" / "5.png", np.full(SIZE, 9, dtype=np.uint8))
    save(folder / "masks" / "6.png", np.full(SIZE, 255, dtype=np.uint8))
    (folder / "masks" / "7.png").unlink()
    (folder / "images" / "8.png").unlink()
    (folder / "images" / "9.png").write_bytes((folder / "images" / "9.png").read_bytes()[:200])
    shutil.copy(folder / "images" / "0.png", folder / "images" / "2.png")
    save_json(folder / "splits.json", {"train": ["0.png", "1.png", "4.png", "gone.png"], "val": ["2.png", "3.png"]})
    report = check_labels(folder)
    assert not report.ok
    found = {(problem.kind, problem.severity, problem.name) for problem in report.problems}
    assert found == {
        ("size_mismatch", "error", "4.png"),
        ("unknown_class", "error", "5.png"),
        ("empty_mask", "warning", "6.png"),
        ("missing_label", "error", "7.png"),
        ("missing_image", "error", "8.png"),
        ("unreadable", "error", "9.png"),
        ("duplicate", "error", "0.png"),
        ("missing_label", "error", "gone.png"),
    }
    text = report.text()
    assert "the image is 30 x 24, its label 32 x 24" in text
    assert f"id 9 ({SIZE[0] * SIZE[1]} pixels) is no class" in text
    assert "in train (0.png) and val (2.png)" in text
    assert text.endswith("7 errors, 1 warnings")


def test_everything_is_wrong_with_coco(tmp_path: Path) -> None:
    folder = write_coco(tmp_path, count=6)
    content = json.loads((folder / "annotations.json").read_text())
    content["annotations"][0]["category_id"] = 77
    content["annotations"][2]["segmentation"] = {"size": [3, 3], "counts": [0, 9]}
    content["annotations"][4]["segmentation"] = [[1, 2]]
    content["annotations"][7]["image_id"] = 99
    content["annotations"][6]["segmentation"] = []
    content["annotations"] = content["annotations"][:8]
    save_json(folder / "annotations.json", content)
    os.unlink(folder / "images" / "5.png")
    report = check_labels(folder)
    found = {(problem.kind, problem.severity, problem.name) for problem in report.problems}
    assert found == {
        ("unknown_class", "error", "0.png"),
        ("size_mismatch", "error", "1.png"),
        ("unreadable", "error", "2.png"),
        ("missing_image", "error", "annotation 8"),
        ("empty_mask", "warning", "3.png"),
        ("empty_mask", "warning", "4.png"),
        ("missing_image", "error", "5.png"),
        ("empty_mask", "warning", "5.png"),
    }


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("images", {"height": None}, "number 1 of 'images' has height None: it must be a whole number"),
        ("images", {"file_name": 3}, "number 1 of 'images' has file_name 3: it must be a text"),
        ("annotations", {"category_id": "dog"}, "number 1 of 'annotations' has category_id 'dog'"),
        ("categories", {"id": None}, "number 1 of 'categories' has id None"),
    ],
)
def test_coco_that_lacks_what_is_needed_is_told_in_a_sentence(
    tmp_path: Path, kind: str, change: dict[str, object], message: str
) -> None:
    folder = write_coco(tmp_path, count=2)
    content = json.loads((folder / "annotations.json").read_text())
    content[kind][1] |= change
    save_json(folder / "annotations.json", content)
    with pytest.raises(UsageError, match=message):
        check_labels(folder)


@pytest.mark.parametrize("counts", [[10, 20], [0, 24 * 32 + 1], "", "0", "zz", "\x60"])
def test_run_lengths_of_another_mask_are_unreadable(tmp_path: Path, counts: object) -> None:
    folder = write_coco(tmp_path, count=1)
    content = json.loads((folder / "annotations.json").read_text())
    content["annotations"][0]["segmentation"] = {"size": list(SIZE), "counts": counts}
    save_json(folder / "annotations.json", content)
    found = [(one.kind, one.name) for one in check_labels(folder).problems]
    assert found == [("empty_split", "val"), ("unreadable", "0.png")]


def test_what_systems_leave_in_folders_is_no_image(tmp_path: Path) -> None:
    folder = write_mask_folder(tmp_path)
    for name in ("images/.DS_Store", "images/._0.png", "masks/Thumbs.db", "images/desktop.ini"):
        (folder / name).write_bytes(b"x")
    assert check_labels(folder).problems == ()


def test_two_images_of_one_mask(tmp_path: Path) -> None:
    folder = write_mask_folder(tmp_path)
    save(folder / "images" / "0.bmp", picture(7))
    assert [one.detail for one in check_labels(folder).problems][-1] == "masks/0.png is of another image of that name"


def test_an_image_whose_objects_nobody_told_apart(tmp_path: Path) -> None:
    report = check_labels(write_voc(tmp_path))
    assert report.ok
    assert [(one.kind, one.name) for one in report.problems] == [("missing_label", "2007_3.jpg")]


def test_long_lists_are_cut_short(tmp_path: Path) -> None:
    folder = write_mask_folder(tmp_path, count=30)
    for path in (folder / "masks").glob("*.png"):
        Image.fromarray(np.full(SIZE, 8, dtype=np.uint8)).save(path)
    report = check_labels(folder)
    assert len(report.problems) == 30
    assert "unknown_class: 20 more" in report.text()
    assert len(report.text().splitlines()) < 25
