"""From a card to a network. Owns: the list of architectures, and whether a card and its network fit together.
Must not know: weights' origin, files, devices; how each library builds its networks (`models.networks`).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ValidationError
from torch.utils._python_dispatch import TorchDispatchMode

from models.card import (
    ArgmaxPostprocessing,
    Card,
    ClassInfo,
    DetectionsPostprocessing,
    LetterboxPolicy,
    Postprocessing,
    TilePolicy,
    WatershedPostprocessing,
)
from models.networks import mask_rcnn, smp, vision
from models.palettes import distinct_color


class Architecture(NamedTuple):
    """How networks of one name are made, and what is known of them before any is."""

    #: Pydantic model of `Card.architecture_args`; it has a field `output_channels`.
    args: type[BaseModel]
    #: `make(args, input_channels=...)`: random weights, on the CPU. Raises ValueError for what does not fit.
    make: Callable[..., torch.nn.Module]
    #: Pixels of which heights and widths must be multiples, of a network made.
    stride: Callable[[torch.nn.Module], int]
    #: The layers whose output is logits at the network's own resolution.
    logits_layers: Callable[[torch.nn.Module], list[torch.nn.Module]]
    #: True where it finds instances by itself, rather than classes of pixels.
    detects: bool


_SMP: Mapping[str, type[smp.SmpArgs]] = {
    "unet": smp.UnetArgs,
    "unetplusplus": smp.UnetArgs,
    "deeplabv3plus": smp.Deeplabv3plusArgs,
    "fpn": smp.FpnArgs,
    "pspnet": smp.PspnetArgs,
    "linknet": smp.LinknetArgs,
    "upernet": smp.UpernetArgs,
    "segformer": smp.SegformerArgs,
    "dpt": smp.DptArgs,
}
#: Name in the card → how it is made.
ARCHITECTURES: Mapping[str, Architecture] = {
    **{name: Architecture(args, smp.maker(name), smp.stride, smp.logits_layers, False) for name, args in _SMP.items()},
    **{
        name: Architecture(vision.SemanticArgs, vision.maker(name), vision.stride, vision.logits_layers, False)
        for name in vision.NAMES
    },
    **{
        name: Architecture(mask_rcnn.MaskRcnnArgs, mask_rcnn.maker(name), mask_rcnn.stride, lambda _: [], True)
        for name in mask_rcnn.NAMES
    },
}


def architecture(name: str) -> Architecture:
    """The architecture of this name. Raises ValueError, which names the nearest ones."""
    found = ARCHITECTURES.get(name)
    if found is None:
        near = difflib.get_close_matches(name, ARCHITECTURES, 3, 0.5)
        hint = f"did you mean {', '.join(near)}? " if near else ""
        raise ValueError(f"unknown architecture {name!r}: {hint}known are {', '.join(sorted(ARCHITECTURES))}")
    return found


def build(card: Card, *, blank: bool = False, most_bytes: int | None = None) -> torch.nn.Module:
    """The card's network with random weights (from torch's global generator), float32, on the CPU, in eval
    mode. `blank`: with whatever was in memory, faster by seconds; every weight is then to be overwritten.
    `most_bytes`: of weights and tables; a card that asks for more is refused before the memory is taken.

    It maps float [N, card.input_channels, H, W], with H and W multiples of `card.canvas_multiple` or as the size policy
    fixes them, to logits [N, card.network_channels, H, W] (torchvision's: in a dict, as `out`; those of Mask R-CNN are
    only for `models.detection`). Raises ValueError, with a sentence, for an unknown architecture or encoder, arguments
    that are not valid, and a card whose classes, bands, sizes or post-processing the network cannot serve.
    """
    found = architecture(card.architecture)
    args = _valid_args(found, card)
    if found.detects != (card.postprocessing.kind == "detections"):
        raise ValueError(
            f"{card.architecture} {'finds' if found.detects else 'finds no'} instances by itself: "
            f"its postprocessing cannot be {card.postprocessing.kind!r}"
        )
    if args.output_channels != card.network_channels:
        raise ValueError(
            f"{card.architecture} puts out {args.output_channels} channels, the card needs {card.network_channels}"
        )
    with _NoRandomNumbers() if blank else nullcontext(), _Budget(card, most_bytes) if most_bytes else nullcontext():
        network = found.make(args, input_channels=card.input_channels).eval()
    check_sizes(card, network)
    return network


def check_sizes(card: Card, network: torch.nn.Module) -> None:
    """Raises ValueError where the card's sizes are none that its network can serve."""
    found = architecture(card.architecture)
    stride = found.stride(network)
    _check_sizes(card, stride)
    if found.detects and isinstance(card.size_policy, TilePolicy):
        least_px = int(network.transform.size_divisible)  # type: ignore[union-attr,arg-type]
        if card.size_policy.tile_px < least_px:
            raise ValueError(f"tile_px {card.size_policy.tile_px} is smaller than the network's stride {least_px}")
    pools = True if found.detects else _pools_whole_image(card, network, stride)
    if pools and card.pools_whole_image is False:
        raise ValueError(f"{card.architecture} pools over the whole image, the card says that it does not")
    if (pools or card.pools_whole_image) and card.canvas_multiple != stride:
        raise ValueError(
            f"{card.architecture} pools over the whole image, so padding changes its answer: canvas_multiple must be "
            f"its stride, {stride}, not {card.canvas_multiple}"
        )


