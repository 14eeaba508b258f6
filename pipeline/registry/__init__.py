"""Models by name. Owns: where model files lie, what their names and aliases mean, and every change of that. Must not
know: what a network is; training; what makes one model better than another.

`shelf` reads: a reference → its file; `history` is what was decided, one create-only file an entry, whose newest is
what holds now; `changes` writes: push, alias, rollback, and the one step by which a champion changes; `importing` makes
model files out of published weights.

    REGISTRY/<name>/<version>.safetensors     created once
    REGISTRY/<name>/_history/<number>.json    created once; aliases are those of the highest number

Nothing is ever overwritten or deleted.
"""

from __future__ import annotations

from pipeline.registry.changes import Pushed, push_model, rollback_model, set_alias
from pipeline.registry.history import Entry
from pipeline.registry.importing import import_model
from pipeline.registry.shelf import (
    CHALLENGER,
    CHAMPION,
    Listing,
    Model,
    listings,
    model_history,
    registry_uri,
    required_registry,
    resolve,
)

__all__ = [
    "CHALLENGER",
    "CHAMPION",
    "Entry",
    "Listing",
    "Model",
    "Pushed",
    "import_model",
    "listings",
    "model_history",
    "push_model",
    "registry_uri",
    "required_registry",
    "resolve",
    "rollback_model",
    "set_alias",
]
