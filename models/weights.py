"""Published weights as they come in files: reading them safely, and fitting them to a network. Owns: what wraps a
state dict, and which tensors of it only training used. Must not know: who published them, cards, models' files.

Nothing is unpickled but tensors (torch.load with weights_only=True).
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

#: Where checkpoints of training programs keep the weights.
_NESTS = ("state_dict", "model_state_dict", "model")
#: What wrappers put before every name.
_PREFIXES = ("module.", "_orig_mod.", "model.")


class WeightsError(ValueError):
    """Weights that cannot be imported. The message says why, and what to do."""


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a `.pth` or `.safetensors` file, by name, on the CPU; wrappers around them are taken off.

    Runs no code of the file's. Raises WeightsError if it is no such file or holds anything but weights, OSError if it
    cannot be read.
    """
    data: Any
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            data = load(path.read_bytes())
        except SafetensorError as error:
            raise WeightsError(f"{path} is not a safetensors file: {error}") from error
    else:
        try:
            with warnings.catch_warnings():
                # Of old protocols, to those who would change torch.
                warnings.simplefilter("ignore", UserWarning)
                data = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise WeightsError(
                f"{path} is not read: it holds more than weights, and a pickle can run any code "
                f"({reason(error)}); save the network's state_dict() alone"
            ) from error
        except (RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError, IndexError) as error:
            raise WeightsError(f"{path} is not a file of weights: {reason(error)}") from error
    for nest in _NESTS:
        if isinstance(data, Mapping) and isinstance(data.get(nest), Mapping):
            data = data[nest]
    if not isinstance(data, Mapping) or not data or not all(isinstance(value, torch.Tensor) for value in data.values()):
        raise WeightsError(f"{path} holds no state dict: it must be a mapping of names to tensors")
    return _unwrapped(data)


def load_weights(network: torch.nn.Module, state: Mapping[str, torch.Tensor], *, what: str) -> None:
    """Through the library's own loading, which knows how its older files were called."""
    expected = network.state_dict()
    kept = OrderedDict((key, tensor) for key, tensor in state.items() if key in expected or not _unused(key))
    versions = getattr(state, "_metadata", None)
    if versions is not None:
        kept._metadata = versions  # type: ignore[attr-defined]
    try:
        missing, unknown = network.load_state_dict(kept, strict=False)
    except RuntimeError as error:
        lines = str(error).splitlines()
        raise WeightsError(f"the weights do not fit {what}: {lines[min(1, len(lines) - 1)].strip()}") from error
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]
    for lack, keys in (("lack", missing), ("have unknown", unknown)):
        if keys:
            raise WeightsError(
                f"the weights do not fit {what}: they {lack} {len(keys)} tensors, the first is {sorted(keys)[0]!r}"
            )


def _unused(key: str) -> bool:
    """Only training uses these, or nothing does: torchvision's second classifier, counters of frozen BatchNorm, stages
    of an encoder below its depth.
    """
    return (
        key.startswith("aux_classifier.")
        or key.endswith("num_batches_tracked")
        or re.match(r"encoder\.layer\d\.", key) is not None
    )


def _unwrapped(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without prefixes that all names share. Keeps what torch knows of the layers' versions."""
    names = {name: name for name in state}
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in names.values()):
            names = {key: name.removeprefix(prefix) for key, name in names.items()}
    bare: OrderedDict[str, torch.Tensor] = OrderedDict((name, state[key]) for key, name in names.items())
    versions = getattr(state, "_metadata", None)
    if versions is not None:
        bare._metadata = versions  # type: ignore[attr-defined]
    return bare


def reason(error: Exception) -> str:
    """What an exception of a library says, in one line."""
    text = str(error) or type(error).__name__
    sentences = [line.strip() for line in text.splitlines() if line.strip()]
    # Torch opens with a paragraph of advice, such as to load it all the same; the finding follows it.
    finding = [line.rpartition("WeightsUnpickler error: ")[2] for line in sentences if "unsupported" in line.lower()]
    return (finding or sentences or [type(error).__name__])[0].partition(". Please")[0].rstrip(".")[:200]
