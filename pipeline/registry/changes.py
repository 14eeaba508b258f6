"""What changes a registry: pushes, aliases, champions. Owns: which entry follows which, and that a change is made only
to the state that it was decided on. Must not know: why a model deserves to be champion.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from models.file import ModelFileError, load_module
from pipeline.errors import ChampionChangedError, InfrastructureError, ModelError, UsageError
from pipeline.registry.history import CHALLENGER, CHAMPION, Entry, append, read_entry
from pipeline.registry.shelf import (
    Model,
    Shelf,
    is_alias,
    model_of,
    open_shelf,
    parse_reference,
    read_model,
    read_shelf,
    required_registry,
)
from pipeline.storage import Storage, join_uri, normalize_uri, open_storage, without_secrets

_ATTEMPTS = 20


class Pushed(NamedTuple):
    """A model that is in a registry now. `new`: its file was not there before."""

    name: str
    version: str
    uri: str
    aliases: tuple[str, ...]
    new: bool
    #: What makes this registry less safe than it should be, in sentences.
    warnings: tuple[str, ...]


def push_model(
    model: str | os.PathLike[str] | bytes,
    registry: str | None = None,
    *,
    alias: str | None = CHALLENGER,
    reason: str | None = None,
    profile: str | None = None,
) -> Pushed:
    """Puts a model file, by path, URL or bytes, into a registry, under the name on its card, and gives it an alias: by
    default it is the challenger.

    Safe to repeat: the same file is the same version. The champion is never made here: the alias of a version that is
    champion already stays as it is. Raises ModelError for a file that does not load, UsageError for an alias that
    cannot be given.
    """
    registry = required_registry(registry)
    check_alias(alias)
    found = model_of(model, "bytes") if isinstance(model, bytes) else read_model(normalize_uri(os.fspath(model)))
    try:
        load_module(found.data)
    except ModelFileError as error:
        raise ModelError(f"{without_secrets(found.origin)} is not a usable model: {error}") from error
    name = found.card.name
    storage = open_shelf(registry, name, profile=profile, new=True).storage
    warnings = registry_warnings(registry, profile=profile)
    uri, new = _put(storage, join_uri(registry, name), found)

    def entry(shelf: Shelf) -> Entry | None:
        state, champion = shelf.state, shelf.champion()
        given = {alias: found.version} if alias and found.version != champion else {}
        aliases = {**state.aliases, **given}
        if aliases == state.aliases and not new and _is_told(shelf, found.version):
            return None
        return state.followed_by("push", found.version, champion_before=champion, aliases=aliases, reason=reason)

    shelf, _ = amend(registry, name, entry, profile=profile)
    aliases = next(line.aliases for line in shelf.lines() if line.version == found.version)
    return Pushed(name, found.version, uri, aliases, new, warnings)


def set_alias(
    reference: str,
    alias: str,
    *,
    registry: str | None = None,
    reason: str | None = None,
    profile: str | None = None,
) -> Entry | None:
    """Gives a version in a registry one more alias, which another version loses; None where it has it already. Raises
    UsageError for `champion`, which is promoted, and ModelError for what is not in the registry."""
    registry = required_registry(registry)
    check_alias(alias)
    name, which = parse_reference(reference)
    version = read_shelf(name, registry=registry, profile=profile).line(which).version

    def entry(shelf: Shelf) -> Entry | None:
        _check_there(shelf, version)
        state = shelf.state
        if state.aliases.get(alias) == version:
            return None
        aliases = {**state.aliases, alias: version}
        return state.followed_by("alias", version, champion_before=shelf.champion(), aliases=aliases, reason=reason)

    return amend(registry, name, entry, profile=profile)[1]


def change_champion(
    registry: str,
    name: str,
    version: str,
    action: Literal["promote", "keep", "rollback"],
    *,
    instead_of: str | None,
    profile: str | None = None,
    **fields: Any,
) -> Entry:
    """One entry about the champion: `promote` or `rollback` to `version`, or `keep` the champion against it. The only
    step by which a champion changes.

    Decided with the version `instead_of` as the champion: raises ChampionChangedError where it no longer is, and then
    nothing was changed. Of any number of such calls at the same moment one wins. `fields`: reason, decision.
    """

    def entry(shelf: Shelf) -> Entry:
        before = shelf.champion()
        if before != instead_of:
            raise ChampionChangedError(
                f"the champion of {name} changed meanwhile, from {instead_of or 'none'} to {before or 'none'}: nothing "
                "was changed by this command, decide again"
            )
        return _keep(shelf, version, fields) if action == "keep" else _crown(shelf, version, action, fields)

    made = amend(required_registry(registry), name, entry, profile=profile)[1]
    assert made is not None
    return made


def rollback_model(
    name: str, *, registry: str | None = None, reason: str | None = None, profile: str | None = None
) -> Entry:
    """Makes the champion before the present one the champion again; twice: the one before that. The history grows by an
    entry, nothing is removed. Raises UsageError where there was none, ChampionChangedError as `change_champion`.
    """
    registry = required_registry(registry)
    name, which = parse_reference(name)
    if which is not None:
        raise UsageError(f"a rollback goes to the champion before: give {name}, not {name}@{which}")
    shelf = read_shelf(name, registry=registry, profile=profile)
    if not shelf.state.former_champions:
        raise UsageError(f"model {name!r} had no champion before this one: there is nothing to go back to")
    target = shelf.state.former_champions[-1]
    return change_champion(
        registry, name, target, "rollback", instead_of=shelf.state.champion, profile=profile, reason=reason
    )


def check_alias(alias: str | None) -> None:
    """Raises UsageError for what cannot be given by hand."""
    if alias == CHAMPION:
        raise UsageError("`champion` is given by a promotion: push the model, then `maskmill models promote` it")
    if alias is not None and not is_alias(alias):
        raise UsageError(f"{alias!r} is no alias: give lowercase letters, digits, - and _, unlike a version")


def amend(
    registry: str, name: str, entry: Callable[[Shelf], Entry | None], *, profile: str | None = None
) -> tuple[Shelf, Entry | None]:
    """Appends what `entry` makes of the present state, again from the new state where another writer was first; None:
    there is nothing to do. Returns the shelf as it is after that, and what was appended."""
    for attempt in range(_ATTEMPTS):
        shelf = open_shelf(registry, name, profile=profile)
        wanted = entry(shelf)
        if wanted is None:
            return shelf, None
        if append(shelf.storage, shelf.uri, wanted):
            return open_shelf(registry, name, profile=profile), wanted
        time.sleep(random.uniform(0, 0.05 * 2 ** min(attempt, 5)))
    raise InfrastructureError(
        f"{_ATTEMPTS} times another writer changed {name} in {registry} first: try again when it is calmer"
    )


def _keep(shelf: Shelf, version: str, fields: dict[str, Any]) -> Entry:
    return shelf.state.followed_by("keep", version, champion_before=shelf.champion(), **fields)


def _crown(shelf: Shelf, version: str, action: Literal["promote", "rollback"], fields: dict[str, Any]) -> Entry:
    state, before, shipped = shelf.state, shelf.champion(), shelf.shipped()
    for one, uri in shipped.items():
        # A later release of Maskmill may not have it, and the history shall lead to a file.
        if one in (version, before) and one not in shelf.versions:
            _put(shelf.storage, shelf.uri, read_model(uri))
    if version not in shipped:
        _check_there(shelf, version)
    earlier = state.former_champions
    aliases = {alias: to for alias, to in state.aliases.items() if (alias, to) != (CHALLENGER, version)}
    return state.followed_by(
        action, version, champion_before=before, aliases={**aliases, CHAMPION: version},
        former_champions=earlier[:-1] if action == "rollback" else earlier + ((before,) if before else ()), **fields,
    )  # fmt: skip


def _put(storage: Storage, folder_uri: str, model: Model) -> tuple[str, bool]:
    uri = join_uri(folder_uri, f"{model.version}.safetensors")
    new = storage.put_new(uri, model.data)
    if not new and storage.head(uri).size_bytes != len(model.data):
        raise ModelError(
            f"{uri} is there and has another size than version {model.version}: it was damaged or replaced; take it "
            "away and push again"
        )
    return uri, new


def _is_told(shelf: Shelf, version: str) -> bool:
    """Whether the history has an entry about a version. A push that was killed half-way has left its file alone."""
    return any(read_entry(shelf.storage, shelf.uri, number).version == version for number in reversed(shelf.entries))


def _check_there(shelf: Shelf, version: str) -> None:
    if version not in shelf.versions:
        raise ModelError(f"version {version} of {shelf.name!r} has no file in {shelf.uri}: push it first")


def registry_warnings(registry: str, *, profile: str | None = None) -> tuple[str, ...]:
    """What makes this registry less safe than it should be, in sentences."""
    if open_storage(registry, profile=profile).check_create_only():
        return ()
    return (
        f"{registry} has no create-only writes: two promotions at the same moment could both seem to win there. "
        "Change one thing at a time",
    )
