"""The command `maskmill`. Owns: options, signals, exit statuses. Must not know: how anything is done, or how it looks.

Exit status: 0 done; 1 infrastructure failed, or a table is damaged; 2 wrong usage; 3 done with too many errors; 4 a run
has drifted; 130 interrupted.
"""

from __future__ import annotations

import datetime as dt
import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

import pipeline
from models.overrides import parse_settings
from pipeline import screen
from pipeline.config import DEFAULT_SUFFIXES, SegmentConfig
from pipeline.errors import MaskmillError, UsageError

OK, INFRASTRUCTURE, USAGE, TOO_MANY_ERRORS, DRIFTED, INTERRUPTED = 0, 1, 2, 3, 4, 130
#: Options that are not named as their field of SegmentConfig.
_FIELD_OPTIONS = {
    "source": "SOURCE",
    "dest": "DEST",
    "memory_bytes": "--memory-mb",
    "suffixes": "--suffix",
    "lease_ttl_s": "--lease-ttl",
}

app = typer.Typer(
    help="Images in object storage in, one Parquet row per image out.",
    no_args_is_help=True,
    add_completion=False,
)
runs_app = typer.Typer(help="Runs of a table: list, show, abandon.", no_args_is_help=True)
models_app = typer.Typer(help="Models that a name can reach: list, show, import.", no_args_is_help=True)
app.add_typer(runs_app, name="runs")
app.add_typer(models_app, name="models")

Dest = Annotated[str, typer.Argument(metavar="DEST", help="Where the table lives: a folder or a URL.")]
RunId = Annotated[str, typer.Argument(metavar="RUN_ID", help="As `maskmill runs list` shows it.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
DestProfile = Annotated[str | None, typer.Option("--dest-profile", metavar="NAME", help="AWS profile for DEST.")]


def _version(asked: bool) -> None:
    if asked:
        print(f"maskmill {pipeline.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it and end.")
    ] = False,
) -> None:
    """Images in object storage in, one Parquet row per image out."""


@contextmanager
def _interruptible(console: Console) -> Iterator[Any]:
    """Yields `should_stop`. The first SIGINT or SIGTERM drains, the second stops at once."""
    asked: list[int] = []

    def on_signal(number: int, frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        console.print("stopping: shards in flight are finishing; once more to stop at once")

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}

    def should_stop() -> bool:
        # Ray puts a handler of its own in place when it starts.
        for number in before:
            if signal.getsignal(number) is not on_signal:
                signal.signal(number, on_signal)
        return bool(asked)

    try:
        yield should_stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _option(help_text: str, *names: str, panel: str = "Options", metavar: str | None = None) -> Any:
    return typer.Option(*names, help=help_text, rich_help_panel=panel, metavar=metavar)


_WHICH, _HOW, _WHERE = "Which images", "How they are processed", "Where the work is done"


