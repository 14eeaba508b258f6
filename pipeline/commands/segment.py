"""`maskmill segment`. Owns: its options. Must not know: how anything is done, or how it looks."""

from __future__ import annotations

import datetime as dt
import json
import sys
from contextlib import redirect_stdout
from typing import Annotated

import typer

import pipeline
from models.overrides import parse_settings
from pipeline import screen
from pipeline.commands.options import INTERRUPTED, TOO_MANY_ERRORS, Dest, Registry, interruptible, option
from pipeline.config import DEFAULT_SUFFIXES, SegmentConfig
from pipeline.errors import UsageError

_WHICH, _HOW, _WHERE = "Which images", "How they are processed", "Where the work is done"


def segment(  # noqa: PLR0917 - typer's way: every option of the command is a parameter
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A folder, a glob, one file, a URL, or a manifest of URIs.")
    ],
    dest: Dest,
    model: Annotated[
        str,
        option("A name, name@alias, name@version, or the path or URL of a .safetensors file.", metavar="REF"),
    ],
    registry: Registry = None,
    max_error_rate: Annotated[float, option("Above this share of errors: exit status 3.", metavar="SHARE")] = 0.05,
    dry_run: Annotated[bool, option("Only print the plan.", "--dry-run")] = False,
    wait: Annotated[bool, option("Wait for a run that another live driver holds.", "--wait")] = False,
    report: Annotated[bool, option("Leave an HTML report beside the run's record.", "--report/--no-report")] = True,
    as_json: Annotated[bool, option("Print exactly one JSON object on stdout.", "--json")] = False,
    limit: Annotated[
        int | None, option("At most this many of the images that are left.", panel=_WHICH, metavar="N")
    ] = None,
    canary: Annotated[
        int | None,
        option("So many first; go on only if their error rate is fine.", panel=_WHICH, metavar="N"),
    ] = None,
    retry_errors: Annotated[
        bool, option("Take up again all images that failed.", "--retry-errors", panel=_WHICH)
    ] = False,
    force: Annotated[bool, option("Process every image again.", "--force", panel=_WHICH)] = False,
    suffix: Annotated[
        list[str] | None,
        option("A file ending that counts as an image; may be repeated.", panel=_WHICH, metavar="TEXT"),
    ] = None,
    precision: Annotated[
        str,
        option("auto: bf16 where the device has it.", panel=_HOW, metavar="auto|fp32|bf16|fp16"),
    ] = "auto",
    compiled: Annotated[
        bool, option("torch.compile: faster on long runs, other last bits. Frozen.", "--compile", panel=_HOW)
    ] = False,
    batch_size: Annotated[
        int | None, option("Images per forward pass, at most. Frozen in the run.", panel=_HOW, metavar="N")
    ] = None,
    shard_size: Annotated[
        int | None, option("Images per shard, and so per Parquet file.", panel=_HOW, metavar="N")
    ] = None,
    change: Annotated[
        list[str] | None,
        option(
            "Change a field of the model's card for this run: postprocessing.min_area_px=30; may be repeated.",
            "--set",
            panel=_HOW,
            metavar="KEY=VALUE",
        ),
    ] = None,
    max_pixels: Annotated[int, option("Larger images become `too_large` rows.", panel=_HOW, metavar="N")] = 200_000_000,
    run_date: Annotated[
        dt.datetime | None,
        typer.Option(
            formats=["%Y-%m-%d"],
            help="Date that the run files under. Default: today, UTC.",
            rich_help_panel=_HOW,
            metavar="YYYY-MM-DD",
        ),
    ] = None,
    engine: Annotated[
        str,
        option("auto: ray for a Ray address or several GPUs.", panel=_WHERE, metavar="auto|local|ray"),
    ] = "auto",
    actors: Annotated[
        int | None,
        option("Workers at most. Default: one per GPU, or one per CPU core.", panel=_WHERE, metavar="N"),
    ] = None,
    gpus_per_actor: Annotated[
        float | None, option("GPUs of each actor; fractions share one.", panel=_WHERE, metavar="X")
    ] = None,
    threads: Annotated[
        int | None,
        option("CPU threads of each worker's network. Frozen in the run.", panel=_WHERE, metavar="N"),
    ] = None,
    memory_mb: Annotated[
        int, option("Decoded pixels in flight in one worker, in MB.", panel=_WHERE, metavar="N")
    ] = 1024,
    ray_address: Annotated[str | None, option("A running Ray cluster.", panel=_WHERE, metavar="ADDRESS")] = None,
    shared_filesystem: Annotated[
        bool, option("Local paths mean the same on every node.", "--shared-filesystem", panel=_WHERE)
    ] = False,
    source_profile: Annotated[str | None, option("AWS profile for SOURCE.", panel=_WHERE, metavar="NAME")] = None,
    dest_profile: Annotated[str | None, option("AWS profile for DEST.", panel=_WHERE, metavar="NAME")] = None,
    lease_ttl: Annotated[
        float,
        option("A driver silent for this long is taken for dead.", panel=_WHERE, metavar="SECONDS"),
    ] = 30.0,
) -> None:
    """Bring the table at DEST up to date with SOURCE: one row per image.

    The same command again continues what was stopped, and does only what is new.

    Exit status: 0 done; 1 infrastructure failed, what was committed is kept; 2 wrong usage;
    3 done, but too many errors; 130 interrupted.
    """
    try:
        settings = parse_settings(change or ())
    except ValueError as error:
        raise UsageError(f"--set: {error}") from error
    config = SegmentConfig(
        source=source, dest=dest, model=model, registry=registry, engine=engine, actors=actors,
        gpus_per_actor=gpus_per_actor,
        batch_size=batch_size, shard_size=shard_size, threads=threads, precision=precision, limit=limit, canary=canary,
        dry_run=dry_run, retry_errors=retry_errors, force=force, max_error_rate=max_error_rate, wait=wait,
        ray_address=ray_address, shared_filesystem=shared_filesystem, source_profile=source_profile,
        dest_profile=dest_profile, suffixes=tuple(suffix or DEFAULT_SUFFIXES), max_pixels=max_pixels,
        memory_bytes=memory_mb << 20, run_date=run_date.date() if run_date else None, lease_ttl_s=lease_ttl,
        settings=settings, compile=compiled, report=report,
    )  # type: ignore[arg-type] # fmt: skip
    display = screen.Screen(quiet=as_json)
    try:
        # Ray prints what it has to say of dying nodes on stdout, which is for the outcome alone.
        with redirect_stdout(sys.stderr), interruptible(display.console) as should_stop:
            outcome = pipeline.segment(config, listen=display.listen, should_stop=should_stop)
    finally:
        display.close()
    if as_json:
        print(json.dumps(screen.as_json(outcome)))
    elif outcome.state == "planned":
        screen.print_plan(outcome, dest)
    else:
        screen.print_outcome(outcome, dest)
    if outcome.state == "interrupted":
        raise typer.Exit(INTERRUPTED)
    if outcome.state == "canary_failed" or outcome.error_rate > max_error_rate:
        raise typer.Exit(TOO_MANY_ERRORS)
