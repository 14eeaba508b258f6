"""Rows of the table `evaluations`: one image's prediction held against its labels. Owns: what is counted, and between
which classes. Must not know: networks, how images are read, scores.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from models.boundaries import boundary_counts
from models.card import Card, DetectionsPostprocessing
from models.masks import Instance, mask_crc32
from models.matching import AREA_RANGES, match_instances, panoptic_counts
from models.metrics import sparse_confusion
from pipeline.errors import UsageError
from pipeline.learning.labels.truth import IGNORE_ID, Labels
from pipeline.table.evaluations import CLASSES_KEY, EVALUATIONS


class ClassAlignment(NamedTuple):
    """Between the ids of a model and those of a data set; a class is its name."""

    #: The data set's classes, then those that only the model has.
    names: tuple[str, ...]
    #: uint8 [256]: index into `names` by the model's id; IGNORE_ID for ids that the model does not have.
    index_of: NDArray[np.uint8]

    def class_ids(self, predicted: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """uint8 [h, w]: a model's mask in ids of `names`."""
        return self.index_of[predicted]

    def instances(self, predicted: Iterable[Instance]) -> list[Instance]:
        """A model's instances with class ids of `names`."""
        return [one._replace(class_id=int(self.index_of[one.class_id])) for one in predicted]


def align_classes(
    model_classes: Mapping[int, str], dataset_classes: Sequence[str], *, renamed: Mapping[str, str] | None = None
) -> ClassAlignment:
    """Classes of a card (name by id) and of a data set (names by id) that are the same by name.

    `renamed`: names of the data set by those of the model, where they differ; several may become one. A class of the
    model alone is wrong wherever it is predicted. Raises UsageError where no class is the same, other than one called
    background, and where `renamed` speaks of classes that are none.
    """
    renamed = dict(renamed or {})
    for ours, theirs in renamed.items():
        if ours not in model_classes.values():
            raise UsageError(f"{ours!r} is no class of the model: it has {', '.join(model_classes.values())}")
        if theirs not in dataset_classes:
            raise UsageError(f"{theirs!r} is no class of the data set: it has {', '.join(dataset_classes)}")
    model_classes = {class_id: renamed.get(name, name) for class_id, name in model_classes.items()}
    names = list(dict.fromkeys([*dataset_classes, *model_classes.values()]))
    if len(names) > IGNORE_ID:
        raise UsageError(f"model and data set have {len(names)} classes together; {IGNORE_ID} fit into a mask")
    shared = set(model_classes.values()) & set(dataset_classes)
    if not shared - {"background"}:
        raise UsageError(
            f"the model's classes ({', '.join(model_classes.values())}) are none of the data set's "
            f"({', '.join(dataset_classes)}): say which is which by --map MODEL_CLASS=DATASET_CLASS"
        )
    index_of = np.full(256, IGNORE_ID, dtype=np.uint8)
    for class_id, name in model_classes.items():
        index_of[class_id] = names.index(name)
    return ClassAlignment(tuple(names), index_of)


def counting_score(card: Card) -> float:
    """The score that an object needs to count for PQ, F1, precision and recall, unless somebody says otherwise:
    detectors list what they hardly believe in, and are cut at 0.5; other models mean all that they give.
    """
    return 0.5 if isinstance(card.postprocessing, DetectionsPostprocessing) else 0.0


def measure_image(
    class_ids: NDArray[np.uint8],
    instances: Sequence[Instance] | None,
    truth: Labels,
    *,
    min_score: float = 0.0,
) -> dict[str, Any]:
    """The columns `MEASURES` of one image.

    `class_ids` uint8 [h, w] and `instances` are the prediction, in ids of the data set (see `align_classes`);
    `instances` None: the model tells no objects apart. `min_score`: detections below it are left out of the panoptic
    counts, and so of PQ, F1, precision and recall; average precision always takes all. Raises UsageError where
    prediction and labels differ in size, or the labels have ids that are no class.
    """
    if class_ids.shape != (truth.height, truth.width):
        raise UsageError(f"the prediction has shape {class_ids.shape}, the label {(truth.height, truth.width)}")
    if truth.unknown:
        raise UsageError(f"the label has ids that are no class: {sorted(truth.unknown)}")
    actual = truth.class_ids()
    ignored = truth.ignored()
    row: dict[str, Any] = {
        "truth_crc32": mask_crc32(actual, [one.rle for one in truth.objects or ()]),
        "ignored_pixels": int(np.count_nonzero(actual == IGNORE_ID)),
        "confusion": _structs(
            ("actual", "predicted", "pixels"), sparse_confusion(class_ids, actual, ignore_id=IGNORE_ID)
        ),
        "boundary": _structs(
            ("class_id", "actual", "actual_matched", "predicted", "predicted_matched"),
            boundary_counts(class_ids, actual, ignore_id=IGNORE_ID),
        ),
        "panoptic": None,
        "detections": None,
        "objects": None,
    }
    if instances is None or truth.objects is None:
        return row
    matches = match_instances(instances, truth.objects)
    row["panoptic"] = [
        counts._asdict() for counts in panoptic_counts(instances, truth.objects, ignored, min_score=min_score)
    ]
    row["detections"] = [
        {"class_id": one.class_id, "score": score, "matched": matched, "ignored": skipped}
        for one in matches
        for score, matched, skipped in zip(one.scores.tolist(), one.matched.tolist(), one.ignored.tolist(), strict=True)
    ]
    row["objects"] = [{"class_id": one.class_id, **dict(zip(AREA_RANGES, one.objects, strict=True))} for one in matches]
    return row


def evaluations_table(rows: Iterable[Mapping[str, Any]], class_names: Sequence[str]) -> pa.Table:
    """A table of EVALUATIONS with these class names; absent keys become null. Tables of the same names concatenate."""
    schema = EVALUATIONS.with_metadata({CLASSES_KEY: json.dumps(list(class_names)).encode()})
    return pa.Table.from_pylist([dict(row) for row in rows], schema=schema)


def _structs(names: Sequence[str], rows: NDArray[np.int64]) -> list[dict[str, int]]:
    return [dict(zip(names, row, strict=True)) for row in rows.tolist()]
