"""`maskmill evaluate`. Owns: its options, and its table. Must not know: how anything is done."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

import pipeline
from pipeline import screen
from pipeline.commands.options import (
    HOW,
    INTERRUPTED,
    TOO_MANY_ERRORS,
    WHERE,
    Actors,
    BatchSize,
    Changes,
    Compiled,
    DrawSplits,
    Engine,
    GpusPerActor,
    LabelsOf,
    Layout,
    MaxPixels,
    MemoryMb,
    ModelRef,
    OneObject,
    Precision,
    RayAddress,
    Registry,
    ShardSize,
    SharedFilesystem,
    Threads,
    Wait,
    card_changes,
    interruptible,
    local_file,
    option,
    splitting,
)
from pipeline.errors import UsageError
from pipeline.storage import without_secrets

_WHAT = "What is scored"
_SLICE_LINES = (
    ("mIoU", "miou"),
    ("pixel accuracy", "pixel_accuracy"),
    ("AP", "ap"),
    ("PQ", "pq"),
    ("F1", "instance_f1"),
)


def evaluate(  # noqa: PLR0917 - typer's way: every option of the command is a parameter
    dataset: Annotated[
        str, typer.Argument(metavar="DATASET", help="Images with labels: a folder or URL in one of the layouts.")
    ],
    model: ModelRef,
    registry: Registry = None,
    split: Annotated[str, option("Which images; `all`: every labelled one.", metavar="NAME")] = "val",
    out: Annotated[
        str | None,
        option("DEST of masks and counts. Default: in the registry, or ~/.cache/maskmill.", metavar="DEST"),
    ] = None,
    page: Annotated[Path | None, option("Write the page here, too.", metavar="FILE", parser=local_file)] = None,
    no_page: Annotated[bool, option("Write no page.", "--no-page")] = False,
    max_error_rate: Annotated[float, option("Above this share of failures: exit status 3.", metavar="SHARE")] = 0.05,
    wait: Wait = False,
    as_json: OneObject = False,
    slices: Annotated[
        list[str] | None,
        option(
            "Score piece by piece, too: size, prefix, stratum, brightness or another column; may be repeated.",
            "--slice",
            panel=_WHAT,
            metavar="COLUMN",
        ),
    ] = None,
    where: Annotated[
        str | None, option("Score only rows for which this SQL holds.", panel=_WHAT, metavar="SQL")
    ] = None,
    renamed: Annotated[
        list[str] | None,
        option(
            "A class of the model is one of the data set by another name; may be repeated.",
            "--map",
            panel=_WHAT,
            metavar="MODEL_CLASS=DATASET_CLASS",
        ),
    ] = None,
    min_score: Annotated[
        float | None,
        option("Objects below count for AP only. Default: 0.5 for detectors, else 0.", panel=_WHAT, metavar="X"),
    ] = None,
    max_detections: Annotated[int, option("Of one class in one image, that AP takes.", panel=_WHAT, metavar="N")] = 100,
    resamples: Annotated[int, option("Of the bootstrap; 0: no intervals.", panel=_WHAT, metavar="N")] = 1000,
    confidence: Annotated[float, option("Of the intervals.", panel=_WHAT, metavar="SHARE")] = 0.95,
    seed: Annotated[int, option("Of the bootstrap.", panel=_WHAT, metavar="N")] = 0,
    layout: Layout = None,
    labels_of: LabelsOf = None,
    draw_splits: DrawSplits = None,
    precision: Precision = "auto",
    compiled: Compiled = False,
    batch_size: BatchSize = None,
    shard_size: ShardSize = None,
    change: Changes = None,
    retry_errors: Annotated[bool, option("Take up again all images that failed.", "--retry-errors", panel=HOW)] = False,
    max_pixels: MaxPixels = 200_000_000,
    engine: Engine = "auto",
    actors: Actors = None,
    gpus_per_actor: GpusPerActor = None,
    threads: Threads = None,
    memory_mb: MemoryMb = 1024,
    ray_address: RayAddress = None,
    shared_filesystem: SharedFilesystem = False,
    source_profile: Annotated[str | None, option("AWS profile for DATASET.", panel=WHERE, metavar="NAME")] = None,
    dest_profile: Annotated[
        str | None,
        option("AWS profile for DEST. Default: in the registry that of the registry.", panel=WHERE, metavar="NAME"),
    ] = None,
    registry_profile: Annotated[
        str | None, option("AWS profile for the model and its registry.", panel=WHERE, metavar="NAME")
    ] = None,
) -> None:
    """Measure a model on labelled images: masks by the fleet, counts by image, scores with intervals.

    The same command again continues what was stopped, and only scores what is there.

    Exit status: 0 done; 1 infrastructure failed, what was committed is kept; 2 wrong usage;
    3 done, but too many images failed; 130 interrupted.
    """
    from pipeline.learning.assessment import EvaluateConfig

    config = EvaluateConfig(
        dataset=dataset, model=model, registry=registry, split=split, dest=out, layout=layout, labels_of=labels_of,
        splitting=splitting(draw_splits),
        renamed=_renamed(renamed or []), min_score=min_score, where=where, slices=tuple(slices or ()),
        resamples=resamples, confidence=confidence, seed=seed, max_detections=max_detections, engine=engine,
        actors=actors, gpus_per_actor=gpus_per_actor, batch_size=batch_size, shard_size=shard_size, threads=threads,
        precision=precision, compile=compiled, settings=card_changes(change), max_pixels=max_pixels,
        memory_bytes=memory_mb << 20, max_error_rate=max_error_rate, retry_errors=retry_errors, wait=wait,
        ray_address=ray_address, source_profile=source_profile, dest_profile=dest_profile,
        registry_profile=registry_profile, shared_filesystem=shared_filesystem,
    )  # type: ignore[arg-type] # fmt: skip
    display = screen.Screen(quiet=as_json)
    try:
        with redirect_stdout(sys.stderr), interruptible(display.console) as should_stop:
            found = pipeline.evaluate(config, listen=display.listen, should_stop=should_stop)
    finally:
        display.close()
    pages = [] if no_page or found.scores is None else _write_pages(config, found, page)
    pages = [without_secrets(uri) for uri in pages]
    if as_json:
        print(json.dumps(_as_json(found, pages), allow_nan=False))
    else:
        _print(found, pages)
    if found.state == "interrupted":
        raise typer.Exit(INTERRUPTED)
    if found.error_rate > max_error_rate:
        raise typer.Exit(TOO_MANY_ERRORS)


def _renamed(texts: list[str]) -> dict[str, str]:
    found = {}
    for text in texts:
        ours, mark, theirs = text.partition("=")
        if not (ours and mark and theirs):
            raise UsageError(f"--map is {text!r}: give MODEL_CLASS=DATASET_CLASS, such as auto=car")
        found[ours] = theirs
    return found


def _write_pages(config: Any, found: Any, page: Path | None) -> list[str]:
    from pipeline.learning.evaluation_page import write_page

    return write_page(config, found, page)


def _as_json(found: Any, pages: list[str]) -> dict[str, Any]:
    """The scores at the top, as scripts want them; what they are of beside them."""
    from pipeline.learning.scores import Scores

    scores = found.scores.model_dump(mode="json") if found.scores else dict.fromkeys(Scores.model_fields)
    body = found.model_dump(mode="json", exclude={"scores", "segmented"})
    body["dest"] = without_secrets(body["dest"])
    return scores | body | {"pages": pages, "segmented": screen.as_json(found.segmented)}


def _print(found: Any, pages: list[str]) -> None:
    from pipeline.learning.evaluation_page import FIGURES, remarks
    from pipeline.wording import counted

    out = screen.stdout()
    scores = found.scores
    if scores is None:
        out.print(f"interrupted: run {', '.join(found.segmented.runs) or '-'}; the same command continues")
        return
    out.print(
        Text.assemble(
            (f"{screen.plain(found.model_name)} {found.model_version}", "bold"),
            f" on {screen.plain(found.split)} of {screen.plain(found.dataset)}: {counted(scores.images, 'image')}",
        ),
        soft_wrap=True,
    )
    failed = sum(found.failed_by_kind.values())
    if failed:
        kinds = ", ".join(f"{number} {kind}" for kind, number in found.failed_by_kind.items())
        text = f"{counted(failed, 'image')} failed, and no score speaks of {'it' if failed == 1 else 'them'}: {kinds}"
        out.print(Text(text, style="red"), soft_wrap=True)
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    for column in ("score", f"{scores.confidence:.0%} interval" if scores.intervals else ""):
        table.add_column(column, justify="right", no_wrap=True)
    for words, name in FIGURES:
        value = getattr(scores, name)
        if value is not None:
            between = scores.intervals.get(name)
            table.add_row(words, f"{value:.4f}", f"{between.low:.4f} to {between.high:.4f}" if between else "")
    screen.print_whole(table)
    screen.print_whole(_class_table(scores))
    for line in remarks(found):
        out.print(Text(screen.plain(line), style="dim"), soft_wrap=True)
    for by, pieces in found.slices.items():
        screen.print_whole(_slice_table(by, pieces))
    out.print(Text(f"counts: {screen.plain(without_secrets(found.folder))}"), soft_wrap=True)
    for page in pages:
        out.print(Text(f"page:   {screen.plain(page)}"), soft_wrap=True)


def _class_table(scores: Any) -> Table:
    from pipeline.learning.evaluation_page import class_columns

    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("class", overflow="fold")
    shown = class_columns(scores)
    for words, _ in shown:
        table.add_column(words, justify="right", no_wrap=True)
    for name in scores.class_names:
        if name not in scores.left_out:
            table.add_row(Text(screen.plain(name)), *(_figure(values.get(name)) for _, values in shown))
    return table


def _slice_table(by: str, pieces: Any) -> Table:
    names = [
        (words, name)
        for words, name in _SLICE_LINES
        if any(one.scores and getattr(one.scores, name) is not None for one in pieces)
    ]
    table = Table(box=None, padding=(0, 2, 0, 0), title=Text(f"by {screen.plain(by)}"), title_justify="left")
    table.add_column(Text(screen.plain(by)), overflow="fold")
    table.add_column("images", justify="right")
    for words, name in names:
        table.add_column(words, justify="right", no_wrap=True)
        if name in ("miou", "pq"):
            table.add_column("interval", justify="right", no_wrap=True)
    for one in pieces:
        cells = []
        for _, name in names:
            cells.append(_figure(getattr(one.scores, name) if one.scores else None))
            if name in ("miou", "pq"):
                between = one.scores.intervals.get(name) if one.scores else None
                cells.append(f"{between.low:.4f} to {between.high:.4f}" if between else "")
        table.add_row(Text(screen.plain(one.value)), str(one.images), *cells)
    return table


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
