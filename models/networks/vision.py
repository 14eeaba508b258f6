"""The semantic networks of torchvision. Owns: their arguments and how they are made. Must not know: cards, weights'
origin, files, devices.

Source: https://docs.pytorch.org/vision/stable/models.html#semantic-segmentation. Names of parameters are torchvision's;
the auxiliary classifier, which only training uses, is left out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field

NAMES = (
    "fcn_resnet50",
    "fcn_resnet101",
    "deeplabv3_resnet50",
    "deeplabv3_resnet101",
    "deeplabv3_mobilenet_v3_large",
    "lraspp_mobilenet_v3_large",
)


class SemanticArgs(BaseModel):
    """Arguments of torchvision's semantic networks."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    output_channels: int = Field(ge=1)


def maker(name: str) -> Callable[..., torch.nn.Module]:
    """`make(args, input_channels=...)` of the network called `name`."""
    return functools.partial(_make, name)


def _make(name: str, args: SemanticArgs, *, input_channels: int) -> torch.nn.Module:
    from torchvision.models import segmentation

    if input_channels != 3:
        raise ValueError(f"{name} takes 3 bands, the card's preprocessing has {input_channels}")
    network: torch.nn.Module = getattr(segmentation, name)(
        weights=None, weights_backbone=None, num_classes=args.output_channels
    )
    return network


def stride(network: torch.nn.Module) -> int:
    """Pixels: any size will do."""
    return 1


def logits_layers(network: torch.nn.Module) -> list[torch.nn.Module]:
    """The last convolutions, before logits are brought to the size of the input."""
    classifier: Any = network.classifier
    if hasattr(classifier, "low_classifier"):
        return [classifier.low_classifier, classifier.high_classifier]
    return [classifier[-1]]