@app.command()
def segment(  # noqa: PLR0917 - typer's way: every option of the command is a parameter
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A folder, a glob, one file, a URL, or a manifest of URIs.")
    ],
    dest: Dest,
    model: Annotated[
        str,
        _option("A name, name@alias, name@version, or the path or URL of a .safetensors file.", metavar="REF"),
    ],
    max_error_rate: Annotated[float, _option("Above this share of errors: exit status 3.", metavar="SHARE")] = 0.05,
    dry_run: Annotated[bool, _option("Only print the plan.", "--dry-run")] = False,
    wait: Annotated[bool, _option("Wait for a run that another live driver holds.", "--wait")] = False,
    as_json: Annotated[bool, _option("Print exactly one JSON object on stdout.", "--json")] = False,
    limit: Annotated[
        int | None, _option("At most this many of the images that are left.", panel=_WHICH, metavar="N")
    ] = None,
    canary: Annotated[
        int | None,
        _option("So many first; go on only if their error rate is fine.", panel=_WHICH, metavar="N"),
    ] = None,
    retry_errors: Annotated[
        bool, _option("Take up again all images that failed.", "--retry-errors", panel=_WHICH)
    ] = False,
    force: Annotated[bool, _option("Process every image again.", "--force", panel=_WHICH)] = False,
    suffix: Annotated[
        list[str] | None,
        _option("A file ending that counts as an image; may be repeated.", panel=_WHICH, metavar="TEXT"),
    ] = None,
    precision: Annotated[
        str,
        _option("auto: bf16 where the device has it.", panel=_HOW, metavar="auto|fp32|bf16|fp16"),
    ] = "auto",
    compiled: Annotated[
        bool, _option("torch.compile: faster on long runs, other last bits. Frozen.", "--compile", panel=_HOW)
    ] = False,
    batch_size: Annotated[
        int | None, _option("Images per forward pass, at most. Frozen in the run.", panel=_HOW, metavar="N")
    ] = None,
    shard_size: Annotated[
        int | None, _option("Images per shard, and so per Parquet file.", panel=_HOW, metavar="N")
    ] = None,
    change: Annotated[
        list[str] | None,
        _option(
            "Change a field of the model's card for this run: postprocessing.min_area_px=30; may be repeated.",
            "--set",
            panel=_HOW,
            metavar="KEY=VALUE",
        ),
    ] = None,
    max_pixels: Annotated[
        int, _option("Larger images become `too_large` rows.", panel=_HOW, metavar="N")
    ] = 200_000_000,
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
        _option("auto: ray for a Ray address or several GPUs.", panel=_WHERE, metavar="auto|local|ray"),
    ] = "auto",
    actors: Annotated[
        int | None,
        _option("Workers at most. Default: one per GPU, or one per CPU core.", panel=_WHERE, metavar="N"),
    ] = None,
    gpus_per_actor: Annotated[
        float | None, _option("GPUs of each actor; fractions share one.", panel=_WHERE, metavar="X")
    ] = None,
    threads: Annotated[
        int | None,
        _option("CPU threads of each worker's network. Frozen in the run.", panel=_WHERE, metavar="N"),
    ] = None,
    memory_mb: Annotated[
        int, _option("Decoded pixels in flight in one worker, in MB.", panel=_WHERE, metavar="N")
    ] = 1024,
    ray_address: Annotated[str | None, _option("A running Ray cluster.", panel=_WHERE, metavar="ADDRESS")] = None,
    shared_filesystem: Annotated[
        bool, _option("Local paths mean the same on every node.", "--shared-filesystem", panel=_WHERE)
    ] = False,
    source_profile: Annotated[str | None, _option("AWS profile for SOURCE.", panel=_WHERE, metavar="NAME")] = None,
    dest_profile: Annotated[str | None, _option("AWS profile for DEST.", panel=_WHERE, metavar="NAME")] = None,
    lease_ttl: Annotated[
        float,
        _option("A driver silent for this long is taken for dead.", panel=_WHERE, metavar="SECONDS"),
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
        source=source, dest=dest, model=model, engine=engine, actors=actors, gpus_per_actor=gpus_per_actor,
        batch_size=batch_size, shard_size=shard_size, threads=threads, precision=precision, limit=limit, canary=canary,
        dry_run=dry_run, retry_errors=retry_errors, force=force, max_error_rate=max_error_rate, wait=wait,
        ray_address=ray_address, shared_filesystem=shared_filesystem, source_profile=source_profile,
        dest_profile=dest_profile, suffixes=tuple(suffix or DEFAULT_SUFFIXES), max_pixels=max_pixels,
        memory_bytes=memory_mb << 20, run_date=run_date.date() if run_date else None, lease_ttl_s=lease_ttl,
        settings=settings, compile=compiled,
    )  # type: ignore[arg-type] # fmt: skip
    display = screen.Screen(quiet=as_json)
    try:
        # Ray prints what it has to say of dying nodes on stdout, which is for the outcome alone.
        with redirect_stdout(sys.stderr), _interruptible(display.console) as should_stop:
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


