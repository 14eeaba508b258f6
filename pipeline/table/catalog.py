"""SQL over DEST. Owns: DuckDB connections and the views `segments`, `images`, `classes`, `instances`, `errors`, `runs`.
Must not know: how rows are made, runs beyond their records' fields.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import duckdb
import pyarrow as pa

from pipeline.errors import InfrastructureError, StorageError, UsageError
from pipeline.storage import Storage, duckdb_path, join_uri, normalize_uri, open_storage
from pipeline.table.schema import RUN_ID, SEGMENTS, parse_part_name

_KEY_TYPES = {"model": "VARCHAR", "version": "VARCHAR", "date": "DATE"}
_OUTER_KEY = re.compile(r"/(?:model|version|date)=")
_DUCKDB_TYPES = {
    "string": "VARCHAR", "binary": "BLOB", "int16": "SMALLINT", "int32": "INTEGER", "int64": "BIGINT", "float": "FLOAT",
}  # fmt: skip
_GETS_AT_ONCE = 16
_BYTES_KINDS = "('empty','truncated','not_an_image','unsupported','too_large','corrupt','model_failed')"

#: SQL condition on a row of `segments`: nothing more will be tried for this etag.
TERMINAL = f"(status = 'ok' OR error_kind IN {_BYTES_KINDS})"


def open_duckdb(
    storage: Storage,
    *,
    sizes: Mapping[str, int] | None = None,
    memory_bytes: int | None = None,
    temp_path: str | None = None,
) -> Any:
    """A DuckDB connection that can read what `storage` holds, remote or local. Downloads no extension.

    `sizes`: bytes by URI of files that a listing has shown already, so that none is asked for by itself.
    """
    connection = duckdb.connect()
    connection.execute("SET TimeZone = 'UTC'")
    connection.execute("SET enable_progress_bar = false")
    if memory_bytes:
        connection.execute(f"SET memory_limit = '{memory_bytes >> 20}MiB'")
    if temp_path:
        connection.execute("SET temp_directory = ?", [temp_path])
    filesystem = storage.filesystem(sizes)
    if filesystem is not None:
        connection.register_filesystem(filesystem)
    return connection


def part_sizes(storage: Storage, prefix_uri: str) -> dict[str, int]:
    """Bytes by URI of every Part below `prefix_uri`; foreign files left out, {} where there is nothing."""
    found: dict[str, int] = {}
    try:
        for batch in storage.list(prefix_uri):
            for uri, size_bytes in zip(batch["uri"].to_pylist(), batch["size_bytes"].to_pylist(), strict=True):
                if parse_part_name(uri.rpartition("/")[2]):
                    found[uri] = size_bytes
    except StorageError as error:
        if error.kind != "missing":
            raise
    return dict(sorted(found.items()))


def read_parts_sql(uris: Sequence[str], *, hive: bool = False) -> str:
    """A FROM clause over these Parts. With `hive` the path keys become columns `model`, `version`, `date`."""
    if not uris:
        return _no_rows(hive)
    listed = ", ".join(sql_text(_literal(duckdb_path(uri))) for uri in uris)
    if not hive:
        return f"read_parquet([{listed}], hive_partitioning = false)"
    if _OUTER_KEY.search(uris[0].rpartition("/segments/")[0]):
        # DuckDB takes a key's first value in a path, which here is DEST's own and not the table's.
        keys = ", ".join(
            f"regexp_extract(filename, '.*/{key}=([^/]*)/', 1)::{kind} AS {key}" for key, kind in _KEY_TYPES.items()
        )
        return (
            f"(SELECT * EXCLUDE (filename), {keys} "
            f"FROM read_parquet([{listed}], hive_partitioning = false, filename = true))"
        )
    types = ", ".join(f"{key}: {kind}" for key, kind in _KEY_TYPES.items())
    # Without types a version of digits only would be taken for a number.
    return f"read_parquet([{listed}], hive_partitioning = true, hive_types = {{{types}}})"


def _no_rows(hive: bool) -> str:
    """No rows, with the types of SEGMENTS: every view works before the first Part is there."""
    names = ", ".join(f'NULL::{_duckdb_type(field.type)} AS "{field.name}"' for field in SEGMENTS)
    keys = "".join(f", NULL::{kind} AS {key}" for key, kind in _KEY_TYPES.items()) if hive else ""
    return f"(SELECT {names}{keys} WHERE false)"


def _duckdb_type(arrow: pa.DataType) -> str:
    if pa.types.is_list(arrow):
        return _duckdb_type(arrow.value_type) + "[]"
    if pa.types.is_struct(arrow):
        return "STRUCT(" + ", ".join(f'"{field.name}" {_duckdb_type(field.type)}' for field in arrow) + ")"
    if pa.types.is_timestamp(arrow):
        return "TIMESTAMPTZ"
    return _DUCKDB_TYPES[str(arrow)]


def _literal(path: str) -> str:
    """`path` so that DuckDB takes it as one name. On a disk the literal name wins over a glob by itself."""
    return re.sub(r"([*?\[])", r"[\1]", path) if "://" in path else path


def unreadable(dest: str, error: duckdb.Error) -> InfrastructureError:
    """What DuckDB says of a table that it cannot read, in one sentence and without the SQL."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    # What a store raises reaches us as the text of a traceback: its last line says what happened.
    why = lines[-1] if "Traceback" in lines[0] else lines[0]
    return InfrastructureError(f"the table at {dest} could not be read: {why}")


