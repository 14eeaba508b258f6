"""The command `maskmill`. Owns: which commands there are, and what an error becomes. Must not know: their options.

Exit status: 0 done; 1 infrastructure failed, or a table is damaged; 2 wrong usage; 3 done with too many errors; 4 a run
has drifted; 5 a challenger was not good enough; 130 interrupted.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.text import Text

import pipeline
from pipeline import screen
from pipeline.commands import evaluation, export, limits, models, report, runs, segment, tables, training, upkeep
from pipeline.commands.options import INFRASTRUCTURE, INTERRUPTED, OK, USAGE
from pipeline.errors import MaskmillError, UsageError
from pipeline.storage import hide_secrets

#: Options that are not named as their field of SegmentConfig.
_FIELD_OPTIONS = {
    "source": "SOURCE",
    "dest": "DEST",
    "memory_bytes": "--memory-mb",
    "suffixes": "--suffix",
    "lease_ttl_s": "--lease-ttl",
}

#: What one of an option is in its field.
_OPTION_UNITS = {"memory_bytes": 1 << 20}

app = typer.Typer(
    help="Images in object storage in, one Parquet row per image out.",
    no_args_is_help=True,
    add_completion=False,
)
app.command()(segment.segment)
app.command()(evaluation.evaluate)
app.command()(training.train)
for command in (tables.sheet, tables.query, tables.verify, tables.drift):
    app.command()(command)
app.command()(report.report)
app.command()(limits.limits)
app.command()(export.export)
app.command()(upkeep.prune)
app.command()(upkeep.forget)
app.add_typer(runs.app, name="runs")
app.add_typer(models.app, name="models")
app.add_typer(training.labels_app, name="labels")


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


def main() -> None:
    """The entry point: errors become one sentence and an exit status, never a traceback (MASKMILL_DEBUG=1 shows it)."""
    debug = bool(os.environ.get("MASKMILL_DEBUG"))
    logging.basicConfig(
        level=logging.ERROR,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    if debug:  # of the libraries no more than ever: some tell whole addresses, signatures included
        for name in ("pipeline", "models"):
            logging.getLogger(name).setLevel(logging.DEBUG)
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
            print(screen.plain_lines(hide_secrets(traceback.format_exc())), file=sys.stderr)
        word, text, status = _last_words(error)
        if text:  # none where a command without arguments has just shown its help
            line = Text.assemble((f"{word}:", "red"), " ", screen.plain_lines(hide_secrets(text)))
            Console(stderr=True, highlight=False).print(line, soft_wrap=True)
    sys.exit(status)


def _last_words(error: Exception) -> tuple[str, str, int]:
    if isinstance(error, UsageError):
        return "error", str(error), USAGE
    if isinstance(error, MaskmillError):
        return "failed", str(error), INFRASTRUCTURE
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        field, value, message = str(first["loc"][0]), first["input"], first["msg"].lower()
        if unit := _OPTION_UNITS.get(field):
            value //= unit
            for bound in first.get("ctx", {}).values():
                message = message.replace(str(bound), str(bound // unit))
        option = _FIELD_OPTIONS.get(field, f"--{field}".replace("_", "-"))
        return "error", f"{option} is {value!r}: {message}", USAGE
    # Typer's own usage errors (a missing option, an unknown command) know how to say so.
    if hasattr(error, "format_message"):
        return "error", error.format_message(), USAGE
    return "failed", f"{type(error).__name__}: {error} (MASKMILL_DEBUG=1 shows where)", INFRASTRUCTURE


if __name__ == "__main__":
    main()
