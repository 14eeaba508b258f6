"""What a training run needs to go on, at rest. Owns: the form of a checkpoint, its names and its folder. Must not know:
networks, optimisers, schedules.

    FOLDER/checkpoint-00000120.safetensors    everything after step 120: tensors, and `Progress` as JSON in the header
    FOLDER/best-00000080.safetensors          the averaged weights that measured best
    FOLDER/trace/00003.parquet                the row of epoch 3
    FOLDER/outcome.json                       what became of it: the run is over

A checkpoint is created once, in one step, and never replaced; the newest that is there counts. Nothing is unpickled.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load

from pipeline.errors import InfrastructureError, StorageError, UsageError
from pipeline.storage import join_uri, normalize_uri, open_storage

_PROGRESS_KEY = "maskmill_training"
#: What safetensors calls the types that networks and optimisers have.
_TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_NAME = re.compile(r"(checkpoint|best)-(\d{8})\.safetensors")
#: A checkpoint that is being written when the machine dies is never seen; one is kept besides for the curious.
_KEPT = 2


class Progress(BaseModel):
    """Where a run stands, besides its tensors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: Steps and epochs that are done.
    step: int = 0
    epoch: int = 0
    #: Seconds spent so far, as far as they were not lost.
    elapsed_s: float = 0.0
    #: One row per epoch: see pipeline/learning/trace.py.
    trace: tuple[dict[str, JsonValue], ...] = ()
    #: The step whose averaged weights measured best, and how well; None before the first measurement.
    best_step: int | None = None
    best_score: float | None = None
    #: Measurements since then.
    stale: int = 0
    #: Nothing is left to be trained.
    finished: bool = False
    #: When, in UTC and ISO 8601; "" before.
    finished_at: str = ""
    #: CPU threads that it was computed with: with others the last bits differ.
    threads: int = 0
    #: Who wrote it.
    writer: str = ""


class Checkpoint(NamedTuple):
    """Tensors by `model/<name>`, `average/<name>`, `optimizer/<parameter>/<key>`, all on the CPU."""

    progress: Progress
    tensors: dict[str, torch.Tensor]

    def part(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors below `name/`, by the rest of their names."""
        return {key[len(name) + 1 :]: tensor for key, tensor in self.tensors.items() if key.startswith(f"{name}/")}


class CheckpointFolder:
    """The checkpoints of one run, at any URL."""

    def __init__(self, uri: str, *, profile: str | None = None) -> None:
        self.uri = normalize_uri(uri).rstrip("/")
        self._storage = open_storage(self.uri, profile=profile)
        self._writer = uuid.uuid4().hex

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint, or None where there is none. Raises InfrastructureError for one that is damaged."""
        steps = [step for kind, step in self._listed() if kind == "checkpoint"]
        return self._read(self._uri("checkpoint", max(steps))) if steps else None

    def save(self, progress: Progress, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keeps a checkpoint, and forgets what is older than the one before. Raises UsageError where another process
        has written the same step: it trains the same.
        """
        uri = self._uri("checkpoint", progress.step)
        progress = progress.model_copy(update={"writer": self._writer})
        if not self._storage.put_new(uri, _packed(tensors, progress)) and self._read(uri).progress != progress:
            raise UsageError(
                f"another process is training the same: it has written {uri}. Let it finish, or stop it and give the "
                "same command again"
            )
        self._prune(progress)

    def save_best(self, step: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Before the checkpoint that names it; an epoch that is done again writes it again."""
        self._storage.put(self._uri("best", step), _packed(tensors, None))

    def best(self, step: int) -> dict[str, torch.Tensor]:
        """What `save_best` was given, on the CPU."""
        return self._read(self._uri("best", step)).tensors

    def outcome(self) -> dict[str, Any] | None:
        """What `finish` was given, or None while the run is not over."""
        uri = join_uri(self.uri, "outcome.json")
        return json.loads(self._storage.get(uri).data) if self._storage.exists(uri) else None

    def finish(self, outcome: Mapping[str, Any]) -> None:
        """Says that the run is over, and forgets its checkpoints; trace and curves stay."""
        self._storage.put(join_uri(self.uri, "outcome.json"), json.dumps(outcome, indent=1).encode())
        self.tidy()

    def tidy(self) -> None:
        """Forgets the checkpoints of a run that is over."""
        for kind, step in self._listed():
            self._storage.delete(self._uri(kind, step))

    def clear(self) -> None:
        """Forgets everything, the trace too."""
        for uri in self._files():
            self._storage.delete(uri)

    def put(self, name: str, data: bytes, *, replace: bool = False) -> None:
        """A file of the run's beside its checkpoints."""
        uri = join_uri(self.uri, name)
        if replace:
            self._storage.put(uri, data)
        else:
            self._storage.put_new(uri, data)

    def _prune(self, progress: Progress) -> None:
        listed = self._listed()
        steps = sorted(step for kind, step in listed if kind == "checkpoint" and step <= progress.step)
        kept = set(steps[-_KEPT:])
        # The best that the checkpoint before names is needed where this one is damaged, or not yet seen everywhere.
        before = max((step for kind, step in listed if kind == "best" and step <= min(kept)), default=None)
        for kind, step in listed:
            named = step >= min(kept) or step in (before, progress.best_step)
            old = step not in kept if kind == "checkpoint" else not named
            if old and step < progress.step:
                self._storage.delete(self._uri(kind, step))

    def _listed(self) -> list[tuple[str, int]]:
        names = [_NAME.fullmatch(uri.rpartition("/")[2]) for uri in self._files()]
        return [(found[1], int(found[2])) for found in names if found]

    def _files(self) -> list[str]:
        try:
            return [uri for batch in self._storage.list(self.uri) for uri in batch["uri"].to_pylist()]
        except StorageError as error:
            if error.kind == "missing":
                return []
            raise

    def _uri(self, kind: str, step: int) -> str:
        return join_uri(self.uri, f"{kind}-{step:08d}.safetensors")

    def _read(self, uri: str) -> Checkpoint:
        data = self._storage.get(uri).data
        try:
            tensors = load(data)
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            text = header.get("__metadata__", {}).get(_PROGRESS_KEY)
            return Checkpoint(Progress.model_validate_json(text) if text else Progress(), tensors)
        except (SafetensorError, ValidationError, ValueError) as error:
            raise InfrastructureError(
                f"the checkpoint {uri} cannot be read ({error}): delete it to go on from the one before"
            ) from error


def _packed(tensors: Mapping[str, torch.Tensor], progress: Progress | None) -> memoryview:
    """A safetensors file: the header's length, the header, the tensors. The library's `save` copies each tensor several
    times, four to seven times the work of this.
    """
    header: dict[str, Any] = {"__metadata__": {_PROGRESS_KEY: progress.model_dump_json()}} if progress else {}
    placed: list[tuple[torch.Tensor, int, int]] = []
    end = 0
    # The widest first, so that each begins at a multiple of its own width.
    for name, tensor in sorted(tensors.items(), key=lambda pair: -pair[1].element_size()):
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _TYPES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [start, end]}
        placed.append((tensor, start, end))
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    packed = np.empty(8 + len(head) + end, dtype=np.uint8)
    packed[: 8 + len(head)] = np.frombuffer(len(head).to_bytes(8, "little") + head, dtype=np.uint8)
    body = torch.from_numpy(packed[8 + len(head) :])
    for tensor, start, end in placed:
        body[start:end].view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())
    return packed.data
