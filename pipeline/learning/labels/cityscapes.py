"""Cityscapes' layout. Owns: that layout, and which of its labels are classes. Must not know: other layouts, scores.

`leftImg8bit/<split>/<city>/*_leftImg8bit.png` and `gtFine/<split>/<city>/*_gtFine_{labelIds,instanceIds}.png`.
(Cordts et al., The Cityscapes Dataset, CVPR 2016; label ids of cityscapesScripts, `helpers/labels.py`.)
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

import numpy as np

from models.masks import encode_rle
from pipeline.learning.labels.mask_folder import ClassList
from pipeline.learning.labels.place import Place, decode_ids, id_size
from pipeline.learning.labels.source import Gap
from pipeline.learning.labels.splits import Entry, Splitting, choose_splits
from pipeline.learning.labels.truth import Item, LabelledObject, Labels

#: The nineteen classes that Cityscapes evaluates, by its label id.
CITYSCAPES_CLASSES = {
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light",
    20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car", 27: "truck",
    28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle",
}  # fmt: skip
#: The label ids of things, whose pixels are 1000 * id + number, or the id alone where objects run together.
_THINGS = (24, 25, 26, 27, 28, 31, 32, 33)
_LABEL = re.compile(r"(?P<split>[^/]+)/(?P<city>[^/]+)/(?P<stem>[^/]+)_gtFine_labelIds\.png")


class _Files(NamedTuple):
    image: str
    labels: str
    instances: str | None


class CityscapesLabels:
    """A `LabelSource`. Names are `<split>/<city>/<image>`; a city is a stratum and a group; objects that run together
    are crowds; labels that are not evaluated are IGNORE_ID. There is no background.
    """

    layout: Literal["cityscapes"] = "cityscapes"
    background_id: int | None = None
    class_names = tuple(CITYSCAPES_CLASSES.values())

    def __init__(self, place: Place, splitting: Splitting | None) -> None:
        self._place = place
        self.title = str(place)
        others = frozenset(range(-1, 34)) - CITYSCAPES_CLASSES.keys()
        index_of = {raw: index for index, raw in enumerate(CITYSCAPES_CLASSES)}
        self._classes = ClassList(self.class_names, index_of, others | {255})
        truths = place.files("gtFine")
        there, images = set(truths), set(place.files("leftImg8bit"))
        self.entries: dict[str, Entry] = {}
        self._files: dict[str, _Files] = {}
        own: dict[str, list[str]] = {}
        gaps = []
        for label in truths:
            found = _LABEL.fullmatch(label)
            if found is None:
                continue
            name = f"{found['split']}/{found['city']}/{found['stem']}_leftImg8bit.png"
            instances = label.replace("_labelIds.png", "_instanceIds.png")
            self.entries[name] = Entry(name, stratum=found["city"], group=found["city"])
            self._files[name] = _Files(
                f"leftImg8bit/{name}", f"gtFine/{label}", f"gtFine/{instances}" if instances in there else None
            )
            own.setdefault(found["split"], []).append(name)
            if name not in images:
                gaps.append(Gap(name, "image", f"gtFine/ has {label}, leftImg8bit/ has no image for it"))
        gaps += [Gap(name, "label", "gtFine/ has no labelIds for it") for name in sorted(images - set(self.entries))]
        self.has_objects = any(files.instances for files in self._files.values())
        self.gaps = tuple(gaps)
        self.splits = choose_splits(
            place, self.entries.values(), splitting, own={split: tuple(names) for split, names in own.items()}
        )

    def item(self, entry: Entry) -> Item:
        height, width = id_size(self._place.read(self._files[entry.name].labels), entry.name)
        return Item(entry.name, height, width, entry.stratum, entry.group)

    def labels(self, item: Item) -> Labels:
        files = self._files[item.name]
        class_ids, unknown = self._classes.indexed(decode_ids(self._place.read(files.labels), item.name))
        objects = None
        if files.instances is not None:
            numbers = decode_ids(self._place.read(files.instances), item.name)
            found = []
            for number in np.unique(numbers).tolist():
                raw = number // 1000 if number >= 1000 else number
                if raw in _THINGS:
                    mask = numbers == number
                    class_id = self._classes.index_of[raw]
                    area = float(np.count_nonzero(mask))
                    found.append(LabelledObject(class_id, encode_rle(mask), area, is_crowd=number < 1000))
            objects = tuple(found)
        return Labels(*class_ids.shape, class_ids=class_ids, objects=objects, unknown=unknown)

    def image_uri(self, name: str) -> str:
        return self._place.uri_of(self._files[name].image)

    def image_bytes(self, name: str) -> bytes:
        return self._place.read(self._files[name].image)

    def label_bytes(self, name: str) -> bytes:
        files = self._files[name]
        return self._place.read(files.labels) + (self._place.read(files.instances) if files.instances else b"")
