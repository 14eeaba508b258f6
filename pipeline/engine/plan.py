"""What is left to do. Owns: the one query that answers it, and the cutting of its answer into shards.
Must not know: workers, leases, who asks.

    work left = distinct manifest ANTI JOIN terminal rows, minus the lists of open runs
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.engine.ledger import Plan, WorkCounts
from pipeline.errors import ALWAYS_RETRIED_KINDS
from pipeline.storage import Storage
from pipeline.table.catalog import TERMINAL, key_sql, open_duckdb, read_parts_sql, sql_text
from pipeline.table.forgotten import Forgotten
from pipeline.table.schema import SCHEMA_VERSION, WORK

log = logging.getLogger(__name__)

#: Failed attempts on one etag for reasons of the world (missing and denied apart) before an image is given up.
MAX_ATTEMPTS = 3

#: A Part of this size is large enough to scan well and small enough for one PUT and one retry.
TARGET_PART_BYTES = 128 << 20
_GUESSED_ROW_BYTES = 8 << 10
#: A past run of errors only has tiny rows: the next one may not.
_LEAST_ROW_BYTES = 1 << 10
_SHARDS_PER_ACTOR = 4
#: Up to here the frozen list is sorted by uri: neighbours stay together, and row groups get narrow statistics.
_SORTED_IMAGES = 2_000_000

_LISTED_KEY = f"{key_sql('uri', 'etag')} AS key"
_ROW_KEY = f"{key_sql('image_uri', 'listed_etag')} AS key"


class Question(NamedTuple):
    """What planning needs to know. `corpus`: what stands after FROM in DuckDB, with the columns of MANIFEST_SCHEMA and
    `corpus_rows` rows; `corpus_is_distinct` where it is known that none repeats a URI. `held`: open runs and their
    lists.

    `forgotten`: images that no plan may hold again, whatever SOURCE says.
    `unmatched_path`: where to list the images (Parquet of image_uri) of the terminal rows whose image the corpus does
    not hold under the etag that they were planned with; None where nobody asks.
    """

    corpus: str
    corpus_rows: int
    corpus_is_distinct: bool
    part_sizes: Mapping[str, int]
    held: dict[str, Path]
    settings_digest: str
    limit: int | None = None
    retry_errors: bool = False
    force: bool = False
    unmatched_path: Path | None = None
    forgotten: Forgotten | None = None


def work_left(
    question: Question,
    storage: Storage,
    *,
    scratch: Path,
    list_path: Path | None,
    memory_bytes: int = 3 << 30,
) -> WorkCounts:
    """Counts the work left and, with `list_path`, writes it there (schema `WORK`).

    An image is done where a terminal row has its uri with its etag, as listed or as read. One that an open run holds is
    left to that run whatever its etag. Memory: about `memory_bytes`; beyond that DuckDB spills into `scratch`.
    Changes nothing in DEST.
    """
    connection = open_duckdb(storage, sizes=question.part_sizes, memory_bytes=memory_bytes, temp_path=str(scratch))
    try:
        connection.execute("SET preserve_insertion_order = false")
        question, forgotten = _without_forgotten(connection, question, scratch)
        return _answer(connection, question, list_path).model_copy(update={"forgotten": forgotten})
    finally:
        connection.close()


def _without_forgotten(connection: Any, question: Question, scratch: Path) -> tuple[Question, int]:
    """The question about the rest of the corpus, and how many lines of it are left out."""
    if not question.forgotten:
        return question, 0
    rest = scratch / "unforgotten.parquet"
    kept = connection.execute(
        f"COPY (SELECT * FROM {question.corpus} "
        f"WHERE NOT {question.forgotten.condition(connection, 'uri')}) TO {sql_text(str(rest))} "
        "(FORMAT parquet, COMPRESSION zstd, COMPRESSION_LEVEL 1)"
    ).fetchone()[0]
    left = question._replace(corpus=f"read_parquet({sql_text(str(rest))})", corpus_rows=kept)
    return left, question.corpus_rows - kept


def _answer(connection: Any, question: Question, list_path: Path | None) -> WorkCounts:
    def number(sql: str) -> int:
        ((value,),) = connection.execute(sql).fetchall()
        return int(value)

    of_these_settings = f"settings_digest = {sql_text(question.settings_digest)}"
    rows = f"(SELECT * FROM {read_parts_sql(list(question.part_sizes))} WHERE {of_these_settings})"
    # Counted by whoever read it: to count an inventory is to read it.
    listed, lines = question.corpus, question.corpus_rows
    images = lines
    twice = np.empty(0, np.uint64) if question.corpus_is_distinct else _repeated(connection, listed, lines)
    if not len(twice):
        connection.execute(f"CREATE VIEW corpus AS SELECT uri, etag, size_bytes, modified FROM {listed}")
    else:
        connection.register("repeated", pa.table({"key": twice}))
        perhaps = f"{listed} l {{}} JOIN repeated r ON hash(l.uri) = r.key"
        # Of a URI that is named twice with different etags, one whole line: the newest, the same every night.
        connection.execute(
            "CREATE TEMP TABLE corpus AS SELECT uri, one.etag, one.size_bytes, one.modified FROM (SELECT uri, "
            "first({'etag': etag, 'size_bytes': size_bytes, 'modified': modified} "
            f"ORDER BY modified DESC NULLS LAST, etag) AS one FROM {perhaps.format('SEMI')} GROUP BY uri)"
            f" UNION ALL SELECT uri, etag, size_bytes, modified FROM {perhaps.format('ANTI')}"
        )
        images = number("SELECT count(*) FROM corpus")

    final = "status = 'ok'" if question.retry_errors else TERMINAL
    asked = not question.force and bool(question.part_sizes)
    if asked:
        _join(connection, rows, final, question.unmatched_path if final == TERMINAL else None)
    else:
        connection.execute("CREATE VIEW undone AS SELECT * FROM corpus")
        undone = images
    if question.unmatched_path is not None and not (asked and final == TERMINAL):
        _write_unmatched(
            connection,
            question.unmatched_path,
            f"(SELECT image_uri, {_ROW_KEY} FROM {rows} WHERE {TERMINAL}) t "
            f"ANTI JOIN (SELECT {_LISTED_KEY} FROM corpus) c",
        )
    if asked:
        undone = number("SELECT count(*) FROM undone")

    past_rows = 0
    if question.part_sizes and undone:
        connection.execute(
            f"""CREATE TEMP TABLE past_rows AS SELECT image_uri AS uri, listed_etag, image_etag, status, error_kind
            FROM {rows} SEMI JOIN (SELECT hash(uri) AS key FROM undone) u ON hash(image_uri) = u.key"""
        )
        past_rows = number("SELECT count(*) FROM past_rows")
    if asked and past_rows:
        connection.execute(
            f"""CREATE OR REPLACE TEMP TABLE undone AS SELECT c.* FROM undone c
            ANTI JOIN (SELECT uri, image_etag FROM past_rows WHERE {final} AND image_etag <> listed_etag) t
                ON c.uri = t.uri AND c.etag = t.image_etag"""
        )
        undone = number("SELECT count(*) FROM undone")

    exhausted = 0
    if past_rows:
        always = ", ".join(sql_text(kind) for kind in sorted(ALWAYS_RETRIED_KINDS))
        give_up = "false" if question.retry_errors or question.force else f"coalesce(p.spent, 0) >= {MAX_ATTEMPTS}"
        connection.execute(
            f"""CREATE TEMP TABLE past AS SELECT uri, listed_etag AS etag,
                count(*) FILTER (status = 'error') AS failures,
                count(*) FILTER (status = 'error' AND error_kind NOT IN ({always}) AND NOT {TERMINAL}) AS spent
            FROM past_rows GROUP BY ALL"""
        )
        connection.execute(
            f"""CREATE VIEW candidates AS SELECT u.*, coalesce(p.failures, 0) AS failures, p.uri IS NOT NULL AS seen,
                {give_up} AS exhausted
            FROM undone u LEFT JOIN past p ON u.uri = p.uri AND u.etag = p.etag"""
        )
        exhausted = number("SELECT count(*) FROM candidates WHERE exhausted")
    else:
        connection.execute(
            "CREATE VIEW candidates AS SELECT *, 0 AS failures, false AS seen, false AS exhausted FROM undone"
        )

    held_by: dict[str, int] = {}
    if question.held and undone:
        open_lists = " UNION ALL ".join(
            f"SELECT uri, {sql_text(run)} AS run_id FROM read_parquet({sql_text(str(path))})"
            for run, path in question.held.items()
        )
        held_by = dict(
            connection.execute(
                f"SELECT run_id, count(*) FROM candidates JOIN ({open_lists}) h USING (uri) "
                "WHERE NOT exhausted GROUP BY run_id ORDER BY run_id"
            ).fetchall()
        )
        connection.execute(
            f"CREATE VIEW work AS SELECT * FROM candidates ANTI JOIN ({open_lists}) h USING (uri) WHERE NOT exhausted"
        )
    else:
        connection.execute("CREATE VIEW work AS SELECT * FROM candidates WHERE NOT exhausted")
    left, failed_before, repeated, changed = undone, 0, 0, 0
    if held_by or past_rows:
        left, failed_before, repeated = connection.execute(
            "SELECT count(*), count(*) FILTER (failures > 0), count(*) FILTER (failures = 0 AND seen) FROM work"
        ).fetchone()
    if past_rows:
        changed = number("SELECT count(*) FROM work WHERE NOT seen AND uri IN (SELECT uri FROM past)")

    planned, planned_bytes = left, 0
    if list_path is not None or question.limit:
        order = "ORDER BY uri" if left <= _SORTED_IMAGES or question.limit else ""
        cut = f"LIMIT {question.limit}" if question.limit else ""
        chosen = f"SELECT uri, etag, size_bytes, modified, (failures + 1)::SMALLINT AS attempt FROM work {order} {cut}"
        planned = min(left, question.limit or left)
        if list_path is not None:
            connection.execute(
                f"COPY ({chosen}) TO {sql_text(str(list_path))} (FORMAT parquet, COMPRESSION zstd, "
                f"COMPRESSION_LEVEL 1, KV_METADATA {{maskmill_schema_version: '{SCHEMA_VERSION}'}})"
            )
            planned_bytes = number(f"SELECT coalesce(sum(size_bytes), 0) FROM read_parquet({sql_text(str(list_path))})")
    return WorkCounts(
        images=images,
        duplicates=lines - images,
        done=images - undone,
        exhausted=exhausted,
        held=undone - exhausted - left,
        held_by=held_by,
        left=left,
        new=left - changed - failed_before - repeated,
        changed=changed,
        repeated=repeated,
        failed_before=failed_before,
        planned=planned,
        planned_bytes=planned_bytes,
    )


def _repeated(connection: Any, listed: str, lines: int) -> np.ndarray:
    """Hashes of the URIs that stand on more than one line, and perhaps of a few that do not.

    Memory: 8 bytes a line. A tenth of the time and memory of grouping by URI.
    """
    keys = np.empty(lines, np.uint64)
    at = 0
    for batch in connection.sql(f"SELECT hash(uri) AS key FROM {listed}").to_arrow_reader(1_000_000):
        keys[at : at + len(batch)] = batch.column(0).to_numpy()
        at += len(batch)
    keys.sort()
    return np.unique(keys[1:][keys[1:] == keys[:-1]])


def _join(connection: Any, rows: str, final: str, unmatched_path: Path | None) -> None:
    """The table `undone`: images of `corpus` without a row that is final; and, on the way, rows without an image.

    Compared are `key_sql` of URI and etag.
    """
    # Measured at 20 million images: an outer join takes no longer than the anti-join; a second anti-join, of rows
    # against images, takes twice its time and nearly three times its memory.
    hashed = "hash(image_uri, listed_etag)"  # a quarter of what a key costs: says which rows are worth one once more
    kind, of_rows, where = "ANTI", "", ""
    if unmatched_path is not None:
        kind, of_rows, where = "FULL", ", t.key, t.hash", "WHERE c.key IS NULL OR t.key IS NULL"
    connection.execute(
        f"""CREATE TEMP TABLE undone AS SELECT uri, etag, size_bytes, modified{of_rows} FROM
            (SELECT *, {_LISTED_KEY} FROM corpus) c
        {kind} JOIN (SELECT {_ROW_KEY}, {hashed} AS hash FROM {rows} WHERE {final}) t
            ON c.key = t.key {where}"""
    )
    if unmatched_path is None:
        return
    connection.execute("CREATE TEMP TABLE unmatched AS SELECT key, hash FROM undone WHERE uri IS NULL")
    any_left = connection.execute("SELECT count(*) > 0 FROM unmatched").fetchone()[0]
    if any_left:
        connection.execute("DELETE FROM undone WHERE uri IS NULL")
    perhaps = f"{rows} t SEMI JOIN unmatched u ON {hashed} = u.hash WHERE {final} {'' if any_left else 'LIMIT 0'}"
    keyed = f"SELECT image_uri, {_ROW_KEY} FROM {perhaps}"
    _write_unmatched(connection, unmatched_path, f"({keyed}) t SEMI JOIN unmatched c")


def _write_unmatched(connection: Any, path: Path, joined: str) -> None:
    connection.execute(
        f"COPY (SELECT DISTINCT image_uri FROM {joined} ON c.key = t.key) "
        f"TO {sql_text(str(path))} (FORMAT parquet, COMPRESSION zstd, COMPRESSION_LEVEL 1)"
    )


def choose_shard_size(images: int, *, actors: int, row_bytes: float | None) -> int:
    """Images per shard: a Part near TARGET_PART_BYTES, but at least a few shards for each actor.

    `row_bytes` is what a row of this model took before, in bytes of Part; None where nothing is known.
    """
    by_size = int(TARGET_PART_BYTES / max(row_bytes or _GUESSED_ROW_BYTES, _LEAST_ROW_BYTES))
    by_actors = -(-images // (actors * _SHARDS_PER_ACTOR))
    return max(1, min(by_size, by_actors))


def add_addresses(list_path: Path, signed_path: Path | None, out_path: Path) -> Path:
    """Writes the frozen list to `out_path` with one more column, `address`: what each image is to be read by, NULL
    where its URI is enough. Gives the path to read.

    `signed_path`: Parquet of `uri` and `address`, which may repeat a URI; None where there are none.
    """
    if signed_path is None:
        return list_path
    one_each = f"SELECT uri, max(address) AS address FROM read_parquet({sql_text(str(signed_path))}) GROUP BY uri"
    with duckdb.connect() as connection:
        connection.execute(
            f"""COPY (SELECT w.* EXCLUDE (file_row_number), a.address
            FROM read_parquet({sql_text(str(list_path))}, file_row_number = true) w
            LEFT JOIN ({one_each}) a ON w.uri = a.uri ORDER BY w.file_row_number)
            TO {sql_text(str(out_path))} (FORMAT parquet)"""
        )
    return out_path


def shard_lists(plan: Plan, list_path: Path, *, without: set[int]) -> Iterator[tuple[int, pa.Table]]:
    """(ordinal, references) of every shard not in `without`, in order, reading the frozen list piece by piece.

    References are of schema `WORK`, and have the column `address` where the list does (`add_addresses`)."""
    bounds = plan.bounds()
    batches = pq.ParquetFile(list_path).iter_batches(batch_size=max(plan.shard_size, 8192))
    buffered: list[pa.RecordBatch] = []
    buffered_rows = 0
    for ordinal, (start, stop) in enumerate(bounds):
        need = stop - start
        while buffered_rows < need:
            batch = next(batches)
            buffered.append(batch)
            buffered_rows += len(batch)
        table = pa.Table.from_batches(buffered)
        shard, rest = table.slice(0, need), table.slice(need)
        buffered, buffered_rows = rest.to_batches(), len(rest)
        if ordinal not in without:
            # A copy: a slice would travel to its worker with all that it is cut from.
            schema = WORK if "address" not in shard.column_names else WORK.append(pa.field("address", pa.string()))
            yield ordinal, shard.cast(schema).take(pa.array(range(need), pa.int64())).combine_chunks()
