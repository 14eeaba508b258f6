"""`maskmill report`. Owns: its options. Must not know: what is on the page."""

from __future__ import annotations

import json
from typing import Annotated

import typer

import pipeline
from pipeline import screen
from pipeline.commands.options import Dest, DestProfile, DriftChanges, Json, drift_config
from pipeline.storage import without_secrets


def report(  # noqa: PLR0917 - typer's way: every option of the command is a parameter
    dest: Dest,
    run: Annotated[
        str | None, typer.Option("--run", metavar="RUN_ID", help="Default: the newest finished run with images.")
    ] = None,
    out: Annotated[
        str, typer.Option("--out", metavar="FILE", help="The HTML to write: a path or URL.")
    ] = "report.html",
    source_profile: Annotated[
        str | None, typer.Option("--source-profile", metavar="NAME", help="AWS profile for the images.")
    ] = None,
    drift: DriftChanges = None,
    dest_profile: DestProfile = None,
    as_json: Json = False,
) -> None:
    """Write a run as one HTML page: counts, charts, pictures with their masks, errors, drift.

    The page holds all that it shows, and opens anywhere, offline too.
    """
    made = pipeline.report(
        dest, run, out=out, drift=drift_config(drift), source_profile=source_profile, dest_profile=dest_profile
    )
    if as_json:
        print(json.dumps({"run_id": made.run_id, "out": without_secrets(out), "size_bytes": made.size_bytes}))
    else:
        screen.stdout().print(
            f"{screen.plain(without_secrets(out))}: run {made.run_id}, {made.size_bytes / 1e6:.1f} MB", markup=False
        )
