"""Rows and records against each other. Owns: what must hold between Parts, frozen lists and records of runs, and the
way back where it does not.
Must not know: what is inside a Part beyond its flat columns, how runs are made.
"""

from __future__ import annotations

import datetime as dt
import json
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import duckdb

from pipeline.config import DEFAULT_SUFFIXES, SegmentConfig
from pipeline.storage import Storage, duckdb_path, join_uri
from pipeline.table.catalog import TERMINAL, key_sql, read_parts_sql, sql_text
from pipeline.table.forgotten import STAND_IN
from pipeline.table.inspection import Inspected, reason, why_unreadable
from pipeline.table.runs import RunFiles
from pipeline.table.schema import PartPlace, parse_part_name, part_name, shard_bounds

_EXAMPLES = 3
#: In `listed`: the line of an image that was forgotten.
_STANDS_IN = f"starts_with(uri, {sql_text(STAND_IN)})"
_COUNTS = ("ok", "errors", "errors_by_kind", "parts", "parts_bytes", "instances")


class Finding(NamedTuple):
    """Something that is wrong: what kind of thing, where, what exactly, and the way to mend it."""

    kind: str
    uri: str
    message: str
    mend: str


class Audit:
    """The findings on one DEST as they come together. `files`: bytes by URI of all below `segments`."""

    def __init__(
        self, storage: Storage, dest: str, files: Mapping[str, int], runs: Mapping[str, RunFiles], connection: Any
    ) -> None:
        self.storage = storage
        self.dest = dest
        self.files = files
        self.runs = runs
        self.findings: list[Finding] = []
        self.connection = connection
        self._present: dict[str, dict[int, str]] = {}
        self._readable: dict[str, dict[int, str]] = {}
        self._seen: dict[str, Inspected] = {}
        self._repeating: set[str] = set()

    def add(self, kind: str, uri: str, message: str, mend: str) -> None:
        """One more finding."""
        self.findings.append(Finding(kind, uri, message, mend))

    def enter(self, run: RunFiles, ordinal: int, uri: str, seen: Inspected) -> None:
        """Part `ordinal` of `run` is in its place, and this is what is in it."""
        self._present.setdefault(run.run_id, {})[ordinal] = uri
        self._seen[uri] = seen
        if seen.readable:
            self._readable.setdefault(run.run_id, {})[ordinal] = uri

    def check_repeats(self) -> None:
        """One terminal row per image, etag, model version and settings, and one more per run that was asked for it."""
        try:
            found = self._repeats()
        except duckdb.Error:  # rarely, Arrow reads what DuckDB does not
            self._set_apart()
            found = self._repeats()
        for paths, number, example in found:
            uris = [path if "://" in path else f"file://{path}" for path in paths]
            self._repeating.update(uris)
            run_id, _ = parse_part_name(uris[-1].rpartition("/")[2]) or ("", 0)
            where = f"here and in {', '.join(uris[:-1])}" if len(uris) > 1 else "all in this file"
            self.add(
                "repeated_row", uris[-1],
                f"{number} images have more than one terminal row of one etag, model version and settings, {where}: "
                f"for example {example!r}",
                self.replacement(self.runs[run_id]),
            )  # fmt: skip

    def _repeats(self) -> list[tuple[list[str], int, str]]:
        """(files, how many keys are repeated in just these, one of their images)."""
        if not self._all_readable():
            return []
        again = ", ".join(sql_text(run.run_id) for run in self.runs.values() if not run.damage and run.again)
        asked = f"CASE WHEN run_id IN ({again}) THEN run_id ELSE '' END" if again else "''"
        # As in planning: all keys of the table are in memory at once.
        key = key_sql("image_uri", "listed_etag", "model_version", "settings_digest", asked)
        rows = f"(SELECT *, {key} AS key FROM {read_parts_sql(self._all_readable(), filename=True)} WHERE {TERMINAL})"
        found: list[tuple[list[str], int, str]] = self.connection.execute(
            f"""WITH repeated AS (SELECT key FROM {rows} GROUP BY ALL HAVING count(*) > 1)
            SELECT files, count(*), min(image_uri) FROM (
                SELECT min(image_uri) AS image_uri, list_sort(list(DISTINCT filename)) AS files
                FROM {rows} SEMI JOIN repeated USING (key) GROUP BY key
            ) GROUP BY files ORDER BY files"""
        ).fetchall()
        return found

    def _set_apart(self) -> None:
        """Parts that DuckDB cannot read become findings, and no longer count."""
        columns = "image_uri, listed_etag, model_version, settings_digest, run_id, status, error_kind"
        for run_id, parts in self._readable.items():
            for ordinal, uri in list(parts.items()):
                try:
                    self.connection.execute(f"SELECT max(hash({columns})) FROM {read_parts_sql([uri])}").fetchall()
                except duckdb.Error as error:
                    self.add("unreadable_file", uri, reason(error), self.replacement(self.runs[run_id]))
                    del parts[ordinal]

    def check_run(self, run: RunFiles) -> None:
        """A closed run has a row for each image of its list, and its record counts them."""
        manifest_uri = self.run_uri(run, "manifest.parquet")
        why = why_unreadable(self.storage, manifest_uri) if "manifest.parquet" in run.names else "it is not there"
        if why:
            self.add(
                "unreadable_file", manifest_uri, f"the frozen list of run {run.run_id}: {why}",
                "restore it from a backup; without it nobody can tell whether the run is whole, but its rows stand",
            )  # fmt: skip
            return
        bounds = self.bounds(run)
        present, readable = self._present.get(run.run_id, {}), self._readable.get(run.run_id, {})
        self.connection.execute(
            "CREATE OR REPLACE TEMP TABLE listed AS SELECT uri, etag, file_row_number AS line FROM "
            f"read_parquet({sql_text(duckdb_path(manifest_uri))}, file_row_number = true, hive_partitioning = false)"
        )
        if self._number("SELECT count(*) FROM listed") != run.plan["counts"]["planned"]:
            self.add(
                "wrong_list", manifest_uri,
                f"it has {self._number('SELECT count(*) FROM listed')} images, and the plan of run {run.run_id} has "
                f"{run.plan['counts']['planned']}", "restore both from a backup: they are written together",
            )  # fmt: skip
            return
        missing = sorted(set(range(len(bounds))) - set(present))
        if missing:
            self._check_missing(run, missing)
        # With a Part gone, or damaged and reported, its rows cannot add up.
        if missing or set(readable) != set(present):
            return
        own = read_parts_sql(list(readable.values()))
        asked = f"(FROM listed WHERE NOT {_STANDS_IN})"
        without_row = f"{asked} l ANTI JOIN {own} r ON l.uri = r.image_uri AND l.etag = r.listed_etag"
        not_listed = f"{own} r ANTI JOIN listed l ON l.uri = r.image_uri AND l.etag = r.listed_etag"
        unanswered, example = self.connection.execute(f"SELECT count(*), min(uri) FROM {without_row}").fetchone()
        strangers = self._number(f"SELECT count(*) FROM {not_listed}")
        rows = self._number(f"SELECT count(*) FROM {own}")
        done = run.outcome is not None and run.outcome["state"] == "done"
        run_uri = self.run_uri(run, "run.json")
        if done and unanswered:
            self.add(
                "missing_rows", run_uri, f"{unanswered} images of its frozen list have no row, for example {example!r}",
                f"give the command again: {self.command(run)}, which processes what has no row",
            )  # fmt: skip
        elif strangers or rows > run.plan["counts"]["planned"]:
            if not self._repeating & set(readable.values()):
                self.add(
                    "foreign_rows", run_uri,
                    f"its Parts have {rows} rows, {strangers} of them of images that are not in its frozen list",
                    "compare its Parts with a backup: one of them was changed",
                )  # fmt: skip
        else:
            self._check_counts(run, present, self._number(f"SELECT count(*) FROM listed WHERE {_STANDS_IN}"))

    def _check_missing(self, run: RunFiles, missing: Sequence[int]) -> None:
        """Parts that are gone are a loss as long as images of theirs have no row at all."""
        bounds = self.bounds(run)
        ranges = " OR ".join(f"(line >= {bounds[one][0]} AND line < {bounds[one][1]})" for one in missing)
        rows = read_parts_sql(self._all_readable())
        gone = [
            sql_text(duckdb_path(self.run_uri(one, "removed.parquet")))
            for one in self.runs.values()
            if "removed.parquet" in one.names and not why_unreadable(self.storage, self.run_uri(one, "removed.parquet"))
        ]
        without = f"ANTI JOIN read_parquet([{', '.join(gone)}]) g ON l.uri = g.image_uri" if gone else ""
        lost, example = self.connection.execute(
            f"""SELECT count(*), min(uri) FROM (SELECT uri, etag FROM listed WHERE ({ranges}) AND NOT {_STANDS_IN}) l
            ANTI JOIN (SELECT image_uri, settings_digest, model_version FROM {rows}) r
                ON l.uri = r.image_uri AND r.model_version = {sql_text(run.plan["model_version"])}
                AND r.settings_digest = {sql_text(run.plan["settings_digest"])} {without}"""
        ).fetchone()
        outcome = run.outcome or {}
        if outcome.get("state") == "abandoned":
            left = self._number(
                f"SELECT count(*) FROM {read_parts_sql(list(self._readable.get(run.run_id, {}).values()))}"
            )
            if left >= outcome["ok"] + outcome["errors"]:  # only names that were taken with nothing in them
                return
        if not lost:
            return
        names = ", ".join(part_name(run.run_id, one) for one in missing[:_EXAMPLES])
        more = f" and {len(missing) - _EXAMPLES} more" if len(missing) > _EXAMPLES else ""
        self.add(
            "missing_part", self.part_uri(run, missing[0]),
            f"{names}{more} of run {run.run_id} are not there; {lost} of their images have no row, for example "
            f"{example!r}",
            f"restore them from a backup; or give the command again: {self.command(run)}, which processes these images",
        )  # fmt: skip

    def _check_counts(self, run: RunFiles, present: Mapping[int, str], forgotten: int) -> None:
        """`forgotten`: images of its list that were taken out since; their rows may be in its record still."""
        seen = [self._seen[uri] for uri in present.values()]
        kinds = sum((one.rows for one in seen), Counter[str]())
        ok = kinds.pop("ok", 0)
        counted = {
            "ok": ok,
            "errors": kinds.total(),
            "errors_by_kind": dict(kinds),
            "parts": len(present),
            "parts_bytes": sum(self.files[uri] for uri in present.values()),
            "instances": sum(one.instances for one in seen),
        }
        recorded = run.outcome or {}
        if recorded["state"] == "abandoned":  # nobody counts them then
            counted["instances"] = recorded["instances"]
        wrong = [
            f"{name} {recorded.get(name)}, and it is {counted[name]}"
            for name in _COUNTS
            if recorded.get(name) != counted[name]
        ]
        if forgotten and _only_fewer(recorded, counted, forgotten):
            return
        if wrong:
            self.add(
                "wrong_counts", self.run_uri(run, "run.json"),
                "the rows are all there, but it says " + "; ".join(wrong),
                "restore it from a backup; or delete it and give the command again: "
                f"{self.command(run, itself=True)}, which counts the Parts and closes the run",
            )  # fmt: skip

    def _all_readable(self) -> list[str]:
        return [uri for parts in self._readable.values() for uri in parts.values()]

    def _number(self, sql: str) -> int:
        return int(self.connection.execute(sql).fetchone()[0])

    # ── what a run says of itself ────────────────────────────────────────────────────────────────────────────────────

    def bounds(self, run: RunFiles) -> list[tuple[int, int]]:
        """Rows of the frozen list by shard."""
        plan = run.plan
        return shard_bounds(plan["counts"]["planned"], shard_size=plan["shard_size"], canary=plan["canary"])

    def run_uri(self, run: RunFiles, name: str) -> str:
        """A file of a run's folder."""
        return join_uri(self.dest, "runs", run.run_id, name)

    def folder(self, run: RunFiles) -> str:
        """Where its Parts lie, below DEST."""
        date = dt.date.fromisoformat(run.plan["run_date"])
        return PartPlace(run.plan["model_name"], run.plan["model_version"], date).folder()

    def part_uri(self, run: RunFiles, ordinal: int) -> str:
        """The one place of Part `ordinal`."""
        return join_uri(self.dest, self.folder(run), part_name(run.run_id, ordinal))

    def command(self, run: RunFiles, *, itself: bool = False) -> str:
        """What processes again what the run has lost: the same question, to be pasted into a shell. `itself`: with what
        else makes it the run's own command."""
        asked = run.plan["command"]
        words = ["maskmill", "segment", asked["source"], self.dest]
        words += ["--model", f"{run.plan['model_name']}@{run.plan['model_version']}"]
        if asked["precision"] != "auto":
            words += ["--precision", asked["precision"]]
        if asked["max_pixels"] != SegmentConfig.model_fields["max_pixels"].default:
            words += ["--max-pixels", str(asked["max_pixels"])]
        for key, value in _leaves(asked.get("settings") or {}):
            words += ["--set", f"{key}={json.dumps(value)}"]
        words += ["--compile"] if asked.get("compile") else []
        if sorted(asked["suffixes"]) != sorted(DEFAULT_SUFFIXES):
            words += [word for suffix in asked["suffixes"] for word in ("--suffix", suffix)]
        if itself:
            words += ["--limit", str(asked["limit"])] if asked["limit"] else []
            words += [f"--{name.replace('_', '-')}" for name in ("force", "retry_errors") if asked[name]]
        return f"`{shlex.join(words)}` (where no registry has the model, the path of its file)"

    def replacement(self, run: RunFiles) -> str:
        """How a Part that cannot be trusted is replaced."""
        return (
            "restore it from a backup; or move it out of DEST/segments and give the command again: "
            f"{self.command(run)}, which processes its images anew"
        )


def _only_fewer(recorded: Mapping[str, Any], counted: Mapping[str, Any], forgotten: int) -> bool:
    """Whether these counts are those of the record, but for the rows of so many images that were forgotten since."""
    kinds, now = recorded["errors_by_kind"], counted["errors_by_kind"]
    fewer = recorded["ok"] + recorded["errors"] - counted["ok"] - counted["errors"]
    return (
        recorded["parts"] == counted["parts"]
        and (fewer == forgotten or (recorded["state"] == "abandoned" and 0 <= fewer <= forgotten))
        and counted["ok"] <= recorded["ok"]
        and counted["instances"] <= recorded["instances"]
        and all(number <= kinds.get(kind, 0) for kind, number in now.items())
    )


def _leaves(settings: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings as `--set` takes them: dotted keys, and their values."""
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value
