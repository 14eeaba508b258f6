"""COCO instances. Owns: reading its JSON and where its images lie. Must not know: other layouts, scores.

Either `images/` and `annotations.json`, or as COCO publishes it: `annotations/instances_<split>.json`, each with its
images in `<split>/`, `images/<split>/` or `images/`. Segmentations are polygons, or run lengths, compressed or not.
(Format: cocodataset.org, "Data format", object detection.)
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from pycocotools import mask as coco_mask

from models.runs import run_lengths
from pipeline.errors import UsageError
from pipeline.learning.labels.place import Place
from pipeline.learning.labels.source import Gap
from pipeline.learning.labels.splits import Entry, Splitting, choose_splits
from pipeline.learning.labels.truth import Item, LabelError, LabelledObject, Labels

#: What has to be there, and as what.
_NEEDED: dict[str, dict[str, type]] = {
    "categories": {"id": int, "name": str},
    "images": {"id": int, "file_name": str, "height": int, "width": int},
    "annotations": {"image_id": int, "category_id": int},
}


#: As far as points of polygons may lie from an image's corner, in sides of the image.
_FARTHEST_SIDES, _LEAST_SIDE_PX = 10, 1000
#: Run lengths are of 32 bits; and a map of classes takes a byte for each.
_MOST_PIXELS = 1 << 30
#: Areas are of whole objects; none is as large as this.
_MOST_AREA = 1e15


class _Annotated(NamedTuple):
    """One image of the JSON."""

    file: str
    height: int
    width: int
    objects: list[Mapping[str, Any]]


class CocoLabels:
    """A `LabelSource`. Class 0 is background, the categories follow in the order of their ids."""

    layout: Literal["coco"] = "coco"
    background_id: int | None = 0
    has_objects = True

    def __init__(self, place: Place, splitting: Splitting | None) -> None:
        """Raises UsageError where a file is not COCO's, or two files disagree on the categories."""
        self._place = place
        self.title = str(place)
        self.entries: dict[str, Entry] = {}
        self._images: dict[str, _Annotated] = {}
        self._class_of_category: dict[int, int] = {}
        self.class_names: tuple[str, ...] = ()
        gaps: list[Gap] = []
        own: dict[str, tuple[str, ...]] = {}
        published = {} if place.has("annotations.json") else _published(place)
        for file, folders in (published or {"annotations.json": ("images",)}).items():
            before = len(self.entries)
            self._read(file, folders, gaps)
            if published:
                split = file.removeprefix("annotations/instances_").removesuffix(".json")
                own[split] = tuple(self.entries)[before:]
        self.splits = choose_splits(place, self.entries.values(), splitting, own=own)
        self.gaps = tuple(gaps)

    def item(self, entry: Entry) -> Item:
        image = self._images[entry.name]
        return Item(entry.name, image.height, image.width, entry.stratum, entry.group)

    def labels(self, item: Item) -> Labels:
        objects: list[LabelledObject] = []
        unknown: dict[int, int] = {}
        for annotation in self._images[item.name].objects:
            category = annotation["category_id"]
            class_id = self._class_of_category.get(category)
            if class_id is None:
                unknown[int(category)] = unknown.get(int(category), 0) + 1
                continue
            rle = _rle(annotation, item)
            area = annotation.get("area")
            if not (area is None or (isinstance(area, int | float) and abs(area) < _MOST_AREA)):
                what = f"annotation {annotation.get('id')} of {item.name}"
                raise LabelError(f"{what} has the area {str(area)[:40]}", kind="unreadable")
            objects.append(
                LabelledObject(
                    class_id=class_id,
                    rle=rle,
                    area=float(coco_mask.area(rle) if area is None else area),
                    is_crowd=bool(annotation.get("iscrowd", 0)),
                )
            )
        return Labels(item.height, item.width, objects=tuple(objects), unknown=unknown)

    def image_uri(self, name: str) -> str:
        return self._place.uri_of(self._images[name].file)

    def image_bytes(self, name: str) -> bytes:
        return self._place.read(self._images[name].file)

    def label_bytes(self, name: str) -> bytes:
        return json.dumps(self._images[name].objects, sort_keys=True).encode()

    def _read(self, file: str, folders: Sequence[str], gaps: list[Gap]) -> None:
        annotations = self._place.read_json(file)
        for key in ("images", "annotations", "categories"):
            if not isinstance(annotations, dict) or not isinstance(annotations.get(key), list):
                raise UsageError(f"{self.title}/{file} is not COCO's: it has no {key!r}, or no list of them")
        for kind, keys in _NEEDED.items():
            for number, entry in enumerate(annotations[kind]):
                self._check(f"{file}: number {number} of {kind!r}", entry, keys)
        categories = sorted(annotations["categories"], key=lambda category: category["id"])
        names = ("background", *(str(category["name"]) for category in categories))
        if self.class_names and names != self.class_names:
            raise UsageError(f"{self.title}/{file} has other categories than the files before it")
        self.class_names = names
        self._class_of_category = {category["id"]: index for index, category in enumerate(categories, start=1)}
        folder = next((one for one in folders if len(folders) == 1 or self._place.has_folder(one)), folders[0])
        there = set(self._place.files(folder))
        name_of_id = {}
        for entry in annotations["images"]:
            name = str(entry["file_name"])
            if ".." in name.split("/") or "\0" in name:
                raise UsageError(f"{self.title}/{file} has file_name {name!r}, which leads out of the data set")
            if name in self.entries:
                raise UsageError(f"{self.title}/{file} names {name!r}, which was named before")
            height, width = int(entry["height"]), int(entry["width"])
            if min(height, width) < 1 or height * width > _MOST_PIXELS:
                raise UsageError(
                    f"{self.title}/{file} says that {name!r} is {width} x {height}: at most {_MOST_PIXELS:,} pixels"
                )
            name_of_id[entry["id"]] = name
            self.entries[name] = Entry(name, str(entry.get("modality", "")), str(entry.get("group", "")))
            self._images[name] = _Annotated(f"{folder}/{name}", height, width, [])
            if name not in there:
                gaps.append(Gap(name, "image", f"{file} has it, {folder}/ has not"))
        for annotation in annotations["annotations"]:
            owner = name_of_id.get(annotation["image_id"])
            if owner is None:
                gaps.append(
                    Gap(f"annotation {annotation.get('id')}", "image", f"image_id {annotation['image_id']} is none")
                )
            else:
                self._images[owner].objects.append(annotation)

    def _check(self, what: str, entry: Any, keys: Mapping[str, type]) -> None:
        for key, kind in keys.items():
            value = entry.get(key) if isinstance(entry, dict) else None
            if not isinstance(value, kind):
                wanted = "a whole number" if kind is int else "a text"
                raise UsageError(f"{self.title}/{what} has {key} {value!r}: it must be {wanted}")


