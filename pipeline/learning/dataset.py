"""A data set on disk, as training and evaluation read it. Owns: the folder's layout and its decoding to
arrays. Must not know: networks, augmentation, where the folder came from.

Layout: `images/` (any format that Pillow reads), `annotations.json` (COCO instances: compressed or
uncompressed run lengths, or polygons), `splits.json` ({"train": [file names], "val": [...]}). Masks are never
resized.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from pycocotools import mask as coco_mask

from pipeline.errors import UsageError


class Item(NamedTuple):
    """One image of a data set."""

    name: str
    height: int
    width: int
    #: What sampling balances: the `modality` of the image's entry, empty where it has none.
    stratum: str


class Dataset:
    """One split of a data set folder. Reads the annotations at once and images when asked. Safe to share by
    threads.
    """

    def __init__(self, folder: Path, split: str) -> None:
        """Raises UsageError when the folder has not the layout, or lacks the split or an image's entry."""
        self.folder = folder
        self.split = split
        annotations = _read_json(folder / "annotations.json")
        splits = _read_json(folder / "splits.json")
        if split not in splits:
            raise UsageError(f"data set {folder} has no split {split!r}: it has {', '.join(sorted(splits))}")
        entries = {entry["file_name"]: entry for entry in annotations["images"]}
        absent = [name for name in splits[split] if name not in entries]
        if absent:
            raise UsageError(f"split {split!r} of {folder} names {absent[0]!r}, which annotations.json does not have")
        self.items = tuple(
            Item(
                name,
                int(entries[name]["height"]),
                int(entries[name]["width"]),
                str(entries[name].get("modality", "")),
            )
            for name in splits[split]
        )
        categories = sorted(annotations["categories"], key=lambda category: category["id"])
        #: Names by class id, from 0 (background).
        self.class_names = ("background", *(str(category["name"]) for category in categories))
        self._class_of_category = {category["id"]: index for index, category in enumerate(categories, start=1)}
        name_of_id = {entry["id"]: entry["file_name"] for entry in annotations["images"]}
        self._objects: dict[str, list[Mapping[str, Any]]] = {item.name: [] for item in self.items}
        for annotation in annotations["annotations"]:
            name = name_of_id[annotation["image_id"]]
            if name in self._objects:
                self._objects[name].append(annotation)

    def __len__(self) -> int:
        return len(self.items)

    def image(self, item: Item) -> NDArray[np.uint8]:
        """Pixels as uint8 RGB [h, w, 3], upright by EXIF. Raises UsageError if the size is not the annotated
        one.
        """
        with Image.open(self.folder / "images" / item.name) as file:
            pixels = np.array(ImageOps.exif_transpose(file).convert("RGB"))
        if pixels.shape[:2] != (item.height, item.width):
            raise UsageError(f"image {item.name} has shape {pixels.shape}, annotated as {item.height} x {item.width}")
        return pixels

    def instance_labels(self, item: Item) -> NDArray[np.int32]:
        """int32 [h, w]: 0 is background, objects are 1 .. n in the annotations' order; later ones win
        overlaps.
        """
        labels = np.zeros((item.height, item.width), dtype=np.int32)
        for index, annotation in enumerate(self._objects[item.name], start=1):
            labels[self._mask(annotation, item)] = index
        return labels

    def class_ids(self, item: Item) -> NDArray[np.uint8]:
        """uint8 [h, w]: indices into `class_names`; later objects win overlaps."""
        class_ids = np.zeros((item.height, item.width), dtype=np.uint8)
        for annotation in self._objects[item.name]:
            class_ids[self._mask(annotation, item)] = self._class_of_category[annotation["category_id"]]
        return class_ids

    def digest(self) -> str:
        """SHA-256 over the split's names, image bytes and annotations, in the split's order: 64 hexadecimal
        digits.
        """
        sha256 = hashlib.sha256()
        for item in self.items:
            objects = json.dumps(self._objects[item.name], sort_keys=True)
            for part in (
                item.name.encode(),
                (self.folder / "images" / item.name).read_bytes(),
                objects.encode(),
            ):
                sha256.update(len(part).to_bytes(8, "little"))
                sha256.update(part)
        return sha256.hexdigest()

    def _mask(self, annotation: Mapping[str, Any], item: Item) -> NDArray[np.bool_]:
        segmentation = annotation["segmentation"]
        if isinstance(segmentation, dict) and not isinstance(segmentation["counts"], list):
            rle = segmentation
        else:
            rle = coco_mask.frPyObjects(segmentation, item.height, item.width)
            rle = coco_mask.merge(rle) if isinstance(rle, list) else rle
        if list(rle["size"]) != [item.height, item.width]:
            raise UsageError(
                f"annotation {annotation.get('id')} of {item.name} has size {rle['size']}, "
                f"the image is {item.height} x {item.width}"
            )
        decoded: NDArray[np.uint8] = coco_mask.decode(rle)
        return decoded.astype(bool)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"{path.parent} is not a data set: it has no {path.name}") from error
    except ValueError as error:
        raise UsageError(f"{path} is not valid JSON: {error}") from error
