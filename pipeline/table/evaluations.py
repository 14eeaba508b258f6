"""The table `evaluations`: what a model got right and wrong, image by image. Owns: its Arrow schema. Must not know: how
rows are made or scored.

Counts, never scores: any selection of rows has its own mIoU, AP and the rest, without an image being read again.
"""

from __future__ import annotations

import pyarrow as pa

from pipeline.table.schema import SEGMENTS

#: Key of the schema's metadata: JSON list of the class names by id, to which all ids of the table refer.
CLASSES_KEY = b"maskmill_classes"

_SHARED = (
    "image_uri", "image_etag", "listed_etag", "model_version", "settings_digest", "run_id", "node", "task", "attempt",
    "processed_at", "image_bytes", "image_modified", "width", "height", "image_format", "status", "error_kind",
    "error_message", "mean_confidence", "mean_entropy", "foreground_fraction", "brightness", "contrast",
)  # fmt: skip

_CONFUSION = pa.struct([("actual", pa.int16()), ("predicted", pa.int16()), ("pixels", pa.int64())])
_BOUNDARY = pa.struct(
    [
        ("class_id", pa.int16()),
        ("actual", pa.int64()),
        ("actual_matched", pa.int64()),
        ("predicted", pa.int64()),
        ("predicted_matched", pa.int64()),
    ]
)
_PANOPTIC = pa.struct(
    [
        ("class_id", pa.int16()),
        ("matched", pa.int32()),
        ("predicted", pa.int32()),
        ("actual", pa.int32()),
        ("matched_iou", pa.float64()),
    ]
)
_DETECTION = pa.struct(
    [("class_id", pa.int16()), ("score", pa.float64()), ("matched", pa.int64()), ("ignored", pa.int64())]
)
_OBJECTS = pa.struct(
    [
        ("class_id", pa.int16()),
        ("all", pa.int32()),
        ("small", pa.int32()),
        ("medium", pa.int32()),
        ("large", pa.int32()),
    ]
)

#: The columns that measuring an image gives; null in rows that are errors.
MEASURES = pa.schema(
    [
        # Which labels the image was held against: equal numbers, equal labels.
        ("truth_crc32", pa.int64()),
        ("ignored_pixels", pa.int64()),
        # Only pairs that occur, ignored pixels left out.
        ("confusion", pa.list_(_CONFUSION)),
        # See models.boundaries.boundary_counts.
        ("boundary", pa.list_(_BOUNDARY)),
        # Null from here on where model or labels tell no objects apart. See models.matching.
        ("panoptic", pa.list_(_PANOPTIC)),
        # By class, then descending score; the flags of models.matching.ClassMatches.
        ("detections", pa.list_(_DETECTION)),
        # Objects that count, in each of COCO's area ranges.
        ("objects", pa.list_(_OBJECTS)),
    ]
)

#: One row per image. Columns that `segments` has too mean the same; `split` is of the labels.
EVALUATIONS = pa.schema([*(SEGMENTS.field(name) for name in _SHARED), pa.field("split", pa.string()), *MEASURES])
