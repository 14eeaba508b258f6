from __future__ import annotations

import math

import pytest
import torch

from models.losses import cross_entropy_dice


def perfect(targets: torch.Tensor, channels: int = 3) -> torch.Tensor:
    return 50 * torch.nn.functional.one_hot(targets.clamp_max(channels - 1), channels).movedim(-1, 1).float()


def test_is_zero_for_a_perfect_answer() -> None:
    targets = torch.randint(0, 3, (2, 8, 8), generator=torch.Generator().manual_seed(0))
    assert cross_entropy_dice(perfect(targets), targets, torch.ones(2, 8, 8)).item() == pytest.approx(0, abs=1e-4)


def test_value_of_a_uniform_answer() -> None:
    targets = torch.zeros(1, 10, 10, dtype=torch.int64)
    loss = cross_entropy_dice(torch.zeros(1, 2, 10, 10), targets, torch.ones(1, 10, 10))
    assert loss.item() == pytest.approx(math.log(2) + 1 - 101 / 151)


def test_weights_move_the_loss() -> None:
    targets = torch.tensor([[[0, 1]]])
    logits = torch.tensor([[[[5.0, 5.0]], [[0.0, 0.0]]]])
    right, wrong = torch.tensor([[[9.0, 1.0]]]), torch.tensor([[[1.0, 9.0]]])
    assert cross_entropy_dice(logits, targets, right) < cross_entropy_dice(logits, targets, wrong)


def test_ignored_pixels_do_not_count() -> None:
    targets = torch.tensor([[[0, 1, 255]]])
    logits = torch.randn(1, 3, 1, 3, generator=torch.Generator().manual_seed(0))
    other = logits.clone()
    other[..., 2] = 100.0
    weights = torch.ones(1, 1, 3)
    assert torch.equal(cross_entropy_dice(logits, targets, weights), cross_entropy_dice(other, targets, weights))
    nothing = cross_entropy_dice(logits, torch.full((1, 1, 3), 255), weights)
    assert nothing.item() == 0


def test_has_a_gradient_in_low_precision() -> None:
    logits = torch.zeros(1, 3, 4, 4, dtype=torch.bfloat16, requires_grad=True)
    loss = cross_entropy_dice(logits, torch.ones(1, 4, 4, dtype=torch.int64), torch.ones(1, 4, 4))
    loss.backward()
    assert loss.dtype == torch.float32
    assert logits.grad is not None
    assert logits.grad.abs().sum() > 0
