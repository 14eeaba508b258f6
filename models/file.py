"""The model file: one safetensors file with the weights, and the card as JSON in its header. No pickle, ever.
Owns: reading, checking, writing and naming (by digest) such files. Must not know: where they are stored, the
corpus.

Format of the header: https://github.com/huggingface/safetensors#format (8 bytes little-endian length, then
JSON).
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from models.card import Card

if TYPE_CHECKING:
    import torch

#: The key of the card in the header's `__metadata__`.
CARD_KEY = "maskmill_card"
#: The format's own limit on the header, in bytes.
MAX_HEADER_BYTES = 100_000_000
#: A network in float32 may need so many bytes for each byte of its file, whose weights may be of 8 bits, and so many
#: beyond: tables that are no weights. A card that asks for more is damaged or hostile.
_NETWORK_BYTES_PER_BYTE = 5
_NETWORK_BYTES = 256 << 20


class ModelFileError(ValueError):
    """A file that is not a usable model. The message says what is wrong with it."""


def model_version(data: bytes) -> str:
    """First 12 hexadecimal digits of the SHA-256 of the whole file."""
    return hashlib.sha256(data).hexdigest()[:12]


def read_card(data_or_path: bytes | str | os.PathLike[str]) -> Card:
    """The card of a model file, read from the header only: cheap, and needs no torch.

    Raises ModelFileError if it is no model file or has no valid card, OSError if a path cannot be read.
    """
    if isinstance(data_or_path, bytes):
        header = _parse_header(data_or_path[:8], data_or_path[8:], size_bytes=len(data_or_path))
    else:
        with open(data_or_path, "rb") as file:
            size_bytes = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            rest = file.read(min(int.from_bytes(prefix, "little"), MAX_HEADER_BYTES))
        header = _parse_header(prefix, rest, size_bytes=size_bytes)
    return _card_of(header)


def load_module(data: bytes) -> tuple[Card, torch.nn.Module]:
    """The card, and the network with its weights: on the CPU, float32, in eval mode.

    Raises ModelFileError when the bytes are cut off, are no model, or weights and architecture do not fit
    together.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load

    card = read_card(data)
    try:
        state = load(data)
    except (SafetensorError, KeyError, ValueError) as error:
        raise ModelFileError(f"the weights of model {card.name!r} cannot be read: {error}") from error
    module = build_for(card, file_bytes=len(data))
    _check_fit(card, module.state_dict(), state)
    module.load_state_dict(
        {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    )
    for name, parameter in module.state_dict().items():
        if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
            raise ModelFileError(f"model {card.name!r} holds NaN or infinity in {name!r}: its training went wrong")
    return card, module.eval()


def build_for(card: Card, *, file_bytes: int) -> torch.nn.Module:
    """The card's network without its weights, which lie in a file of so many bytes: cheap, and enough to know whether
    a card, such as one with the settings of a run, is one that its network can serve.

    Raises ModelFileError where it is not: sizes that do not go with the network's stride, an unknown architecture.
    """
    from models.architectures import build

    try:
        return build(card, blank=True, most_bytes=_NETWORK_BYTES_PER_BYTE * file_bytes + _NETWORK_BYTES)
    except ValueError as error:
        raise ModelFileError(f"model {card.name!r} cannot be built: {error}") from error


def save_model(path: str | os.PathLike[str], state_dict: Mapping[str, torch.Tensor], card: Card) -> str:
    """Writes weights and card as one file and returns its version.

    Atomic: the file appears whole under its name, or not at all; safe to repeat. Equal inputs give equal
    bytes. Raises ModelFileError if the weights do not fit the card's architecture, OSError if it cannot be
    written.
    """
    from safetensors.torch import save

    from models.architectures import build

    _check_fit(card, build(card, blank=True).state_dict(), state_dict)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    data = save(tensors, metadata={CARD_KEY: card.model_dump_json()})
    target = Path(path)
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return model_version(data)


def _parse_header(prefix: bytes, rest: bytes, *, size_bytes: int) -> dict[str, object]:
    if size_bytes == 0:
        raise ModelFileError("not a model file: it is empty")
    header_bytes = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or header_bytes > MAX_HEADER_BYTES or rest[:1] not in (b"{", b""):
        raise ModelFileError("not a model file: it does not start with a safetensors header")
    if len(rest) < header_bytes:
        raise ModelFileError(
            f"the model file is cut off: its header needs {8 + header_bytes} bytes, it has {size_bytes}"
        )
    try:
        header = json.loads(rest[:header_bytes])
    except (ValueError, RecursionError) as error:
        raise ModelFileError("not a model file: its safetensors header is not JSON") from error
    if not isinstance(header, dict):
        raise ModelFileError("not a model file: its safetensors header is not a JSON object")
    try:
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        needed = 8 + header_bytes + max(ends, default=0)
    except (KeyError, IndexError, TypeError) as error:
        raise ModelFileError("not a model file: its safetensors header is malformed") from error
    if size_bytes < needed:
        raise ModelFileError(f"the model file is cut off: it needs {needed} bytes, it has {size_bytes}")
    return header


def _card_of(header: dict[str, object]) -> Card:
    metadata = header.get("__metadata__")
    text = metadata.get(CARD_KEY) if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise ModelFileError(f"a safetensors file without a model card: its header has no {CARD_KEY!r}; use save_model")
    try:
        return Card.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "card"
        raise ModelFileError(f"the model card is not valid at {where!r}: {first['msg']}") from error


def _check_fit(card: Card, expected: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> None:
    """Raises ModelFileError with the first difference in names or shapes."""
    what = f"weights do not fit the architecture {card.architecture!r} of model {card.name!r}"
    missing, extra = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
    if missing:
        raise ModelFileError(f"{what}: {len(missing)} tensors are missing, the first is {missing[0]!r}")
    if extra:
        raise ModelFileError(f"{what}: {len(extra)} tensors are unknown, the first is {extra[0]!r}")
    for name, tensor in expected.items():
        if tensor.shape != given[name].shape:
            raise ModelFileError(
                f"{what}: {name!r} has shape {tuple(given[name].shape)}, not {tuple(tensor.shape)} "
                f"(the card says {card.network_channels} channels out, {card.input_channels} bands in)"
            )
