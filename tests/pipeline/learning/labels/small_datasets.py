"""Data sets of a few drawn images, one function for each layout. The pictures are the same in all of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from models.masks import encode_rle

SIZE = (24, 32)


def picture(index: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """uint8 [h, w, 3], different for each index."""
    return np.random.default_rng(index).integers(0, 255, (*size, 3)).astype(np.uint8)


def squares(index: int) -> list[np.ndarray]:
    """Two masks bool [h, w] that do not touch; the second moves with the index."""
    masks = [np.zeros(SIZE, dtype=bool) for _ in range(2)]
    masks[0][2:8, 3:9] = True
    masks[1][12:20, 10 + index : 18 + index] = True
    return masks


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def save_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def class_map(index: int, *, first: int, second: int, others: int) -> np.ndarray:
    """uint8 [h, w] class ids of the two squares, with a strip of 255 at the right border."""
    ids = np.full(SIZE, others, dtype=np.uint8)
    for mask, class_id in zip(squares(index), (first, second), strict=True):
        ids[mask] = class_id
    ids[:, -2:] = 255
    return ids


def write_mask_folder(folder: Path, *, count: int = 4) -> Path:
    """Classes with holes in their ids: 0 ground, 3 cart, 7 tree."""
    for index in range(count):
        save(folder / "images" / f"{index}.png", picture(index))
        save(folder / "masks" / f"{index}.png", class_map(index, first=3, second=7, others=0))
    classes = [{"id": 7, "name": "tree"}, {"id": 0, "name": "ground"}, {"id": 3, "name": "cart"}]
    save_json(folder / "classes.json", {"task": "semantic", "ignore_index": 255, "classes": classes})
    save_json(folder / "splits.json", {"train": ["0.png", "1.png"], "val": ["2.png", "3.png"][: count - 2]})
    return folder


def coco_content(indices: range, *, crowd: bool = True) -> dict[str, Any]:
    """One instance of category 2, one crowd (or instance) of category 5 which overlaps it, for each image."""
    annotations: list[dict[str, Any]] = []
    for index in indices:
        first, second = squares(index)
        around = second.copy()
        around[5:14, 5:20] = True
        for mask, category, iscrowd in ((around, 5, int(crowd)), (first, 2, 0)):
            rle = encode_rle(mask)
            annotations.append(
                {
                    "id": 2 * index + len(annotations) % 2 + 1, "image_id": index, "category_id": category,
                    "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()}, "iscrowd": iscrowd,
                    "area": float(mask.sum()) + 0.5, "bbox": [0, 0, 1, 1],
                }
            )  # fmt: skip
    height, width = SIZE
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "height": height, "width": width} for i in indices],
        "annotations": annotations,
        "categories": [{"id": 5, "name": "sheep"}, {"id": 2, "name": "dog"}],
    }


def write_coco(folder: Path, *, count: int = 4) -> Path:
    for index in range(count):
        save(folder / "images" / f"{index}.png", picture(index))
    save_json(folder / "annotations.json", coco_content(range(count)))
    return folder


def write_published_coco(folder: Path) -> Path:
    for split, indices in (("train2017", range(3)), ("val2017", range(3, 4))):
        save_json(folder / "annotations" / f"instances_{split}.json", coco_content(indices))
        for index in indices:
            save(folder / split / f"{index}.png", picture(index))
    save_json(folder / "annotations" / "captions_val2017.json", {})
    return folder


def write_voc(folder: Path) -> Path:
    """Squares are a bird (3) and a person (15); object numbers 1 and 2, void on the border."""
    for index in range(4):
        save(folder / "JPEGImages" / f"2007_{index}.jpg", picture(index))
        save(folder / "SegmentationClass" / f"2007_{index}.png", class_map(index, first=3, second=15, others=0))
        if index < 3:
            numbers = class_map(index, first=1, second=2, others=0)
            save(folder / "SegmentationObject" / f"2007_{index}.png", numbers)
    save(folder / "JPEGImages" / "2007_9.jpg", picture(9))
    lists = folder / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for split, indices in (("train", "012"), ("val", "3"), ("trainval", "0123"), ("test", "9")):
        (lists / f"{split}.txt").write_text("".join(f"2007_{index}\n" for index in indices))
    return folder


def write_cityscapes(folder: Path) -> Path:
    """Road (7) with a car (26, number 4) and a group of persons (24), and ego vehicle (1) on the border."""
    for index, (split, city) in enumerate((("train", "ulm"), ("train", "bonn"), ("val", "trier"))):
        stem = f"{split}/{city}/{city}_000000_00001{index}"
        save(folder / "leftImg8bit" / f"{stem}_leftImg8bit.png", picture(index))
        ids = class_map(index, first=26, second=24, others=7)
        ids[ids == 255] = 1
        save(folder / "gtFine" / f"{stem}_gtFine_labelIds.png", ids)
        numbers = ids.astype(np.uint16)
        numbers[squares(index)[0]] = 26004
        save(folder / "gtFine" / f"{stem}_gtFine_instanceIds.png", numbers)
    return folder
