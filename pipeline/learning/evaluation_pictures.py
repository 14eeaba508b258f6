"""The images that a model does worst on, drawn beside their truth. Owns: which they are, and how they are drawn.
Must not know: how scores are computed, how a page looks.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import cv2
import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask

from models.masks import Instance, decode_mask_png, decode_rle
from models.palettes import distinct_color
from pipeline.errors import MaskmillError
from pipeline.insight.overlay import brightened, painted
from pipeline.learning.dataset import Dataset
from pipeline.learning.evaluations import ClassAlignment
from pipeline.learning.labels.place import in_order
from pipeline.learning.labels.truth import IGNORE_ID, LabelledObject
from pipeline.learning.scores import image_scores
from pipeline.storage import Storage, join_uri
from pipeline.table.catalog import open_duckdb, part_sizes, read_parts_sql, sql_text, unreadable

#: Longer side of a picture.
PICTURE_PX = 360
#: Objects that were found and right, and those that were not.
FOUND, WRONG, CROWD = (38, 132, 255), (255, 122, 26), (150, 150, 150)


class Pair(NamedTuple):
    """One image: the model's masks and the truth, as data: URLs; or why they cannot be shown."""

    name: str
    score: float
    width: int
    height: int
    predicted: str
    truth: str
    trouble: str


def class_color(class_id: int) -> tuple[int, int, int]:
    """RGB of a class, whatever the model or the data set paints it with."""
    return distinct_color(class_id + 1)  # the first is black, which shows nothing


def worst_pairs(
    table: pa.Table,
    dataset: Dataset,
    alignment: ClassAlignment,
    storage: Storage,
    *,
    dest: str,
    where: str | None,
    limit: int,
) -> list[Pair]:
    """The `limit` images of an evaluation with the lowest `image_scores`, worst first, of those for which the SQL
    condition `where` holds. `storage` holds `dest`, the table that has their masks. Never raises for what is wrong with
    an image: the pair says it.
    """
    scores = dict(list(image_scores(table, where=where).items())[:limit])
    items = {dataset.source.image_uri(item.name): item for item in dataset.items}
    chosen = table.filter(pc.is_in(table["image_uri"], pa.array(list(scores), pa.string())))
    masks = {row["image_uri"]: row for row in _masks(chosen, storage, dest)}

    def draw(uri: str) -> Pair:
        item = items[uri]
        pair = Pair(item.name, scores[uri], item.width, item.height, "", "", "")
        try:
            pixels = dataset.image(item)
            labels = dataset.labels(item)
            if masks[uri]["instances"] is None or labels.objects is None:
                ours = alignment.class_ids(decode_mask_png(masks[uri]["mask"]))
                drawn = [_by_class(pixels, ids, dataset.background_id) for ids in (ours, labels.class_ids())]
            else:
                found = [_instance(one) for one in masks[uri]["instances"]]
                drawn = _by_match(pixels, alignment.instances(found), labels.objects)
        except (MaskmillError, KeyError, OSError, ValueError) as error:
            return pair._replace(trouble=f"it cannot be shown now: {error}")
        return pair._replace(predicted=_data_url(drawn[0]), truth=_data_url(drawn[1]))

    return list(in_order(draw, scores, threads=4))


def _masks(chosen: pa.Table, storage: Storage, dest: str) -> list[dict[str, Any]]:
    if not chosen.num_rows:
        return []
    first = {name: chosen[name][0].as_py() for name in ("model_name", "model_version", "settings_digest")}
    sizes = part_sizes(
        storage, join_uri(dest, f"segments/model={first['model_name']}/version={first['model_version']}")
    )
    rows = ", ".join(
        f"({sql_text(uri)}, {sql_text(run)})"
        for uri, run in zip(chosen["image_uri"].to_pylist(), chosen["run_id"].to_pylist(), strict=True)
    )
    with open_duckdb(storage, sizes=sizes) as connection:
        try:
            found = connection.sql(
                f"SELECT image_uri, mask.bytes AS mask, instances FROM {read_parts_sql(list(sizes))} "
                f"WHERE (image_uri, run_id) IN ({rows}) AND settings_digest = {sql_text(first['settings_digest'])}"
            ).to_arrow_table()
        except duckdb.Error as error:
            raise unreadable(dest, error) from error
    listed: list[dict[str, Any]] = found.to_pylist()
    return listed


def _instance(one: Mapping[str, Any]) -> Instance:
    return Instance(one["class_id"], one["score"], tuple(one["bbox"]), one["area"], one["rle"])


def _by_class(pixels: NDArray[np.uint8], class_ids: NDArray[np.uint8], background_id: int | None) -> NDArray[np.uint8]:
    colors = np.array([(0, 0, 0), *(class_color(class_id) for class_id in range(IGNORE_ID)), CROWD], np.uint8)
    labels = class_ids.astype(np.int32) + 1
    if background_id is not None:
        labels[class_ids == background_id] = 0
    return _drawn(pixels, labels, colors)


def _by_match(
    pixels: NDArray[np.uint8], found: Sequence[Instance], objects: Sequence[LabelledObject]
) -> list[NDArray[np.uint8]]:
    """Objects in one colour where both sides have them (IoU above 0.5, one class), else in another."""
    right, seen = np.zeros(len(found), bool), np.zeros(len(objects), bool)
    if found and objects:
        iou = np.asarray(
            coco_mask.iou(
                [one.rle for one in found], [one.rle for one in objects], [int(one.is_crowd) for one in objects]
            )
        )
        same = np.array([one.class_id for one in found])[:, None] == np.array([one.class_id for one in objects])[None]
        hit = (iou > 0.5) & same
        right, seen = hit.any(axis=1), hit.any(axis=0)
    sides: list[tuple[list[dict[str, Any]], list[tuple[int, int, int]]]] = [
        ([one.rle for one in found], [FOUND if hit else WRONG for hit in right]),
        (
            [one.rle for one in objects],
            [CROWD if one.is_crowd else FOUND if hit else WRONG for one, hit in zip(objects, seen, strict=True)],
        ),
    ]
    drawn = []
    for rles, colors in sides:
        labels = np.zeros(pixels.shape[:2], np.int32)
        for number, rle in enumerate(rles, start=1):
            labels[decode_rle(rle)] = number
        drawn.append(_drawn(pixels, labels, np.array([(0, 0, 0), *colors], np.uint8)))
    return drawn


def _drawn(pixels: NDArray[np.uint8], labels: NDArray[np.int32], colors: NDArray[np.uint8]) -> NDArray[np.uint8]:
    height, width = labels.shape
    scale = PICTURE_PX / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    # OpenCV resizes no int32; float64 holds every label exactly.
    near = cv2.resize(labels.astype(np.float64), size, interpolation=cv2.INTER_NEAREST).astype(np.int32)
    return painted(brightened(small.astype(np.uint8, copy=False)), near, colors)


def _data_url(pixels: NDArray[np.uint8]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=84)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
