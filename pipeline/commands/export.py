"""`maskmill export`. Owns: its options, and what it shows. Must not know: how a format looks."""

from __future__ import annotations

import json
import time
from typing import Annotated

import typer
from rich.console import Console

import pipeline
from pipeline import screen
from pipeline.commands.options import Dest, DestProfile, Json
from pipeline.storage import without_secrets

_LINE_EVERY_S = 30.0


def export(  # noqa: PLR0917 - typer's way: every option of the command is a parameter
    dest: Dest,
    kind: Annotated[
        str, typer.Option("--format", metavar="coco|png|overlay|yolo|hf|labelstudio", help="For which tool.")
    ],
    out: Annotated[str, typer.Option("--out", metavar="URL", help="A new or empty folder, on disk or anywhere.")],
    where: Annotated[
        str | None,
        typer.Option("--where", metavar="SQL", help="Only the images for which this is true, of the view `images`."),
    ] = None,
    images: Annotated[bool, typer.Option("--images", help="Take the images along.")] = False,
    source_profile: Annotated[
        str | None, typer.Option("--source-profile", metavar="NAME", help="AWS profile for the images.")
    ] = None,
    dest_profile: DestProfile = None,
    out_profile: Annotated[
        str | None, typer.Option("--out-profile", metavar="NAME", help="AWS profile for --out.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the masks of DEST for other tools: labelling, training, looking at them.

    The same command again continues what was stopped, whatever stopped it.

    Example: maskmill export masks --format coco --images --out task --where "image_uri IN (SELECT image_uri FROM images
    ORDER BY mean_entropy DESC LIMIT 200)"
    """
    told = _Told(Console(stderr=True, highlight=False), quiet=as_json)
    outcome = pipeline.export(
        dest=dest, out=out, format=kind, where=where, images=images, source_profile=source_profile,
        dest_profile=dest_profile, out_profile=out_profile, listen=told.listen,
    )  # fmt: skip
    if as_json:
        print(json.dumps(outcome._asdict() | {"out": without_secrets(outcome.out)}))
        return
    left_out = f", left out: {reasons}" if (reasons := _reasons(outcome.skipped)) else ""
    before = "nothing to do: " if outcome.was_there else ""
    counts = f"{outcome.images:,} images, {outcome.annotations:,} {_UNITS[kind]}"
    screen.stdout().print(
        f"{before}{screen.plain(without_secrets(out))} has {counts}{left_out}", markup=False, soft_wrap=True
    )


_UNITS = {
    "coco": "annotations", "png": "masks", "overlay": "overlays", "yolo": "polygons", "hf": "rows",
    "labelstudio": "polygons",
}  # fmt: skip


def _reasons(skipped: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(skipped.items()))


class _Told:
    """A line now and then, on stderr."""

    def __init__(self, console: Console, *, quiet: bool) -> None:
        self._console = console
        self._quiet = quiet
        self._last_s = time.monotonic()

    def listen(self, done: int, total: int) -> None:
        now_s = time.monotonic()
        if self._quiet or done == total or now_s - self._last_s < _LINE_EVERY_S:
            return
        self._last_s = now_s
        self._console.print(f"{done:,}/{total:,} images")
