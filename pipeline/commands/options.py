"""What several commands share. Owns: options and arguments that mean the same everywhere, exit statuses, signals.
Must not know: any one command.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console

OK, INFRASTRUCTURE, USAGE, TOO_MANY_ERRORS, DRIFTED, KEPT, INTERRUPTED = 0, 1, 2, 3, 4, 5, 130

Dest = Annotated[str, typer.Argument(metavar="DEST", help="Where the table lives: a folder or a URL.")]
RunId = Annotated[str, typer.Argument(metavar="RUN_ID", help="As `maskmill runs list` shows it.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
DestProfile = Annotated[str | None, typer.Option("--dest-profile", metavar="NAME", help="AWS profile for DEST.")]

Registry = Annotated[
    str | None,
    typer.Option("--registry", metavar="URL", help="Folder or URL with models. Default: MASKMILL_REGISTRY."),
]


def option(help_text: str, *names: str, panel: str = "Options", metavar: str | None = None) -> Any:
    return typer.Option(*names, help=help_text, rich_help_panel=panel, metavar=metavar)


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
