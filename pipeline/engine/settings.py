"""What of a command changes a model's answers. Owns: the card as it is asked for, the settings that rows name by their
digest. Must not know: plans, runs, devices.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pydantic import JsonValue

from models.card import Card
from models.file import build_for
from models.overrides import with_settings
from pipeline.config import Precision
from pipeline.errors import UsageError
from pipeline.registry import Model

#: No part of how long an image takes, or named beside it.
_NOT_OF_SETUP = ("precision", "max_pixels")


def asked_of(shipped: Model, changes: Mapping[str, JsonValue]) -> Model:
    """The model with its card as a command wants it. Raises UsageError where the card, or its network, cannot."""
    try:
        asked = shipped._replace(card=with_settings(shipped.card, changes))
        if _asks_of_network(asked.card) != _asks_of_network(shipped.card):
            # A card as it was shipped is its workers' to refuse. These are answered before there are any.
            build_for(asked.card, file_bytes=len(shipped.data))
    except ValueError as error:
        raise UsageError(f"--set: {error}") from error
    return asked


def settings_of(shipped: Card, asked: Card, *, precision: Precision, max_pixels: int, compile: bool) -> dict[str, Any]:
    """What changes the answer."""
    before, card = shipped.model_dump(mode="json"), asked.model_dump(mode="json")
    settings: dict[str, Any] = {
        "precision": precision,
        "max_pixels": max_pixels,
        "tile_above_pixels": asked.tile_above_pixels,
        "postprocessing": card["postprocessing"],
    }
    # Naming a field of the card with the card's own value is no other question.
    settings |= {name: card[name] for name in sorted(card) if card[name] != before.get(name)}
    if compile:
        settings["compile"] = True
    return settings


def digest_of(settings: Mapping[str, Any]) -> str:
    """12 hex digits, the same for the same settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def setup_digest(settings: Mapping[str, Any]) -> str:
    """Of those settings that, beside the precision, decide how long an image takes."""
    return digest_of({name: value for name, value in settings.items() if name not in _NOT_OF_SETUP})


def _asks_of_network(card: Card) -> tuple[Any, ...]:
    """What a run can change of a card that its network may not serve."""
    return card.size_policy, card.postprocessing.kind
