"""What a run may change of a card: how sizes are treated and what happens after the network. Owns: which fields those
are, how changes are merged. Must not know: networks, weights, what the fields mean.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, JsonValue, ValidationError

from models.card import Card
from models.refinement import AugmentationSettings, CleanupSettings, CrfSettings

#: Fields of a card that change the answer without changing the weights.
SETTABLE = ("size_policy", "tile_above_pixels", "postprocessing", "cleanup", "crf", "augmentation")

#: What a card may lack, and a run add.
_OPTIONAL: Mapping[str, type[BaseModel]] = {
    "cleanup": CleanupSettings,
    "crf": CrfSettings,
    "augmentation": AugmentationSettings,
}


def parse_settings(lines: Iterable[str]) -> dict[str, JsonValue]:
    """`["postprocessing.min_area_px=30", "augmentation.flips=[\\"horizontal\\"]"]` as a nested mapping.

    A value is JSON, or else a string. Raises ValueError for a line without a key or an equals sign, and for two lines
    that contradict each other in shape.
    """
    settings: dict[str, Any] = {}
    for line in lines:
        key, equals, text = line.partition("=")
        names = key.strip().split(".")
        if not equals or not all(names):
            raise ValueError(f"{line!r} is not KEY=VALUE, for example postprocessing.min_area_px=30")
        place = settings
        for name in names[:-1]:
            place = place.setdefault(name, {})
            if not isinstance(place, dict):
                raise ValueError(f"{line!r} goes below {name!r}, which has a value already")
        try:
            place[names[-1]] = json.loads(text)
        except json.JSONDecodeError:
            place[names[-1]] = text
    return settings


def with_settings(card: Card, settings: Mapping[str, JsonValue]) -> Card:
    """`card` with the fields of `settings` in place of its own; nested fields that are not named stay.

    Where `kind` changes, the fields of the old kind go. Raises ValueError, which names the nearest known field, for
    one that is unknown or not settable, and for values that do not fit.
    """
    for name in settings:
        if name not in SETTABLE:
            raise ValueError(f"{name!r} cannot be set for a run{_nearest(name, SETTABLE)}")
    merged = _merged(card.model_dump(mode="json"), settings)
    try:
        return Card.model_validate(merged)
    except ValidationError as error:
        first = error.errors()[0]
        where = [str(part) for part in first["loc"]]
        # Pydantic puts the kind of a union between the field and what is in it.
        names = [part for part in where if part not in _kinds(card, settings)]
        hint = ""
        if first["type"] == "extra_forbidden" and names:
            hint = _nearest(names[-1], _known(card, names[:-1]))
        message = "there is no such setting" if hint else first["msg"].removeprefix("Value error, ")
        if first["type"] == "missing":
            message = "it has to be set too"
        subject = f"{'.'.join(names)} does" if names else "the settings do"
        raise ValueError(f"{subject} not fit model {card.name!r}: {message}{hint}") from error


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(old)
    for name, value in new.items():
        before = merged.get(name)
        if isinstance(value, Mapping) and isinstance(before, Mapping) and _same_kind(before, value):
            merged[name] = _merged(before, value)
        else:
            merged[name] = value
    return merged


def _same_kind(before: Mapping[str, Any], value: Mapping[str, Any]) -> bool:
    return "kind" not in value or value["kind"] == before.get("kind")


def _kinds(card: Card, settings: Mapping[str, Any]) -> set[str]:
    chosen = {card.size_policy.kind, card.postprocessing.kind}
    named = {str(value["kind"]) for value in settings.values() if isinstance(value, Mapping) and "kind" in value}
    # A size policy may be a bare name.
    return chosen | named | {value for value in settings.values() if isinstance(value, str)}


def _known(card: Card, names: list[str]) -> list[str]:
    place: Any = card
    for name in names:
        place = getattr(place, name, None) or _OPTIONAL.get(name)
    return list(
        getattr(place, "model_fields", {}) if isinstance(place, type) else getattr(type(place), "model_fields", {})
    )


def _nearest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if near:
        return f": did you mean {near[0]!r}?"
    return f": known are {', '.join(known)}" if known else ""
