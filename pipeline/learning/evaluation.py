"""How good a model is on a split, measured through the Segmenter that serves it. Owns: the loop and the
figures' names. Must not know: training, tables, storage.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from models.masks import Instance, decode_rle
from models.metrics import (
    InstanceCounts,
    PixelCounts,
    confusion_matrix,
    instance_counts,
    mean_iou,
    pixel_counts,
)
from models.preprocessing import image_statistics
from models.segmenter import Prediction, Segmenter
from pipeline.learning.dataset import IGNORE_ID, Dataset


def evaluate(segmenter: Segmenter, dataset: Dataset) -> dict[str, float]:
    """Figures of one model on one split; images one at a time, unresized, compared at their own size.

    Semantic: `mean_iou`, `pixel_accuracy`. Instance: `foreground_iou` and `foreground_iou_per_image` (pixels
    pooled over the split; mean over its images), `instance_f1` and `panoptic_quality` (IoU above 0.5, counts
    pooled). All: `images`.
    """
    if segmenter.card.task == "semantic":
        return _evaluate_semantic(segmenter, dataset)
    pixels, instances, per_image = PixelCounts(), InstanceCounts(), []
    for item in dataset.items:
        _, found = segmenter.postprocess(predict(segmenter, dataset.image(item)))
        predicted = label_map(found, item.height, item.width)
        actual = dataset.instance_labels(item)
        counts = pixel_counts(predicted > 0, actual > 0)
        pixels = pixels.plus(counts)
        per_image.append(counts.iou)
        instances = instances.plus(instance_counts(predicted, actual))
    return {
        "foreground_iou": pixels.iou,
        "foreground_iou_per_image": float(np.mean(per_image)),
        "instance_f1": instances.f1,
        "panoptic_quality": instances.panoptic_quality,
        "images": len(dataset),
    }


def predict(segmenter: Segmenter, pixels: NDArray[np.uint8]) -> Prediction:
    """The prediction for one uint8 RGB image, as a batch of one."""
    height, width = pixels.shape[:2]
    canvas_height, canvas_width = segmenter.canvas(height, width)
    padding = ((0, canvas_height - height), (0, canvas_width - width), (0, 0))
    images_NHWC = np.pad(pixels, padding, mode="edge")[None]
    statistics_N2 = np.array([image_statistics(pixels)], dtype=np.float32)
    pending = segmenter.submit(images_NHWC, np.array([[height, width]], dtype=np.int32), statistics_N2)
    return segmenter.finish(pending)[0]


def label_map(instances: list[Instance], height: int, width: int) -> NDArray[np.int32]:
    """int32 [h, w]: 0 is background, instances are 1 .. n in order."""
    labels = np.zeros((height, width), dtype=np.int32)
    for index, instance in enumerate(instances, start=1):
        labels[decode_rle(instance.rle)] = index
    return labels


def _evaluate_semantic(segmenter: Segmenter, dataset: Dataset) -> dict[str, float]:
    highest = max(info.id for info in segmenter.card.classes)
    classes = max(highest + 1, len(dataset.class_names))
    confusion = np.zeros((classes, classes), dtype=np.int64)
    for item in dataset.items:
        class_ids, _ = segmenter.postprocess(predict(segmenter, dataset.image(item)))
        confusion += confusion_matrix(class_ids, dataset.class_ids(item), classes, ignore_id=IGNORE_ID)
    total = int(confusion.sum())
    return {
        "mean_iou": mean_iou(confusion),
        "pixel_accuracy": float(np.trace(confusion) / total) if total else float("nan"),
        "images": len(dataset),
    }
