"""Normalisation that is part of the convolution before it. Owns: finding such pairs in any network, and the arithmetic.
Must not know: cards, precision, devices.

In evaluation BatchNorm is one factor and one summand for each channel, which the convolution can apply itself: one pass
over the feature maps less for each pair. Pairs are found by watching a forward pass, not by the modules' order, which
says nothing of what else reads the convolution's output.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.ops.misc import FrozenBatchNorm2d


class _Watch(TorchDispatchMode):
    """Counts which operations read the outputs of convolutions."""

    def __init__(self) -> None:
        super().__init__()
        #: By identity, which stays theirs because the tensor is kept.
        self.outputs: dict[int, tuple[torch.nn.Module, torch.Tensor]] = {}
        self.reads: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in [*args, *(kwargs or {}).values()]:
            for one in value if isinstance(value, (list, tuple)) else (value,):
                if id(one) in self.outputs:
                    self.reads[id(one)] = self.reads.get(id(one), 0) + 1
        return func(*args, **(kwargs or {}))


def fold_batch_norms(network: torch.nn.Module, input_shape: tuple[int, int, int, int]) -> int:
    """Folds each BatchNorm (frozen ones too) that alone reads the output of one convolution into that, in place.

    Returns how many. `network` is in evaluation mode and float32, and takes [N, C, H, W] of `input_shape`; it runs
    once, without arithmetic. Answers agree but for rounding. Names of folded layers vanish from the state.
    """
    pairs = _pairs(network, input_shape)
    for convolution, norm in pairs.items():
        _fold(convolution, norm)
    rests = {norm: _rest(norm) for norm in pairs.values()}
    for parent in network.modules():
        for name, child in parent.named_children():
            if child in rests:
                setattr(parent, name, rests[child])
    return len(pairs)


def _pairs(network: torch.nn.Module, input_shape: tuple[int, int, int, int]) -> Mapping[Any, Any]:
    watch = _Watch()
    partners: dict[torch.nn.Module, set[torch.nn.Module | None]] = {}
    # Kept as tensors: of one that is gone the next may have the identity.
    calls: list[tuple[torch.nn.Module, torch.Tensor]] = []

    def note_output(part: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        watch.outputs[id(output)] = (part, output)

    def note_input(part: torch.nn.Module, inputs: Any) -> None:
        calls.append((part, inputs[0]))

    hooks = []
    for part in network.modules():
        if type(part) is torch.nn.Conv2d or (type(part) is torch.nn.ConvTranspose2d and part.groups == 1):
            hooks.append(part.register_forward_hook(note_output))
        elif _is_foldable(part):
            hooks.append(part.register_forward_pre_hook(note_input))
    # Each module once, whatever its names, and each of its tensors, whoever shares them.
    tensors = {
        f"{name}.{own}" if name else own: torch.empty_like(tensor, device="meta")
        for name, part in network.named_modules()
        for own, tensor in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
    }
    try:
        with torch.no_grad(), watch:
            answer = torch.func.functional_call(
                network, tensors, (torch.empty(input_shape, device="meta"),), tie_weights=False
            )
    finally:
        for hook in hooks:
            hook.remove()
    # What the network gives to its caller is read there.
    for leaf in tree_leaves(answer):
        watch.reads[id(leaf)] = watch.reads.get(id(leaf), 0) + 1
    read_by = dict.fromkeys(watch.outputs)
    for norm, given in calls:
        if watch.reads.get(id(given)) == 1:
            read_by[id(given)] = norm
    for source, (convolution, _) in watch.outputs.items():
        partners.setdefault(convolution, set()).add(read_by[source])
    for norm, given in calls:
        # A norm that also serves someone else stays.
        if id(given) not in watch.outputs:
            partners = {one: {None} if norm in norms else norms for one, norms in partners.items()}
    single = {one: next(iter(norms)) for one, norms in partners.items() if len(norms) == 1 and None not in norms}
    owners = list(single.values())
    return {one: norm for one, norm in single.items() if owners.count(norm) == 1}


def _is_foldable(part: torch.nn.Module) -> bool:
    if isinstance(part, FrozenBatchNorm2d):
        return True
    # timm's layer is a BatchNorm2d with an activation.
    plain = type(part) is torch.nn.BatchNorm2d or type(part).__name__ == "BatchNormAct2d"
    return plain and getattr(part, "running_mean", None) is not None


def _rest(norm: Any) -> torch.nn.Module:
    """What the layer does beside normalising."""
    if type(norm).__name__ == "BatchNormAct2d":
        return torch.nn.Sequential(norm.drop, norm.act)
    return torch.nn.Identity()


def _fold(convolution: torch.nn.Conv2d | torch.nn.ConvTranspose2d, norm: Any) -> None:
    """As torch.nn.utils.fusion.fuse_conv_bn_weights, in double precision."""
    by_channel = (1, -1, 1, 1) if isinstance(convolution, torch.nn.ConvTranspose2d) else (-1, 1, 1, 1)
    with torch.no_grad():
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight.double()
        shift = -norm.running_mean.double() * scale
        if convolution.bias is not None:
            shift += convolution.bias.double() * scale
        if norm.bias is not None:
            shift += norm.bias.double()
        weight = convolution.weight.double() * scale.view(by_channel)
        convolution.weight = torch.nn.Parameter(weight.float(), requires_grad=False)
        convolution.bias = torch.nn.Parameter(shift.float(), requires_grad=False)
