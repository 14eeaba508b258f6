from __future__ import annotations

import copy

import pytest
import torch

from pipeline.learning.configuration import TrainConfig
from pipeline.learning.optimization import load_optimizer_tensors, make_optimizer, optimizer_tensors


def network() -> torch.nn.Module:
    """Weights whose memory is in another order than their shape says."""
    torch.manual_seed(0)
    layers = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, bias=False), torch.nn.BatchNorm2d(8), torch.nn.Conv2d(8, 4, 3)
    )
    return layers.to(memory_format=torch.channels_last)


def config(**changes: object) -> TrainConfig:
    settings = {"dataset": "d", "name": "n", "out": "f", "steps": 1, "learning_rate": 0.05, "weight_decay": 0.1}
    return TrainConfig.model_validate(settings | changes)


def take_steps(module: torch.nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        images = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        module(images.to(memory_format=torch.channels_last)).square().mean().backward()
        optimizer.step()


def weights(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_the_quick_form_learns_what_the_plain_one_does(name: str) -> None:
    quick, plain = network(), network()
    optimizer = make_optimizer(quick, config(optimizer=name))
    by_dimension = [[one for one in plain.parameters() if (one.ndim > 1) == wide] for wide in (True, False)]
    groups = [{"params": by_dimension[0], "weight_decay": 0.1}, {"params": by_dimension[1], "weight_decay": 0.0}]
    reference: torch.optim.Optimizer
    if name == "adamw":
        reference = torch.optim.AdamW(groups, lr=0.05, foreach=False)
    else:
        reference = torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True, foreach=False)
    before = weights(quick)
    take_steps(quick, optimizer, 0, 5)
    take_steps(plain, reference, 0, 5)
    assert torch.allclose(weights(quick), weights(plain), rtol=1e-4, atol=1e-5)
    assert (weights(quick) - before).abs().mean() > 0.01


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_what_is_kept_of_an_optimizer_is_all_that_it_needs(name: str) -> None:
    steady = network()
    optimizer = make_optimizer(steady, config(optimizer=name))
    take_steps(steady, optimizer, 0, 3)
    again = copy.deepcopy(steady)
    tensors = {key: tensor.clone().contiguous() for key, tensor in optimizer_tensors(steady, optimizer).items()}
    later = make_optimizer(again, config(optimizer=name))
    load_optimizer_tensors(again, later, tensors)
    take_steps(steady, optimizer, 3, 6)
    take_steps(again, later, 3, 6)
    assert torch.equal(weights(again), weights(steady))
