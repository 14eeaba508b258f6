"""The table `segments`. Owns: its Arrow schema in every version, and where its files lie under DEST.
Must not know: how rows are made or files written.

A column that is added, taken away or given another meaning is a new version: the old schema stays in `SCHEMAS`, and
what it lacks is NULL to readers. All Parts of a run are of the version in its plan.
"""

from __future__ import annotations

import datetime as dt
import re
from typing import NamedTuple

import pyarrow as pa

SCHEMA_VERSION = "1"

_CLASS = pa.struct(
    [
        ("class_id", pa.int16()),
        ("name", pa.string()),
        ("pixels", pa.int64()),
        ("fraction", pa.float32()),
        ("mean_confidence", pa.float32()),
        ("regions", pa.int32()),
    ]
)
_RLE = pa.struct([("size", pa.list_(pa.int32())), ("counts", pa.binary())])
_INSTANCE = pa.struct(
    [
        ("class_id", pa.int16()),
        ("name", pa.string()),
        ("score", pa.float32()),
        ("bbox", pa.list_(pa.float32())),
        ("area", pa.int64()),
        ("rle", _RLE),
    ]
)

#: One row per image and attempt. See docs/table.md for what each column means.
SEGMENTS = pa.schema(
    [
        ("image_uri", pa.string()),
        ("image_etag", pa.string()),
        ("listed_etag", pa.string()),
        ("model_version", pa.string()),
        ("settings_digest", pa.string()),
        ("run_id", pa.string()),
        ("node", pa.string()),
        ("task", pa.string()),
        ("attempt", pa.int16()),
        ("processed_at", pa.timestamp("us", "UTC")),
        ("image_bytes", pa.int64()),
        ("image_modified", pa.timestamp("us", "UTC")),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("image_format", pa.string()),
        ("status", pa.string()),
        ("error_kind", pa.string()),
        ("error_message", pa.string()),
        ("mean_confidence", pa.float32()),
        ("mean_entropy", pa.float32()),
        ("foreground_fraction", pa.float32()),
        ("brightness", pa.float32()),
        ("contrast", pa.float32()),
        ("classes", pa.list_(_CLASS)),
        ("mask", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("mask_crc32", pa.int64()),
        ("instances", pa.list_(_INSTANCE)),
        ("fetch_ms", pa.float32()),
        ("decode_ms", pa.float32()),
        ("infer_ms", pa.float32()),
        ("encode_ms", pa.float32()),
    ]
)

#: What the files of each version hold, oldest first.
SCHEMAS = {"1": SEGMENTS}

#: The frozen list of a run: what a shard is a slice of.
WORK = pa.schema(
    [
        ("uri", pa.string()),
        ("etag", pa.string()),
        ("size_bytes", pa.int64()),
        ("modified", pa.timestamp("us", "UTC")),
        ("attempt", pa.int16()),
    ]
)

#: Sortable by time; what `engine.ledger.new_run_id` makes.
RUN_ID = re.compile(r"\d{8}T\d{6}Z-[0-9a-f]{6}")
_PART_NAME = re.compile(rf"(?P<run_id>{RUN_ID.pattern})-(?P<ordinal>\d{{6,}})\.parquet")


class PartPlace(NamedTuple):
    """The folder of a run's Parts below DEST, and so the path keys of its rows."""

    model: str
    version: str
    date: dt.date

    def folder(self) -> str:
        """`segments/model=<name>/version=<v>/date=<date>`, relative to DEST."""
        return f"segments/model={self.model}/version={self.version}/date={self.date.isoformat()}"


def shard_bounds(planned: int, *, shard_size: int, canary: int = 0) -> list[tuple[int, int]]:
    """First and last-plus-one row in the frozen list of every shard, by ordinal. Canary shards come first and end at
    the canary. A run of no images has no shards."""
    if not planned:
        return []
    cuts = list(range(0, canary, shard_size)) + list(range(canary, planned, shard_size))
    return list(zip(cuts, [*cuts[1:], planned], strict=True))


def part_name(run_id: str, ordinal: int) -> str:
    """The one name under which shard `ordinal` of `run_id` can ever be committed."""
    return f"{run_id}-{ordinal:06d}.parquet"


def parse_part_name(name: str) -> tuple[str, int] | None:
    """(run_id, ordinal), or None where `name` is no Part of ours (foreign files are left alone)."""
    found = _PART_NAME.fullmatch(name)
    return (found["run_id"], int(found["ordinal"])) if found else None
