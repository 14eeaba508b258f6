"""Our own table as labels: a teacher's masks train a student. Owns: which rows count and what their ids mean.
Must not know: other layouts, how the table is written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from models.card import Card
from models.masks import decode_mask_png
from pipeline.errors import UsageError
from pipeline.learning.labels.mask_folder import ClassList
from pipeline.learning.labels.place import Place
from pipeline.learning.labels.source import Gap
from pipeline.learning.labels.splits import Entry, Splitting, choose_splits
from pipeline.learning.labels.truth import Item, LabelError, LabelledObject, Labels
from pipeline.storage import duckdb_path, join_uri, open_storage, uri_scheme
from pipeline.table.catalog import connect, part_sizes

_COLUMNS = "image_uri, image_etag, width, height, mask.bytes AS mask, instances"


class SegmentsLabels:
    """A `LabelSource` over the rows that are `ok` in the view `images`. Names are the images' URIs.

    Masks are held in memory, compressed as they are in the table.
    """

    layout: Literal["segments"] = "segments"

    def __init__(self, place: Place, splitting: Splitting | None, *, model: str | None) -> None:
        """Raises UsageError where DEST holds no table, or masks of several models and `model` names none of them."""
        self._place = place
        self.title = str(place)
        connection = connect(place.uri, profile=place.profile)
        versions = dict(connection.execute("SELECT DISTINCT model, version FROM images WHERE status = 'ok'").fetchall())
        if model is None and len(versions) == 1:
            model = next(iter(versions))
        if model not in versions:
            raise UsageError(
                f"{place} holds masks of {', '.join(sorted(versions)) or 'no model'}: name one of these models"
            )
        card = _card(connection, place, f"/model={model}/version={versions[model]}/")
        classes = sorted((info.id, info.name) for info in card.classes)
        index_of = {raw: index for index, (raw, _) in enumerate(classes)}
        self._classes = ClassList(tuple(name for _, name in classes), index_of, frozenset())
        self.class_names = self._classes.names
        self.background_id = None if card.background_id is None else index_of[card.background_id]
        self.has_objects = card.task == "instance"
        query = f"SELECT {_COLUMNS} FROM images WHERE status = 'ok' AND model = ? ORDER BY image_uri"
        self._rows: dict[str, Mapping[str, Any]] = {}
        for batch in connection.sql(query, params=[model]).to_arrow_table().to_batches(1024):
            self._rows.update((row["image_uri"], row) for row in batch.to_pylist())
        self._stores = {
            scheme: open_storage(uri, profile=place.profile)
            for scheme, uri in {uri_scheme(uri): uri for uri in self._rows}.items()
        }
        self.entries = {uri: Entry(uri) for uri in self._rows}
        self.splits = choose_splits(place, self.entries.values(), splitting)
        self.gaps: tuple[Gap, ...] = ()

    def item(self, entry: Entry) -> Item:
        row = self._rows[entry.name]
        return Item(entry.name, row["height"], row["width"], entry.stratum, entry.group)

    def labels(self, item: Item) -> Labels:
        row = self._rows[item.name]
        try:
            ids = decode_mask_png(row["mask"])
        except (OSError, ValueError) as error:
            raise LabelError(f"the mask of {item.name} cannot be read: {error}", kind="unreadable") from error
        class_ids, unknown = self._classes.indexed(ids.astype(np.int32))
        objects = None
        if self.has_objects:
            found = list(row["instances"] or ())
            if strange := {one["class_id"] for one in found} - self._classes.index_of.keys():
                raise LabelError(
                    f"objects of {item.name} have classes {strange} that the card lacks", kind="unreadable"
                )
            objects = tuple(
                LabelledObject(self._classes.index_of[one["class_id"]], dict(one["rle"]), float(one["area"]))
                for one in found
            )
        return Labels(*class_ids.shape, class_ids=class_ids, objects=objects, unknown=unknown)

    def image_uri(self, name: str) -> str:
        return name

    def image_bytes(self, name: str) -> bytes:
        """As `LabelSource`. Raises LabelError where the image is no longer the one that the mask is of."""
        blob = self._stores[uri_scheme(name)].get(name)
        etag = self._rows[name]["image_etag"]
        if etag and blob.etag and etag != blob.etag:
            raise LabelError(
                f"{name} has changed since its mask was made (etag {blob.etag}, then {etag}): segment it again",
                kind="size_mismatch",
            )
        return blob.data

    def label_bytes(self, name: str) -> bytes:
        row = self._rows[name]
        objects = [[one["class_id"], one["rle"]["counts"].hex()] for one in row["instances"] or ()]
        return bytes(row["mask"]) + json.dumps(objects).encode()


def _card(connection: Any, place: Place, folder: str) -> Card:
    """The card of the first Part in `folder` that has one (a Part that only takes a name has none)."""
    for uri in part_sizes(open_storage(place.uri, profile=place.profile), join_uri(place.uri, "segments")):
        if folder in uri:
            found = connection.execute(
                "SELECT decode(value) FROM parquet_kv_metadata(?) WHERE decode(key) = 'maskmill_card'",
                [duckdb_path(uri)],
            ).fetchall()
            if found and found[0][0] != "{}":
                return Card.model_validate_json(found[0][0])
    raise UsageError(f"{place} has no model card for {folder.strip('/')}: its class ids mean nothing")
