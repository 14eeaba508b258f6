"""`maskmill runs`. Owns: its options. Must not know: how anything is done, or how it looks."""

from __future__ import annotations

import json

import typer
from rich.table import Table
from rich.text import Text

import pipeline
from pipeline import screen
from pipeline.commands.options import Dest, DestProfile, Json, RunId

app = typer.Typer(help="Runs of a table: list, show, abandon.", no_args_is_help=True)


@app.command("list")
def runs_list(dest: Dest, dest_profile: DestProfile = None, as_json: Json = False) -> None:
    """Every run of DEST, newest first; running ones too."""
    rows = pipeline.list_runs(dest, profile=dest_profile)
    if as_json:
        print(json.dumps(rows))
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("run", "state", "model", "version", "rows", "errors", "images/s", "gone/back", "held by", "source"):
        table.add_column(column, no_wrap=column != "source", overflow="fold")
    for row in rows:
        speed = "" if row["images_per_s"] is None else f"{row['images_per_s']:.1f}"
        changes = f"{row['removed']}/{row['returned']}" if row["removed"] or row["returned"] else ""
        table.add_row(
            row["run_id"], row["state"], row["model"], row["model_version"], f"{row['rows']}/{row['planned']}",
            str(row["errors"]), speed, changes, row["holder"] or "", Text(screen.plain(row["source"])),
        )  # fmt: skip
    screen.print_whole(table)


@app.command("show")
def runs_show(dest: Dest, run_id: RunId, dest_profile: DestProfile = None) -> None:
    """One run whole, as JSON: settings, counts, devices, times, outcome."""
    print(json.dumps(pipeline.show_run(dest, run_id, profile=dest_profile), indent=2))


@app.command("abandon")
def runs_abandon(dest: Dest, run_id: RunId, dest_profile: DestProfile = None) -> None:
    """Give an open run up. What it committed stays; its other images are free for the next run."""
    row = pipeline.abandon_run(dest, run_id, profile=dest_profile)
    print(f"run {row['run_id']} is {row['state']}: {row['rows']} of {row['planned']} rows are committed")
