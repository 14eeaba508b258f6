"""A labelled data set, as training and evaluation read it: one split of it, whatever its layout. Owns: the one
interface to all layouts. Must not know: networks, augmentation, how a layout lies in its files.

Layouts are recognised by their files (see pipeline/learning/labels): COCO instances, `images/` with `masks/` and
`classes.json`, Pascal VOC, Cityscapes, and a DEST of our own. Splits come from `splits.json`, else from the layout,
else they are drawn by group from a seed. Masks are never resized.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.corpus.decode import decode
from pipeline.errors import ImageError, UsageError
from pipeline.learning.labels.place import in_order
from pipeline.learning.labels.source import LabelSource, Layout, open_labels
from pipeline.learning.labels.splits import Splitting
from pipeline.learning.labels.truth import IGNORE_ID, Item, LabelledObject, Labels

__all__ = ["IGNORE_ID", "MAX_PIXELS", "Dataset", "Item", "LabelledObject", "Labels", "Splitting", "open_labels"]

#: Larger images are refused.
MAX_PIXELS = 1 << 28


class Dataset:
    """One split of a data set, or all of it. Reads annotations and sizes at once, images and masks when asked.
    Safe to share by threads; pickles.
    """

    def __init__(
        self,
        source: str | Path | LabelSource,
        split: str | None = None,
        *,
        layout: Layout | None = None,
        splitting: Splitting | None = None,
        model: str | None = None,
        profile: str | None = None,
    ) -> None:
        """`split` None: every labelled image. The other arguments are those of `open_labels`; a source that is open
        already (so that two splits share it) takes none of them.

        Raises UsageError where it is no data set, lacks the split, or lacks the label of an image of the split.
        """
        if isinstance(source, str | Path):
            source = open_labels(source, layout=layout, splitting=splitting, model=model, profile=profile)
        self.source = source
        self.split = split
        if split is not None and split not in source.splits:
            raise UsageError(
                f"data set {source.title} has no split {split!r}: it has {', '.join(sorted(source.splits))}"
            )
        names = tuple(source.entries) if split is None else source.splits[split]
        absent = [name for name in names if name not in source.entries]
        if absent:
            raise UsageError(f"split {split!r} of {source.title} names {absent[0]!r}, for which there is no label")
        self.items: tuple[Item, ...] = tuple(in_order(source.item, [source.entries[name] for name in names]))
        #: Names by class id.
        self.class_names = source.class_names
        #: The class that means "nothing here", where there is one.
        self.background_id = source.background_id
        #: Whether objects are told apart: else `instance_labels` and `objects` raise.
        self.has_objects = source.has_objects

    def __len__(self) -> int:
        return len(self.items)

    def image(self, item: Item) -> NDArray[np.uint8]:
        """Pixels as uint8 RGB [h, w, 3], decoded as in a run: upright by EXIF, transparency over white. Raises
        UsageError where it cannot be decoded, or its size is not the label's.
        """
        try:
            pixels = decode(self.source.image_bytes(item.name), max_pixels=MAX_PIXELS).pixels
        except ImageError as error:
            raise UsageError(f"image {item.name} of {self.source.title} cannot be used: {error}") from error
        if pixels.shape[:2] != (item.height, item.width):
            raise UsageError(f"image {item.name} has shape {pixels.shape}, annotated as {item.height} x {item.width}")
        return pixels

    def labels(self, item: Item) -> Labels:
        """All that is known of one image, read once. Raises UsageError for ids that are no class."""
        labels = self.source.labels(item)
        if labels.unknown:
            raise UsageError(
                f"the label of {item.name} has ids that are no class: {sorted(labels.unknown)}; the classes of "
                f"{self.source.title} are {', '.join(self.class_names)}"
            )
        return labels

    def class_ids(self, item: Item) -> NDArray[np.uint8]:
        """uint8 [h, w]: indices into `class_names`, or IGNORE_ID. Painted from objects: later ones win overlaps, and
        crowds are IGNORE_ID where no object is.
        """
        return self.labels(item).class_ids()

    def instance_labels(self, item: Item) -> NDArray[np.int32]:
        """int32 [h, w]: 0 is background and crowds, objects are 1 .. n in the annotations' order; later ones win
        overlaps. Raises UsageError for labels of classes only.
        """
        return self.labels(item).instance_labels()

    def objects(self, item: Item) -> tuple[LabelledObject, ...]:
        """Objects and crowds in the annotations' order. Raises UsageError for labels of classes only."""
        objects = self.labels(item).objects
        if objects is None:
            raise UsageError(f"{self.source.title} has labels of classes only: no objects are told apart")
        return objects

    def ignored(self, item: Item) -> NDArray[np.bool_]:
        """bool [h, w]: pixels to be left out of losses and metrics: unknown truth, and crowds where no object is."""
        return self.labels(item).ignored()

    def digest(self) -> str:
        """SHA-256 over the split's names, image bytes and labels, in the split's order: 64 hexadecimal digits."""
        sha256 = hashlib.sha256()

        def read(item: Item) -> tuple[bytes, ...]:
            name = item.name
            return name.encode(), self.source.image_bytes(name), self.source.label_bytes(name)

        for parts in in_order(read, self.items):
            for part in parts:
                sha256.update(len(part).to_bytes(8, "little"))
                sha256.update(part)
        return sha256.hexdigest()
