"""What became of images in SOURCE. Owns: finding out which are gone or back by comparing a full listing with the table,
and the two files of a run that say so.
Must not know: how SOURCE is listed, how runs are planned.

    runs/<run_id>/removed.parquet     image_uri                images of the table that the listing no longer shows
    runs/<run_id>/returned.parquet    image_uri, image_etag    images that it shows again, and with which etag

Both are facts about SOURCE at the moment of a plan, put create-only beside it, before the log makes it real; a file
that would be empty is not written. They count in whatever state the run is. Nothing is deleted: the view `images`
leaves out what is gone, and shows what is back at an older etag with the row of that etag.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import UsageError
from pipeline.storage import Storage, join_uri
from pipeline.table.catalog import TERMINAL, Current, images_sql, key_sql, open_table, sql_text
from pipeline.table.schema import SCHEMA_VERSION

REMOVED = pa.schema([("image_uri", pa.string())], {"maskmill_schema_version": SCHEMA_VERSION})
RETURNED = pa.schema(
    [("image_uri", pa.string()), ("image_etag", pa.string())], {"maskmill_schema_version": SCHEMA_VERSION}
)
REMOVED_NAME, RETURNED_NAME = "removed.parquet", "returned.parquet"


class Coverage(NamedTuple):
    """Which names a full listing would have shown, had they been there: without it, every image under another prefix
    or with another suffix would seem gone.

    `prefix_uri`: the folder that was listed. `suffixes`: lower case; none for all. `name_regex`: of RE2, for the name
    below the folder, where SOURCE was a glob. `hidden`: whether names with a part that begins with a dot were listed.
    """

    prefix_uri: str
    suffixes: tuple[str, ...] = ()
    name_regex: str | None = None
    hidden: bool = False

    def condition(self, column: str) -> str:
        """The same in SQL."""
        prefix = self.prefix_uri if self.prefix_uri.endswith("/") else self.prefix_uri + "/"
        below = f"substr({column}, {len(prefix) + 1})"
        tests = [f"starts_with({column}, {sql_text(prefix)})"]
        if self.suffixes:
            ending = "(?:" + "|".join(re.escape(suffix) for suffix in self.suffixes) + r")\z"
            tests.append(f"regexp_matches({below}, {sql_text(ending)}, 'i')")
        if self.name_regex is not None:
            tests.append(f"regexp_matches({below}, {sql_text(self.name_regex)})")
        if not self.hidden:
            tests.append(rf"NOT regexp_matches({below}, '(?:\A|/)\.')")
        return f"({' AND '.join(tests)})"


class Changes(NamedTuple):
    """What a listing says of the table. `switches`: the last closed run of this model was of another version or other
    settings, whose rows the view `images` shows until a run of these is closed, even one of no images.

    The paths are of Parquet files in the scratch folder, None where there is nothing to say.
    """

    removed: int = 0
    returned: int = 0
    switches: bool = False
    removed_path: Path | None = None
    returned_path: Path | None = None

    @property
    def worth_a_run(self) -> bool:
        """Whether there is something to record although no image is left to process."""
        return bool(self.removed or self.returned or self.switches)


def find_changes(
    storage: Storage,
    dest: str,
    *,
    listing: str,
    coverage: Coverage,
    current: Current,
    scratch: Path,
    unmatched_path: Path | None = None,
    memory_bytes: int = 3 << 30,
) -> Changes:
    """Compares a full listing (what stands after FROM, with uri and etag; no uri twice) with what the view `images`
    would show once a run of `current` is closed.

    `unmatched_path`: Parquet of image_uri, the images of the terminal rows of `current` that the listing does not hold
    under their listed etag, where somebody knows them already: finding them is nearly all of the cost.

    Removed: shown, covered by the listing, and not in it. Returned: gone by an earlier record and listed now; or
    listed with another etag than the row that is shown has, while an older terminal row has it. Asked again with the
    files written, the answer is nothing. Memory: about `memory_bytes`, then DuckDB spills into `scratch`. Raises
    StorageError; changes nothing in DEST.
    """
    try:
        connection = open_table(storage, dest, current=current, memory_bytes=memory_bytes, temp_path=str(scratch))
    except UsageError:  # no table yet
        return Changes()
    try:
        connection.execute("SET preserve_insertion_order = false")
        connection.execute(f"CREATE VIEW listing AS SELECT uri, etag FROM {listing}")
        _compare(connection, coverage, current, unmatched_path)
        removed = "SELECT DISTINCT image_uri FROM odd_shown SEMI JOIN (FROM odd WHERE gone) USING (image_uri)"
        returned = f"{_REVERTED} UNION {_BACK}"
        removed_path = _copy(connection, removed, scratch / REMOVED_NAME)
        returned_path = _copy(connection, returned, scratch / RETURNED_NAME)
        switches = _switches(connection, current)
    finally:
        connection.close()
    return Changes(
        removed=_rows(removed_path),
        returned=_rows(returned_path),
        switches=switches,
        removed_path=removed_path,
        returned_path=returned_path,
    )


def find_switch(storage: Storage, dest: str, current: Current) -> Changes:
    """Whether the view `images` shows another version or other settings than `current`: all that can be said where
    SOURCE was not listed in full. Raises StorageError; changes nothing in DEST."""
    try:
        connection = open_table(storage, dest, current=current)
    except UsageError:  # no table yet
        return Changes()
    try:
        return Changes(switches=_switches(connection, current))
    finally:
        connection.close()


def _switches(connection: Any, current: Current) -> bool:
    before = connection.execute(
        "SELECT max_by({'v': model_version, 's': settings_digest}, sequence) FROM _runs "
        f"WHERE state = 'done' AND model = {sql_text(current.model)}"
    ).fetchone()[0]
    return before is not None and (before["v"], before["s"]) != (current.version, current.settings_digest)


def _compare(connection: Any, coverage: Coverage, current: Current, unmatched_path: Path | None) -> None:
    """Tables `odd` (images of which a row is not as listed: gone, or there with another etag), `odd_rows` (all their
    rows that could count), `odd_shown` (those that do), and `back` (images that were gone and are listed)."""
    # Compared are keys, as in planning: the listing's side of the join is all that is in memory.
    known = "SELECT NULL::VARCHAR AS image_uri WHERE false"
    others = ""
    if unmatched_path is not None:
        known = f"SELECT image_uri FROM read_parquet({sql_text(str(unmatched_path))})"
        others = f"WHERE model <> {sql_text(current.model)}"
    connection.execute(f"CREATE TEMP TABLE unmatched AS SELECT DISTINCT image_uri FROM ({known})")
    if connection.execute(f"SELECT count(*) FROM (SELECT 1 FROM _candidates {others} LIMIT 1)").fetchone()[0]:
        connection.execute(
            f"""INSERT INTO unmatched SELECT DISTINCT image_uri FROM
                (SELECT image_uri, {key_sql("image_uri", "listed_etag")} AS key FROM _candidates {others}) s
            ANTI JOIN (SELECT {key_sql("uri", "etag")} AS key FROM listing) l
                ON s.key = l.key"""
        )
    connection.execute(
        f"""CREATE TEMP TABLE odd AS SELECT image_uri, gone, etag FROM
            (SELECT image_uri, l.uri IS NULL AS gone, l.etag FROM (SELECT DISTINCT image_uri FROM unmatched) u
            LEFT JOIN listing l ON l.uri = u.image_uri) WHERE NOT gone OR {coverage.condition("image_uri")}"""
    )
    columns = "model, run_id, image_uri, image_etag, listed_etag, image_modified, processed_at"
    any_odd = connection.execute("SELECT count(*) > 0 FROM odd").fetchone()[0]
    connection.execute(
        f"CREATE TEMP TABLE odd_rows AS SELECT {columns} FROM _candidates "
        + ("SEMI JOIN odd USING (image_uri)" if any_odd else "LIMIT 0")
    )
    connection.execute(f"CREATE TEMP TABLE odd_shown AS {images_sql('odd_rows', newest=True, events=True)}")
    connection.execute(
        "CREATE TEMP TABLE back AS SELECT e.image_uri, e.sequence, l.etag FROM _events e JOIN listing l "
        "ON e.image_uri = l.uri WHERE e.image_etag IS NULL"
    )
    any_back = connection.execute("SELECT count(*) > 0 FROM back").fetchone()[0]
    connection.execute(
        "CREATE TEMP TABLE later AS SELECT s.image_uri, r.sequence FROM segments s JOIN _runs r USING (run_id) "
        + (f"WHERE s.image_uri IN (SELECT image_uri FROM back) AND {TERMINAL}" if any_back else "LIMIT 0")
    )


_REVERTED = """
    SELECT DISTINCT i.image_uri, l.etag AS image_etag FROM odd_shown i JOIN odd l USING (image_uri)
    JOIN odd_rows o ON o.image_uri = i.image_uri AND o.model = i.model AND l.etag IN (o.image_etag, o.listed_etag)
    WHERE NOT l.gone AND l.etag IS DISTINCT FROM i.image_etag AND l.etag <> i.listed_etag