@runs_app.command("list")
def runs_list(dest: Dest, dest_profile: DestProfile = None, as_json: Json = False) -> None:
    """Every run of DEST, newest first; running ones too."""
    rows = pipeline.list_runs(dest, profile=dest_profile)
    if as_json:
        print(json.dumps(rows))
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("run", "state", "model", "version", "rows", "errors", "images/s", "held by", "source"):
        table.add_column(column, no_wrap=column != "source", overflow="fold")
    for row in rows:
        speed = "" if row["images_per_s"] is None else f"{row['images_per_s']:.1f}"
        table.add_row(
            row["run_id"], row["state"], row["model"], row["model_version"], f"{row['rows']}/{row['planned']}",
            str(row["errors"]), speed, row["holder"] or "", Text(screen.plain(row["source"])),
        )  # fmt: skip
    screen.print_whole(table)


@runs_app.command("show")
def runs_show(dest: Dest, run_id: RunId, dest_profile: DestProfile = None) -> None:
    """One run whole, as JSON: settings, counts, devices, times, outcome."""
    print(json.dumps(pipeline.show_run(dest, run_id, profile=dest_profile), indent=2))


@runs_app.command("abandon")
def runs_abandon(dest: Dest, run_id: RunId, dest_profile: DestProfile = None) -> None:
    """Give an open run up. What it committed stays; its other images are free for the next run."""
    row = pipeline.abandon_run(dest, run_id, profile=dest_profile)
    print(f"run {row['run_id']} is {row['state']}: {row['rows']} of {row['planned']} rows are committed")


@models_app.command("list")
def models_list(as_json: Json = False) -> None:
    """Models that a name can reach."""
    lines = pipeline.models()
    if as_json:
        print(json.dumps([line._asdict() for line in lines]))
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("name", "version", "aliases", "file"):
        table.add_column(column, overflow="fold")
    for line in lines:
        table.add_row(line.name, line.version, ", ".join(line.aliases), Text(screen.plain(line.origin)))
    screen.print_whole(table)


@models_app.command("show")
def models_show(
    reference: Annotated[str, typer.Argument(metavar="REF", help="A name, name@alias, name@version, path or URL.")],
) -> None:
    """A model's card, as JSON."""
    from pipeline.registry import resolve

    model = resolve(reference)
    body = {"version": model.version, "file": model.origin, "size_bytes": len(model.data)}
    print(json.dumps(body | model.card.model_dump(mode="json"), indent=2))


@models_app.command("import")
def models_import(  # noqa: PLR0917 - typer's way: every option of the command is a parameter
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="torchvision:NAME, or smp:ARCHITECTURE/ENCODER.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The .safetensors file to write.")],
    weights: Annotated[
        str | None, typer.Option(metavar="NAME", help="Published weights (torchvision: DEFAULT unless told otherwise).")
    ] = None,
    weights_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A state dict, as .pth or .safetensors.")
    ] = None,
    random: Annotated[bool, typer.Option("--random", help="Random weights, for tests and measurements.")] = False,
    seed: Annotated[int, typer.Option(help="Of the random weights.")] = 0,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Of the model.")] = None,
    classes: Annotated[str | None, typer.Option(metavar="A,B,...", help="Class names, by channel.")] = None,
    task: Annotated[str, typer.Option(metavar="semantic|instance", help="What the channels mean.")] = "semantic",
    arg: Annotated[
        list[str] | None, typer.Option(metavar="KEY=JSON", help="An argument of the architecture; may be repeated.")
    ] = None,
    normalization: Annotated[
        str | None, typer.Option(metavar="imagenet|per_image|unit", help="Of the pixels, where no weights say it.")
    ] = None,
) -> None:
    """Make a model file out of published weights.

    Example: maskmill models import torchvision:deeplabv3_resnet50 --out street.safetensors
    """
    from pipeline.registry import import_model

    arguments: dict[str, Any] = {}
    for text in arg or []:
        key, _, value = text.partition("=")
        try:
            arguments[key] = json.loads(value)
        except ValueError as error:
            raise UsageError(f"--arg is {text!r}: give KEY=JSON, such as encoder_depth=4 or name='\"text\"'") from error
    model = import_model(
        out, source=source, weights=weights, weights_file=weights_file, seed=seed if random else None, name=name,
        classes=tuple(part.strip() for part in classes.split(",")) if classes else None, task=task, args=arguments,
        normalization=normalization,
    )  # fmt: skip
    print(f"{out}: {model.card.name}, version {model.version}, {len(model.card.classes)} classes")


