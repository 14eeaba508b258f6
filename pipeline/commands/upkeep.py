"""`maskmill prune|forget`: what is deleted from a table. Owns: their options, asking before, what they say.
Must not know: how it is done.
"""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer
from rich.table import Table

import pipeline
from pipeline import screen
from pipeline.commands.options import Dest, DestProfile, Json
from pipeline.wording import counted

_Yes = Annotated[bool, typer.Option("--yes", help="Do it. Without: say what would be done, and ask on a terminal.")]


def prune(
    dest: Dest,
    keep_versions: Annotated[
        int, typer.Option("--keep-versions", metavar="N", help="Versions of each model that stay: the newest N.")
    ],
    yes: _Yes = False,
    dest_profile: DestProfile = None,
    as_json: Json = False,
) -> None:
    """Delete the rows of all but the newest N versions of each model. Says first what would go.

    The newest is the version whose run was finished last: what the view `images` shows always stays. Killed in the
    middle, the same command again finishes.
    """

    def agrees(found: Any) -> bool:
        if not as_json:
            _show_versions(found)
        return yes or _agreed(f"Delete {counted(sum(one.parts for one in found.going), 'Part')}", as_json)

    found = pipeline.prune(dest, keep_versions=keep_versions, yes=agrees, profile=dest_profile)
    if not found.going and not as_json:
        _show_versions(found)
    size = screen.size_text(sum(one.bytes for one in found.going))
    _end(found, as_json, nothing=not found.going, done=f"{size} deleted; records of runs and evaluations stay")


def forget(
    dest: Dest,
    where: Annotated[
        str | None,
        typer.Option("--where", metavar="SQL", help="Which images: a condition on columns of the view segments."),
    ] = None,
    yes: _Yes = False,
    dest_profile: DestProfile = None,
    as_json: Json = False,
) -> None:
    """Take images out of the table for good, and keep them out of every later plan. Says first what would go.

    Gone are masks, metrics, evaluations, and their names in the lists of runs; reports that may show them are deleted.
    Killed in the middle, the same command again finishes; so does one without --where.

    Example: maskmill forget masks --where "image_uri LIKE 's3://photos/jane/%'"
    """

    def agrees(found: Any) -> bool:
        if not as_json:
            _show_images(found)
        return yes or _agreed("Take them out", as_json)

    found = pipeline.forget(dest, where, yes=agrees, profile=dest_profile)
    done = "forgotten: no file of the table names these images any more, and no plan will hold them"
    _end(found, as_json, nothing=found.nothing, done=done)


def _show_versions(found: Any) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("", "model", "version", "runs", "parts", "size", "last finished run"):
        table.add_column(column, no_wrap=True)
    for one in found.versions:
        word = "goes" if one.goes else "stays: an open run" if one.is_open else "stays"
        size = screen.size_text(one.bytes)
        table.add_row(word, one.model, one.version, str(one.runs), f"{one.parts:,}", size, one.last_run)
    screen.print_whole(table)


def _show_images(found: Any) -> None:
    out = screen.stdout()
    before = "" if found.images else "; what was begun before, or came back, is finished"
    out.print(f"{counted(found.images, 'image')} to forget{before}. In the table:")
    for number, what in (
        (found.parts, f"{counted(found.rows, 'row')} in {counted(found.parts, 'Part')}"),
        (found.lists, f"{counted(found.list_lines, 'line')} in {counted(found.lists, 'list')} of runs"),
        (found.event_lines, f"{counted(found.event_lines, 'line')} in records of what was gone from SOURCE, or back"),
        (found.evaluation_rows, f"{counted(found.evaluation_rows, 'row')} of evaluations"),
        (found.pages, f"{counted(found.pages, 'report')}, which will be deleted"),
        (found.records, f"SOURCE in {counted(found.records, 'record')} of runs"),
    ):
        if number:
            out.print(f"  {what}")


def _agreed(what: str, as_json: bool) -> bool:
    """Whether somebody is there to be asked, and says yes."""
    asks = not as_json and sys.stdin.isatty() and sys.stdout.isatty()
    return asks and typer.confirm(f"{what}? It cannot be undone")


def _end(found: Any, as_json: bool, *, nothing: bool, done: str) -> None:
    if as_json:
        print(json.dumps(found.model_dump(mode="json")))
        return
    text = done if found.done else "nothing to do" if nothing else "nothing was changed; --yes does it"
    screen.stdout().print(text, soft_wrap=True)
