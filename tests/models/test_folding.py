from __future__ import annotations

from typing import Any

import pytest
import torch
from small_networks import DETECTORS, SEMANTIC, distinct_network, small_card
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d

from models.architectures import build, least_canvas
from models.folding import fold_batch_norms

SHAPE = (1, 3, 16, 16)
#: Plain, timm's and transposed layers, norms of sums.
QUICK = ("unet", "unetplusplus", "deeplabv3plus", "linknet", "lraspp_mobilenet_v3_large")


def norm(channels: int) -> nn.BatchNorm2d:
    made = nn.BatchNorm2d(channels).eval()
    with torch.no_grad():
        for tensor in (made.weight, made.bias, made.running_mean):
            tensor.normal_()
        made.running_var.uniform_(0.5, 2)
    return made


def answers(network: nn.Module) -> Any:
    with torch.no_grad():
        return network(torch.randn(2, *SHAPE[1:], generator=torch.Generator().manual_seed(0)))


class Net(nn.Module):
    """Two convolutions and norms, used in the way that a test gives."""

    def __init__(self, use: Any, second_norm: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3, bias=False)
        self.norm, self.second_norm = norm(4), second_norm or norm(4)
        self.use = use

    def forward(self, x: torch.Tensor) -> Any:
        return self.use(self, x)


def sole(net: Net, x: torch.Tensor) -> Any:
    return net.norm(net.first(x)) + net.second_norm(net.second(x))


def read_twice(net: Net, x: torch.Tensor) -> Any:
    between = net.first(x)
    return net.norm(between) * between


def given_out(net: Net, x: torch.Tensor) -> Any:
    between = net.first(x)
    return net.norm(between), {"between": between}


def read_through_a_view(net: Net, x: torch.Tensor) -> Any:
    between = net.first(x)
    return net.norm(between) + between[:, :1]


def shared_norm(net: Net, x: torch.Tensor) -> Any:
    return net.norm(net.first(x)) + net.norm(net.second(x))


def norm_of_something_else(net: Net, x: torch.Tensor) -> Any:
    return net.norm(net.first(x)) + net.norm(net.second(x) * 2)


def convolution_before_two(net: Net, x: torch.Tensor) -> Any:
    return net.norm(net.first(x)) + net.second_norm(net.first(x * 2))


@pytest.mark.parametrize("use", [read_twice, given_out, read_through_a_view, shared_norm, norm_of_something_else,
                                 convolution_before_two])  # fmt: skip
def test_what_someone_else_reads_stays(use: Any) -> None:
    torch.manual_seed(0)
    network = Net(use).eval()
    before = answers(network)
    assert fold_batch_norms(network, SHAPE) == 0
    torch.testing.assert_close(answers(network), before, rtol=0, atol=0)


class Preactivated(nn.Module):
    """Norms before their convolutions, of tensors that nobody keeps: Python gives their place to what comes next."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(norm(3) for _ in range(12))
        self.convolutions = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for one, convolution in zip(self.norms, self.convolutions, strict=True):
            x = torch.relu(convolution(one(x * 2)).abs())
        return x


@pytest.mark.parametrize("seed", range(4))
def test_norms_of_what_is_gone_stay(seed: int) -> None:
    torch.manual_seed(seed)
    network = Preactivated().eval()
    before = answers(network)
    assert fold_batch_norms(network, SHAPE) == 0
    torch.testing.assert_close(answers(network), before, rtol=0, atol=0)


def test_pairs_are_folded_whatever_they_are_called() -> None:
    torch.manual_seed(0)
    frozen = FrozenBatchNorm2d(4)
    frozen.running_mean.normal_()
    frozen.running_var.uniform_(0.5, 2)
    network = Net(sole, frozen).eval()
    before = answers(network)
    assert fold_batch_norms(network, SHAPE) == 2
    assert type(network.norm) is type(network.second_norm) is nn.Identity
    torch.testing.assert_close(answers(network), before, rtol=1e-5, atol=1e-5)


def test_a_norm_with_two_parents_goes_from_both() -> None:
    network = Net(sole).eval()
    network.alias = nn.ModuleList([network.norm])
    before = answers(network)
    assert fold_batch_norms(network, SHAPE) == 2
    assert type(network.alias[0]) is nn.Identity
    torch.testing.assert_close(answers(network), before, rtol=1e-5, atol=1e-5)


def test_the_activation_in_a_layer_of_timm_stays() -> None:
    from timm.layers import BatchNormAct2d

    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct2d(4)).eval()
    network[1].running_mean.normal_()
    before = answers(network)
    assert (before == 0).any()
    assert fold_batch_norms(network, SHAPE) == 1
    torch.testing.assert_close(answers(network), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in SEMANTIC]
)
def test_networks_answer_as_before(name: str) -> None:
    card = small_card(name)
    network = distinct_network(card)
    shape = (1, card.input_channels, *least_canvas(card))
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = network(images)
        norms = sum(isinstance(part, nn.BatchNorm2d) for part in network.modules())
        folded = fold_batch_norms(network, shape)
        left = sum(isinstance(part, nn.BatchNorm2d) for part in network.modules())
        assert left == norms - folded
        # U-Net++ norms some sums, DPT has none.
        assert folded >= 0.9 * norms
        after = network(images)
    before, after = (answer["out"] if isinstance(answer, dict) else answer for answer in (before, after))
    assert (after - before).abs().max() <= 2e-3 * before.std()


@pytest.mark.parametrize("name", DETECTORS)
def test_backbones_of_detectors_lose_all_their_norms(name: str) -> None:
    backbone = build(small_card(name)).backbone
    assert fold_batch_norms(backbone, (1, 3, 64, 64)) > 20
    assert not any(isinstance(part, (nn.BatchNorm2d, FrozenBatchNorm2d)) for part in backbone.modules())
