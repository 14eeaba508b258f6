"""`segment` as a command to disturb: a small corpus with every kind of fate, for its first night and for its second."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from handmade import encoded_image
from harness import SHAPE, in_process

import pipeline
from pipeline.errors import WORLD_KINDS, UsageError
from pipeline.storage import Storage, open_storage

#: Whole images, an empty one, one that is none, and one that was cut off.
FIRST_NIGHT: dict[str, bytes] = {
    "a.png": encoded_image(1),
    "b.png": encoded_image(2),
    "bad.jpg": b"no picture at all",
    "cut.png": encoded_image(3)[:-90],
    "empty.png": b"",
    "z.png": encoded_image(4),
}
#: One image was replaced, one is gone, one is new.
SECOND_NIGHT = {
    **{name: data for name, data in FIRST_NIGHT.items() if name != "b.png"},
    "a.png": encoded_image(5),
    "new.png": encoded_image(6),
}


class Row(NamedTuple):
    """A terminal row, as far as it must not depend on what went wrong meanwhile."""

    name: str
    image_etag: str
    status: str
    error_kind: str | None
    mask: bytes | None
    mask_crc32: int | None
    classes: str


class SegmentScene:
    """`maskmill segment SOURCE FOLDER/dest`, with its worker in this process."""

    def __init__(self, source: str, model: str, **settings: Any) -> None:
        self.source = source
        self._settings = {
            "source": source, "model": model, "engine": "local", "shard_size": 2, "lease_ttl_s": 0.4,
            "max_error_rate": 1.0, **SHAPE, **settings,
        }  # fmt: skip

    def of(self, source: str) -> SegmentScene:
        """The same over other images."""
        other = copy.copy(self)
        other.source, other._settings = source, self._settings | {"source": source}
        return other

    def act(self, folder_uri: str) -> object:
        with in_process():
            outcome = pipeline.segment(dest=f"{folder_uri}/dest", **self._settings)
        assert outcome.state == "done"
        return outcome

    def look(self, folder_uri: str) -> None:
        dest = f"{folder_uri}/dest"
        terminal_rows(dest)
        try:
            assert pipeline.verify(dest) == []
        except UsageError as error:  # nothing was written yet
            assert "holds no Maskmill table" in str(error)

    def end(self, folder_uri: str) -> object:
        dest = f"{folder_uri}/dest"
        assert pipeline.verify(dest, deep=True) == []
        table = pipeline.connect(dest)
        runs = table.sql(
            "SELECT state, count(*), sum(planned), sum(removed), sum(returned) FROM runs WHERE state <> 'abandoned' "
            "GROUP BY ALL"
        )
        ((state, _, planned, removed, returned),) = runs.fetchall()
        assert state == "done"
        given_up = table.sql(
            "SELECT count(*) FROM segments SEMI JOIN (FROM runs WHERE state = 'abandoned') USING (run_id)"
        )
        rows = terminal_rows(dest)
        # An image that could not be read is planned again, and nothing else is.
        kinds = ", ".join(f"'{kind}'" for kind in WORLD_KINDS)
        failed = table.sql(f"SELECT count(*) FROM errors WHERE error_kind IN ({kinds})").fetchall()[0][0]
        assert planned == len(rows) + failed - given_up.fetchall()[0][0]
        shown = table.sql(
            "SELECT image_uri, image_etag, status, error_kind, mask_crc32 FROM images ORDER BY ALL"
        ).fetchall()
        return rows, removed, returned, shown


def terminal_rows(dest: str) -> list[Row]:
    """Every terminal row under DEST, from the Parts alone. Fails where an image has two of the same bytes."""
    storage = open_storage(dest)
    found: dict[tuple[str, ...], Row] = {}
    for uri in files(storage, f"{dest}/segments"):
        for row in pq.read_table(pa.BufferReader(storage.get(uri).data)).to_pylist():
            if row["error_kind"] in WORLD_KINDS:
                continue
            one = Row(
                row["image_uri"].rpartition("/")[2], row["image_etag"], row["status"], row["error_kind"],
                row["mask"]["bytes"] if row["mask"] else None, row["mask_crc32"], str(row["classes"]),
            )  # fmt: skip
            key = row["image_uri"], row["listed_etag"], row["model_version"], row["settings_digest"]
            assert key not in found, f"{key} has two terminal rows in {dest}"
            found[key] = one
    return sorted(found.values(), key=str)


def files(storage: Storage, folder_uri: str) -> list[str]:
    """URIs of all files below a folder that may not be there yet."""
    from pipeline.table.catalog import files_below

    return list(files_below(storage, folder_uri))


def show(source: str, corpus: Mapping[str, bytes]) -> None:
    """Makes the folder `source` hold these images and no others. What stays is not touched."""
    storage = open_storage(source)
    there = {uri.rpartition("/")[2]: uri for uri in files(storage, source)}
    for name, data in corpus.items():
        if name not in there or storage.get(there[name]).data != data:
            storage.put(f"{source}/{name}", data)
    for name in there.keys() - corpus.keys():
        storage.delete(there[name])
