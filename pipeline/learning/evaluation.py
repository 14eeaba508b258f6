"""How good a network in memory is on a split, measured through the Segmenter that serves it. Owns: an image's way
through it as a run takes it, and the figures' names. Must not know: training, tables, storage.

What is measured by a fleet, kept and sliced is `pipeline.learning.assessment`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.metrics import InstanceCounts, PixelCounts
from models.preprocessing import image_statistics, picture_statistics, select_bands
from models.segmenter import Prediction, Segmenter
from pipeline.learning.dataset import Dataset
from pipeline.learning.evaluations import align_classes, counting_score, evaluations_table, measure_image
from pipeline.learning.scores import score


def evaluate(segmenter: Segmenter, dataset: Dataset) -> dict[str, float]:
    """Figures of one model on one split; images one at a time, as the card's size policy has them, compared at their
    own size. Classes are the same by name; pixels that the labels ignore, and crowds, count for nothing.

    Semantic: `mean_iou`, `pixel_accuracy`. Instance: `foreground_iou` and `foreground_iou_per_image` (pixels
    pooled over the split; mean over its images), `instance_f1` and `panoptic_quality` (IoU above 0.5, counts
    pooled), `ap` and `ap50` (COCO's; NaN without objects in the labels). All: `images`. Raises UsageError where model
    and data set share no class.
    """
    card = segmenter.card
    alignment = align_classes({info.id: info.name for info in card.classes}, dataset.class_names)
    rows: list[Mapping[str, Any]] = []
    for item in dataset.items:
        class_ids, found = segmenter.postprocess(predict(segmenter, dataset.image(item)))
        instances = alignment.instances(found) if card.task == "instance" else None
        measured = measure_image(
            alignment.class_ids(class_ids), instances, dataset.labels(item), min_score=counting_score(card)
        )
        rows.append({"image_uri": item.name, "status": "ok", **measured})
    scores = score(evaluations_table(rows, alignment.names), resamples=0)
    if card.task == "semantic":
        return {
            "mean_iou": _number(scores.miou),
            "pixel_accuracy": _number(scores.pixel_accuracy),
            "images": len(dataset),
        }
    foreground = [_foreground(row["confusion"], dataset.background_id) for row in rows]
    objects = InstanceCounts()
    for row in rows:
        for one in row["panoptic"] or ():
            objects = objects.plus(
                InstanceCounts(one["matched"], one["predicted"], one["actual"], matched_iou=one["matched_iou"])
            )
    return {
        "foreground_iou": PixelCounts(*np.sum(foreground, axis=0).tolist()).iou,
        "foreground_iou_per_image": float(np.mean([one.iou for one in foreground])),
        "instance_f1": objects.f1,
        "panoptic_quality": objects.panoptic_quality,
        "ap": _number(scores.ap),
        "ap50": _number(scores.ap50),
        "images": len(dataset),
    }


def predict(segmenter: Segmenter, pixels: NDArray[Any]) -> Prediction:
    """The prediction for one image [h, w, bands], as a batch of one: resized or in tiles where the card says so, as in
    a run. Raises ValueError for an image that the card does not serve.
    """
    height, width = pixels.shape[:2]
    settings = segmenter.card.preprocessing
    mean, std = picture_statistics(select_bands(pixels, settings), settings.low_high)[:2]
    mosaic = segmenter.mosaic(height, width)
    if mosaic is None:
        prediction: Prediction = _answer(segmenter, pixels, (mean, std), tiles=False)
        return prediction
    for window in mosaic.grid.windows():
        tile = pixels[window.y : window.y + window.height, window.x : window.x + window.width]
        mosaic.add(window, _answer(segmenter, tile, (mean, std), tiles=True))
    return segmenter.assemble(mosaic)


def _answer(segmenter: Segmenter, pixels: NDArray[Any], statistics: tuple[float, float], *, tiles: bool) -> Any:
    """What the model says of one canvas: a prediction, or what a mosaic takes."""
    size = pixels.shape[:2]
    canvas = np.empty((*segmenter.canvas(*size), segmenter.input_channels), segmenter.input_dtype)
    placed = segmenter.fit(pixels, canvas)
    if placed != size and not tiles:
        statistics = image_statistics(canvas[: placed[0], : placed[1]])
    pending = segmenter.submit(
        canvas[None],
        np.array([placed], dtype=np.int32),
        np.array([statistics], dtype=np.float32),
        np.array([size], dtype=np.int32),
        tiles=tiles,
    )
    return segmenter.finish(pending)[0]


def _foreground(confusion: list[dict[str, int]], background_id: int | None) -> PixelCounts:
    """Pixels that are not background, whatever class they are."""
    counts = PixelCounts()
    for pair in confusion:
        actual, predicted = pair["actual"] != background_id, pair["predicted"] != background_id
        counts = counts.plus(
            PixelCounts(pair["pixels"] * (actual and predicted), pair["pixels"] * predicted, pair["pixels"] * actual)
        )
    return counts


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