@app.command()
def sheet(
    dest: Dest,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The PNG to write.")],
    dest_profile: DestProfile = None,
) -> None:
    """Draw the masks of DEST over their images, one tile each."""
    from pipeline.insight.contact_sheet import SheetConfig, draw_contact_sheet

    print(f"{out}: {draw_contact_sheet(dest, out, SheetConfig(dest_profile=dest_profile))} images")


@app.command()
def query(
    dest: Dest,
    sql: Annotated[str, typer.Argument(metavar="SQL", help="One statement, in DuckDB's SQL.")],
    output: Annotated[
        str, typer.Option("--format", metavar="table|csv|json|parquet", help="What to print on stdout.")
    ] = "table",
    dest_profile: DestProfile = None,
) -> None:
    """Run SQL over the views segments, images, classes, instances, errors and runs of DEST.

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
            screen.print_rows(relation)
        else:
            screen.write_rows(relation, output)
    except (duckdb.Error, pa.ArrowException) as error:
        raise UsageError(f"the query failed: {error}") from error


@app.command()
def verify(
    dest: Dest,
    deep: Annotated[bool, typer.Option("--deep", help="Decode every mask and check its CRC.")] = False,
    dest_profile: DestProfile = None,
    as_json: Json = False,
) -> None:
    """Check that the table at DEST is whole. Changes nothing.

    Exit status: 0 nothing is wrong; 1 something is, and each finding says how to mend it.
    """
    findings = pipeline.verify(dest, deep=deep, profile=dest_profile)
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


@app.command()
def drift(
    dest: Dest,
    run: Annotated[
        str | None, typer.Option("--run", metavar="RUN_ID", help="Default: the newest finished run.")
    ] = None,
    dest_profile: DestProfile = None,
    as_json: Json = False,
) -> None:
    """Compare a run's images with those of the runs before it: confidence, coverage, counts, brightness.

    Exit status: 0 alike, or nothing to compare with; 4 something has drifted.
    """
    report = pipeline.drift(dest, run, profile=dest_profile)
    if as_json:
        print(json.dumps(report.model_dump(mode="json") | {"drifted": report.drifted}))
    else:
        screen.print_drift(report)
    if report.drifted:
        raise typer.Exit(DRIFTED)


def main() -> None:
    """The entry point: errors become one sentence and an exit status, never a traceback (MASKMILL_DEBUG=1 shows it)."""
    debug = bool(os.environ.get("MASKMILL_DEBUG"))
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.ERROR,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    try:
        # Outside its standalone mode Typer returns the code of `typer.Exit`, and None where nothing was raised.
        status = app(prog_name="maskmill", standalone_mode=False) or OK
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    except BrokenPipeError:
        # The reader has gone (`| head`): nobody is left to be told. As click does it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = INFRASTRUCTURE
    except Exception as error:  # noqa: BLE001 - the last boundary: a person sees a sentence
        if debug:
            traceback.print_exc()
        word, text, status = _last_words(error)
        if text:  # none where a command without arguments has just shown its help
            line = Text.assemble((f"{word}:", "red"), " ", screen.plain(text))
            Console(stderr=True, highlight=False).print(line, soft_wrap=True)
    sys.exit(status)


def _last_words(error: Exception) -> tuple[str, str, int]:
    if isinstance(error, UsageError):
        return "error", str(error), USAGE
    if isinstance(error, MaskmillError):
        return "failed", str(error), INFRASTRUCTURE
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        option = _FIELD_OPTIONS.get(str(first["loc"][0]), f"--{first['loc'][0]}".replace("_", "-"))
        return "error", f"{option} is {first['input']!r}: {first['msg'].lower()}", USAGE
    # Typer's own usage errors (a missing option, an unknown command) know how to say so.
    if hasattr(error, "format_message"):
        return "error", error.format_message(), USAGE
    return "failed", f"{type(error).__name__}: {error} (MASKMILL_DEBUG=1 shows where)", INFRASTRUCTURE


if __name__ == "__main__":
    main()
