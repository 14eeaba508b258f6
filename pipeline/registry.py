"""A model's name, alias, path or URL → its file. Owns: where models are looked for, and how files come in.
Must not know: what a network is; training; promotion.

A registry is a folder or URL (`MASKMILL_REGISTRY`) that holds `<name>/<version>.safetensors` and, per name,
`aliases.json` (`{"champion": "<version>"}`). The models that ship with Maskmill are found after it.
"""

from __future__ import annotations

import os
import re
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from models.card import Card
from models.file import ModelFileError, model_version, read_card
from pipeline.errors import InfrastructureError, ModelError, StorageError
from pipeline.storage import join_uri, normalize_uri, open_storage

_NAME = re.compile(r"(?P<name>[a-z][a-z0-9-]*)(?:@(?P<which>[A-Za-z0-9_-]+))?")
_ALIASES = TypeAdapter(dict[str, str])
DEFAULT_ALIAS = "champion"


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


def registry_uri() -> str | None:
    """The registry that the environment names, if any."""
    text = os.environ.get("MASKMILL_REGISTRY")
    return normalize_uri(text) if text else None


def resolve(reference: str, *, profile: str | None = None) -> Model:
    """Reads the model that `reference` names.

    That is `name`, `name@alias`, `name@version`, or the path or URL of a `.safetensors` file. A name without
    a suffix means its `champion`, or its only version. Raises ModelError with one sentence.
    """
    if reference.endswith(".safetensors") or "/" in reference:
        return _read(normalize_uri(reference), profile)
    found = _NAME.fullmatch(reference)
    if not found:
        raise ModelError(
            f"{reference!r} is neither a model name ([a-z][a-z0-9-]*, perhaps with @alias or @version) nor a path "
            "that ends in .safetensors"
        )
    name, which = found["name"], found["which"]
    known = [line for line in listings(profile=profile) if line.name == name]
    if not known:
        names = ", ".join(sorted({line.name for line in listings(profile=profile)})) or "none"
        raise ModelError(f"no model is called {name!r} (known: {names}): see `maskmill models list`")
    for line in known:
        if which is None and (DEFAULT_ALIAS in line.aliases or len(known) == 1):
            return _read(line.origin, profile)
        if which is not None and (which in line.aliases or line.version == which):
            return _read(line.origin, profile)
    versions = ", ".join(f"{line.version} ({', '.join(line.aliases) or 'no alias'})" for line in known)
    raise ModelError(f"model {name!r} has no {which or DEFAULT_ALIAS!r}; it has {versions}")


def listings(*, profile: str | None = None) -> list[Listing]:
    """Every model that a name can reach: the registry's, then those that ship with Maskmill."""
    found: list[Listing] = []
    registry = registry_uri()
    if registry:
        storage = open_storage(registry, profile=profile)
        aliases: dict[str, dict[str, str]] = {}
        files: list[tuple[str, str, str]] = []
        try:
            uris = [uri for batch in storage.list(registry) for uri in batch["uri"].to_pylist()]
        except StorageError as error:
            raise ModelError(f"the registry {registry} (MASKMILL_REGISTRY) cannot be read: {error}") from error
        for uri in uris:
            name, _, file = uri.removeprefix(registry.rstrip("/") + "/").rpartition("/")
            if file == "aliases.json":
                aliases[name] = _aliases(bytes(storage.get(uri).data), uri)
            elif file.endswith(".safetensors") and re.fullmatch(r"[a-z][a-z0-9-]*", name):
                files.append((name, file.removesuffix(".safetensors"), uri))
        for name, version, uri in sorted(files):
            mine = tuple(sorted(alias for alias, to in aliases.get(name, {}).items() if to == version))
            found.append(Listing(name, version, mine, uri))
    names = {line.name for line in found}
    zoo = resources.files("models").joinpath("zoo")
    if zoo.is_dir():
        for entry in sorted(zoo.iterdir(), key=lambda e: e.name):
            name = entry.name.removesuffix(".safetensors")
            if entry.name.endswith(".safetensors") and name not in names:
                uri = join_uri(normalize_uri(str(zoo)), entry.name)
                found.append(Listing(name, model_version(entry.read_bytes()), (DEFAULT_ALIAS,), uri))
    return found


def import_model(out: str | os.PathLike[str], **settings: Any) -> Model:
    """Makes a model file on this machine out of published weights, and gives it back.

    `settings` are the fields of `models.importing.ImportConfig`: `source="torchvision:fcn_resnet50"` fetches
    torchvision's own weights; `weights_file`, `seed` and `smp:...` are the other ways. The file appears whole or not at
    all; the same weights make the same file. Raises ModelError for what cannot be a model, InfrastructureError where
    weights cannot be fetched or the file cannot be written.
    """
    from models.file import save_model
    from models.importing import DownloadError, ImportConfig, import_model

    path = Path(out)
    if path.suffix != ".safetensors":
        raise ModelError(f"{path} must end in .safetensors: that is what the file will be")
    try:
        card, state_dict = import_model(ImportConfig(**settings))
        save_model(path, state_dict, card)
    except DownloadError as error:
        raise InfrastructureError(str(error)) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ModelError(f"{where} is {first['input']!r}: {first['msg']}") from error
    except ValueError as error:
        raise ModelError(str(error)) from error
    except FileNotFoundError as error:
        raise ModelError(f"{error.filename} is not there: {error.strerror}") from error
    except OSError as error:
        raise InfrastructureError(f"{path} could not be made: {error}") from error
    return _read(normalize_uri(str(path)), None)


def _aliases(data: bytes, uri: str) -> dict[str, str]:
    try:
        return _ALIASES.validate_json(data)
    except ValidationError as error:
        raise ModelError(
            f"{uri} must be a JSON object of aliases and versions: {error.errors()[0]['msg'].lower()}"
        ) from error


def _read(uri: str, profile: str | None) -> Model:
    try:
        data = bytes(open_storage(uri, profile=profile).get(uri).data)
        return Model(read_card(data), model_version(data), data, uri)
    except StorageError as error:
        raise ModelError(f"the model file {uri} cannot be read: {error}") from error
    except ModelFileError as error:
        raise ModelError(f"{uri} is not a usable model: {error}") from error
