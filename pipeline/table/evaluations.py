"""The table `evaluations`: what a model got right and wrong, image by image. Owns: its Arrow schema, where its files
lie under DEST, writing and reading them. Must not know: how rows are made or scored.

Counts, never scores: any selection of rows has its own mIoU, AP and the rest, without an image being read again.

    DEST/evaluations/model=<name>/version=<v>/evaluation=<id>/<name of the Part of segments>.parquet
"""

from __future__ import annotations

import io
import re

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import InfrastructureError, StorageError, UsageError
from pipeline.storage import Storage, join_uri, normalize_uri, open_storage
from pipeline.table.catalog import files_below
from pipeline.table.schema import SEGMENTS

#: Key of the schema's metadata: JSON list of the class names by id, to which all ids of the table refer.
CLASSES_KEY = b"maskmill_classes"

_SHARED = (
    "image_uri", "image_etag", "listed_etag", "model_version", "settings_digest", "run_id", "node", "task", "attempt",
    "processed_at", "image_bytes", "image_modified", "width", "height", "image_format", "status", "error_kind",
    "error_message", "mean_confidence", "mean_entropy", "foreground_fraction", "brightness", "contrast", "mask_crc32",
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

_LABELLED = pa.schema(
    [
        # Which question the row answers: model, settings, images, labels, classes. See docs/evaluation.md.
        ("evaluation_id", pa.string()),
        ("evaluated_at", pa.timestamp("us", "UTC")),
        ("model_name", pa.string()),
        ("dataset", pa.string()),
        ("split", pa.string()),
        # What the data set says of the image: its name, and the stratum and group that splits and sampling go by.
        ("image_name", pa.string()),
        ("stratum", pa.string()),
        ("label_group", pa.string()),
    ]
)

#: One row per image of an evaluation. Columns that `segments` has too mean the same, but for one more `error_kind`.
EVALUATIONS = pa.schema([*_LABELLED, *(SEGMENTS.field(name) for name in _SHARED), *MEASURES])
#: Columns of `segments` that a row takes over.
TAKEN_OVER = _SHARED
#: `error_kind` of a row whose image was segmented, and whose label cannot be held against it.
BAD_LABEL = "bad_label"

_ID = re.compile(r"/evaluation=([0-9a-f]+)/")


def evaluation_folder(model: str, version: str, evaluation_id: str) -> str:
    """The folder of an evaluation's files, relative to DEST."""
    return f"evaluations/model={model}/version={version}/evaluation={evaluation_id}"


def commit_evaluations(storage: Storage, uri: str, table: pa.Table) -> bool:
    """Puts a table of EVALUATIONS at `uri`, create-only. True: it is ours; False: it was there already, which is
    success too. Raises StorageError. Safe to retry.
    """
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", compression_level=1, write_page_checksum=True)
    return storage.put_new(uri, sink.getvalue())


def read_evaluation(storage: Storage, dest: str, model: str, version: str, evaluation_id: str) -> pa.Table:
    """All rows of one evaluation, in no order. Raises StorageError, InfrastructureError for a file that is damaged."""
    folder = join_uri(dest, evaluation_folder(model, version, evaluation_id))
    uris = [uri for uri in files_below(storage, folder) if uri.endswith(".parquet")]
    return _concatenated(storage, uris) if uris else EVALUATIONS.empty_table()


def read_evaluations(
    dest: str, *, model_version: str, evaluation_id: str | None = None, profile: str | None = None
) -> pa.Table:
    """The rows of the newest evaluation in DEST of this version of a model, or of the one of that id: one row an image,
    class names in the metadata, as `pipeline.learning.scores.score` and `comparison.compare` take them.

    Raises UsageError where there is none, StorageError, InfrastructureError.
    """
    dest = normalize_uri(dest)
    storage = open_storage(dest, profile=profile)
    of_id: dict[str, list[str]] = {}
    try:
        for uri in files_below(storage, join_uri(dest, "evaluations")):
            found = _ID.search(uri)
            if found and uri.endswith(".parquet") and f"/version={model_version}/" in uri:
                of_id.setdefault(found[1], []).append(uri)
    except StorageError as error:
        raise error.told(f"{dest} cannot be read: {error}") from error
    if evaluation_id is not None:
        of_id = {key: uris for key, uris in of_id.items() if key == evaluation_id}
    tables = {key: _concatenated(storage, uris) for key, uris in of_id.items()}
    tables = {key: table for key, table in tables.items() if table.num_rows}
    if not tables:
        which = f" {evaluation_id}" if evaluation_id else ""
        raise UsageError(
            f"{dest} holds no evaluation{which} of model version {model_version}: `maskmill evaluate` makes one"
        )
    return max(tables.values(), key=lambda table: pc.max(table["evaluated_at"]).as_py())


def _concatenated(storage: Storage, uris: list[str]) -> pa.Table:
    tables = []
    for uri in uris:
        try:
            tables.append(pq.read_table(pa.BufferReader(storage.get(uri).data)))
        except (pa.ArrowException, OSError) as error:
            raise InfrastructureError(
                f"{uri} is damaged ({error}): remove it, and the same `maskmill evaluate` makes it again"
            ) from error
    return pa.concat_tables(tables)
