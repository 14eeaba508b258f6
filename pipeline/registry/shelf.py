"""A model's name, alias, path or URL → its file. Owns: where models are looked for, and what a name means. Must not
know: how a name comes to mean something else.

A registry is a folder or URL (`MASKMILL_REGISTRY`, unless one is given). The models that ship with Maskmill are found
after it: a shipped one is the champion of its name until the registry has one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from importlib import resources
from typing import NamedTuple

from models.card import Card
from models.file import ModelFileError, model_version, read_card
from pipeline.errors import MaskmillError, ModelError, StorageError, UsageError
from pipeline.registry.history import (
    CHALLENGER,
    CHAMPION,
    FOLDER,
    Entry,
    State,
    entry_numbers,
    read_entry,
    read_state,
)
from pipeline.storage import Storage, join_uri, normalize_uri, open_storage, without_secrets

__all__ = ["CHALLENGER", "CHAMPION", "Listing", "Model", "Shelf", "listings", "model_history", "read_shelf", "resolve"]

_NAME = re.compile(r"[a-z][a-z0-9-]*")
_REFERENCE = re.compile(rf"(?P<name>{_NAME.pattern})(?:@(?P<which>[A-Za-z0-9_-]+))?")
_ALIAS = re.compile(r"(?![0-9a-f]{12}\Z)[a-z][a-z0-9_-]*")
_VERSION_FILE = re.compile(r"([0-9a-f]{12})\.safetensors")


class Model(NamedTuple):
    """A model file in memory. `version` is the first 12 hex digits of its SHA-256."""

    card: Card
    version: str
    data: bytes
    origin: str


class Listing(NamedTuple):
    """One line of `maskmill models list`."""

    name: str
    version: str
    aliases: tuple[str, ...]
    origin: str


class Shelf(NamedTuple):
    """What a registry has under one name, as it was read."""

    storage: Storage
    #: The folder of the name.
    uri: str
    name: str
    #: URI by version.
    versions: dict[str, str]
    #: Numbers of the entries of its history, ascending.
    entries: list[int]
    state: State

    def lines(self) -> list[Listing]:
        """One for each version, those that ship with Maskmill last."""
        aliases = dict(self.state.aliases)
        if champion := self.champion():
            aliases[CHAMPION] = champion
        return [
            Listing(self.name, version, tuple(sorted(alias for alias, to in aliases.items() if to == version)), uri)
            for version, uri in (self.versions | self.shipped() | self.versions).items()
        ]

    def champion(self) -> str | None:
        """The version that the name means without a suffix; None where that was never decided. Its file may be lost."""
        return self.state.champion or next(iter(self.shipped()), None)

    def shipped(self) -> dict[str, str]:
        """URI by version of what ships with Maskmill under this name: its champion until the registry has one."""
        return _shipped(self.name)

    def line(self, which: str | None) -> Listing:
        """The version or alias `which`; None: the champion, or the only version. Raises ModelError."""
        lines = self.lines()
        for line in lines:
            if which is None and (CHAMPION in line.aliases or len(lines) == 1):
                return line
            if which is not None and (which in line.aliases or line.version == which):
                return line
        wanted = which or CHAMPION
        if lost := self.state.aliases.get(wanted):
            raise ModelError(f"{self.name}@{wanted} is {lost}, whose file is not in {self.uri}: push it again")
        known = ", ".join(f"{line.version} ({', '.join(line.aliases) or 'no alias'})" for line in lines)
        raise ModelError(f"model {self.name!r} has no {wanted!r}; it has {known}")


def registry_uri(registry: str | None = None) -> str | None:
    """`registry`, or the one that the environment names, if any."""
    text = registry or os.environ.get("MASKMILL_REGISTRY")
    return normalize_uri(text).rstrip("/") if text else None


def resolve(reference: str, *, registry: str | None = None, profile: str | None = None) -> Model:
    """Reads the model that `reference` names.

    That is `name`, `name@alias`, `name@version`, or the path or URL of a `.safetensors` file. A name without
    a suffix means its `champion`, or its only version. Raises ModelError with one sentence, also for a file of the
    registry that is not the version which its name says; StorageError where the store fails, for the next try.
    """
    if reference.endswith(".safetensors") or "/" in reference:
        return read_model(normalize_uri(reference), profile)
    name, which = parse_reference(reference)
    line = read_shelf(name, registry=registry, profile=profile).line(which)
    model = read_model(line.origin, profile)
    if model.version != line.version:
        raise ModelError(
            f"{without_secrets(line.origin)} is version {model.version}, not what its name says: it was damaged or "
            "replaced"
        )
    return model


def parse_reference(reference: str) -> tuple[str, str | None]:
    """(name, alias or version). Raises ModelError for anything else."""
    found = _REFERENCE.fullmatch(reference)
    if not found:
        raise ModelError(
            f"{reference!r} is neither a model name ([a-z][a-z0-9-]*, perhaps with @alias or @version) nor a path "
            "that ends in .safetensors"
        )
    return found["name"], found["which"]


def read_shelf(name: str, *, registry: str | None = None, profile: str | None = None) -> Shelf:
    """What there is under `name`. Raises ModelError where that is nothing, or there is no such registry; StorageError
    where its store fails."""
    registry = registry_uri(registry)
    shelf = open_shelf(registry, name, profile=profile) if registry else None
    if shelf is not None and (shelf.versions or shelf.entries):
        return shelf
    if not _shipped(name):
        names = ", ".join(sorted({line.name for line in listings(registry=registry, profile=profile)})) or "none"
        raise ModelError(f"no model is called {name!r} (known: {names}): see `maskmill models list`")
    return _zoo_shelf(name)


def open_shelf(registry: str, name: str, *, profile: str | None = None, new: bool = False) -> Shelf:
    """The folder of `name` in a registry; empty where there is none. One LIST, and one GET of the newest entry. Raises
    ModelError where the registry is not there (with `new` it need not be yet), StorageError where its store fails."""
    storage, uri = open_storage(registry, profile=profile), join_uri(registry, name)
    try:
        uris = _files(storage, uri)
    except StorageError as error:
        if error.kind != "missing":
            raise _unreadable(_said(registry), error) from error
        uris = []
        try:
            next(iter(storage.list(registry)), None)
        except StorageError as also:
            if not new:
                raise _unreadable(_said(registry), also) from also
    return _shelf(storage, registry, name, uris)


def listings(*, registry: str | None = None, profile: str | None = None) -> list[Listing]:
    """Every model that a name can reach: the registry's, then those that ship with Maskmill."""
    registry = registry_uri(registry)
    shelves: dict[str, Shelf] = {}
    if registry:
        storage = open_storage(registry, profile=profile)
        files: dict[str, list[str]] = {}
        try:
            for uri in _files(storage, registry):
                name, slash, _ = uri.removeprefix(f"{registry}/").partition("/")
                if slash and _NAME.fullmatch(name):
                    files.setdefault(name, []).append(uri)
        except StorageError as error:
            raise _unreadable(_said(registry), error) from error
        shelves = {name: _shelf(storage, registry, name, uris) for name, uris in sorted(files.items())}
    found = [line for shelf in shelves.values() for line in shelf.lines()]
    names = {line.name for line in found}
    return found + [line for name in _zoo() if name not in names for line in _zoo_shelf(name).lines()]


