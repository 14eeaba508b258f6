"""Settings that train in a moment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from models.file import load_module
from pipeline.learning.configuration import TrainConfig
from pipeline.storage import open_storage

TINY: dict[str, Any] = {
    "name": "discs",
    "arch": "unet",
    "args": {"encoder_depth": 3, "decoder_channels": [16, 8, 8]},
    "augmentation": {"crop_px": 32},
    "batch_size": 2,
    "precision": "fp32",
    "use_gpu": False,
    "threads": 1,
    "seed": 1,
}

#: Networks without batch norm, whose statistics would be those of the images that one worker sees at once.
NORMLESS: dict[str, Any] = {
    "encoder": "tu-convnext_atto",
    "args": {"encoder_depth": 3, "decoder_channels": [16, 8, 8], "decoder_use_norm": False},
}


def tiny(dataset: Path, registry: Path, **changes: Any) -> TrainConfig:
    """Two steps an epoch of four images, and four steps unless `changes` say otherwise."""
    ends = {} if changes.keys() & {"epochs", "steps", "minutes"} else {"steps": 4}
    return TrainConfig(**{"dataset": str(dataset), "registry": str(registry), **TINY, **ends, **changes})


def weights(uri: str) -> dict[str, torch.Tensor]:
    _, module = load_module(open_storage(uri).get(uri).data)
    return module.state_dict()


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
