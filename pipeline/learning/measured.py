"""Evaluations that lie in a DEST. Owns: which rows of the table `evaluations` are one model's. Must not know: how rows
are made or scored.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import UsageError
from pipeline.storage import join_uri, normalize_uri, open_storage
from pipeline.table.catalog import files_below
from pipeline.table.evaluations import CLASSES_KEY


def measured_rows(dest: str, name: str, version: str, *, profile: str | None = None) -> pa.Table:
    """The evaluations of a model's version in DEST, with the class names in the metadata. Raises UsageError where there
    are none, or of more than one kind of settings."""
    dest = normalize_uri(dest)
    storage = open_storage(dest, profile=profile)
    uris = [uri for uri in files_below(storage, join_uri(dest, "evaluations")) if uri.endswith(".parquet")]
    tables, others = [], set()
    for uri in uris:
        try:
            table = pq.read_table(pa.BufferReader(storage.get(uri).data))
        except (pa.ArrowInvalid, pa.ArrowKeyError) as error:
            raise UsageError(f"{uri} is no table of evaluations: {error}") from error
        others.update(table["model_version"].unique().to_pylist())
        tables.append(table.filter(pc.equal(table["model_version"], version)))
    tables = [table for table in tables if table.num_rows]
    if not tables:
        found = ", ".join(sorted(others)) or "nothing"
        raise UsageError(f"{dest} holds no evaluations of {name}@{version} (it holds {found}): evaluate it there first")
    names = {(table.schema.metadata or {}).get(CLASSES_KEY) for table in tables}
    whole = pa.concat_tables(tables)
    if len(names) > 1 or len(whole["settings_digest"].unique()) > 1:
        raise UsageError(
            f"{dest} holds evaluations of {name}@{version} with different classes or settings: use a DEST of its own"
        )
    return whole