def sql_text(text: str) -> str:
    """`text` as an SQL literal."""
    return "'" + text.replace("'", "''") + "'"


def connect(dest: str, *, profile: str | None = None) -> Any:
    """A DuckDB connection with the views of DEST, on disk and on S3. Raises UsageError where DEST holds no table.

    `segments`: all rows. `images`: for each model the terminal rows of the version and settings of its last closed run,
    the newest etag per uri. `classes`, `instances`: unnested from `images`. `errors`: rows that are errors.
    `runs`: one row a run.
    """
    dest = normalize_uri(dest)
    storage = open_storage(dest, profile=profile)
    sizes = part_sizes(storage, join_uri(dest, "segments"))
    uris = list(sizes)
    records = _records(storage, dest)
    if not uris and not records:
        raise UsageError(f"{dest} holds no Maskmill table: give the DEST of an earlier `maskmill segment`")
    connection = open_duckdb(storage, sizes=sizes, temp_path=os.environ.get("TMPDIR", "/tmp"))
    try:
        _create_views(connection, uris, records)
    except duckdb.Error as error:
        raise unreadable(dest, error) from error
    return connection


def _create_views(connection: Any, uris: Sequence[str], records: Sequence[Mapping[str, Any]]) -> None:
    connection.execute(f"CREATE VIEW segments AS SELECT * FROM {read_parts_sql(uris, hive=True)}")
    connection.register("_runs", pa.Table.from_pylist(list(records), schema=_RUNS))
    connection.execute("CREATE VIEW runs AS SELECT * FROM _runs ORDER BY sequence")
    connection.execute(
        "CREATE VIEW _current AS SELECT model, max_by(model_version, sequence) AS model_version, "
        "max_by(settings_digest, sequence) AS settings_digest FROM _runs WHERE state = 'done' GROUP BY model"
    )
    # Of every run, whatever became of it: rows of an open or abandoned run are rows too.
    repeats = connection.execute(
        "SELECT coalesce(sum(repeats), 0) FROM _runs SEMI JOIN _current USING (model, model_version, settings_digest)"
    ).fetchone()[0]
    # What was read last is what is there now; a file's own time may go back (mv, rsync -t).
    newest = (
        "QUALIFY row_number() OVER (PARTITION BY s.model, s.image_uri "
        "ORDER BY s.processed_at DESC, s.image_modified DESC NULLS LAST) = 1"
    )
    connection.execute(
        "CREATE VIEW images AS SELECT s.* FROM segments s "
        "JOIN _current c ON s.model = c.model AND s.model_version = c.model_version "
        "AND s.settings_digest = c.settings_digest "
        f"WHERE {TERMINAL.replace('status', 's.status')} {newest if repeats else ''}"
    )
    connection.execute(
        "CREATE VIEW classes AS SELECT image_uri, model, version, date, run_id, width, height, "
        "unnest(classes, recursive := true) FROM images"
    )
    connection.execute(
        "CREATE VIEW instances AS SELECT image_uri, model, version, date, run_id, width, height, i.* "
        "FROM (SELECT *, unnest(instances) AS i FROM images)"
    )
    connection.execute("CREATE VIEW errors AS SELECT * FROM segments WHERE status = 'error'")


