"""A deletion request. Owns: choosing the images, keeping them out of every later plan, and taking them out of every
file of DEST.
Must not know: how runs are planned or worked on.

    choose ─▶ list their hashes ─▶ take the next number in the log of plans ─▶ take out ─▶ look again

The list comes first, and is never taken back: from then on nothing of these images is needed to go on, and the same
command, or one without a condition, finishes what was interrupted. The number makes every plan that was being made
without the list lose its race, so that it is made again, with it.

A Part keeps its name: its rows without those of forgotten images replace it in one atomic step, and only if it is still
what was read. So no reader sees a row twice or misses one, a worker that comes back from the dead finds the name taken,
and of two commands at once none brings back what the other took out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import duckdb
from pydantic import BaseModel, ConfigDict

from pipeline.errors import InfrastructureError, UsageError
from pipeline.storage import Storage, join_uri, normalize_uri, open_storage
from pipeline.table.catalog import files_below, open_duckdb, open_table, read_parts_sql, sql_text, unreadable
from pipeline.table.conditions import check_condition, told
from pipeline.table.forgotten import STAND_IN, Forgotten, hash_sql, read_forgotten, write_forgotten
from pipeline.table.runs import RunFiles, read_runs
from pipeline.table.scratch import scratch_folder
from pipeline.table.takeout import take_out
from pipeline.table.traces import EVENT_NAMES, LIST_NAME, Files, Trace, Traces, find_traces, list_files, run_of
from pipeline.wording import counted

_MEMORY_BYTES = 3 << 30
#: Each holds a Part twice, as it is stored.
_PARTS_AT_ONCE = 4
_ROUNDS = 5
#: What DuckDB raises for an SQL text, whatever the files hold.
_OF_THE_CONDITION = (
    duckdb.ParserException, duckdb.BinderException, duckdb.CatalogException, duckdb.ConversionException,
)  # fmt: skip
_LOG_NAME = re.compile(r"/(\d{8,})\.json\Z")


class Forgetting(BaseModel):
    """What `forget` did, or would do. `images`: those that the condition chose and that were not forgotten before. The
    rest counts what is taken out, of images forgotten before too. `done`: whether it was done."""

    model_config = ConfigDict(frozen=True)

    images: int
    rows: int
    parts: int
    lists: int
    list_lines: int
    evaluation_rows: int
    event_lines: int
    pages: int
    records: int
    done: bool

    @property
    def nothing(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.images or self.parts or self.lists or self.evaluation_rows or self.event_lines or self.records)


#: True, False, or what is told first what would be done, and answers.
Consent = bool | Callable[[Forgetting], bool]


def forget(dest: str, where: str | None = None, *, yes: Consent = False, profile: str | None = None) -> Forgetting:
    """Takes the images that `where` chooses out of the table at `dest`, for good; without `yes` only says what it would
    take.

    `where`: an SQL condition on columns of the view `segments`; an image is chosen where any of its rows fulfils it,
    and all its rows go. One that names no column but `image_uri` also finds images that have no row: in frozen lists,
    records of what is gone from SOURCE, and evaluations. None: only finish what was begun, or came back.

    Once it returns, no file of DEST names any image that was ever forgotten, and no plan will hold one again. Raises
    UsageError (nothing was changed: a condition that fails, no table, an open run that holds such an image),
    InfrastructureError (the same call again goes on where this one stopped).
    """
    dest = normalize_uri(dest)
    return forget_in(open_storage(dest, profile=profile), dest, where, yes=yes)


def forget_in(storage: Storage, dest: str, where: str | None, *, yes: Consent) -> Forgetting:
    """As `forget`, on a store that is open already."""
    if where is not None and not where.strip():
        raise UsageError("the condition is empty: give one such as \"image_uri LIKE 's3://photos/jane/%'\"")
    known = read_forgotten(storage, dest)
    salt = known.salt
    chosen = _choose(storage, dest, where, known, salt) if where is not None else frozenset()
    everything = known.also(salt, chosen)
    runs, traces, _ = _look(storage, dest, everything)
    _refuse_open_runs(dest, runs, traces)
    found = _counted(len(chosen), traces)
    if found.nothing:
        _complain_of_unreadable(dest, traces)
    if found.nothing or not (yes(found) if callable(yes) else yes):
        return found
    storage.check_create_only()
    if chosen:
        write_forgotten(storage, dest, salt, chosen)
    _supersede_plans(storage, dest)
    _take_all_out(storage, dest, everything)
    return found.model_copy(update={"done": True})


# ── choosing ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _choose(storage: Storage, dest: str, where: str, known: Forgotten, salt: str) -> frozenset[str]:
    """Hashes of the URIs that `where` chooses and that are not known yet."""
    with scratch_folder() as folder:
        connection = open_table(storage, dest, memory_bytes=_MEMORY_BYTES, temp_path=str(folder))
        try:
            check_condition(connection, where)
            chosen = _hashes(connection, "segments", where, known, salt)
        except _OF_THE_CONDITION as error:
            raise UsageError(f"--where {where!r}: {told(error)}") from error
        except duckdb.Error as error:
            raise unreadable(dest, error) from error
        finally:
            connection.close()
        files = list_files(storage, dest)
        connection = open_duckdb(storage, sizes=files.sizes, memory_bytes=_MEMORY_BYTES, temp_path=str(folder))
        try:
            # The other files know no more of an image than its URI.
            connection.execute(f"SELECT 1 FROM (SELECT '' AS image_uri) WHERE ({where}\n)").fetchall()
            for uris, column in ((files.lists, "uri"), (files.events, "image_uri"), (files.evaluations, "image_uri")):
                if uris:
                    named = f"(SELECT {column} AS image_uri FROM {read_parts_sql(uris)})"
                    chosen |= _hashes(connection, named, where, known, salt)
        except _OF_THE_CONDITION:
            return chosen
        except duckdb.Error as error:
            raise unreadable(dest, error) from error
        finally:
            connection.close()
    return chosen


def _hashes(connection: Any, relation: str, where: str, known: Forgotten, salt: str) -> frozenset[str]:
    sql = (
        f"SELECT {hash_sql(salt, 'image_uri')} AS digest FROM "
        f"(SELECT DISTINCT image_uri FROM {relation} WHERE ({where}\n)) "
        f"WHERE NOT starts_with(image_uri, {sql_text(STAND_IN)}) AND NOT {known.condition(connection, 'image_uri')}"
    )
    return frozenset(connection.execute(sql).fetchnumpy()["digest"].tolist())


# ── looking ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _look(storage: Storage, dest: str, forgotten: Forgotten) -> tuple[list[RunFiles], Traces, Files]:
    # Files first: a run that is closed in between is then closed in what is known of it, and not the other way round.
    files = list_files(storage, dest)
    runs = read_runs(storage, dest)
    return runs, _find(storage, dest, files, runs, forgotten), files


def _find(storage: Storage, dest: str, files: Files, runs: Sequence[RunFiles], forgotten: Forgotten) -> Traces:
    with scratch_folder() as folder:
        connection = open_duckdb(storage, sizes=files.sizes, memory_bytes=_MEMORY_BYTES, temp_path=str(folder))
        try:
            return find_traces(connection, files, runs, forgotten, dest)
        finally:
            connection.close()


def _refuse_open_runs(dest: str, runs: Sequence[RunFiles], traces: Traces, error: type[Exception] = UsageError) -> None:
    """Their workers would make rows of these images yet."""
    open_runs = {run.run_id for run in runs if "run.json" not in run.names}
    for trace in traces.of("list", "part"):
        if trace.run_id in open_runs:
            raise error(
                f"run {trace.run_id} is open and holds {counted(trace.images, 'image')} of these: let its command "
                f"finish, or give `maskmill runs abandon {dest} {trace.run_id}`; then forget again"
            )


def _complain_of_unreadable(dest: str, traces: Traces) -> None:
    if traces.unreadable:
        more = f" and {len(traces.unreadable) - 1} more" if len(traces.unreadable) > 1 else ""
        raise InfrastructureError(
            f"{traces.unreadable[0]}{more} cannot be read, so nobody knows which images are in there: `maskmill verify "
            f"{dest}` says how to mend it; then forget again"
        )


def _counted(images: int, traces: Traces) -> Forgetting:
    return Forgetting(
        images=images,
        rows=traces.images("part"),
        parts=len(traces.of("part")),
        lists=len(traces.of("list")),
        list_lines=traces.images("list"),
        evaluation_rows=traces.images("evaluation"),
        event_lines=traces.images("event"),
        pages=len(traces.of("page")),
        records=len(traces.of("record")),
        done=False,
    )


# ── doing ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _supersede_plans(storage: Storage, dest: str) -> None:
    """Takes the next number in the log of plans: whoever planned before it, without the list, has to plan again."""
    folder = join_uri(dest, "runs", "_log")
    while True:
        found = (_LOG_NAME.search(uri) for uri in files_below(storage, folder))
        number = max((int(name[1]) for name in found if name), default=0) + 1
        if storage.put_new(join_uri(folder, f"{number:08d}.json"), json.dumps({"run_id": "_forgotten"}).encode()):
            return


def _in_turn(traces: Traces) -> list[list[Trace]]:
    """A file by which another one is found goes after it, so that a kill in between hides nothing: what a page shows is
    told from the files that it was made of, and SOURCE of a closed run from `run.json`."""
    turns: list[list[Trace]] = [[], [], []]
    for trace in traces.found:
        turns[0 if trace.kind == "page" else 2 if trace.uri.endswith("/run.json") else 1].append(trace)
    return turns


def _take_all_out(storage: Storage, dest: str, forgotten: Forgotten) -> None:
    """Until nothing is found any more: what was being written meanwhile is found by the next look."""
    touched: set[str] = set()
    for _ in range(_ROUNDS):
        runs, traces, files = _look(storage, dest, forgotten)
        # One that was planned a moment ago, before this command took its number.
        _refuse_open_runs(dest, runs, traces, InfrastructureError)
        if not traces.found:
            # A report that was being made of a run that had just been closed.
            for uri in files.pages:
                if run_of(uri) in touched:
                    storage.delete(uri)
            _complain_of_unreadable(dest, traces)
            return
        touched |= {trace.run_id for trace in traces.of("list", "part")}
        began = {run.run_id for run in runs}

        def take(trace: Trace, began: set[str] = began) -> None:
            if trace.kind in ("list", "event") and trace.run_id not in began:
                # Of a plan that lost its race to our number or before; its driver, if it is alive, does the same.
                for name in ("plan.json", LIST_NAME, *EVENT_NAMES):
                    storage.delete(join_uri(dest, "runs", trace.run_id, name))
            else:
                take_out(storage, trace, forgotten)

        with ThreadPoolExecutor(_PARTS_AT_ONCE) as pool:
            for some in _in_turn(traces):
                for _done in pool.map(take, some):
                    pass
    raise InfrastructureError(
        f"forgotten images came back to {dest} {_ROUNDS} times: stop what writes them, then forget again"
    )
