from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d

from models.precision import lower_precision


class Sum(nn.Module):
    """Notes the type in which each part was called."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.register_buffer("offset", torch.ones(1))
        self.types: list[torch.dtype] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        for part in self.parts:
            images = part(images)
            self.types.append(images.dtype)
        return images + self.offset


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True), FrozenBatchNorm2d(4)]
)
def test_normalisation_stays_float32_inside(norm: nn.Module) -> None:
    network = Sum(nn.Conv2d(3, 4, 1), norm, nn.Conv2d(4, 2, 1)).eval()
    images = torch.randn(2, 3, 5, 5)
    with torch.inference_mode():
        expected = network(images)
        names = list(network.state_dict())
        lower_precision(network, torch.bfloat16)
        network.types.clear()
        result = network(images.bfloat16())
    assert network.types == [torch.bfloat16] * 3
    assert result.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in norm.state_dict().values() if tensor.is_floating_point()} <= {torch.float32}
    assert network.parts[0].weight.dtype == torch.bfloat16
    assert list(network.state_dict()) == names
    assert torch.allclose(result.float(), expected, atol=0.05)


def test_layer_norm_and_logits() -> None:
    norm, last = nn.LayerNorm(6), nn.Linear(6, 2)
    network = lower_precision(Sum(nn.Linear(4, 6), norm, last).eval(), torch.bfloat16, logits_layers=[last])
    with torch.inference_mode():
        network(torch.randn(3, 4).bfloat16())
    assert network.types == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert norm.weight.dtype == torch.float32


def test_float32_changes_nothing() -> None:
    network = Sum(nn.Conv2d(3, 4, 1))
    weight = network.parts[0].weight
    assert lower_precision(network, torch.float32).parts[0].weight is weight
