"""Pascal VOC's layout for segmentation. Owns: that layout and its classes. Must not know: other layouts, scores.

`JPEGImages/`, `SegmentationClass/`, `SegmentationObject/` (may be absent) and `ImageSets/Segmentation/<split>.txt`;
255 is void. (Everingham et al., The Pascal VOC Challenge, IJCV 2010; development kit 2012.) `classes.json` stands in
for VOC's own twenty classes where there is one.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from models.masks import encode_rle
from pipeline.learning.labels.mask_folder import ClassList, read_classes
from pipeline.learning.labels.place import Place, decode_ids, id_size
from pipeline.learning.labels.source import Gap
from pipeline.learning.labels.splits import Entry, Splitting, choose_splits
from pipeline.learning.labels.truth import IGNORE_ID, Item, LabelError, LabelledObject, Labels

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


class VocLabels:
    """A `LabelSource`. Names are of files in `JPEGImages/`. An object's class is that of most of its pixels; void
    pixels belong to no object. `trainval` is left out of the splits: it is the others together.
    """

    layout: Literal["voc"] = "voc"

    def __init__(self, place: Place, splitting: Splitting | None) -> None:
        self._place = place
        self.title = str(place)
        self._classes = ClassList(VOC_CLASSES, {index: index for index in range(len(VOC_CLASSES))}, frozenset({255}))
        self.background_id: int | None = 0
        if place.has("classes.json"):
            self._classes, self.background_id = read_classes(place)
        self.class_names = self._classes.names
        masks = _stems(place, "SegmentationClass")
        self._objects = frozenset(_stems(place, "SegmentationObject"))
        self.has_objects = bool(self._objects)
        images = {name.rpartition(".")[0]: name for name in place.files("JPEGImages")}
        named = {stem: images.get(stem, f"{stem}.jpg") for stem in masks}
        self.entries = {name: Entry(name) for name in named.values()}
        gaps = [Gap(name, "image", f"SegmentationClass/{stem}.png has no image in JPEGImages/")
                for stem, name in named.items() if stem not in images]  # fmt: skip
        own = {}
        for file in place.files("ImageSets/Segmentation"):
            split = file.removesuffix(".txt")
            stems = place.read_text(f"ImageSets/Segmentation/{file}").split()
            if split != "trainval" and any(stem in named for stem in stems):
                own[split] = tuple(named.get(stem, f"{stem}.jpg") for stem in stems)
                gaps += [Gap(f"{stem}.jpg", "label", f"{file} names it, SegmentationClass/ has no mask for it")
                         for stem in stems if stem not in named]  # fmt: skip
        self.gaps = tuple(gaps)
        self.splits = choose_splits(place, self.entries.values(), splitting, own=own)

    def item(self, entry: Entry) -> Item:
        height, width = id_size(self._place.read(f"SegmentationClass/{_stem(entry.name)}.png"), entry.name)
        return Item(entry.name, height, width, entry.stratum, entry.group)

    def labels(self, item: Item) -> Labels:
        stem = _stem(item.name)
        ids = decode_ids(self._place.read(f"SegmentationClass/{stem}.png"), item.name)
        class_ids, unknown = self._classes.indexed(ids)
        objects = None
        if stem in self._objects:
            numbers = decode_ids(self._place.read(f"SegmentationObject/{stem}.png"), item.name)
            if numbers.shape != ids.shape:
                raise LabelError(
                    f"SegmentationObject/{stem}.png has shape {numbers.shape}, SegmentationClass/ {ids.shape}",
                    kind="size_mismatch",
                )
            found = []
            for number in np.unique(numbers[(numbers > 0) & (class_ids != IGNORE_ID)]).tolist():
                mask = (numbers == number) & (class_ids != IGNORE_ID)
                class_id = int(np.bincount(class_ids[mask]).argmax())
                found.append(LabelledObject(class_id, encode_rle(mask), float(np.count_nonzero(mask))))
            objects = tuple(found)
        return Labels(*class_ids.shape, class_ids=class_ids, objects=objects, unknown=unknown)

    def image_uri(self, name: str) -> str:
        return self._place.uri_of(f"JPEGImages/{name}")

    def image_bytes(self, name: str) -> bytes:
        return self._place.read(f"JPEGImages/{name}")

    def label_bytes(self, name: str) -> bytes:
        stem = _stem(name)
        data = self._place.read(f"SegmentationClass/{stem}.png")
        return data + (self._place.read(f"SegmentationObject/{stem}.png") if stem in self._objects else b"")


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _stems(place: Place, folder: str) -> list[str]:
    return [_stem(name) for name in place.files(folder) if name.endswith(".png")]
