"""SQL over DEST. Owns: DuckDB connections and the views `segments`, `images`, `classes`, `instances`, `errors`, `runs`,
`evaluations`.
Must not know: how rows are made, runs beyond their records' fields.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import duckdb
import pyarrow as pa

from pipeline.errors import BYTES_KINDS, InfrastructureError, StorageError, UsageError
from pipeline.machine import memory_bytes as machine_bytes
from pipeline.storage import Storage, duckdb_path, join_uri, normalize_uri, open_storage, sql_text
from pipeline.table.functions import add_functions
from pipeline.table.runs import RunFiles, read_runs, runs_table
from pipeline.table.schema import SCHEMA_VERSION, SCHEMAS, SEGMENTS, parse_part_name
from pipeline.table.scratch import scratch_is_full

_KEY_TYPES = {"model": "VARCHAR", "version": "VARCHAR", "date": "DATE"}
_OUTER_KEY = re.compile(r"/(?:model|version|date)=")
_DUCKDB_TYPES = {
    "string": "VARCHAR", "binary": "BLOB", "int16": "SMALLINT", "int32": "INTEGER", "int64": "BIGINT", "float": "FLOAT",
}  # fmt: skip

#: SQL condition on a row of `segments`: nothing more will be tried for this etag.
TERMINAL = "(status = 'ok' OR error_kind IN ('" + "', '".join(sorted(BYTES_KINDS)) + "'))"


class Current(NamedTuple):
    """The version and settings of a model whose rows count."""

    model: str
    version: str
    settings_digest: str


def open_duckdb(
    storage: Storage,
    *,
    sizes: Mapping[str, int] | None = None,
    memory_bytes: int | None = None,
    temp_path: str | None = None,
) -> Any:
    """A DuckDB connection that can read what `storage` holds, remote or local. Downloads no extension.

    `sizes`: bytes by URI of files that a listing has shown already, so that none is asked for by itself.
    `memory_bytes`: what it takes before it spills to `temp_path`; half of what this process may have where that is
    less.
    """
    connection = duckdb.connect()
    connection.execute("SET TimeZone = 'UTC'")
    connection.execute("SET enable_progress_bar = false")
    # It reads ahead over the masks that lie between the columns asked for: measured, 35 times the bytes for `classes`.
    connection.execute("SET disable_parquet_prefetching = true")
    if memory_bytes:
        connection.execute(f"SET memory_limit = '{min(memory_bytes, machine_bytes() // 2) >> 20}MiB'")
    if temp_path:
        connection.execute("SET temp_directory = ?", [temp_path])
    filesystem = storage.filesystem(sizes)
    if filesystem is not None:
        connection.register_filesystem(filesystem)
    return connection


def part_sizes(storage: Storage, prefix_uri: str) -> dict[str, int]:
    """Bytes by URI of every Part below `prefix_uri`; foreign files left out, {} where there is nothing."""
    found = files_below(storage, prefix_uri)
    return {uri: size_bytes for uri, size_bytes in found.items() if parse_part_name(uri.rpartition("/")[2])}


def key_sql(*columns: str) -> str:
    """128 bits that stand for these texts together, in SQL, in less time and memory than comparing them. MD5, since
    DuckDB's `hash` gives the same for many names that are alike; two of 100 million are one by a chance of 10^-23.
    """
    texts = ", ".join(f"strlen({column}), ' ', {column}" for column in columns)
    return f"md5_number(concat({texts}))"


def read_parts_sql(uris: Sequence[str], *, hive: bool = False, filename: bool = False, row_number: bool = False) -> str:
    """A FROM clause over these Parts. With `hive` the path keys become columns `model`, `version`, `date`; with
    `filename` there is a column of that name, with `row_number` `file_row_number`: a row's place in its file, from 0.
    """
    if not uris:
        return _no_rows(hive)
    listed = ", ".join(sql_text(duckdb_path(uri)) for uri in uris)
    if not hive:
        also = (", filename = true" if filename else "") + (", file_row_number = true" if row_number else "")
        return f"read_parquet([{listed}], hive_partitioning = false{also})"
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


def unreadable(dest: str, error: duckdb.Error, *, or_else: str = "") -> InfrastructureError:
    """What DuckDB says of a table that it cannot read, in one sentence and without the SQL. `or_else` names what else
    it was reading.
    """
    if os.strerror(errno.ENOSPC) in str(error):  # it reads the table, and writes in scratch
        return scratch_is_full()
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    # What a store raises reaches us as the text of a traceback: its last line says what happened. The SQL may follow.
    said = next((index for index, line in enumerate(lines) if index and line.startswith("LINE ")), len(lines))
    why = lines[said - 1] if "Traceback" in lines[0] else lines[0]
    also = f", or {or_else}," if or_else else ""
    return InfrastructureError(f"the table at {dest}{also} could not be read: {why}")


def connect(dest: str, *, profile: str | None = None) -> Any:
    """A DuckDB connection with the views of DEST, on disk and on S3. Raises UsageError where DEST holds no table.

    `segments`: all rows. `images`: for each model the terminal rows of the version and settings of its last closed run,
    the newest etag per uri, without the images that SOURCE no longer holds. `classes`, `instances`: unnested from
    `images`. `errors`: rows that are errors. `runs`: one row a run. `evaluations`: what models scored. The functions of
    `pipeline.table.functions` are there, too.

    The views show DEST as it was when it was opened; connect again to see more.
    """
    dest = normalize_uri(dest)
    connection = open_table(open_storage(dest, profile=profile), dest, temp_path=os.environ.get("TMPDIR", "/tmp"))
    add_functions(connection)
    return connection


def open_table(
    storage: Storage,
    dest: str,
    *,
    current: Current | None = None,
    memory_bytes: int | None = None,
    temp_path: str | None = None,
) -> Any:
    """As `connect`, without the functions. With `current` the view `images` is what it will be once a run of that
    model, version and settings is closed."""
    sizes = part_sizes(storage, join_uri(dest, "segments"))
    runs = read_runs(storage, dest)
    if not sizes and not runs:
        raise UsageError(f"{dest} holds no Maskmill table: give the DEST of an earlier `maskmill segment`")
    evaluations = _parquet_below(storage, join_uri(dest, "evaluations"))
    connection = open_duckdb(storage, sizes=sizes | evaluations, memory_bytes=memory_bytes, temp_path=temp_path)
    try:
        connection.execute(f"CREATE VIEW segments AS SELECT * FROM {_segments_sql(list(sizes), runs)}")
        connection.register("_runs", runs_table(runs))
        connection.execute("CREATE VIEW runs AS SELECT * FROM _runs ORDER BY sequence")
        has_events = _create_events(connection, dest, runs)
        _create_images(connection, current, has_events)
        connection.execute("CREATE VIEW errors AS SELECT * FROM segments WHERE status = 'error'")
        connection.execute(f"CREATE VIEW evaluations AS SELECT * FROM {_evaluations_sql(list(evaluations))}")
    except duckdb.Error as error:
        raise unreadable(dest, error) from error
    return connection


def _segments_sql(uris: Sequence[str], runs: Sequence[RunFiles]) -> str:
    """All Parts, whatever their schema version; what an old one lacks is NULL."""
    version_of = {run.run_id: run.schema_version for run in runs}
    groups: dict[str, list[str]] = {}
    for uri in uris:
        run_id, _ = parse_part_name(uri.rpartition("/")[2]) or ("", 0)
        groups.setdefault(version_of.get(run_id, SCHEMA_VERSION), []).append(uri)
    if groups.keys() <= {SCHEMA_VERSION}:
        return read_parts_sql(uris, hive=True)
    return "(" + " UNION ALL ".join(_one_version_sql(*group) for group in groups.items()) + ")"


def _one_version_sql(version: str, uris: Sequence[str]) -> str:
    if version not in SCHEMAS:
        raise InfrastructureError(
            f"files of schema version {version} are in this table, and this Maskmill knows {', '.join(SCHEMAS)}: "
            "use a newer release"
        )
    known = set(SCHEMAS[version].names)
    columns = ", ".join(
        f'{_column(field.name, known)}::{_duckdb_type(field.type)} AS "{field.name}"' for field in SEGMENTS
    )
    return f"SELECT {columns}, {', '.join(_KEY_TYPES)} FROM {read_parts_sql(uris, hive=True)}"


def _column(name: str, known: set[str]) -> str:
    return f'"{name}"' if name in known else "NULL"


def _create_images(connection: Any, current: Current | None, has_events: bool) -> None:
    found = dict(
        connection.execute(
            "SELECT model, {'version': max_by(model_version, sequence), 'settings': max_by(settings_digest, sequence)} "
            "FROM _runs WHERE state = 'done' GROUP BY model"
        ).fetchall()
    )
    chosen = [Current(model, one["version"], one["settings"]) for model, one in found.items()]
    if current is not None:
        chosen = [one for one in chosen if one.model != current.model] + [current]
    # Of every run, whatever became of it: rows of an open or abandoned run are rows too.
    repeats = connection.execute(
        f"SELECT coalesce(sum(repeats), 0) FROM _runs s WHERE {_is_current(chosen, version='model_version')}"
    ).fetchone()[0]
    connection.execute(
        f"CREATE VIEW _candidates AS SELECT * FROM segments s WHERE {_is_current(chosen)} AND {TERMINAL}"
    )
    connection.execute(f"CREATE VIEW images AS {images_sql('_candidates', newest=bool(repeats), events=has_events)}")
    connection.execute(
        "CREATE VIEW classes AS SELECT image_uri, model, version, date, run_id, width, height, "
        "unnest(classes, recursive := true) FROM images"
    )
    connection.execute(
        "CREATE VIEW instances AS SELECT image_uri, model, version, date, run_id, width, height, i.* "
        "FROM (SELECT *, unnest(instances) AS i FROM images)"
    )


def _is_current(chosen: Sequence[Current], version: str = "version") -> str:
    """A condition in literals, so that files of other versions are left out by their paths."""
    if not chosen:
        return "false"
    versions = ", ".join(sorted({sql_text(one.version) for one in chosen}))
    exact = " OR ".join(
        f"(s.model = {sql_text(one.model)} AND s.{version} = {sql_text(one.version)} "
        f"AND s.settings_digest = {sql_text(one.settings_digest)})"
        for one in chosen
    )
    return f"s.{version} IN ({versions}) AND ({exact})"


def images_sql(candidates: str, *, newest: bool, events: bool) -> str:
    """The rows of the relation `candidates` that count. `newest`: some image may have more than one. `events`: the
    table `_events` says what has become of some images in SOURCE.

    A row that was made after an event speaks for itself; of those before it none counts where the image was gone, and
    rather the one with its etag where it was back.
    """
    joined, left, order = "", "", ""
    if newest or events:
        joined = "LEFT JOIN _runs r ON s.run_id = r.run_id "
    if events:
        joined += "LEFT JOIN _events e ON s.image_uri = e.image_uri "
        before = "(e.image_uri IS NOT NULL AND coalesce(r.sequence, 0) <= e.sequence)"
        left = f"WHERE NOT ({before} AND e.image_etag IS NULL)"
        order = (
            f"CASE WHEN NOT {before} THEN 2 "
            "WHEN s.image_etag = e.image_etag OR s.listed_etag = e.image_etag THEN 1 ELSE 0 END DESC, "
        )
    # What was read last is what is there now; a file's own time may go back (mv, rsync -t). Of runs that were not open
    # at the same time the later one read last, whatever the clocks of their hosts say: of two such, the later one's
    # `closed_before` is the sequence of the earlier one or more, and so more than the earlier one's own.
    qualified = (
        f"QUALIFY row_number() OVER (PARTITION BY s.model, s.image_uri ORDER BY {order}"
        "coalesce(r.closed_before, -1) DESC, s.processed_at DESC, s.image_modified DESC NULLS LAST) = 1"
    )
    return f"SELECT s.* FROM {candidates} s {joined}{left} {qualified if newest else ''}"


def _create_events(connection: Any, dest: str, runs: Sequence[RunFiles]) -> bool:
    """The table `_events`: of each image that was ever gone from SOURCE, or back at an older etag, what was found last:
    in the plan of which run (`sequence`), and its etag then, NULL where it was gone. False where there is none."""
    selects = ["SELECT NULL::VARCHAR AS image_uri, NULL::VARCHAR AS image_etag, NULL::VARCHAR AS run_id WHERE false"]
    for name, etag in (("removed.parquet", "NULL::VARCHAR"), ("returned.parquet", "image_etag")):
        paths = [duckdb_path(join_uri(dest, "runs", run.run_id, name)) for run in runs if name in run.names]
        if paths:
            listed = ", ".join(sql_text(path) for path in paths)
            selects.append(
                f"SELECT image_uri, {etag} AS image_etag, "
                f"regexp_extract(filename, '.*/runs/([^/]+)/{name}$', 1) AS run_id "
                f"FROM read_parquet([{listed}], filename = true, hive_partitioning = false)"
            )
    connection.execute(
        "CREATE TEMP TABLE _events AS SELECT image_uri, max(sequence) AS sequence, "
        "max_by({'etag': image_etag}, sequence).etag AS image_etag "
        f"FROM ({' UNION ALL '.join(selects)}) JOIN _runs USING (run_id) GROUP BY image_uri"
    )
    return len(selects) > 1


def _evaluations_sql(uris: Sequence[str]) -> str:
    if not uris:
        return "(SELECT NULL::VARCHAR AS model, NULL::VARCHAR AS model_version WHERE false)"
    listed = ", ".join(sql_text(duckdb_path(uri)) for uri in uris)
    return f"read_parquet([{listed}], union_by_name = true, hive_partitioning = false)"


def _parquet_below(storage: Storage, prefix_uri: str) -> dict[str, int]:
    return {uri: size for uri, size in files_below(storage, prefix_uri).items() if uri.endswith(".parquet")}


def files_below(storage: Storage, prefix_uri: str) -> dict[str, int]:
    """Bytes by URI of all files below `prefix_uri`, by URI; {} where there is nothing."""
    found: dict[str, int] = {}
    try:
        for batch in storage.list(prefix_uri):
            found.update(zip(batch["uri"].to_pylist(), batch["size_bytes"].to_pylist(), strict=True))
    except StorageError as error:
        if error.kind != "missing":
            raise
    return dict(sorted(found.items()))