_RUNS = pa.schema(
    [
        ("run_id", pa.string()),
        ("sequence", pa.int64()),
        ("state", pa.string()),
        ("model", pa.string()),
        ("model_version", pa.string()),
        ("settings_digest", pa.string()),
        ("precision", pa.string()),
        ("source", pa.string()),
        ("run_date", pa.date32()),
        ("created_at", pa.timestamp("us", "UTC")),
        ("closed_at", pa.timestamp("us", "UTC")),
        ("planned", pa.int64()),
        ("ok", pa.int64()),
        ("errors", pa.int64()),
        ("parts", pa.int64()),
        ("parts_bytes", pa.int64()),
        ("seconds", pa.float64()),
        ("images_per_s", pa.float64()),
        ("repeats", pa.int64()),
    ]
)


def _records(storage: Storage, dest: str) -> list[dict[str, Any]]:
    """One mapping a run, from its closing record or, while it is open, its plan. Plans that lost are left out."""
    prefix = join_uri(dest, "runs") + "/"
    names: set[str] = set()
    try:
        for batch in storage.list(prefix.rstrip("/")):
            names.update(uri.removeprefix(prefix) for uri in batch["uri"].to_pylist())
    except StorageError as error:
        if error.kind != "missing":
            raise
    runs = sorted(name.removesuffix("/plan.json") for name in names if name.endswith("/plan.json"))
    runs = [run_id for run_id in runs if RUN_ID.fullmatch(run_id)]

    def record(run_id: str) -> dict[str, Any] | None:
        closed = f"{run_id}/run.json" in names
        try:
            body = json.loads(storage.get(f"{prefix}{run_id}/{'run.json' if closed else 'plan.json'}").data)
        except StorageError as error:
            if error.kind == "missing":  # a plan that lost its race, taken away since it was listed
                return None
            raise
        plan = body["plan"] if closed else body
        if not closed:
            entry = f"_log/{plan['sequence']:08d}.json"
            if entry not in names or json.loads(storage.get(prefix + entry).data)["run_id"] != run_id:
                return None
        return _record(plan, body if closed else None)

    with ThreadPoolExecutor(_GETS_AT_ONCE) as pool:
        return [found for found in pool.map(record, runs) if found]


def _record(plan: dict[str, Any], outcome: dict[str, Any] | None) -> dict[str, Any]:
    counts = plan["counts"]
    again = plan["command"]["force"] or plan["command"]["retry_errors"]
    outcome = outcome or {}
    found = {
        "run_id": plan["run_id"],
        "sequence": plan["sequence"],
        "state": outcome.get("state", "open"),
        "model": plan["model_name"],
        "model_version": plan["model_version"],
        "settings_digest": plan["settings_digest"],
        "precision": plan["precision"],
        "source": plan["command"]["source"],
        "run_date": dt.date.fromisoformat(plan["run_date"]),
        "created_at": dt.datetime.fromisoformat(plan["created_at"]),
        "closed_at": dt.datetime.fromisoformat(outcome["closed_at"]) if outcome else None,
        "planned": counts["planned"],
        "repeats": counts["changed"] + (counts["planned"] if again else 0),
    }
    results = ("ok", "errors", "parts", "parts_bytes", "seconds", "images_per_s")
    return found | {key: outcome.get(key) for key in results}
