"""What several commands share. Owns: options and arguments that mean the same everywhere, exit statuses, signals.
Must not know: any one command.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console

from models.overrides import parse_settings
from pipeline.config import DriftConfig
from pipeline.errors import UsageError
from pipeline.storage import given_path

OK, INFRASTRUCTURE, USAGE, TOO_MANY_ERRORS, DRIFTED, KEPT, INTERRUPTED = 0, 1, 2, 3, 4, 5, 130


def option(
    help_text: str,
    *names: str,
    panel: str = "Options",
    metavar: str | None = None,
    parser: Callable[[str], Any] | None = None,
) -> Any:
    return typer.Option(*names, help=help_text, rich_help_panel=panel, metavar=metavar, parser=parser)


def local_file(text: str) -> Path:
    """The file on this machine that an option names. Raises typer.BadParameter for any other address."""
    try:
        return Path(given_path(text))
    except UsageError as error:
        raise typer.BadParameter(str(error)) from error


Dest = Annotated[str, typer.Argument(metavar="DEST", help="Where the table lives: a folder or a URL.")]
RunId = Annotated[str, typer.Argument(metavar="RUN_ID", help="As `maskmill runs list` shows it.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
RegistryProfile = Annotated[
    str | None, typer.Option("--registry-profile", metavar="NAME", help="AWS profile for the registry.")
]
DestProfile = Annotated[str | None, typer.Option("--dest-profile", metavar="NAME", help="AWS profile for DEST.")]

Registry = Annotated[
    str | None,
    typer.Option("--registry", metavar="URL", help="Folder or URL with models. Default: MASKMILL_REGISTRY."),
]

# Of every command that reads a labelled data set.
Layout = Annotated[
    str | None,
    typer.Option("--layout", metavar="coco|masks|voc|cityscapes|segments", help="Of DATASET. Default: by its files."),
]
LabelsOf = Annotated[
    str | None,
    typer.Option("--labels-of", metavar="MODEL", help="Whose masks are the truth, where DATASET is a DEST."),
]
DrawSplits = Annotated[
    list[str] | None,
    typer.Option(
        "--draw-splits",
        metavar="KEY=VALUE",
        help="Draw splits, whatever the data set says: seed=1, group_pattern=REGEX, fractions={...}; may be repeated.",
    ),
]

# Of every command that has images segmented.
HOW, WHERE = "How masks are made", "Where the work is done"

ModelRef = Annotated[
    str, option("A name, name@alias, name@version, or the path or URL of a .safetensors file.", metavar="REF")
]
Wait = Annotated[bool, option("Wait for a run that another live driver holds.", "--wait")]
OneObject = Annotated[bool, option("Print exactly one JSON object on stdout.", "--json")]
Precision = Annotated[str, option("auto: bf16 where the device has it.", panel=HOW, metavar="auto|fp32|bf16|fp16")]
Compiled = Annotated[
    bool, option("torch.compile: faster on long runs, other last bits. Frozen.", "--compile", panel=HOW)
]
BatchSize = Annotated[
    int | None, option("Images per forward pass, at most. Frozen in the run.", panel=HOW, metavar="N")
]
ShardSize = Annotated[int | None, option("Images per shard, and so per Parquet file.", panel=HOW, metavar="N")]
Changes = Annotated[
    list[str] | None,
    option(
        "Change a field of the model's card for this run: postprocessing.min_area_px=30; may be repeated.",
        "--set",
        panel=HOW,
        metavar="KEY=VALUE",
    ),
]
MaxPixels = Annotated[int, option("Larger images become `too_large` rows.", panel=HOW, metavar="N")]
Engine = Annotated[str, option("auto: ray for a Ray address or several GPUs.", panel=WHERE, metavar="auto|local|ray")]
Actors = Annotated[
    int | None, option("Workers at most. Default: one per GPU, or one per CPU core.", panel=WHERE, metavar="N")
]
GpusPerActor = Annotated[float | None, option("GPUs of each actor; fractions share one.", panel=WHERE, metavar="X")]
Threads = Annotated[
    int | None, option("CPU threads of each worker's network. Frozen in the run.", panel=WHERE, metavar="N")
]
MemoryMb = Annotated[int, option("Decoded pixels in flight in one worker, in MB.", panel=WHERE, metavar="N")]
RayAddress = Annotated[str | None, option("A running Ray cluster.", panel=WHERE, metavar="ADDRESS")]
SharedFilesystem = Annotated[
    bool, option("Local paths mean the same on every node.", "--shared-filesystem", panel=WHERE)
]


DriftChanges = Annotated[
    list[str] | None,
    option(
        "When a run counts as unlike those before it: psi_threshold=0.3, ks_threshold=0.2, runs=14; may be repeated.",
        "--drift",
        metavar="KEY=VALUE",
    ),
]


def drift_config(lines: list[str] | None) -> DriftConfig:
    """What `--drift` asks for. Raises UsageError."""
    try:
        return DriftConfig(**parse_settings(lines or ()))
    except ValidationError as error:
        first = error.errors()[0]
        known = ", ".join(DriftConfig.model_fields)
        raise UsageError(
            f"--drift {'.'.join(map(str, first['loc']))}={first['input']}: {first['msg']}; known are {known}"
        ) from error
    except ValueError as error:
        raise UsageError(f"--drift: {error}") from error


def card_changes(lines: list[str] | None) -> dict[str, Any]:
    """What `--set` asks for. Raises UsageError."""
    try:
        return parse_settings(lines or ())
    except ValueError as error:
        raise UsageError(f"--set: {error}") from error


def splitting(changes: list[str] | None) -> Any:
    """What --draw-splits asks for, as a `Splitting`; None where it is not given. Raises UsageError."""
    if not changes:
        return None
    from pipeline.learning.labels.splits import Splitting

    try:
        return Splitting.model_validate(parse_settings(changes))
    except ValidationError as error:
        first = error.errors()[0]
        reason = first["msg"].removeprefix("Value error, ").lower()
        raise UsageError(f"--draw-splits {'.'.join(map(str, first['loc']))}: {reason}") from error
    except ValueError as error:
        raise UsageError(f"--draw-splits: {error}") from error


@contextmanager
def interruptible(console: Console) -> Iterator[Any]:
    """Yields `should_stop`. The first SIGINT or SIGTERM drains, the second stops at once."""
    asked: list[int] = []

    def on_signal(number: int, frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        console.print("stopping; once more to stop at once")

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
