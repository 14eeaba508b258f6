"""`maskmill segment`. Owns: its options. Must not know: how anything is done, or how it looks."""

from __future__ import annotations

import datetime as dt
import json
import sys
from contextlib import redirect_stdout
from typing import Annotated

import typer

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
    Dest,
    DriftChanges,
    Engine,
    GpusPerActor,
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
    drift_config,
    interruptible,
    option,
)
from pipeline.config import DEFAULT_SUFFIXES, SegmentConfig
from pipeline.storage import without_secrets

_WHICH = "Which images"


def segment(  # noqa: PLR0917 - typer's way: every option of the command is a parameter
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A folder, a glob, one file, a URL, or a manifest of URIs.")
    ],
    dest: Dest,
    model: ModelRef,
    registry: Registry = None,
    max_error_rate: Annotated[float, option("Above this share of errors: exit status 3.", metavar="SHARE")] = 0.05,
    dry_run: Annotated[bool, option("Only print the plan.", "--dry-run")] = False,
    wait: Wait = False,
    report: Annotated[bool, option("Leave an HTML report beside the run's record.", "--report/--no-report")] = True,
    drift: DriftChanges = None,
    limits: Annotated[
        str | None,
        option("This machine's ceilings, from `maskmill limits`. Default: MASKMILL_LIMITS.", metavar="FILE"),
    ] = None,
    as_json: OneObject = False,
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
    precision: Precision = "auto",
    compiled: Compiled = False,
    batch_size: BatchSize = None,
    shard_size: ShardSize = None,
    change: Changes = None,
    max_pixels: MaxPixels = 200_000_000,
    run_date: Annotated[
        dt.datetime | None,
        typer.Option(
            formats=["%Y-%m-%d"],
            help="Date that the run files under. Default: today, UTC.",
            rich_help_panel=HOW,
            metavar="YYYY-MM-DD",
        ),
    ] = None,
    engine: Engine = "auto",
    actors: Actors = None,
    gpus_per_actor: GpusPerActor = None,
    threads: Threads = None,
    memory_mb: MemoryMb = 1024,
    ray_address: RayAddress = None,
    shared_filesystem: SharedFilesystem = False,
    source_profile: Annotated[str | None, option("AWS profile for SOURCE.", panel=WHERE, metavar="NAME")] = None,
    dest_profile: Annotated[str | None, option("AWS profile for DEST.", panel=WHERE, metavar="NAME")] = None,
    registry_profile: Annotated[
        str | None, option("AWS profile for the model and its registry.", panel=WHERE, metavar="NAME")
    ] = None,
    lease_ttl: Annotated[
        float,
        option("A driver silent for this long is taken for dead.", panel=WHERE, metavar="SECONDS"),
    ] = 30.0,
) -> None:
    """Bring the table at DEST up to date with SOURCE: one row per image.

    The same command again continues what was stopped, and does only what is new.

    Exit status: 0 done; 1 infrastructure failed, what was committed is kept; 2 wrong usage;
    3 done, but too many errors; 130 interrupted.
    """
    config = SegmentConfig(
        source=source, dest=dest, model=model, registry=registry, engine=engine, actors=actors,
        gpus_per_actor=gpus_per_actor,
        batch_size=batch_size, shard_size=shard_size, threads=threads, precision=precision, limit=limit, canary=canary,
        dry_run=dry_run, retry_errors=retry_errors, force=force, max_error_rate=max_error_rate, wait=wait,
        ray_address=ray_address, shared_filesystem=shared_filesystem, source_profile=source_profile,
        dest_profile=dest_profile, registry_profile=registry_profile,
        suffixes=tuple(suffix or DEFAULT_SUFFIXES), max_pixels=max_pixels,
        memory_bytes=memory_mb << 20, run_date=run_date.date() if run_date else None, lease_ttl_s=lease_ttl,
        settings=card_changes(change), compile=compiled, report=report, drift=drift_config(drift),
        limits=limits,
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
        screen.print_plan(outcome, without_secrets(dest))
    else:
        screen.print_outcome(outcome, dest)
    if outcome.state == "interrupted":
        raise typer.Exit(INTERRUPTED)
    if outcome.state == "canary_failed" or outcome.error_rate > max_error_rate:
        raise typer.Exit(TOO_MANY_ERRORS)
