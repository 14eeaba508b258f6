"""What a layout has to answer, and the choice of one. Owns: the protocol of a label source and how a layout is
recognised. Must not know: what is done with labels.

`truth` the values; `place` a folder of files; `splits` which image is where; `coco`, `mask_folder`, `voc`,
`cityscapes`, `segments` one layout each; `check` what may be wrong with all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, get_args

from pipeline.errors import UsageError
from pipeline.learning.labels.place import Place
from pipeline.learning.labels.splits import Entry, Splitting
from pipeline.learning.labels.truth import Item, Labels

Layout = Literal["coco", "masks", "voc", "cityscapes", "segments"]


class Gap(NamedTuple):
    """An image without its label, or a label without its image."""

    name: str
    lacks: Literal["image", "label"]
    detail: str


class LabelSource(Protocol):
    """A labelled data set with all of its splits. Thread safe; pickles."""

    @property
    def layout(self) -> Layout: ...

    @property
    def title(self) -> str:
        """Shown in messages."""
        ...

    @property
    def class_names(self) -> tuple[str, ...]:
        """By class id, from 0. Whatever ids the files use, these are 0 .. n - 1."""
        ...

    @property
    def background_id(self) -> int | None:
        """The class that means "nothing here", where there is one."""
        ...

    @property
    def has_objects(self) -> bool:
        """Whether objects are told apart."""
        ...

    @property
    def entries(self) -> Mapping[str, Entry]:
        """Labelled images by name, in the data set's order."""
        ...

    @property
    def splits(self) -> Mapping[str, tuple[str, ...]]:
        """Names by split. They may be of images that have no label."""
        ...

    @property
    def gaps(self) -> tuple[Gap, ...]: ...

    def item(self, entry: Entry) -> Item:
        """`entry` with its size, as its label says it. Raises LabelError, StorageError."""
        ...

    def labels(self, item: Item) -> Labels:
        """The truth. Raises LabelError, StorageError."""
        ...

    def image_uri(self, name: str) -> str:
        """Where the image lies, as a run names it."""
        ...

    def image_bytes(self, name: str) -> bytes:
        """The image's file. Raises StorageError."""
        ...

    def label_bytes(self, name: str) -> bytes:
        """What the label says, as bytes that change when it does. Raises StorageError."""
        ...


def open_labels(
    source: str | Path,
    *,
    layout: Layout | None = None,
    splitting: Splitting | None = None,
    model: str | None = None,
    profile: str | None = None,
) -> LabelSource:
    """The data set at `source`: a folder, on disk or at any URL, or the DEST of an earlier segmentation.

    `layout` None: recognised by the files that are there. `splitting`: draw splits, whatever the data set says of its
    own. `model`: whose masks, where a DEST holds several models'. Reads lists and annotations, no image. Raises
    UsageError where it is no data set, StorageError where it cannot be read.
    """
    place = Place(source, profile=profile)
    layout = layout or _recognised(place)
    if layout == "coco":
        from pipeline.learning.labels.coco import CocoLabels

        return CocoLabels(place, splitting)
    if layout == "masks":
        from pipeline.learning.labels.mask_folder import MaskFolderLabels

        return MaskFolderLabels(place, splitting)
    if layout == "voc":
        from pipeline.learning.labels.voc import VocLabels

        return VocLabels(place, splitting)
    if layout == "cityscapes":
        from pipeline.learning.labels.cityscapes import CityscapesLabels

        return CityscapesLabels(place, splitting)
    if layout == "segments":
        from pipeline.learning.labels.segments import SegmentsLabels

        return SegmentsLabels(place, splitting, model=model)
    raise UsageError(f"no layout {layout!r}: give one of {', '.join(get_args(Layout))}")


def _recognised(place: Place) -> Layout:
    if place.has("annotations.json"):
        return "coco"
    if place.has("classes.json"):
        return "masks"
    if place.has_folder("ImageSets/Segmentation"):
        return "voc"
    if place.has_folder("gtFine"):
        return "cityscapes"
    if any(name.startswith("instances_") for name in place.files("annotations")):
        return "coco"
    if place.has_folder("segments"):
        return "segments"
    raise UsageError(
        f"{place} is not a data set: it has no annotations.json (COCO), no classes.json (images/ and masks/), "
        "no annotations/instances_*.json (COCO as published), no ImageSets/Segmentation/ (Pascal VOC), no gtFine/ "
        "(Cityscapes) and no segments/ (a table of masks)"
    )
