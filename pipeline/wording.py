"""How numbers are put into sentences, the same everywhere. Must not know: what is being told, or where it is shown."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """`1 image`, `2,000 images`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
