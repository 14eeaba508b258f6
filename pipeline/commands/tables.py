"""`maskmill sheet|query|verify|drift`: what is asked of a table. Owns: their options. Must not know: how it is done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import pyarrow as pa
import typer
from rich.text import Text

import pipeline
from pipeline import screen
from pipeline.commands.options import (
    DRIFTED,
    INFRASTRUCTURE,
    Dest,
    DestProfile,
    DriftChanges,
    Json,
    drift_config,
    local_file,
)
from pipeline.commands.rows import print_rows, write_rows
from pipeline.errors import UsageError
from pipeline.storage import hide_secrets, without_secrets


def sheet(
    dest: Dest,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The PNG to write.", parser=local_file)],
    dest_profile: DestProfile = None,
) -> None:
    """Draw the masks of DEST over their images, one tile each."""
    from pipeline.insight.contact_sheet import SheetConfig, draw_contact_sheet

    number = draw_contact_sheet(dest, out, SheetConfig(dest_profile=dest_profile))
    print(f"{screen.plain(str(out))}: {number} images")


def query(
    dest: Dest,
    sql: Annotated[str, typer.Argument(metavar="SQL", help="One statement, in DuckDB's SQL.")],
    output: Annotated[
        str, typer.Option("--format", metavar="table|csv|json|parquet", help="What to print on stdout.")
    ] = "table",
    dest_profile: DestProfile = None,
) -> None:
    """Run SQL over the views segments, images, classes, instances, errors, runs and evaluations of DEST.

    Example: maskmill query masks "SELECT image_uri, foreground_fraction FROM images ORDER BY 2 DESC LIMIT 9"
    """
    import duckdb

    if output not in ("table", "csv", "json", "parquet"):
        raise UsageError(f"--format is {output!r}: give table, csv, json or parquet")
    if not sql.strip():
        raise UsageError("the query is empty: give one SQL statement")
    connection = pipeline.connect(dest, profile=dest_profile)
    try:
        if (statements := len(connection.extract_statements(sql))) != 1:
            raise UsageError(f"{statements} statements were given: give one SQL statement")
        relation = connection.sql(sql)
        if relation is None:
            return
        if output == "table":
            print_rows(relation)
        else:
            write_rows(relation, output)
    except (duckdb.Error, pa.ArrowException) as error:
        raise UsageError(f"the query failed: {error}") from error


def verify(
    dest: Dest,
    deep: Annotated[bool, typer.Option("--deep", help="Decode every mask and check its CRC.")] = False,
    dest_profile: DestProfile = None,
    as_json: Json = False,
) -> None:
    """Check that the table at DEST is whole. Changes nothing.

    Exit status: 0 nothing is wrong; 1 something is, and each finding says how to mend it.
    """
    findings = [
        finding._replace(
            uri=without_secrets(finding.uri), message=hide_secrets(finding.message), mend=hide_secrets(finding.mend)
        )
        for finding in pipeline.verify(dest, deep=deep, profile=dest_profile)
    ]
    if as_json:
        print(json.dumps([finding._asdict() for finding in findings]))
    else:
        out = screen.stdout()
        for finding in findings:
            out.print(Text(screen.plain(f"{finding.kind}: {finding.uri}"), style="red"), soft_wrap=True)
            for line in (finding.message, finding.mend):
                out.print(Text("  " + screen.plain(line)), soft_wrap=True)
        checked = "every mask was decoded" if deep else "masks were not decoded (--deep does)"
        out.print(f"{len(findings)} findings; {checked}" if findings else f"nothing is wrong; {checked}")
    if findings:
        raise typer.Exit(INFRASTRUCTURE)


def drift(
    dest: Dest,
    run: Annotated[
        str | None, typer.Option("--run", metavar="RUN_ID", help="Default: the newest finished run.")
    ] = None,
    limits: DriftChanges = None,
    dest_profile: DestProfile = None,
    as_json: Json = False,
) -> None:
    """Compare a run's images with those of the runs before it: confidence, coverage, counts, brightness.

    Exit status: 0 alike, or nothing to compare with; 4 something has drifted.
    """
    report = pipeline.drift(dest, run, drift_config(limits), profile=dest_profile)
    if as_json:
        print(json.dumps(report.model_dump(mode="json") | {"drifted": report.drifted}))
    else:
        screen.print_drift(report)
    if report.drifted:
        raise typer.Exit(DRIFTED)