def model_history(name: str, *, registry: str | None = None, profile: str | None = None) -> list[Entry]:
    """Every decision about the models of `name`, the oldest first; [] where none was taken. Raises ModelError for a
    name that nobody knows, and for an entry that is damaged."""
    shelf = read_shelf(parse_reference(name)[0], registry=registry, profile=profile)
    return [read_entry(shelf.storage, shelf.uri, number) for number in shelf.entries]


def read_model(uri: str, profile: str | None = None) -> Model:
    """The model file at `uri`. Raises ModelError, and StorageError where its store fails."""
    try:
        return model_of(bytes(open_storage(uri, profile=profile).get(uri).data), uri)
    except StorageError as error:
        raise _unreadable(f"the model file {without_secrets(uri)}", error) from error


def model_of(data: bytes, origin: str) -> Model:
    """A model file's bytes, of which only the card was read yet. Raises ModelError."""
    try:
        return Model(read_card(data), model_version(data), data, origin)
    except ModelFileError as error:
        raise ModelError(f"{without_secrets(origin)} is not a usable model: {error}") from error


def is_alias(text: str) -> bool:
    """Whether `text` can be an alias: it must not look like a version."""
    return _ALIAS.fullmatch(text) is not None


def required_registry(registry: str | None) -> str:
    """The registry to write to. Raises UsageError where none is named."""
    found = registry_uri(registry)
    if found is None:
        raise UsageError("no registry is named: give --registry URL, or set MASKMILL_REGISTRY to a folder or URL")
    return found


def _shelf(storage: Storage, registry: str, name: str, uris: Iterable[str]) -> Shelf:
    uri = join_uri(registry, name)
    files = {file.removeprefix(f"{uri}/"): file for file in uris}
    versions = {found[1]: files[file] for file in sorted(files) if (found := _VERSION_FILE.fullmatch(file))}
    numbers = entry_numbers(file.removeprefix(f"{FOLDER}/") for file in files if file.startswith(f"{FOLDER}/"))
    try:
        state = read_state(storage, uri, numbers, files.get("aliases.json"))
    except StorageError as error:
        raise _unreadable(_said(registry), error) from error
    return Shelf(storage, uri, name, versions, numbers, state)


def _files(storage: Storage, prefix_uri: str) -> list[str]:
    return [uri for batch in storage.list(prefix_uri) for uri in batch["uri"].to_pylist()]


def _shipped(name: str) -> dict[str, str]:
    """URI by version of the model that ships under `name`."""
    entry = resources.files("models").joinpath("zoo", f"{name}.safetensors")
    return {model_version(entry.read_bytes()): normalize_uri(str(entry))} if entry.is_file() else {}


def _zoo_shelf(name: str) -> Shelf:
    """The shelf of a name that no registry has."""
    zoo = normalize_uri(str(resources.files("models").joinpath("zoo")))
    return Shelf(open_storage(zoo), zoo, name, {}, [], State(0, {}, ()))


def _zoo() -> list[str]:
    zoo = resources.files("models").joinpath("zoo")
    files = sorted(entry.name for entry in zoo.iterdir()) if zoo.is_dir() else []
    return [file.removesuffix(".safetensors") for file in files if file.endswith(".safetensors")]


def _said(registry: str) -> str:
    return f"the registry {without_secrets(registry)} (--registry or MASKMILL_REGISTRY)"


def _unreadable(what: str, error: StorageError) -> MaskmillError:
    return error.told(f"{what} cannot be read: {error}", ModelError)
