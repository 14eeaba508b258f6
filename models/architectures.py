"""From a card to a network. Owns: the list of architectures and their arguments.
Must not know: weights' origin, files, devices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from models.card import ArgmaxPostprocessing, Card, ClassInfo, WatershedPostprocessing

#: Distinct colours for classes that come without any.
DEFAULT_COLORS = (
    (0, 0, 0),
    (230, 25, 75),
    (60, 180, 75),
    (255, 225, 25),
    (0, 130, 200),
    (245, 130, 48),
    (145, 30, 180),
    (70, 240, 240),
    (240, 50, 230),
    (210, 245, 60),
    (250, 190, 212),
    (0, 128, 128),
)


class UnetArgs(BaseModel):
    """Arguments of `unet`: segmentation-models-pytorch's U-Net, BatchNorm, nearest upsampling."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: A name of `segmentation_models_pytorch.encoders`.
    encoder: str = "resnet18"
    #: Halvings of the resolution; the network's stride is 2 ** depth.
    encoder_depth: int = Field(default=5, ge=3, le=5)
    #: From the deepest block to the shallowest: `encoder_depth` entries.
    decoder_channels: tuple[int, ...] = (256, 128, 64, 32, 16)
    output_channels: int = Field(ge=1)


def _unet(card: Card) -> torch.nn.Module:
    args = UnetArgs.model_validate(card.architecture_args)
    if len(args.decoder_channels) != args.encoder_depth:
        raise ValueError(f"unet needs {args.encoder_depth} decoder_channels, got {len(args.decoder_channels)}")
    if args.output_channels != card.network_channels:
        raise ValueError(f"unet puts out {args.output_channels} channels, the card needs {card.network_channels}")
    stride = 2**args.encoder_depth
    if card.canvas_multiple % stride:
        raise ValueError(f"canvas_multiple {card.canvas_multiple} is not a multiple of the network's stride {stride}")
    from segmentation_models_pytorch import Unet

    try:
        network = Unet(
            args.encoder,
            encoder_depth=args.encoder_depth,
            encoder_weights=None,
            decoder_channels=args.decoder_channels,
            classes=args.output_channels,
        )
    except KeyError as error:
        raise ValueError(f"unet has no encoder {args.encoder!r}") from error
    if args.encoder.startswith(("resnet", "resnext")):
        # The library keeps the stages below `encoder_depth`, which forward never reaches: 33 MB for resnet18.
        for stage in range(args.encoder_depth, 5):
            delattr(network.encoder, f"layer{stage}")
    return network


#: Name in the card → builder. A builder raises ValueError for arguments that do not fit.
ARCHITECTURES: Mapping[str, Callable[[Card], torch.nn.Module]] = {"unet": _unet}


def build(card: Card) -> torch.nn.Module:
    """The card's network with random weights (from torch's global generator), float32, on the CPU, in eval
    mode.

    It maps float [N, 3, H, W], with H and W multiples of `card.canvas_multiple`, to logits
    [N, card.network_channels, H, W]. Raises ValueError for an unknown architecture or unfitting arguments.
    """
    builder = ARCHITECTURES.get(card.architecture)
    if builder is None:
        raise ValueError(f"unknown architecture {card.architecture!r}: known are {', '.join(sorted(ARCHITECTURES))}")
    try:
        return builder(card).eval()
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"architecture_args are not valid at {where!r}: {first['msg']}") from error


def untrained_card(
    name: str,
    *,
    task: Literal["semantic", "instance"] = "semantic",
    class_names: tuple[str, ...] = ("background", "object"),
    encoder: str = "resnet18",
    decoder_channels: tuple[int, ...] = (16, 8, 8),
) -> Card:
    """A card for a U-Net that nobody has trained yet: the start of training, and tiny models for tests.

    Class ids are 0, 1, ... in the order of `class_names`; id 0 is the background when it is called so.
    Depth = number of decoder channels; the canvas is a multiple of the stride.
    """
    classes = tuple(
        ClassInfo(id=index, name=class_name, color=DEFAULT_COLORS[index % len(DEFAULT_COLORS)])
        for index, class_name in enumerate(class_names)
    )
    depth = len(decoder_channels)
    return Card(
        name=name,
        task=task,
        architecture="unet",
        architecture_args={
            "encoder": encoder,
            "encoder_depth": depth,
            "decoder_channels": list(decoder_channels),
            "output_channels": 3 if task == "instance" else len(classes),
        },
        classes=classes,
        background_id=0 if class_names[0] == "background" else None,
        canvas_multiple=max(32, 2**depth),
        postprocessing=WatershedPostprocessing() if task == "instance" else ArgmaxPostprocessing(),
    )
