"""What is true of one image: class ids, objects, and what is to be left out. Owns: these values and the painting of
objects into maps. Must not know: files, layouts, splits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.masks import decode_rle
from pipeline.errors import UsageError

#: In class ids: the truth is not known here, or is not to be counted. Never a class.
IGNORE_ID = 255


class LabelError(UsageError):
    """The label of one image cannot be used. `kind` is a kind of `pipeline.learning.labels.check.Problem`."""

    def __init__(self, message: str, *, kind: str) -> None:
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[Callable[..., LabelError], tuple[str, str]]:
        return (_label_error, (str(self), self.kind))


def _label_error(message: str, kind: str) -> LabelError:
    return LabelError(message, kind=kind)


class Item(NamedTuple):
    """One labelled image of a data set."""

    name: str
    #: Pixels, upright.
    height: int
    width: int
    #: What sampling balances: the `modality` of the image's entry, the city; empty where it has none.
    stratum: str
    #: Images of one group look alike, and are never divided between splits. Empty: a group of its own.
    group: str = ""


class LabelledObject(NamedTuple):
    """One object, or one crowd of them."""

    class_id: int
    #: COCO compressed run lengths: {"size": [h, w], "counts": bytes}.
    rle: dict[str, Any]
    #: Pixels, as the annotation says where it does: it need not be the mask's.
    area: float
    #: A region of objects that nobody told apart: neither to be found nor wrong to find.
    is_crowd: bool = False


class Labels:
    """The truth of one image. At least one of class ids and objects is there."""

    def __init__(
        self,
        height: int,
        width: int,
        *,
        class_ids: NDArray[np.uint8] | None = None,
        objects: tuple[LabelledObject, ...] | None = None,
        unknown: Mapping[int, int] | None = None,
    ) -> None:
        """`class_ids` uint8 [h, w], IGNORE_ID where not known. `unknown`: ids of no class with their pixels, or
        objects; these pixels are IGNORE_ID, and these objects left out.
        """
        self.height = height
        self.width = width
        self.objects = objects
        self.unknown = dict(unknown or {})
        self._class_ids = class_ids

    def class_ids(self) -> NDArray[np.uint8]:
        """uint8 [h, w]. Painted from the objects where there is nothing better: 0 is background, later objects win
        overlaps, crowds are IGNORE_ID where no object is. Raises LabelError for a class above 254.
        """
        if self._class_ids is not None:
            return self._class_ids
        painted = np.zeros((self.height, self.width), dtype=np.uint8)
        for one in sorted(self.objects or (), key=lambda one: not one.is_crowd):
            if one.class_id >= IGNORE_ID:
                raise LabelError(
                    f"class {one.class_id} does not fit into a mask of 8 bits; the highest is 254", kind="unknown_class"
                )
            painted[decode_rle(one.rle)] = IGNORE_ID if one.is_crowd else one.class_id
        return painted

    def instance_labels(self) -> NDArray[np.int32]:
        """int32 [h, w]: 0 is background and crowds, the other objects are 1 .. n in order; later ones win overlaps.
        Raises LabelError where the data set tells no objects apart.
        """
        if self.objects is None:
            raise LabelError("these labels are of classes only: no objects are told apart", kind="unreadable")
        labels = np.zeros((self.height, self.width), dtype=np.int32)
        for index, one in enumerate((one for one in self.objects if not one.is_crowd), start=1):
            labels[decode_rle(one.rle)] = index
        return labels

    def ignored(self) -> NDArray[np.bool_]:
        """bool [h, w]: pixels to be left out of losses and of metrics."""
        if self._class_ids is not None:
            mask: NDArray[np.bool_] = self._class_ids == IGNORE_ID
        else:
            mask = np.zeros((self.height, self.width), dtype=np.bool_)
        crowds = [one for one in self.objects or () if one.is_crowd]
        if crowds:
            crowd = np.zeros_like(mask)
            for one in crowds:
                crowd |= decode_rle(one.rle)
            mask = mask | (crowd & (self.instance_labels() == 0))
        return mask
