"""A folder of `images/`, `masks/` and `classes.json`. Owns: that layout and the numbering of its classes.
Must not know: other layouts, scores.

`masks/` holds, under the image's name with `.png`, gray or palette PNGs whose pixels are class ids. `classes.json` is
`{"classes": [{"id": 0, "name": "sky"}, ...], "ignore_index": 255}`, or a list of names.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import UsageError
from pipeline.learning.labels.place import Place, decode_ids, id_size
from pipeline.learning.labels.source import Gap
from pipeline.learning.labels.splits import Entry, Splitting, choose_splits
from pipeline.learning.labels.truth import IGNORE_ID, Item, Labels


class ClassList(NamedTuple):
    """Classes of a label image: its ids, which may have holes, to 0 .. n - 1."""

    names: tuple[str, ...]
    #: Class id by id in the file.
    index_of: dict[int, int]
    #: Ids in the file that mean "not known".
    ignored: frozenset[int]

    def indexed(self, ids: NDArray[np.int32]) -> tuple[NDArray[np.uint8], dict[int, int]]:
        """uint8 class ids, and the pixels of ids that are none of these, which are IGNORE_ID."""
        low, high = int(ids.min(initial=0)), int(ids.max(initial=0))
        known = np.full(high - low + 1, -1, dtype=np.int32)
        for raw, index in self.index_of.items():
            if low <= raw <= high:
                known[raw - low] = index
        for raw in self.ignored:
            if low <= raw <= high:
                known[raw - low] = IGNORE_ID
        indexed = known[ids - low]
        wrong = indexed < 0
        unknown = {}
        if wrong.any():
            raws, pixels = np.unique(ids[wrong], return_counts=True)
            unknown = dict(zip(raws.tolist(), pixels.tolist(), strict=True))
            indexed[wrong] = IGNORE_ID
        return indexed.astype(np.uint8), unknown


class MaskFolderLabels:
    """A `LabelSource`. Images in one folder below `images/` are a group."""

    layout: Literal["masks"] = "masks"
    has_objects = False

    def __init__(self, place: Place, splitting: Splitting | None) -> None:
        """Raises UsageError where `classes.json` is missing or not one."""
        self._place = place
        self.title = str(place)
        self._classes, self.background_id = read_classes(place)
        self.class_names = self._classes.names
        images = place.files("images")
        masks = set(place.files("masks"))
        self.entries: dict[str, Entry] = {}
        gaps, taken = [], set[str]()
        for name in images:
            mask = mask_name(name)
            if mask in masks:
                folder = str(PurePosixPath(name).parent)
                self.entries[name] = Entry(name, group="" if folder == "." else folder)
                masks.discard(mask)
                taken.add(mask)
            else:
                theirs = "is of another image of that name" if mask in taken else "is not there"
                gaps.append(Gap(name, "label", f"masks/{mask} {theirs}"))
        gaps += [Gap(mask, "image", f"masks/{mask} has no image of its name in images/") for mask in sorted(masks)]
        self.gaps = tuple(gaps)
        self.splits = choose_splits(place, self.entries.values(), splitting)

    def item(self, entry: Entry) -> Item:
        height, width = id_size(self.label_bytes(entry.name), entry.name)
        return Item(entry.name, height, width, entry.stratum, entry.group)

    def labels(self, item: Item) -> Labels:
        class_ids, unknown = self._classes.indexed(decode_ids(self.label_bytes(item.name), item.name))
        return Labels(*class_ids.shape, class_ids=class_ids, unknown=unknown)

    def image_uri(self, name: str) -> str:
        return self._place.uri_of(f"images/{name}")

    def image_bytes(self, name: str) -> bytes:
        return self._place.read(f"images/{name}")

    def label_bytes(self, name: str) -> bytes:
        return self._place.read(f"masks/{mask_name(name)}")


def mask_name(image_name: str) -> str:
    """`a/b.png` of `a/b.jpg`."""
    return str(PurePosixPath(image_name).with_suffix(".png"))


def read_classes(place: Place) -> tuple[ClassList, int | None]:
    """Classes of `classes.json`, and which of them is background: the one that the file names (`background_id`), or
    that is called `background`. Raises UsageError.
    """
    content: Any = place.read_json("classes.json")
    listed = content.get("classes") if isinstance(content, dict) else content
    ignored = content.get("ignore_index", IGNORE_ID) if isinstance(content, dict) else IGNORE_ID
    try:
        if not isinstance(listed, list | None):
            raise TypeError(f"{listed!r} is no list")
        skipped = frozenset({int(ignored)} if ignored is not None else ())
        classes = [
            (position, str(one)) if isinstance(one, str) else (int(one["id"]), str(one["name"]))
            for position, one in enumerate(listed or ())
        ]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UsageError(f"{place}/classes.json: every class needs an id and a name ({error!r})") from error
    classes.sort()
    ids, names = [one for one, _ in classes], [name for _, name in classes]
    if not classes or len(set(ids)) < len(ids) or len(set(names)) < len(names) or len(ids) > IGNORE_ID:
        raise UsageError(f"{place}/classes.json must list 1 to {IGNORE_ID} classes with different ids and names")
    if skipped & set(ids):
        raise UsageError(f"{place}/classes.json: {ignored} is both a class and the ignore_index")
    table = ClassList(tuple(names), {raw: index for index, raw in enumerate(ids)}, skipped)
    background = content.get("background_id") if isinstance(content, dict) else None
    if background is not None and (not isinstance(background, int) or background not in table.index_of):
        raise UsageError(f"{place}/classes.json: background_id {background} is not among the classes")
    if background is None and "background" in names:
        return table, names.index("background")
    return table, None if background is None else table.index_of[background]
