"""Networks in less than float32. Owns: which parts of a network keep float32, whatever the precision asked for.
Must not know: cards, devices' names, images.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torchvision.ops.misc import FrozenBatchNorm2d

#: Computed in float32 and rounded once at the end: sums of squares do not survive 8 bits of mantissa. BatchNorm keeps
#: float32 parameters too, and its kernels take narrower input as it is.
_WIDENED = (torch.nn.LayerNorm, torch.nn.GroupNorm, torch.nn.modules.instancenorm._InstanceNorm, FrozenBatchNorm2d)
_KEPT = (torch.nn.modules.batchnorm._BatchNorm, *_WIDENED)


def lower_precision(
    module: torch.nn.Module, dtype: torch.dtype, *, logits_layers: Iterable[torch.nn.Module] = ()
) -> torch.nn.Module:
    """Changes `module` in place to compute in `dtype`: it then takes input of that type. Names and shapes stay.

    Weights, and buffers that are no statistics, become `dtype`; normalisation stays float32. What `logits_layers` put
    out is widened to float32 at once, so that bringing logits to the size of the image loses nothing more.
    float32 changes nothing.
    """
    if dtype == torch.float32:
        return module
    for part in module.modules():
        if isinstance(part, _KEPT):
            continue
        for name, parameter in part.named_parameters(recurse=False):
            part.register_parameter(name, torch.nn.Parameter(parameter.to(dtype), requires_grad=False))
        for name, buffer in part.named_buffers(recurse=False):
            if buffer.is_floating_point():
                persistent = name not in part._non_persistent_buffers_set
                part.register_buffer(name, buffer.to(dtype), persistent=persistent)
    for part in module.modules():
        if isinstance(part, _WIDENED):
            part.register_forward_pre_hook(_widen_input)
            part.register_forward_hook(lambda part, inputs, output: output.to(dtype))
    for layer in logits_layers:
        layer.register_forward_hook(_widen_output)
    return module


def compute_in(module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Changes `module` in place to compute in `dtype` between input and output of float32."""
    if dtype == torch.float32:
        return module
    lower_precision(module, dtype)
    module.register_forward_pre_hook(lambda part, inputs: (_narrowed(inputs[0], dtype), *inputs[1:]))
    module.register_forward_hook(_widen_output)
    return module


def _narrowed(maps: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In channels_last where it is of images, which convolutions would make of it by a copy of its own."""
    return maps.to(dtype, memory_format=torch.channels_last) if maps.dim() == 4 else maps.to(dtype)


def _widen_input(part: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (inputs[0].float(), *inputs[1:])


def _widen_output(part: torch.nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    return output.float()
