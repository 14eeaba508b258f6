"""SQL functions over masks. Owns: what they are called, take and give, and putting them on a connection.
Must not know: views, files.

Plain Python functions and not vectorised ones: measured, DuckDB's own conversion of BLOBs and structs took a third of
the time of the way through Arrow and back (2,000 masks of 480x360: 1.5 s, of which decoding is 1.3; 4.3 s).
"""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

_RLE = 'STRUCT("size" INTEGER[], counts BLOB)'


class SqlFunction(NamedTuple):
    """A function of SQL. Where an argument is NULL, so is the answer: DuckDB sees to it, and then allows no other NULL;
    with `sees_nulls` the function itself does."""

    name: str
    call: Callable[..., Any]
    takes: tuple[str, ...]
    gives: str
    sees_nulls: bool = False


def decode_mask(data: bytes) -> dict[str, Any]:
    """Width and height in pixels, and the class ids, one byte a pixel, row by row from the top. Raises ValueError for
    bytes that are no mask."""
    class_ids = _class_ids(data)
    return {"width": class_ids.shape[1], "height": class_ids.shape[0], "class_ids": class_ids.tobytes()}


def decode_rle(rle: dict[str, Any]) -> dict[str, Any]:
    """Width and height of the image, area of the object in pixels, its box [x, y, width, height], and its pixels, one
    byte each, 1 inside and 0 outside, row by row from the top. Raises ValueError for counts that are no run lengths of
    that size."""
    from pycocotools import mask as coco_mask

    found = _checked(rle)
    pixels = coco_mask.decode(found)
    return {
        "width": found["size"][1],
        "height": found["size"][0],
        "area": int(pixels.sum()),
        "bbox": [float(number) for number in coco_mask.toBbox(found)],
        "pixels": pixels.tobytes(order="C"),
    }


def mask_iou(one: bytes, other: bytes) -> float:
    """Mean over the classes that are in either mask of the intersection over union of their pixels, 0 to 1.

    Raises ValueError where the masks differ in size.
    """
    import numpy as np

    mine, theirs = _same_size(one, other)
    both = np.bincount(mine[mine == theirs], minlength=256)
    either = np.bincount(mine.ravel(), minlength=256) + np.bincount(theirs.ravel(), minlength=256) - both
    present = either > 0
    return float((both[present] / either[present]).mean())


def class_iou(one: bytes | None, other: bytes | None, class_id: int | None) -> float | None:
    """Intersection over union of the pixels of one class, 0 to 1; NULL where neither mask has any. Raises as
    `mask_iou`."""
    if one is None or other is None or class_id is None:
        return None
    mine, theirs = _same_size(one, other)
    mine, theirs = mine == class_id, theirs == class_id
    union = int((mine | theirs).sum())
    return int((mine & theirs).sum()) / union if union else None


def rle_iou(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Intersection over union of two objects, 0 to 1; 0 where both are empty. Raises ValueError where the sizes of
    their images differ, or for counts that are no run lengths."""
    from pycocotools import mask as coco_mask

    mine, theirs = _checked(one), _checked(other)
    if mine["size"] != theirs["size"]:
        raise ValueError(f"run lengths of images of different sizes, {mine['size']} and {theirs['size']} [h, w]")
    return float(coco_mask.iou([mine], [theirs], [0])[0][0])


FUNCTIONS = (
    SqlFunction("decode_mask", decode_mask, ("BLOB",), "STRUCT(width INTEGER, height INTEGER, class_ids BLOB)"),
    SqlFunction(
        "decode_rle", decode_rle, (_RLE,),
        "STRUCT(width INTEGER, height INTEGER, area BIGINT, bbox DOUBLE[], pixels BLOB)",
    ),
    SqlFunction("mask_iou", mask_iou, ("BLOB", "BLOB"), "DOUBLE"),
    SqlFunction("class_iou", class_iou, ("BLOB", "BLOB", "SMALLINT"), "DOUBLE", sees_nulls=True),
    SqlFunction("rle_iou", rle_iou, (_RLE, _RLE), "DOUBLE"),
)  # fmt: skip


def add_functions(connection: Any) -> None:
    """Registers FUNCTIONS on a DuckDB connection, which is closed when the process ends, if not before."""
    for one in FUNCTIONS:
        nulls = "special" if one.sees_nulls else "default"
        connection.create_function(one.name, one.call, list(one.takes), one.gives, null_handling=nulls)
    # A connection with Python functions that outlives the interpreter makes DuckDB complain on stderr of leaks.
    atexit.register(_close, weakref.ref(connection))


def _close(reference: Callable[[], Any]) -> None:
    connection = reference()
    if connection is not None:
        connection.close()


def _class_ids(data: bytes) -> Any:
    from models.masks import decode_mask_png

    try:
        return decode_mask_png(bytes(data))
    except (OSError, SyntaxError) as error:  # Pillow's for damaged PNG
        raise ValueError(f"not a mask of Maskmill's: {error}; `maskmill verify --deep` names its row") from error


def _same_size(one: bytes, other: bytes) -> tuple[Any, Any]:
    mine, theirs = _class_ids(one), _class_ids(other)
    if mine.shape != theirs.shape:
        raise ValueError(f"masks of different sizes, {mine.shape} and {theirs.shape} [h, w], have no IoU")
    return mine, theirs


def _checked(rle: dict[str, Any]) -> dict[str, Any]:
    """The run lengths as pycocotools takes them. Raises ValueError where they don't add up to the image: given such,
    pycocotools answers from memory that it never wrote."""
    size, counts = [int(number) for number in rle["size"]], bytes(rle["counts"])
    if len(size) != 2 or min(size) < 1 or _run_pixels(counts) != size[0] * size[1]:
        raise ValueError(f"counts that are no run lengths of an image of {size} [h, w]")
    return {"size": size, "counts": counts}


def _run_pixels(counts: bytes) -> int:
    """Pixels that COCO's compressed run lengths cover; -1 for bytes that are none.

    The format, from pycocotools' maskApi.c, `rleFrString`: five bits a byte from 48 on, 32 for "more follows", the last
    one's 16 the sign; from the fourth number on each is the difference to the one two before.
    """
    runs: list[int] = []
    value = shift = 0
    for byte in counts:
        bits = byte - 48
        if not 0 <= bits < 64:
            return -1
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        if runs[-1] < 0:
            return -1
        value = shift = 0
    return sum(runs) if not shift else -1
