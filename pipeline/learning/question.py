"""What an evaluation asks: which rows of `segments` are held against which labels. Owns: which rows count, and what
makes two evaluations the same. Must not know: what is counted, scores.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import duckdb

from pipeline.corpus.manifest import Corpus
from pipeline.errors import InfrastructureError
from pipeline.learning.dataset import Dataset
from pipeline.learning.labels.place import in_order
from pipeline.learning.labels.truth import Item
from pipeline.storage import Storage, join_uri, uri_name
from pipeline.table.catalog import TERMINAL, open_duckdb, part_sizes, read_parts_sql, sql_text, unreadable
from pipeline.table.evaluations import evaluation_folder

#: Of what is counted, and how. A change of either is another evaluation.
_MEASURES_VERSION = 1


class Masks(NamedTuple):
    """Whose masks: of a version of a model, made under these settings, in this table."""

    dest: str
    model_name: str
    model_version: str
    settings_digest: str


class Question(NamedTuple):
    """What is asked. Equal masks, labels and settings give equal ids."""

    evaluation_id: str
    #: Where the answer lies: a folder of DEST, as a URI.
    folder: str
    #: URIs of images by URI of the Part of `segments` that holds their rows.
    wanted: dict[str, list[str]]


def ask(masks: Masks, storage: Storage, corpus: Corpus, dataset: Dataset, settings: Mapping[str, Any]) -> Question:
    """The question about the images of `corpus`, which are those of `dataset`. `settings`: whatever else changes what
    is counted, as JSON has it.

    Of an image the newest terminal row of its present bytes counts, else the newest that there is. Raises
    InfrastructureError where an image has none, or the table cannot be read; StorageError where a label cannot.
    """
    rows, part_of = _rows_that_count(masks, storage, corpus)
    absent = corpus.rows - len(rows)
    if absent:
        raise InfrastructureError(
            f"{absent} of {corpus.rows} images have no row in {masks.dest} for what they are now: give the command "
            "again"
        )
    wanted: dict[str, list[str]] = {}
    for uri, *_, part in rows:
        wanted.setdefault(part_of[part], []).append(uri)
    said = {"measures": _MEASURES_VERSION, "masks": masks[1:], "settings": settings}
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for row in rows:
        digest.update(json.dumps(row).encode())
    for name, label in in_order(lambda item: _label(dataset, item), dataset.items):
        digest.update(json.dumps([name, label]).encode())
    evaluation_id = digest.hexdigest()[:12]
    folder = evaluation_folder(masks.model_name, masks.model_version, evaluation_id)
    return Question(evaluation_id, join_uri(masks.dest, folder), wanted)


def _rows_that_count(masks: Masks, storage: Storage, corpus: Corpus) -> tuple[list[tuple[Any, ...]], dict[str, str]]:
    """(a tuple an image, sorted by URI, whose last is the name of its Part; Parts' URIs by name)."""
    folder = join_uri(masks.dest, f"segments/model={masks.model_name}/version={masks.model_version}")
    sizes = part_sizes(storage, folder)
    with open_duckdb(storage, sizes=sizes) as connection:
        try:
            rows: list[tuple[Any, ...]] = connection.execute(
                f"""SELECT s.image_uri, s.image_etag, s.status, s.mask_crc32,
                    regexp_extract(s.filename, '[^/\\\\]+$') AS part
                FROM {read_parts_sql(list(sizes), filename=True)} s
                JOIN (SELECT DISTINCT uri, coalesce(etag, '') AS etag FROM {corpus.sql}) c
                    ON s.image_uri = c.uri AND c.etag IN (s.listed_etag, s.image_etag)
                WHERE s.settings_digest = {sql_text(masks.settings_digest)}
                QUALIFY row_number() OVER (PARTITION BY s.image_uri ORDER BY {TERMINAL} DESC, s.processed_at DESC) = 1
                ORDER BY s.image_uri"""
            ).fetchall()
        except duckdb.Error as error:
            raise unreadable(masks.dest, error) from error
    return rows, {uri_name(uri): uri for uri in sizes}


def _label(dataset: Dataset, item: Item) -> tuple[str, str]:
    return item.name, hashlib.sha256(dataset.source.label_bytes(item.name)).hexdigest()
