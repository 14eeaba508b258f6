"""Whether a table is whole. Owns: looking at every file and every record of DEST, and what each finding says.
Must not know: how runs are made. Changes nothing.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from pipeline.errors import InfrastructureError, StorageError, UsageError
from pipeline.machine import cores
from pipeline.storage import join_uri, normalize_uri, open_storage
from pipeline.table.audit import Audit, Finding
from pipeline.table.catalog import files_below, open_duckdb
from pipeline.table.forgotten import read_forgotten
from pipeline.table.inspection import Inspected, inspect_part, why_unreadable
from pipeline.table.prune import leftovers
from pipeline.table.runs import PRUNED_NAME, RunFiles, read_runs
from pipeline.table.schema import parse_part_name
from pipeline.table.scratch import scratch_folder
from pipeline.table.traces import find_traces, list_files
from pipeline.wording import counted

#: Files in memory at once, where they are remote.
_REMOTE_AT_ONCE = 2
_LOCAL_AT_ONCE = 8
_MEMORY_BYTES = 3 << 30


def verify(dest: str, deep: bool = False, *, profile: str | None = None) -> list[Finding]:
    """What is wrong with the table at `dest`, by kind and URI; [] where nothing is.

    Every file is read from end to end, and is where its run puts it; masks, classes and instances are of the size of
    their image; there is one terminal row per image, etag, model version and settings (one more per run that was asked
    to repeat it); every closed run has a row for each image of its frozen list, and the counts in its record are those
    of its Parts. `deep`: every mask decodes and has the checksum of its row.

    A Part that is gone is no finding any more once its images have rows elsewhere, or are gone from SOURCE. Open runs
    are not counted. Raises UsageError where DEST holds no table, StorageError where the store fails. Changes nothing.
    """
    dest = normalize_uri(dest)
    storage = open_storage(dest, profile=profile)
    files = files_below(storage, join_uri(dest, "segments"))
    runs = read_runs(storage, dest)
    if not files and not runs:
        raise UsageError(f"{dest} holds no Maskmill table: give the DEST of an earlier `maskmill segment`")
    with scratch_folder() as folder:
        connection = open_duckdb(storage, sizes=files, memory_bytes=_MEMORY_BYTES, temp_path=str(folder))
        try:
            audit = Audit(storage, dest, files, {run.run_id: run for run in runs}, connection)
            _check_records(audit)
            _check_parts(audit, deep)
            audit.check_repeats()
            waiting = _check_forgotten(audit)
            for run in runs:
                if run.pruned:
                    _check_pruned(audit, run)
                elif run.outcome and not run.damage and run.run_id not in waiting:
                    audit.check_run(run)
            return sorted(audit.findings)
        finally:
            connection.close()


def _check_records(audit: Audit) -> None:
    """The records of runs, and the small tables beside them."""
    of_runs = []
    for run in audit.runs.values():
        of_runs += [audit.run_uri(run, name) for name in ("removed.parquet", "returned.parquet") if name in run.names]
        if run.damage:
            closed = "run.json" in run.names
            again = "; or delete it, and give the run's command again: it counts the Parts and closes the run"
            audit.add(
                "unreadable_record", audit.run_uri(run, "run.json" if closed else "plan.json"), run.damage,
                "restore it from a backup" + (again if closed else ""),
            )  # fmt: skip
    scores = [
        uri for uri in files_below(audit.storage, join_uri(audit.dest, "evaluations")) if uri.endswith(".parquet")
    ]
    for uri in of_runs + scores:
        if why := why_unreadable(audit.storage, uri):
            then = "evaluate again" if uri in scores else "the next run over the whole of SOURCE finds out anew"
            audit.add("unreadable_file", uri, why, f"restore it from a backup; or delete it: {then}")


def _check_forgotten(audit: Audit) -> frozenset[str]:
    """No file names an image that was to be forgotten. Gives the runs whose files do: they do not add up until then."""
    try:
        forgotten = read_forgotten(audit.storage, audit.dest)
    except InfrastructureError as error:
        if isinstance(error, StorageError):
            raise
        audit.add("unreadable_file", join_uri(audit.dest, "runs", "_forgotten"), str(error), "restore it from a backup")
        return frozenset()
    damaged = {finding.uri for finding in audit.findings if finding.kind == "unreadable_file"}
    traces = find_traces(
        audit.connection, list_files(audit.storage, audit.dest, without=damaged), list(audit.runs.values()), forgotten,
        audit.dest,
    )  # fmt: skip
    for trace in traces.found:
        what = counted(trace.images, "row") + " of images" if trace.images else "pictures of images"
        audit.add(
            "not_forgotten", trace.uri, f"it has {what} that were to be forgotten",
            f"give `maskmill forget {audit.dest}`, which takes them out; of an open run, once it is closed",
        )  # fmt: skip
    return frozenset(trace.run_id for trace in traces.found)


def _check_pruned(audit: Audit, run: RunFiles) -> None:
    """Nothing is left of what `prune` was to delete."""
    parts = [uri for uri in audit.files if (parse_part_name(uri.rpartition("/")[2]) or ("",))[0] == run.run_id]
    if left := leftovers(run, parts):
        audit.add(
            "half_pruned", audit.run_uri(run, PRUNED_NAME),
            f"run {run.run_id} was to be pruned, and {counted(len(left), 'file')} of it are there, such as {left[0]}",
            f"give `maskmill prune {audit.dest} --keep-versions N` again, with any N: it finishes what was begun",
        )  # fmt: skip


def _check_parts(audit: Audit, deep: bool) -> None:
    """Every file below `segments`: those that are Parts in their place are read."""
    jobs: list[tuple[str, RunFiles, int]] = []
    for uri in audit.files:
        parsed = parse_part_name(uri.rpartition("/")[2])
        run = audit.runs.get(parsed[0]) if parsed else None
        if parsed is None:
            audit.add(
                "foreign_file", uri, "it is no file of Maskmill's, and readers of DEST/segments take it for one",
                "move it out of DEST/segments",
            )  # fmt: skip
        elif run is None:
            audit.add(
                "unknown_run", uri, f"DEST/runs has no plan of its run {parsed[0]}",
                f"restore DEST/runs/{parsed[0]} from a backup (what was in `plan.json` is in `run.json`, too, under "
                "`plan`); or move the file out of DEST/segments: its images are processed again",
            )  # fmt: skip
        elif run.damage or run.pruned:
            continue  # said already, or to be said
        elif uri != audit.part_uri(run, parsed[1]) or parsed[1] >= len(audit.bounds(run)):
            audit.add(
                "misplaced_part", uri,
                f"run {run.run_id} has {len(audit.bounds(run))} Parts in {audit.folder(run)}, and none like this",
                "move it out of DEST/segments; or where it belongs, if it is missing there",
            )  # fmt: skip
        else:
            jobs.append((uri, run, parsed[1]))

    def look(job: tuple[str, RunFiles, int]) -> Inspected | None:
        uri, run, _ = job
        version = run.plan["model_version"]
        try:
            return inspect_part(audit.storage, uri, run_id=run.run_id, version=version, deep=deep)
        except StorageError as error:
            if error.kind == "missing":  # gone since it was listed
                return None
            raise

    at_once = min(_LOCAL_AT_ONCE, cores()) if audit.dest.startswith("file:") else _REMOTE_AT_ONCE
    with ThreadPoolExecutor(at_once) as pool:
        for (uri, run, ordinal), seen in zip(jobs, pool.map(look, jobs), strict=True):
            if seen is None:
                continue
            audit.enter(run, ordinal, uri, seen)
            for fault in seen.faults:
                audit.add(fault.kind, uri, fault.message, audit.replacement(run))
