"""The table `evaluations` as arrays, and every score as a function of how often each image counts. Owns: which counts
make which score. Must not know: how counts are made, which resampling is meant.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy import sparse

from models.average_precision import RankedDetections, average_precision
from models.matching import AREA_RANGES, IOU_THRESHOLDS, KEPT_DETECTIONS
from models.metrics import ClassCounts, mean_of_present, ratio
from pipeline.errors import UsageError
from pipeline.table.evaluations import CLASSES_KEY

#: COCO's: detections of one class in one image that count, the highest scores first.
MAX_DETECTIONS = 100

Values = dict[str, NDArray[np.float64]]


class Tally(NamedTuple):
    """The counts of images that were measured, sorted by URI so that equal scores fall in one order."""

    class_names: tuple[str, ...]
    uris: tuple[str, ...]
    #: int64 [images].
    truth_crc32: NDArray[np.int64]
    #: Rows of the table that are errors, and so not among the images.
    failed: int
    #: Sparse [images, classes] by name: `intersection`, `predicted`, `actual`; `boundary_...`; `panoptic_...`.
    counts: dict[str, Any]
    #: Per class, None where no objects are told apart.
    detections: tuple[RankedDetections, ...] | None
    #: Sparse int64 [images, classes] by area range.
    objects: dict[str, Any]
    #: Detections of one class in one image that average precision takes.
    max_detections: int = MAX_DETECTIONS

    def pixel_scores(self, weights: Any) -> Values:
        """Each score float64 [samples], or [samples, classes] where its name ends in `_per_class`. `weights` int64
        [samples, images], dense or sparse: how often an image is in a sample.
        """
        classes = ClassCounts(*(self._sums(weights, name) for name in ("intersection", "predicted", "actual")))
        edges = {
            name: self._sums(weights, f"boundary_{name}")
            for name in ("actual", "actual_matched", "predicted", "predicted_matched")
        }
        # 2 P R / (P + R), which is 0 where nothing agrees, and nothing where there is no boundary at all.
        precision = ratio(edges["predicted_matched"], edges["predicted"])
        recall = ratio(edges["actual_matched"], edges["actual"])
        boundary = ratio(2 * np.nan_to_num(precision * recall), np.nan_to_num(precision) + np.nan_to_num(recall))
        boundary[(edges["actual"] + edges["predicted"] > 0) & np.isnan(boundary)] = 0.0
        return {
            "iou_per_class": classes.iou,
            "dice_per_class": classes.dice,
            "precision_per_class": classes.precision,
            "recall_per_class": classes.recall,
            "boundary_f1_per_class": boundary,
            "miou": mean_of_present(classes.iou),
            "mean_dice": mean_of_present(classes.dice),
            "pixel_accuracy": classes.pixel_accuracy,
            "frequency_weighted_iou": classes.frequency_weighted_iou,
            "boundary_f1": mean_of_present(boundary),
        }

    def instance_scores(self, weights: Any) -> Values:
        """As `pixel_scores`, of panoptic counts; {} where no objects are told apart."""
        if self.detections is None:
            return {}
        matched, predicted, actual, iou = (
            self._sums(weights, f"panoptic_{name}") for name in ("matched", "predicted", "actual", "matched_iou")
        )
        quality = ratio(iou, (predicted + actual) / 2)
        totals = [counts.sum(axis=1) for counts in (matched, predicted, actual)]
        return {
            "pq_per_class": quality,
            "pq": mean_of_present(quality),
            "instance_f1": ratio(2 * totals[0], totals[1] + totals[2]),
            "instance_precision": ratio(totals[0], totals[1]),
            "instance_recall": ratio(totals[0], totals[2]),
        }

    def precision_scores(self, weights: NDArray[np.int64]) -> Values:
        """As `pixel_scores`: COCO's `ap`, `ap50`, `ap75` and `ap_per_class`; {} where no objects are told apart."""
        if self.detections is None:
            return {}
        precision, _ = self._precision(weights, "all", self.max_detections)
        return {
            "ap_per_class": mean_of_present(precision, axis=2),
            "ap": mean_of_present(precision, axis=(1, 2)),
            "ap50": mean_of_present(precision[:, :, 0]),
            "ap75": mean_of_present(precision[:, :, 5]),
        }

    def other_precision_scores(self, weights: NDArray[np.int64]) -> Values:
        """As `pixel_scores`: the rest of COCO's twelve figures: AP by size, and average recall."""
        if self.detections is None:
            return {}
        scores = {}
        for area in ("small", "medium", "large"):
            precision, recall = self._precision(weights, area, self.max_detections)
            scores[f"ap_{area}"] = mean_of_present(precision, axis=(1, 2))
            scores[f"ar_{area}"] = mean_of_present(recall, axis=(1, 2))
        for most in (1, 10, 100):
            _, recall = self._precision(weights, "all", most)
            scores[f"ar{most}"] = mean_of_present(recall, axis=(1, 2))
        return scores

    def main_scores(self, weights: NDArray[np.int64]) -> Values:
        """All of `pixel_scores`, `instance_scores` and `precision_scores`: what is worth resampling."""
        return self.pixel_scores(weights) | self.instance_scores(weights) | self.precision_scores(weights)

    @property
    def longest_ranking(self) -> int:
        """Detections of the class that has most."""
        return max((one.image.size for one in self.detections or ()), default=0)

    def confusion(self) -> NDArray[np.int64]:
        """Pixels int64 [classes, classes], row = actual, column = predicted, over all images."""
        classes = len(self.class_names)
        summed = np.asarray(self.counts["confusion"].sum(axis=0)).ravel()
        return summed.astype(np.int64).reshape(classes, classes + 1)[:, :classes]

    def _sums(self, weights: Any, name: str) -> NDArray[np.float64]:
        """float64 [samples, classes]; exact for counts below 2**53."""
        summed = weights @ self.counts[name]
        return summed.toarray() if sparse.issparse(summed) else np.asarray(summed)

    def _precision(
        self, weights: NDArray[np.int64], area: str, most: int
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(average precision, recall), each float64 [samples, classes, thresholds]."""
        assert self.detections is not None
        shape = (weights.shape[0], len(self.class_names), len(IOU_THRESHOLDS))
        precision, recall = np.full(shape, np.nan), np.full(shape, np.nan)
        positives = weights @ self.objects[area]
        first = list(AREA_RANGES).index(area) * len(IOU_THRESHOLDS)
        for class_id in np.flatnonzero(positives.any(axis=0)).tolist():
            for threshold in range(len(IOU_THRESHOLDS)):
                precision[:, class_id, threshold], recall[:, class_id, threshold] = average_precision(
                    self.detections[class_id], first + threshold, weights, positives[:, class_id], max_detections=most
                )
        return precision, recall


def tally(
    table: pa.Table,
    *,
    where: str | None = None,
    class_names: Sequence[str] | None = None,
    max_detections: int = MAX_DETECTIONS,
) -> Tally:
    """The counts of the rows for which the SQL condition `where` holds.

    `class_names` None: those of the table's metadata. Raises UsageError where a condition cannot be evaluated, no row
    is left, an image has two rows (of two models, say: choose one by `where`), or the classes are not known.
    """
    if not 1 <= max_detections <= KEPT_DETECTIONS:
        raise UsageError(f"max_detections must be 1 to {KEPT_DETECTIONS}, which are kept, got {max_detections}")
    if class_names is None:
        metadata = table.schema.metadata or {}
        if CLASSES_KEY not in metadata:
            raise UsageError("the table does not name its classes: give class_names")
        class_names = json.loads(metadata[CLASSES_KEY])
    chosen = chosen_rows(table, where)
    measured = chosen.filter(pc.equal(chosen["status"], "ok"))
    if not measured.num_rows:
        raise UsageError(f"no image was measured{' where ' + where if where else ''}: there is nothing to score")
    measured = measured.sort_by("image_uri").combine_chunks()
    uris = measured["image_uri"].to_pylist()
    twice = next((uri for uri, after in itertools.pairwise(uris) if uri == after), None)
    if twice is not None:
        raise UsageError(f"{twice} was measured more than once: choose one row an image by a condition")
    told_apart = measured["detections"].null_count == 0
    classes = len(class_names)
    detections = _ranked(measured, classes) if told_apart else None
    return Tally(
        class_names=tuple(class_names),
        uris=tuple(uris),
        truth_crc32=measured["truth_crc32"].to_numpy(),
        failed=chosen.num_rows - measured.num_rows,
        counts=_pixel_counts(measured, classes) | (_class_counts(measured, "panoptic", classes) if told_apart else {}),
        detections=detections,
        objects={
            name.removeprefix("objects_"): counts.astype(np.int64)
            for name, counts in (_class_counts(measured, "objects", classes) if told_apart else {}).items()
        },
        max_detections=max_detections,
    )


def chosen_rows(table: pa.Table, where: str | None) -> pa.Table:
    """The rows for which the SQL condition `where` holds; None: all. Raises UsageError for one that cannot be
    evaluated.
    """
    if where is None:
        return table
    plain = [field.name for field in table.schema if not pa.types.is_nested(field.type)]
    numbered = table.select(plain).append_column("_number", pa.array(range(table.num_rows), pa.int64()))
    with duckdb.connect(config={"enable_external_access": "false"}) as connection:
        connection.register("evaluations", numbered)
        try:
            rows = connection.execute(f"SELECT _number FROM evaluations WHERE ({where})").fetchall()
        except duckdb.Error as error:
            raise UsageError(f"the condition {where!r} cannot be evaluated: {str(error).splitlines()[0]}") from error
    return table.take(pa.array(sorted(number for (number,) in rows), pa.int64()))


def _flat(measured: pa.Table, column: str) -> tuple[NDArray[np.int64], dict[str, NDArray[Any]]]:
    """Image of each entry of a list column, and the entries' fields."""
    lists = measured[column].combine_chunks()
    images = pc.list_parent_indices(lists).to_numpy(zero_copy_only=False).astype(np.int64)
    entries = lists.flatten()
    return images, {
        field.name: pc.struct_field(entries, field.name).to_numpy(zero_copy_only=False) for field in entries.type
    }


def _matrix(images: NDArray[Any], classes: NDArray[Any], values: NDArray[Any], shape: tuple[int, int]) -> Any:
    """Sparse float64; entries of one place are added."""
    return sparse.coo_array((values.astype(np.float64), (images, classes)), shape=shape).tocsr()


def _class_counts(measured: pa.Table, column: str, classes: int) -> dict[str, Any]:
    images, fields = _flat(measured, column)
    class_ids = fields.pop("class_id")
    _check_ids(class_ids, classes)
    shape = (measured.num_rows, classes)
    return {f"{column}_{name}": _matrix(images, class_ids, values, shape) for name, values in fields.items()}


def _pixel_counts(measured: pa.Table, classes: int) -> dict[str, Any]:
    images, fields = _flat(measured, "confusion")
    actual, predicted = fields["actual"].astype(np.int64), fields["predicted"].astype(np.int64)
    pixels = fields["pixels"]
    _check_ids(actual, classes)
    # What the model calls nothing has a place of its own, after the classes.
    predicted = np.minimum(predicted, classes)
    right = actual == predicted
    shape = (measured.num_rows, classes)
    called = predicted < classes
    return {
        "intersection": _matrix(images[right], actual[right], pixels[right], shape),
        "actual": _matrix(images, actual, pixels, shape),
        "predicted": _matrix(images[called], predicted[called], pixels[called], shape),
        "confusion": _matrix(
            images, actual * (classes + 1) + predicted, pixels, (measured.num_rows, classes * (classes + 1))
        ),
    } | _class_counts(measured, "boundary", classes)


def _ranked(measured: pa.Table, classes: int) -> tuple[RankedDetections, ...]:
    images, fields = _flat(measured, "detections")
    class_ids = fields["class_id"].astype(np.int64)
    _check_ids(class_ids, classes)
    # Entries are by class, then by rank: a rank is the distance from where class or image last changed.
    position = np.arange(class_ids.size)
    begins = np.ones(class_ids.size, dtype=bool)
    begins[1:] = (class_ids[1:] != class_ids[:-1]) | (images[1:] != images[:-1])
    rank = position - np.maximum.accumulate(np.where(begins, position, 0)) if class_ids.size else position
    order = np.lexsort((position, -fields["score"], class_ids))
    bounds = np.searchsorted(class_ids[order], np.arange(classes + 1))
    ranked = []
    for class_id in range(classes):
        own = order[bounds[class_id] : bounds[class_id + 1]]
        ranked.append(RankedDetections(images[own], rank[own], fields["matched"][own], fields["ignored"][own]))
    return tuple(ranked)


def _check_ids(class_ids: NDArray[Any], classes: int) -> None:
    if class_ids.size and int(class_ids.max()) >= classes:
        raise UsageError(f"the table has class id {int(class_ids.max())}, and {classes} classes are named")
