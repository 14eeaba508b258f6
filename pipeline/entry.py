"""Where the command starts. Owns: being interrupted before anything is there. Must not know: anything else."""

from __future__ import annotations

import sys


def main() -> None:
    """`maskmill`: importing takes a moment, in which Ctrl-C must be as quiet as later."""
    try:
        from pipeline import cli
    except KeyboardInterrupt:
        sys.exit(130)
    cli.main()
