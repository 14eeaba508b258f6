"""Optimiser, averaged weights and what is frozen, with the state that a checkpoint needs of them. Owns: the groups of
parameters, and names for the optimiser's tensors. Must not know: losses, data, files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from pipeline.learning.configuration import TrainConfig

#: In the order of their start, the average follows the weights more closely: decay is at most step / (step + this).
_EMA_START_STEPS = 10


def backbone_of(module: torch.nn.Module) -> torch.nn.Module | None:
    """The part of a network that published weights are made for: smp's encoder, torchvision's backbone."""
    for name in ("encoder", "backbone"):
        part = getattr(module, name, None)
        if isinstance(part, torch.nn.Module):
            return part
    return None


def make_optimizer(module: torch.nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW or SGD. Weight decay is for weights of more than one dimension; each group keeps its share of the learning
    rate in `rate`.
    """
    backbone = backbone_of(module)
    inside = {id(parameter) for parameter in backbone.parameters()} if backbone is not None else set()
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for parameter in module.parameters():
        rate = config.backbone_rate if id(parameter) in inside else 1.0
        decay = config.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    params = [
        {"params": members, "lr": config.learning_rate * rate, "rate": rate, "weight_decay": decay}
        for (rate, decay), members in groups.items()
    ]
    # One pass over the weights, where the other forms make ten; on GPUs torch chooses for itself.
    fused = True if next(module.parameters()).device.type == "cpu" else None
    if config.optimizer == "sgd":
        momentum = config.momentum
        return torch.optim.SGD(
            params, lr=config.learning_rate, momentum=momentum, nesterov=momentum > 0, fused=fused
        )  # fmt: skip
    return torch.optim.AdamW(params, lr=config.learning_rate, fused=fused)


def set_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["rate"]


def optimizer_tensors(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimiser's state by `<parameter>/<key>`. Numbers become tensors of one element."""
    tensors = {}
    for name, parameter in module.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                tensors[f"{name}/{key}"] = value if isinstance(value, torch.Tensor) else torch.tensor(float(value))
    return tensors


def load_optimizer_tensors(
    module: torch.nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Undoes `optimizer_tensors`: the state then goes on as if it had never left, bit for bit."""
    named = dict(module.named_parameters())
    optimizer.state.clear()
    for full, tensor in tensors.items():
        name, _, key = full.rpartition("/")
        parameter = named[name]
        # In the memory order of the parameter: another would be another kernel, with other last bits.
        value = torch.empty_like(parameter).copy_(tensor) if tensor.shape == parameter.shape else tensor.clone()
        optimizer.state[parameter][key] = value


class Average:
    """The exponential moving average of a network's weights and statistics."""

    def __init__(self, module: torch.nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
        # What the state's tensors are stays for as long as the module does.
        pairs = [(self.tensors[name], tensor) for name, tensor in module.state_dict().items()]
        floats = [(kept, now) for kept, now in pairs if kept.is_floating_point()]
        self._kept, self._now = [kept for kept, _ in floats], [now for _, now in floats]
        self._others = [(kept, now) for kept, now in pairs if not kept.is_floating_point()]

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Takes in the weights after `step` (from 1) steps."""
        decay = min(self.decay, step / (step + _EMA_START_STEPS))
        get_ema_multi_avg_fn(decay)(self._kept, self._now, None)
        for kept, now in self._others:
            kept.copy_(now)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, kept in self.tensors.items():
            kept.copy_(tensors[name])


class Frozen(NamedTuple):
    """What does not learn now."""

    backbone: bool
    norm: bool

    @classmethod
    def at(cls, epoch: int, config: TrainConfig) -> Frozen:
        """`epoch` from 0."""
        backbone = epoch < config.freeze if isinstance(config.freeze, int) else config.freeze == "backbone"
        return cls(backbone, config.freeze_norm)

    def apply(self, module: torch.nn.Module) -> None:
        """Puts the module into training mode, but for what is frozen."""
        module.train()
        backbone = backbone_of(module)
        if backbone is not None:
            backbone.requires_grad_(not self.backbone)
            if self.backbone:
                backbone.eval()
        if self.norm:
            for part in _batch_norms(module):
                part.eval()


def _batch_norms(module: torch.nn.Module) -> Iterable[Any]:
    return (part for part in module.modules() if isinstance(part, torch.nn.modules.batchnorm._BatchNorm))
