"""A data set of drawn discs, in the layout that pipeline/learning/dataset.py reads."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from models.masks import encode_rle


def write_dataset(folder: Path, *, images: int = 6, size: int = 64) -> Path:
    """Bright discs on a dark ground; one image in three the other way round. The last two images are `val`."""
    (folder / "images").mkdir(parents=True)
    entries, annotations = [], []
    for index in range(images):
        random = np.random.default_rng(index)
        name = f"disc-{index}.png"
        pixels = np.full((size, size, 3), 30, dtype=np.uint8)
        entries.append(
            {
                "id": index,
                "file_name": name,
                "width": size,
                "height": size,
                "modality": "dark" if index % 3 == 0 else "light",
            }
        )
        for number in range(4):
            center = (size // 4 + size // 2 * (number % 2), size // 4 + size // 2 * (number // 2))
            mask = np.zeros((size, size), dtype=np.uint8)
            cv2.circle(mask, center, int(random.integers(5, size // 5)), 1, -1)
            pixels[mask > 0] = 200
            rle = encode_rle(mask > 0)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index,
                    "category_id": 1,
                    "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
                }
            )
        if index % 3 == 0:
            pixels = 255 - pixels
        pixels += random.integers(0, 20, pixels.shape, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / name)
    names = [entry["file_name"] for entry in entries]
    write_json(
        folder / "annotations.json",
        {"images": entries, "annotations": annotations, "categories": [{"id": 1, "name": "disc"}]},
    )
    write_json(folder / "splits.json", {"train": names[:-2], "val": names[-2:]})
    return folder


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