def _published(place: Place) -> dict[str, tuple[str, ...]]:
    """Folders to look for images in, by annotation file."""
    found: dict[str, tuple[str, ...]] = {}
    for name in place.files("annotations"):
        match = re.fullmatch(r"instances_(.+)\.json", name)
        if match:
            found[f"annotations/{name}"] = (match[1], f"images/{match[1]}", "images")
    return found


def _rle(annotation: Mapping[str, Any], item: Item) -> dict[str, Any]:
    """Compressed run lengths of an annotation of any kind. Raises LabelError."""
    segmentation = annotation.get("segmentation")
    what = f"annotation {annotation.get('id')} of {item.name}"
    try:
        if not segmentation:
            empty = {"size": [item.height, item.width], "counts": [item.height * item.width]}
            rle: dict[str, Any] = coco_mask.frPyObjects(empty, item.height, item.width)
        elif isinstance(segmentation, list):
            _check_polygons(segmentation, item)
            rle = coco_mask.merge(coco_mask.frPyObjects(segmentation, item.height, item.width))
        elif isinstance(segmentation["counts"], list):
            rle = coco_mask.frPyObjects(segmentation, *segmentation["size"])
        else:
            counts = segmentation["counts"]
            rle = {
                "size": list(segmentation["size"]),
                "counts": counts.encode("ascii") if isinstance(counts, str) else counts,
            }
        if not isinstance(segmentation, list):
            _check_lengths(rle)
    except Exception as error:
        raise LabelError(f"{what} has no segmentation that can be read: {error}", kind="unreadable") from error
    if list(rle["size"]) != [item.height, item.width]:
        raise LabelError(
            f"{what} has size {list(rle['size'])}, the image is {item.height} x {item.width}", kind="size_mismatch"
        )
    return rle


def _check_polygons(polygons: Sequence[Any], item: Item) -> None:
    """Raises ValueError for anything but points not far from the image: the library takes memory for every pixel of an
    outline, and ends the process where there is none.
    """
    farthest = _FARTHEST_SIDES * max(item.height, item.width, _LEAST_SIDE_PX)
    for polygon in polygons:
        points = np.asarray(polygon, dtype=np.float64)
        if points.ndim != 1 or len(points) < 4 or len(points) % 2:
            raise ValueError("a polygon is not a list of x and y by turns, of two points at least")
        if not (np.abs(points) <= farthest).all():
            raise ValueError(f"a polygon has a point that is more than {farthest} pixels away, or nowhere")


def _check_lengths(rle: Mapping[str, Any]) -> None:
    """Raises ValueError where the run lengths are not those of the whole mask: what lies beyond them would be whatever
    was in memory.
    """
    height, width = rle["size"]
    lengths = run_lengths(rle["counts"])
    if lengths.sum() != height * width or (lengths < 0).any():
        raise ValueError(f"its run lengths are of {lengths.sum()} pixels, its size of {height * width}")
