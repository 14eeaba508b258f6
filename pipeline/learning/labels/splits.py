"""Which image is in which split. Owns: `splits.json`, and splits that are drawn. Must not know: labels, pixels."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field, field_validator

from pipeline.errors import UsageError
from pipeline.learning.labels.place import Place


class Splitting(BaseModel):
    """How splits are drawn where a data set says none."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = 0
    #: Shares of the groups by split; they sum to 1.
    fractions: dict[str, float] = Field(default={"train": 0.8, "val": 0.2}, min_length=1)
    #: A regular expression searched for in names: images with the same match (of its first group, where it has one)
    #: are a group. None: the groups that the data set gives.
    group_pattern: str | None = None

    @field_validator("fractions")
    @classmethod
    def _sum_to_one(cls, fractions: dict[str, float]) -> dict[str, float]:
        if min(fractions.values()) < 0 or abs(sum(fractions.values()) - 1) > 1e-9:
            raise ValueError(f"fractions must be at least 0 and sum to 1, got {fractions}")
        return fractions

    @field_validator("group_pattern")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
        return pattern


class Entry(NamedTuple):
    """What is known of a labelled image before anything of it is read."""

    name: str
    stratum: str = ""
    group: str = ""


def draw_splits(entries: Iterable[Entry], splitting: Splitting) -> dict[str, tuple[str, ...]]:
    """Names by split. A group's split depends on the seed and the group alone: images that join later move no other
    image from one split to another. (So the shares hold on average only.)
    """
    drawn: dict[str, list[str]] = {split: [] for split in splitting.fractions}
    for entry in entries:
        digest = hashlib.sha256(f"{splitting.seed}/{_group(entry, splitting)}".encode()).digest()
        chance = int.from_bytes(digest[:8], "big") / 2**64
        for split, fraction in splitting.fractions.items():
            last = split
            chance -= fraction
            if chance < 0:
                break
        drawn[last].append(entry.name)
    return {split: tuple(names) for split, names in drawn.items()}


def choose_splits(
    place: Place,
    entries: Iterable[Entry],
    splitting: Splitting | None,
    *,
    own: Mapping[str, tuple[str, ...]] | None = None,
) -> dict[str, tuple[str, ...]]:
    """The splits of a data set: drawn where `splitting` is given, else `splits.json`, else the layout's `own`, else
    drawn with the default settings. Raises UsageError for a `splits.json` that is not one.
    """
    if splitting is not None:
        return draw_splits(entries, splitting)
    if place.has("splits.json"):
        splits = place.read_json("splits.json")
        if not isinstance(splits, dict) or not all(isinstance(names, list) for names in splits.values()):
            raise UsageError(f'{place}/splits.json must be {{"split": ["image name", ...], ...}}')
        return {str(split): tuple(str(name) for name in names) for split, names in splits.items()}
    return dict(own) if own else draw_splits(entries, Splitting())


def _group(entry: Entry, splitting: Splitting) -> str:
    if splitting.group_pattern is None:
        return entry.group or entry.name
    found = re.search(splitting.group_pattern, entry.name)
    return entry.name if found is None else (found[1] if found.re.groups else found[0]) or entry.name
