"""Parquet that Hugging Face's `datasets` opens with its pictures. Owns: `data/`. Must not know: other formats, where
rows come from.

(Format: huggingface.co/docs/datasets, "Image": a struct of `bytes` and `path`, and the schema's metadata `huggingface`,
which names the columns that are images; the others explain themselves.)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.insight.export.shape import Index, Made, Source, Subject
from pipeline.table.schema import SEGMENTS

_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_COLUMNS = (
    "mask", "image_uri", "image_etag", "width", "height", "mean_confidence", "mean_entropy", "foreground_fraction",
    "brightness", "contrast", "classes", "instances",
)  # fmt: skip
# Their viewer reads a row group for every page that it shows.
_ROW_GROUP_ROWS = 64


class HuggingFace:
    """A `Format`. One file a piece; `image` is its first column where images are taken along."""

    columns = _COLUMNS

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        images = ("image", "mask") if subject.with_images else ("mask",)
        fields = [pa.field("image", _IMAGE)] if subject.with_images else []
        fields += [SEGMENTS.field(name) for name in _COLUMNS]
        fields += [pa.field(name, pa.string()) for name in ("model", "version")]
        features = {"info": {"features": {name: {"_type": "Image"} for name in images}}}
        self._schema = pa.schema(fields, metadata={"huggingface": json.dumps(features)})

    def make(self, source: Source) -> Made:
        record = {name: source.row[name] for name in _COLUMNS}
        record |= {"model": self._subject.model, "version": self._subject.version}
        if source.data is not None:
            record["image"] = {"bytes": source.data, "path": source.name}
        record["mask"] = {"bytes": source.row["mask"]["bytes"], "path": f"{source.stem}.png"}
        return Made(1, record=record)

    def gather(self, records: Sequence[Mapping[str, Any]], digest: str) -> list[tuple[str, bytes]]:
        if not records:
            return []
        sink = pa.BufferOutputStream()
        table = pa.Table.from_pylist(list(records), schema=self._schema)
        pq.write_table(table, sink, compression="zstd", row_group_size=_ROW_GROUP_ROWS, write_page_index=True)
        return [(f"data/train-{digest}.parquet", sink.getvalue().to_pybytes())]

    def indexes(self) -> list[Index]:
        return []
