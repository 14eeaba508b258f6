"""From trained weights to the one file that serves. Owns: what its card says of its origin, choosing the
post-processing, the figures, publishing. Must not know: the loop, Ray.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import models
from models.architectures import build
from models.card import Card, WatershedPostprocessing
from models.file import load_module, save_model
from models.segmenter import Segmenter, supports_bf16
from pipeline.learning.configuration import TrainConfig
from pipeline.learning.dataset import Dataset
from pipeline.learning.evaluation import evaluate
from pipeline.learning.tuning import tune_watershed
from pipeline.machine import cores
from pipeline.registry import push_model
from pipeline.storage import normalize_uri, open_storage
from pipeline.table.scratch import scratch_folder

#: By which figure the best weights of a run are chosen; higher is better.
DECISIVE = {"semantic": "mean_iou", "instance": "panoptic_quality"}


def finished_model(
    card: Card,
    weights: Mapping[str, torch.Tensor],
    *,
    provenance: Mapping[str, Any],
    train: Dataset,
    val: Dataset | None,
    device: str,
    precision: str,
) -> bytes:
    """The model file: post-processing chosen on `train` where there is something to choose, figures of `val`.

    `weights` float32 on the CPU. The figures are those of the very file, measured through the Segmenter, by precision:
    fp32, and bf16 where the hardware has it.
    """
    card = Card.model_validate({**card.model_dump(), "provenance": dict(provenance)})
    if isinstance(card.postprocessing, WatershedPostprocessing):
        segmenter = segmenter_of(card, weights, device=device, precision=precision)
        card = card.model_copy(update={"postprocessing": tune_watershed(segmenter, train)})
    data = _file(card, weights)
    if val is None:
        return data
    figures = {}
    for one in ("fp32", "bf16") if supports_bf16(device) else ("fp32",):
        loaded, module = load_module(data)
        segmenter = Segmenter(module, loaded, device=device, precision=one)
        figures[one] = {name: round(value, 4) for name, value in evaluate(segmenter, val).items()}
    return _file(card.with_metrics({str(val.split): figures}), weights)


def segmenter_of(card: Card, weights: Mapping[str, torch.Tensor], *, device: str, precision: str) -> Segmenter:
    """What serves these weights."""
    module = build(card, blank=True)
    module.load_state_dict(dict(weights))
    return Segmenter(module, card, device=device, precision=precision)


def publish(data: bytes, config: TrainConfig) -> str:
    """Puts the file where it is to go, and gives its URI: where there is a registry that in it, in which it is the
    challenger now. Safe to repeat.
    """
    uris = []
    if config.registry is not None:
        uris.append(push_model(data, config.registry, profile=config.registry_profile).uri)
    if config.out is not None:
        uri = normalize_uri(config.out)
        open_storage(uri, profile=config.registry_profile).put(uri, data)
        uris.append(uri)
    return uris[0]


def origin_of(
    config: TrainConfig, dataset: Dataset, *, data_sha256: str, device: str, precision: str, workers: int
) -> dict[str, Any]:
    """What the card says of data, code, settings and hardware. No path and no address."""
    return {
        "dataset": dataset.source.title.rstrip("/").rpartition("/")[2],
        "split": config.train_split,
        "images": len(dataset),
        "data_sha256": data_sha256,
        "code_version": metadata.version("maskmill"),
        "code_sha256": code_digest(),
        "settings": {key: value for key, value in config.settings().items() if key not in ("init", "backbone_weights")},
        "device": torch.device(device).type,
        "precision": precision,
        "hardware": hardware(device),
        "workers": workers,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "trained_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def code_digest() -> str:
    """SHA-256 of the sources that training runs through."""
    folders = (Path(models.__file__).parent, Path(__file__).parent)
    sources = sorted((path.relative_to(top.parent).as_posix(), path) for top in folders for path in top.rglob("*.py"))
    sha256 = hashlib.sha256()
    for name, path in sources:
        sha256.update(name.encode() + b"\0" + path.read_bytes())
    return sha256.hexdigest()


def hardware(device: str) -> str:
    """In words, for people."""
    if torch.device(device).type == "cuda":
        return str(torch.cuda.get_device_name(device))
    names = [
        line.split(":", 1)[1].strip()
        for line in (Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else [])
        if line.startswith("model name")
    ]
    return f"{cores()} x {names[0] if names else platform.processor()}"


def _file(card: Card, weights: Mapping[str, torch.Tensor]) -> bytes:
    with scratch_folder() as folder:
        path = folder / "model.safetensors"
        save_model(path, weights, card)
        return path.read_bytes()
