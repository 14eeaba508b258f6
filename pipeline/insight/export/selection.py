"""Which rows an export is of. Owns: the condition, the counts, and freezing the list of rows with their places.
Must not know: formats, where files go, what is done already.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import InfrastructureError, StorageError, UsageError
from pipeline.insight.export.shape import ClassInfo, Subject
from pipeline.storage import Storage, join_uri, uri_name
from pipeline.table.catalog import connect, part_sizes, read_parts_sql, sql_text, unreadable
from pipeline.table.conditions import check_condition, told
from pipeline.table.schema import parse_part_name


class Selection(NamedTuple):
    """A list of rows that is a file, and what it is about."""

    list_path: Path
    images: int
    #: Rows of the condition that have no mask.
    error_rows: int
    model: str
    version: str
    task: str
    #: A run that made some of these rows: its plan has the model's card.
    run_id: str


def choose(
    storage: Storage, dest: str, where: str | None, list_path: Path, *, with_images: bool, profile: str | None
) -> Selection:
    """Writes to `list_path` a Parquet of the rows of the view `images` that are ok and for which `where` is true, by
    their Parts: columns `part` (below DEST), `row` (its place in the Part), `size_bytes` (about, of the
    row, and `with_images` of the image).

    Reads no mask. Raises UsageError for a condition that is none, that chooses nothing, or that chooses masks of
    several models; InfrastructureError and StorageError where the table cannot be read.
    """
    connection = connect(dest, profile=profile)
    try:
        connection.execute("SET temp_directory = ?", [str(list_path.parent / "duckdb")])
        _pick(connection, where)
        models, images, errors, run_id, tasks = connection.execute(
            "SELECT list(DISTINCT {'model': model, 'version': version}) FILTER (status = 'ok'), "
            "count(*) FILTER (status = 'ok'), count(*) FILTER (status = 'error'), max(run_id) FILTER (status = 'ok'), "
            "list(DISTINCT task) FILTER (status = 'ok') FROM _picked"
        ).fetchone()
        if not images:
            also = f"; the {errors:,} that it chooses are errors" if errors else ""
            raise UsageError(
                f"--where chooses no image with a mask in {dest}{also}" if where else f"{dest} has no image with a mask"
            )
        if len(models) > 1:
            names = sorted({one["model"] for one in models})
            raise UsageError(
                f"{dest} has masks of several models, {', '.join(names)}: choose one, such as "
                f"--where \"model = '{names[0]}'\""
            )
        _place(connection, storage, dest, list_path, images=images, with_images=with_images)
        return Selection(list_path, images, errors, models[0]["model"], models[0]["version"], tasks[0], run_id)
    except duckdb.Error as error:
        raise unreadable(dest, error) from error
    finally:
        connection.close()


def _pick(connection: Any, where: str | None) -> None:
    """The table `_picked`: which rows of `images` the condition is true for, by what tells rows apart."""
    chosen = "true"
    if where is not None:
        check_condition(connection, where)
        chosen = where
    try:
        connection.execute(
            "CREATE TEMP TABLE _picked AS SELECT run_id, image_uri, listed_etag, attempt, model, version, task, status "
            f"FROM (SELECT * FROM images WHERE ({chosen}\n)) WHERE status IN ('ok', 'error')"
        )
    except (duckdb.ProgrammingError, duckdb.DataError, duckdb.NotSupportedError) as error:
        if where is None:
            raise
        raise UsageError(f"--where {where!r} cannot be asked of the view images: {told(error)}") from error


def _place(connection: Any, storage: Storage, dest: str, list_path: Path, *, images: int, with_images: bool) -> None:
    """Finds the picked rows in their Parts, and writes where."""
    runs = {run_id for (run_id,) in connection.execute("SELECT DISTINCT run_id FROM _picked").fetchall()}
    sizes = {uri: size for uri, size in part_sizes(storage, join_uri(dest, "segments")).items() if _run_of(uri) in runs}
    below = dest.rstrip("/") + "/"
    parts = [{"name": uri_name(uri), "part": uri.removeprefix(below), "bytes": sizes[uri]} for uri in sizes]
    connection.register("_parts", pa.Table.from_pylist(parts))
    files = read_parts_sql(list(sizes), filename=True, row_number=True)
    connection.execute(
        "CREATE TEMP TABLE _files AS SELECT name, part, bytes // rows AS row_bytes FROM _parts JOIN "
        f"(SELECT parse_filename(filename) AS name, count(*) AS rows FROM {files} GROUP BY 1) USING (name)"
    )
    image_bytes = "coalesce(image_bytes, 0)" if with_images else "0"
    connection.execute(
        "COPY (SELECT part, row, row_bytes + image_bytes AS size_bytes FROM ("
        "SELECT run_id, image_uri, listed_etag, attempt, parse_filename(filename) AS name, file_row_number AS row, "
        f"{image_bytes} AS image_bytes FROM {files} WHERE status = 'ok') "
        "JOIN _picked USING (run_id, image_uri, listed_etag, attempt) JOIN _files USING (name) "
        f"WHERE _picked.status = 'ok' ORDER BY name, row) TO {sql_text(str(list_path))} (FORMAT parquet)"
    )
    found = pq.ParquetFile(list_path).metadata.num_rows
    if found != images:
        raise InfrastructureError(
            f"{images:,} rows of the view images were found {found:,} times in the files of {dest}: see "
            f"`maskmill verify {dest}`"
        )


def _run_of(uri: str) -> str | None:
    name = parse_part_name(uri_name(uri))
    return name[0] if name else None


def read_subject(
    storage: Storage, dest: str, run_id: str, *, model: str, version: str, task: str, with_images: bool, out: str
) -> Subject:
    """What is exported, with the classes of the card in the plan of a run that made some of it. Raises
    InfrastructureError where that says nothing."""
    uri = join_uri(dest, "runs", run_id, "plan.json")
    try:
        card = json.loads(storage.get(uri).data)["card"]
        classes = tuple(sorted(ClassInfo(one["id"], one["name"], tuple(one["color"])) for one in card["classes"]))
    except (ValueError, KeyError, TypeError) as error:
        raise InfrastructureError(f"{uri} does not say which classes there are ({error!r}): restore it") from error
    except StorageError as error:
        if error.kind != "missing":
            raise
        raise InfrastructureError(f"{uri} is gone, which says which classes there are: restore it") from error
    return Subject(model, version, task, classes, card.get("background_id"), with_images, out)