"""
_BACK = """
    SELECT b.image_uri, b.etag AS image_etag FROM back b
    ANTI JOIN later ON later.image_uri = b.image_uri AND later.sequence > b.sequence
"""


def _copy(connection: Any, sql: str, path: Path) -> Path | None:
    connection.execute(
        f"COPY ({sql} ORDER BY image_uri) TO {sql_text(str(path))} (FORMAT parquet, COMPRESSION zstd, "
        f"KV_METADATA {{maskmill_schema_version: '{SCHEMA_VERSION}'}})"
    )
    return path if _rows(path) else None


def _rows(path: Path | None) -> int:
    return pq.read_metadata(path).num_rows if path else 0


def write_changes(storage: Storage, dest: str, run_id: str, changes: Changes) -> None:
    """Puts the files of `changes` beside the plan of `run_id`. Raises StorageError; safe to retry."""
    for path in (changes.removed_path, changes.returned_path):
        if path is not None:
            storage.put_new(join_uri(dest, "runs", run_id, path.name), path.read_bytes())


def withdraw_changes(storage: Storage, dest: str, run_id: str, changes: Changes) -> None:
    """Takes back what `write_changes` put beside a plan that lost its race. Raises StorageError; safe to retry."""
    for path in (changes.removed_path, changes.returned_path):
        if path is not None:
            storage.delete(join_uri(dest, "runs", run_id, path.name))


def write_removed(storage: Storage, dest: str, run_id: str, image_uris: Iterable[str]) -> bool:
    """Records images as gone in the plan of `run_id`, create-only. False where the run has such a record already."""
    table = pa.table({"image_uri": sorted(image_uris)}, schema=REMOVED)
    return _put(storage, join_uri(dest, "runs", run_id, REMOVED_NAME), table)


def write_returned(storage: Storage, dest: str, run_id: str, etags: Mapping[str, str]) -> bool:
    """Records images as there again, each with its etag; as `write_removed`."""
    columns = {"image_uri": sorted(etags), "image_etag": [etags[uri] for uri in sorted(etags)]}
    return _put(storage, join_uri(dest, "runs", run_id, RETURNED_NAME), pa.table(columns, schema=RETURNED))


def _put(storage: Storage, uri: str, table: pa.Table) -> bool:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return storage.put_new(uri, sink.getvalue())
