"""One file of the table, looked at from end to end. Owns: what can be wrong with a Part by itself.
Must not know: runs, other Parts, how damage is mended.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.storage import Storage, local_path
from pipeline.table.schema import SCHEMAS

_EXAMPLES = 3
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

#: What Arrow raises for bytes that are no Parquet, or not any more.
UNREADABLE = (pa.ArrowException, OSError, ValueError)


class Fault(NamedTuple):
    """Something wrong with a Part."""

    kind: str
    message: str


class Inspected(NamedTuple):
    """A Part after inspection. `readable`: every page of it. `rows`: how many by error kind, `ok` for none."""

    readable: bool
    faults: list[Fault]
    rows: Counter[str]
    instances: int


def inspect_part(storage: Storage, uri: str, *, run_id: str, version: str, deep: bool) -> Inspected:
    """Reads every page of a Part and checks its rows against each other and against what the file's place says.

    Of each row that is `ok`: the mask, the classes and the instances are of the image's size; with `deep` the mask also
    decodes, and has the checksum and the classes that the row tells. Raises StorageError where the store fails. Memory:
    the file where it is remote, and one row group.
    """
    found, rows, instances = _Findings(), Counter[str](), 0
    try:
        file = open_parquet(storage, uri)
        if why := _schema_fault(file.schema_arrow):
            return Inspected(False, [Fault("wrong_schema", why)], rows, instances)
        for index in range(file.num_row_groups):
            group = file.read_row_group(index)
            _check_rows(group, found, run_id, version, deep)
            rows.update(kind or "ok" for kind in group["error_kind"].to_pylist())
            instances += pc.sum(pc.list_value_length(group["instances"])).as_py() or 0
    except UNREADABLE as error:
        return Inspected(False, [Fault("unreadable_file", reason(error))], rows, instances)
    return Inspected(True, found.faults(), rows, instances)


def _schema_fault(schema: pa.Schema) -> str:
    said = (schema.metadata or {}).get(b"maskmill_schema_version", b"").decode("utf-8", "replace")
    if not said:
        return "it names no schema version"
    if said not in SCHEMAS:
        return f"its schema version is {said!r}, and this release knows {', '.join(SCHEMAS)}"
    return "" if schema.equals(SCHEMAS[said]) else f"its columns are not those of schema version {said}"


def open_parquet(storage: Storage, uri: str) -> pq.ParquetFile:
    """A Parquet file of a store, its pages checked as they are read where they have checksums. Raises one of UNREADABLE
    where it is none, StorageError where the store fails."""
    if uri.startswith("file://"):
        return pq.ParquetFile(pa.memory_map(local_path(uri)), page_checksum_verification=True)
    return pq.ParquetFile(pa.BufferReader(storage.get(uri).data), page_checksum_verification=True)


def why_unreadable(storage: Storage, uri: str) -> str:
    """Why a Parquet file cannot be read from end to end; `""` where it can. Raises StorageError."""
    try:
        file = open_parquet(storage, uri)
        for index in range(file.num_row_groups):
            file.read_row_group(index)
    except UNREADABLE as error:
        return reason(error)
    return ""


def reason(error: BaseException) -> str:
    """The gist of what Arrow or DuckDB says of a file."""
    return "it cannot be read: " + (str(error).strip() or type(error).__name__).splitlines()[0]


class _Findings:
    """Faults by kind, each with how many rows have it and the first few."""

    def __init__(self) -> None:
        self._examples: dict[str, list[str]] = {}
        self._counts: dict[str, int] = {}

    def add(self, kind: str, what: str) -> None:
        self._counts[kind] = self._counts.get(kind, 0) + 1
        examples = self._examples.setdefault(kind, [])
        if len(examples) < _EXAMPLES:
            examples.append(what)

    def faults(self) -> list[Fault]:
        faults = []
        for kind, count in self._counts.items():
            more = f"; and {count - _EXAMPLES} more" if count > _EXAMPLES else ""
            faults.append(Fault(kind, "; ".join(self._examples[kind]) + more))
        return faults


def _check_rows(rows: pa.Table, found: _Findings, run_id: str, version: str, deep: bool) -> None:
    columns = {name: rows[name].to_pylist() for name in ("image_uri", "run_id", "model_version", "status")}
    for uri, of_run, of_version, _ in zip(*columns.values(), strict=True):
        if (of_run, of_version) != (run_id, version):
            found.add("foreign_rows", f"{uri!r} is of run {of_run} and model version {of_version}")
    ok = rows.filter(pc.equal(rows["status"], "ok"))
    for row in _ok_rows(ok):
        _check_sizes(row, found)
        if deep:
            _check_mask(row, found)


def _ok_rows(ok: pa.Table) -> Iterator[dict[str, Any]]:
    names = ("image_uri", "width", "height", "classes", "mask", "mask_crc32", "instances")
    columns = {name: ok[name].to_pylist() for name in names if name in ok.column_names}
    for values in zip(*columns.values(), strict=True):
        yield dict(zip(columns, values, strict=True))


def _check_sizes(row: Mapping[str, Any], found: _Findings) -> None:
    uri, size = row["image_uri"], (row["width"], row["height"])
    if None in size or row["mask"] is None or row["mask"]["bytes"] is None:
        found.add("wrong_size", f"{uri!r} is ok and has no size or no mask")
        return
    mask_size = _png_size(row["mask"]["bytes"])
    if mask_size != size:
        found.add("wrong_size", f"{uri!r} is {_by(size)} and its mask {_by(mask_size) if mask_size else 'no PNG'}")
    pixels = sum(one["pixels"] for one in row["classes"] or ())
    if row["classes"] is not None and pixels != size[0] * size[1]:
        found.add("wrong_size", f"{uri!r} is {_by(size)} and its classes have {pixels:,} pixels")
    odd = {tuple(one["rle"]["size"]) for one in row["instances"] or ()} - {(size[1], size[0])}
    for height, width in sorted(odd)[:1]:
        found.add("wrong_size", f"{uri!r} is {_by(size)} and has an instance in {_by((width, height))}")


def _check_mask(row: Mapping[str, Any], found: _Findings) -> None:
    from models.masks import decode_mask_png, mask_crc32

    uri = row["image_uri"]
    if row["mask"] is None or row["mask"]["bytes"] is None:
        return
    try:
        class_ids = decode_mask_png(row["mask"]["bytes"])
    except (OSError, ValueError, SyntaxError) as error:
        found.add("damaged_mask", f"the mask of {uri!r} does not decode: {error}")
        return
    crc = mask_crc32(class_ids, [one["rle"] for one in row["instances"] or ()])
    if crc != row["mask_crc32"]:
        found.add("damaged_mask", f"the mask of {uri!r} has CRC-32 {crc}, and its row says {row['mask_crc32']}")
    elif row["classes"] is not None and _pixels(class_ids) != {
        one["class_id"]: one["pixels"] for one in row["classes"]
    }:
        found.add("damaged_mask", f"the mask of {uri!r} has other pixels than its classes")


def _pixels(class_ids: NDArray[np.uint8]) -> dict[int, int]:
    return {index: count for index, count in enumerate(np.bincount(class_ids.ravel()).tolist()) if count}


def _png_size(data: bytes) -> tuple[int, int] | None:
    """Width and height from the header (PNG, section 11.2.2), with nothing decoded."""
    if not data.startswith(_PNG_SIGNATURE) or len(data) < 24:
        return None
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def _by(size: Sequence[int] | None) -> str:
    return "×".join(map(str, size or ()))
