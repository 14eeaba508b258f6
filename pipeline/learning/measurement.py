"""From Parts of `segments` to Parts of `evaluations`. Owns: one Part's way: its masks, their labels, its rows, the
commit. Must not know: how masks were made, which Parts an evaluation needs, scores.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from models.masks import Instance, decode_mask_png
from pipeline.errors import InfrastructureError, StorageError, UsageError
from pipeline.learning.evaluations import ClassAlignment, evaluations_table, measure_image
from pipeline.learning.labels.place import in_order
from pipeline.learning.labels.source import LabelSource
from pipeline.learning.labels.truth import Item
from pipeline.storage import Storage, uri_name
from pipeline.table.evaluations import BAD_LABEL, TAKEN_OVER, commit_evaluations

#: Rows of a Part that are in memory at once, masks and all.
_ROWS_AT_ONCE = 32
_MESSAGE_CHARS = 500


class Measured(NamedTuple):
    """What became of one Part."""

    rows: int
    errors: int


class Measurer:
    """Holds masks against labels. `stamp` has the columns that all rows of an evaluation share."""

    def __init__(
        self,
        source: LabelSource,
        items: Mapping[str, Item],
        alignment: ClassAlignment,
        *,
        has_instances: bool,
        min_score: float,
        stamp: Mapping[str, Any],
        threads: int,
    ) -> None:
        """`items` by image URI. `threads`: images that are measured at once."""
        self._source = source
        self._items = items
        self._alignment = alignment
        self._has_instances = has_instances
        self._min_score = min_score
        self._stamp = dict(stamp)
        self._threads = threads

    def measure_part(self, storage: Storage, part_uri: str, wanted: Sequence[str], out_uri: str) -> Measured:
        """Commits at `out_uri` a row for each image of the Part whose URI is in `wanted`. Memory: the Part as it is
        stored, and some of its rows. Raises StorageError, InfrastructureError for a Part that is damaged. Safe to
        repeat: a file is never replaced.
        """
        chosen = frozenset(wanted)
        rows = list(in_order(self._row, _rows(storage, part_uri, chosen), threads=self._threads))
        if len(rows) != len(chosen):
            raise InfrastructureError(
                f"{part_uri} holds {len(rows)} of the {len(chosen)} rows that it had: see `maskmill verify`"
            )
        commit_evaluations(storage, out_uri, evaluations_table(rows, self._alignment.names))
        return Measured(len(rows), sum(row["status"] != "ok" for row in rows))

    def _row(self, segmented: Mapping[str, Any]) -> dict[str, Any]:
        item = self._items[segmented["image_uri"]]
        row = {name: segmented[name] for name in TAKEN_OVER} | self._stamp
        row |= {
            "evaluated_at": dt.datetime.now(dt.UTC),
            "image_name": item.name,
            "stratum": item.stratum,
            "label_group": item.group,
        }
        if segmented["status"] != "ok":
            return row
        try:
            class_ids = self._alignment.class_ids(decode_mask_png(segmented["mask"]["bytes"]))
            truth = self._source.labels(item)
            if self._has_instances and self._source.has_objects and truth.objects is None:
                raise UsageError("the label tells no objects apart, as those of other images do")
            return row | measure_image(class_ids, self._instances(segmented), truth, min_score=self._min_score)
        except (UsageError, StorageError) as error:
            if isinstance(error, StorageError) and error.kind != "missing":
                raise
            return row | {"status": "error", "error_kind": BAD_LABEL, "error_message": str(error)[:_MESSAGE_CHARS]}

    def _instances(self, segmented: Mapping[str, Any]) -> list[Instance] | None:
        if not self._has_instances:
            return None
        return self._alignment.instances(
            Instance(one["class_id"], one["score"], tuple(one["bbox"]), one["area"], one["rle"])
            for one in segmented["instances"] or ()
        )


def _rows(storage: Storage, part_uri: str, wanted: frozenset[str]) -> Iterator[dict[str, Any]]:
    columns = [*TAKEN_OVER, "mask", "instances"]
    try:
        file = pq.ParquetFile(pa.BufferReader(storage.get(part_uri).data))
        for batch in file.iter_batches(_ROWS_AT_ONCE, columns=columns):
            keep = [uri in wanted for uri in batch.column("image_uri").to_pylist()]
            yield from batch.filter(pa.array(keep)).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise InfrastructureError(
            f"{uri_name(part_uri)} cannot be read ({error}): `maskmill verify` says what to do"
        ) from error
