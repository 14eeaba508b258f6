"""Where forgotten images still are. Owns: which files of DEST may name an image, and finding those that name one of
these. Must not know: how a trace is removed.

    segments/**.parquet                     rows
    evaluations/**.parquet                  rows of counts; page.html beside them shows the images
    runs/<run_id>/manifest.parquet          the frozen list
    runs/<run_id>/{removed,returned}.parquet
    runs/<run_id>/{plan,run}.json           where SOURCE was one image
    runs/<run_id>/report.html               shows images of the run
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import duckdb

from pipeline.storage import Storage, duckdb_path, join_uri
from pipeline.table.catalog import files_below, read_parts_sql, unreadable
from pipeline.table.forgotten import Forgotten
from pipeline.table.runs import RunFiles
from pipeline.table.schema import RUN_ID, parse_part_name

Kind = Literal["part", "evaluation", "list", "event", "record", "page"]

LIST_NAME = "manifest.parquet"
EVENT_NAMES = ("removed.parquet", "returned.parquet")
RECORD_NAMES = ("plan.json", "run.json")
REPORT_NAME, EVALUATION_PAGE_NAME = "report.html", "page.html"


class Trace(NamedTuple):
    """A file with something of forgotten images in it. `images`: how many lines or rows are of such; 0 for a page.
    `run_id`: whose file it is, "" for none."""

    uri: str
    kind: Kind
    images: int
    run_id: str = ""


class Files(NamedTuple):
    """What a listing of DEST shows of the files that can name images, as URIs by kind."""

    parts: tuple[str, ...]
    evaluations: tuple[str, ...]
    lists: tuple[str, ...]
    events: tuple[str, ...]
    pages: frozenset[str]
    sizes: Mapping[str, int]


class Traces(NamedTuple):
    """`unreadable`: files of which nobody knows whether there is a trace in them."""

    found: tuple[Trace, ...]
    unreadable: tuple[str, ...]

    def of(self, *kinds: Kind) -> list[Trace]:
        """Those of these kinds."""
        return [trace for trace in self.found if trace.kind in kinds]

    def images(self, *kinds: Kind) -> int:
        """Rows or lines in files of these kinds."""
        return sum(trace.images for trace in self.of(*kinds))


def list_files(storage: Storage, dest: str, *, without: Container[str] = ()) -> Files:
    """Three LISTs. Raises StorageError."""
    sizes, of_evaluations, of_runs = (
        {uri: size for uri, size in files_below(storage, join_uri(dest, name)).items() if uri not in without}
        for name in ("segments", "evaluations", "runs")
    )
    parts = [uri for uri in sizes if parse_part_name(_name(uri))]
    of_runs = {uri: size for uri, size in of_runs.items() if run_of(uri)}
    return Files(
        parts=tuple(parts),
        evaluations=tuple(uri for uri in of_evaluations if uri.endswith(".parquet")),
        lists=tuple(uri for uri in of_runs if _name(uri) == LIST_NAME),
        events=tuple(uri for uri in of_runs if _name(uri) in EVENT_NAMES),
        pages=frozenset(uri for uri in of_runs if _name(uri) == REPORT_NAME)
        | {uri for uri in of_evaluations if _name(uri) == EVALUATION_PAGE_NAME},
        sizes=sizes | of_evaluations | of_runs,
    )


def run_of(uri: str) -> str:
    """The run whose file this is, "" for none: by its folder below `runs`, or by its name where it is a Part."""
    parsed = parse_part_name(_name(uri))
    folder = _name(uri.rpartition("/")[0])
    return parsed[0] if parsed else folder if RUN_ID.fullmatch(folder) else ""


def find_traces(connection: Any, files: Files, runs: Sequence[RunFiles], forgotten: Forgotten, dest: str) -> Traces:
    """Every file that names a forgotten image, the pages that show one first. `connection`: of `open_duckdb` with
    `files.sizes`. Reads the column of URIs of every file. Raises InfrastructureError where the store fails."""
    if not forgotten:
        return Traces((), ())
    found: list[Trace] = []
    unreadable: list[str] = []
    condition = {name: forgotten.condition(connection, name) for name in ("image_uri", "uri")}
    groups: tuple[tuple[Kind, tuple[str, ...], str], ...] = (
        ("event", files.events, "image_uri"),
        ("evaluation", files.evaluations, "image_uri"),
        ("list", files.lists, "uri"),
        ("part", files.parts, "image_uri"),
    )
    for kind, uris, column in groups:
        counts, odd = _count(connection, uris, condition[column], dest)
        found += [Trace(uri, kind, number, run_of(uri) if kind != "evaluation" else "") for uri, number in counts]
        unreadable += odd
    for run in runs:
        if run.plan and forgotten.stand_in(run.plan["command"]["source"]):
            records = [join_uri(dest, "runs", run.run_id, name) for name in RECORD_NAMES if name in run.names]
            found += [Trace(uri, "record", 1, run.run_id) for uri in records]
    return Traces((*_pages(files, found), *found), tuple(unreadable))


def _pages(files: Files, found: Iterable[Trace]) -> list[Trace]:
    uris = set()
    for trace in found:
        if trace.kind == "evaluation":
            uris.add(join_uri(trace.uri.rpartition("/")[0], EVALUATION_PAGE_NAME))
        elif trace.kind in ("part", "list"):
            uris |= {uri for uri in files.pages if run_of(uri) == trace.run_id}
    return [Trace(uri, "page", 0, run_of(uri)) for uri in sorted(uris & files.pages)]


def _count(connection: Any, uris: Sequence[str], condition: str, dest: str) -> tuple[list[tuple[str, int]], list[str]]:
    """(URI and rows that fulfil the condition, where there are any; files that cannot be read)."""
    if not uris:
        return [], []
    uri_of = {duckdb_path(uri) if uri.startswith("file://") else _as_told(uri): uri for uri in uris}
    try:
        counted = connection.execute(
            f"SELECT filename, count(*) FROM {read_parts_sql(uris, filename=True)} WHERE {condition} "
            "GROUP BY filename ORDER BY filename"
        ).fetchall()
    except duckdb.Error as error:
        if "Traceback" in str(error):  # of the store, and not of one file
            raise unreadable(dest, error) from error
        if len(uris) == 1:
            return [], list(uris)
        # One damaged file hides all others: which one it is takes a look at each half.
        middle = len(uris) // 2
        halves = [_count(connection, half, condition, dest) for half in (uris[:middle], uris[middle:])]
        return halves[0][0] + halves[1][0], halves[0][1] + halves[1][1]
    return [(uri_of[_as_told(path)], number) for path, number in counted], []


def _as_told(path: str) -> str:
    """Of what fsspec's memory holds, DuckDB says `memory:///x` where we say `memory://x`."""
    return path.replace(":///", "://", 1)


def _name(uri: str) -> str:
    return uri.rpartition("/")[2]