def with_exact_tiles(card: Card, network: torch.nn.Module) -> Card:
    """The card, with `pools_whole_image` said where it is to tile with a network that pools: then images smaller than a
    tile are not padded to one. A network that takes nothing but its tile keeps its card, and gets them padded.
    """
    policy, found = card.size_policy, architecture(card.architecture)
    if not isinstance(policy, TilePolicy) or found.detects or card.pools_whole_image is not None:
        return card
    stride = found.stride(network)
    smaller = policy.model_copy(update={"tile_px": max(stride, policy.tile_px - stride)})
    try:
        pools = _pools_whole_image(card, network, stride)
        _pools_whole_image(card.model_copy(update={"size_policy": smaller}), network, stride)
    except ValueError:
        return card
    return card.model_copy(update={"pools_whole_image": True}) if pools else card


def least_canvas(card: Card) -> tuple[int, int]:
    """(height, width) of a small input that the card's network takes, or of the only one."""
    policy = card.size_policy
    if isinstance(policy, TilePolicy):
        return policy.tile_px, policy.tile_px
    if isinstance(policy, LetterboxPolicy):
        return policy.height_px, policy.width_px
    step = card.canvas_multiple
    return -(-64 // step) * step, (-(-64 // step) + 1) * step


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
    depth = len(decoder_channels)
    args = {"encoder": encoder, "encoder_depth": depth, "decoder_channels": list(decoder_channels)}
    return card_for(name, "unet", args, task=task, class_names=class_names, canvas_multiple=max(32, 2**depth))


def card_for(
    name: str,
    architecture_name: str,
    args: Mapping[str, Any] | None = None,
    *,
    task: Literal["semantic", "instance"] = "semantic",
    class_names: tuple[str, ...] = ("background", "object"),
    **fields: Any,
) -> Card:
    """A card for any architecture: `args` are its own, less `output_channels`; `fields` are the card's.

    Class ids are 0, 1, ... in the order of `class_names`; id 0 is the background when it is called so. Unless given,
    the canvas is a multiple of the stride (which means building the network once), and the post-processing what the
    task and the architecture ask for. Raises ValueError.
    """
    found = architecture(architecture_name)
    classes = tuple(
        ClassInfo(id=index, name=class_name, color=distinct_color(index))
        for index, class_name in enumerate(class_names)
    )
    chosen: Postprocessing = ArgmaxPostprocessing()
    if found.detects:
        task, chosen = "instance", DetectionsPostprocessing()
    elif task == "instance":
        chosen = WatershedPostprocessing()
    draft = {
        "name": name,
        "task": task,
        "architecture": architecture_name,
        "classes": classes,
        "background_id": 0 if class_names[0] == "background" else None,
        "postprocessing": chosen,
    } | fields
    channels = 3 if isinstance(draft["postprocessing"], WatershedPostprocessing) else len(draft["classes"])
    draft["architecture_args"] = {**(args or {}), "output_channels": channels}
    card = Card.model_validate(draft)
    if "canvas_multiple" not in fields:
        with torch.random.fork_rng(devices=[]):
            made = found.make(_valid_args(found, card), input_channels=card.input_channels)
        card = card.model_copy(update={"canvas_multiple": found.stride(made)})
    return card


def _valid_args(found: Architecture, card: Card) -> Any:
    try:
        return found.args.model_validate(card.architecture_args)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        place = f"at {where!r}: " if where else ""
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden" and len(first["loc"]) == 1:
            known = [name for name in found.args.model_fields if name != "output_channels"]
            near = difflib.get_close_matches(where, known, 1, 0.5)
            meant = f"did you mean {near[0]!r}? " if near else ""
            message = f"{meant}{card.architecture} takes {', '.join(known)}"
        raise ValueError(f"architecture_args are not valid {place}{message}") from error


def _check_sizes(card: Card, stride: int) -> None:
    if card.canvas_multiple % stride:
        raise ValueError(f"canvas_multiple {card.canvas_multiple} is not a multiple of the network's stride {stride}")
    policy = card.size_policy
    fixed: dict[str, int] = {}
    if isinstance(policy, TilePolicy):
        fixed = {"tile_px": policy.tile_px}
    elif isinstance(policy, LetterboxPolicy):
        fixed = {"height_px": policy.height_px, "width_px": policy.width_px}
    for name, size_px in fixed.items():
        if size_px < stride:
            raise ValueError(f"{name} {size_px} is smaller than the network's stride {stride}")
        if size_px % stride:
            raise ValueError(f"{name} {size_px} is not a multiple of the network's stride {stride}")


class _NoRandomNumbers(TorchDispatchMode):
    """Leaves out what fills weights at random. Of this thread alone."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func) in ("aten.uniform_.default", "aten.normal_.default", "aten.erfinv_.default"):
            return args[0]
        return func(*args, **(kwargs or {}))


class _Budget(TorchDispatchMode):
    """Refuses tensors once those that were made need more than `most_bytes`. Of this thread alone."""

    def __init__(self, card: Card, most_bytes: int) -> None:
        super().__init__()
        self._card = card
        self._most_bytes = most_bytes
        self._bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func) in _MAKING:
            self._bytes += math.prod(args[0]) * 4
            if self._bytes > self._most_bytes:
                raise ValueError(
                    f"the {self._card.architecture} of its card needs more than {self._most_bytes:,} bytes, which is "
                    "far more than the weights that are there"
                )
        return func(*args, **(kwargs or {}))


_MAKING = frozenset(f"aten.{name}" for name in ("empty.memory_format", "zeros.default", "ones.default", "full.default"))


class _PoolingWatch(TorchDispatchMode):
    """Notes whether an operation makes one number from all of an image: global means, attention, GroupNorm."""

    pooled = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith(("aten.mean", "aten.sum", "aten.amax")) and len(args) > 1 and isinstance(args[1], list):
            axes, rank = args[1], args[0].dim()
            # Two axes at once are height and width; the middle one of three is that of the patches.
            self.pooled |= len(axes) >= 2 or (rank == 3 and axes[0] % rank == 1)
        self.pooled |= any(word in name for word in ("adaptive", "group_norm", "softmax", "scaled_dot_product"))
        # InstanceNorm is a BatchNorm that uses the statistics of its input.
        self.pooled |= name.startswith("aten.native_batch_norm") and args[5] is True
        return func(*args, **(kwargs or {}))


def _pools_whole_image(card: Card, network: torch.nn.Module, stride: int) -> bool:
    """Runs the network without arithmetic, on the meta device. Raises ValueError where it does not take the card's
    sizes, or does not put out what the card says.
    """
    height, width = least_canvas(card)
    shape = (1, card.input_channels, height, width)
    named = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    tensors = {name: torch.empty_like(tensor, device="meta") for name, tensor in named.items()}
    watch = _PoolingWatch()
    try:
        with torch.no_grad(), watch:
            logits = torch.func.functional_call(network, tensors, (torch.empty(shape, device="meta"),))
    except (RuntimeError, AssertionError, ValueError, IndexError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{card.architecture} does not take {height} x {width} pixels with {card.input_channels} bands, as the "
            f"card's size_policy {card.size_policy.kind!r} needs: {reason}"
        ) from error
    logits = logits["out"] if isinstance(logits, dict) else logits
    if logits.shape != (1, card.network_channels, height, width):
        raise ValueError(
            f"{card.architecture} puts out {tuple(logits.shape)} for an input of {shape}: "
            f"it must be (1, {card.network_channels}, {height}, {width})"
        )
    return watch.pooled
