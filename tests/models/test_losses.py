from __future__ import annotations

import math

import numpy as np
import pytest
import segmentation_models_pytorch as library
import torch
from segmentation_models_pytorch.losses import lovasz as reference
from torchvision.ops import sigmoid_focal_loss

from models.losses import IGNORED, cross_entropy, dice, focal, lovasz


@pytest.fixture
def logits() -> torch.Tensor:
    return 2 * torch.randn(3, 4, 7, 5, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def targets() -> torch.Tensor:
    """Channels 0..2 of 4, and a fifth of the pixels ignored."""
    targets = torch.randint(0, 3, (3, 7, 5), generator=torch.Generator().manual_seed(1))
    return targets.where(torch.rand(3, 7, 5, generator=torch.Generator().manual_seed(2)) > 0.2, IGNORED)


def perfect(targets: torch.Tensor, channels: int = 3) -> torch.Tensor:
    return 50 * torch.nn.functional.one_hot(targets.clamp_max(channels - 1), channels).movedim(-1, 1).float()


@pytest.mark.parametrize("loss", [cross_entropy, focal, dice, lovasz])
def test_a_perfect_answer_loses_nothing(loss) -> None:  # type: ignore[no-untyped-def]
    targets = torch.randint(0, 3, (2, 8, 8), generator=torch.Generator().manual_seed(0))
    assert loss(perfect(targets), targets).item() == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("loss", [cross_entropy, focal, dice, lovasz])
def test_ignored_pixels_neither_count_nor_teach(loss, logits: torch.Tensor, targets: torch.Tensor) -> None:  # type: ignore[no-untyped-def]
    ignored = (targets == IGNORED)[:, None].expand_as(logits)
    other = logits.where(~ignored, torch.full_like(logits, 100.0).cumsum(dim=1)).requires_grad_()
    loss(other, targets).backward()
    assert loss(other, targets).item() == pytest.approx(loss(logits, targets).item())
    assert other.grad is not None
    assert not other.grad[ignored].any()
    assert other.grad[~ignored].abs().sum() > 0
    nothing = torch.full_like(targets, IGNORED)
    unknown = logits.clone().requires_grad_()
    value = loss(unknown, nothing)
    value.backward()
    assert value.item() == 0
    assert unknown.grad is not None
    assert not unknown.grad.any()


@pytest.mark.parametrize("loss", [cross_entropy, focal, dice, lovasz])
def test_has_a_gradient_in_low_precision(loss) -> None:  # type: ignore[no-untyped-def]
    logits = torch.zeros(1, 3, 4, 4, dtype=torch.bfloat16, requires_grad=True)
    value = loss(logits, torch.ones(1, 4, 4, dtype=torch.int64))
    value.backward()
    assert value.dtype == torch.float32
    assert logits.grad is not None
    assert logits.grad.abs().sum() > 0


@pytest.mark.parametrize("loss", [cross_entropy, focal, dice, lovasz])
def test_sums_of_workers_give_the_loss_and_gradient_of_the_whole(loss, logits, targets) -> None:  # type: ignore[no-untyped-def]
    """The first worker has image 0, the second the others; what `total` adds is what the other worker would send."""
    whole = logits.clone().requires_grad_()
    loss(whole, targets).backward()
    parts = [logits[:1].clone().requires_grad_(), logits[1:].clone().requires_grad_()]
    sent: list[torch.Tensor] = []

    def noted(sums: torch.Tensor) -> torch.Tensor:
        sent.append(sums)
        return sums

    for part, truth in zip(parts, (targets[:1], targets[1:]), strict=True):
        loss(part, truth, total=noted)
    shared = loss(parts[0], targets[:1], total=lambda _: sent[0] + sent[1])
    shared.backward()
    assert shared.item() == pytest.approx(loss(whole, targets).item(), rel=1e-5)
    assert whole.grad is not None
    for part, gradient in zip(parts, (whole.grad[:1], whole.grad[1:]), strict=True):
        assert torch.allclose(part.grad, gradient, atol=1e-6)


def test_cross_entropy_is_torchs(logits: torch.Tensor, targets: torch.Tensor) -> None:
    class_weights = torch.tensor([0.5, 2.0, 1.0, 3.0])
    expected = torch.nn.functional.cross_entropy(logits, targets, weight=class_weights, ignore_index=IGNORED)
    assert cross_entropy(logits, targets, class_weights_C=class_weights).item() == pytest.approx(expected.item())
    smooth = torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, label_smoothing=0.1)
    assert cross_entropy(logits, targets, label_smoothing=0.1).item() == pytest.approx(smooth.item())


def test_focal_is_torchvisions(logits: torch.Tensor) -> None:
    """Two channels with logits 0 and x are a sigmoid of x."""
    truth = torch.randint(0, 2, (3, 7, 5), generator=torch.Generator().manual_seed(3))
    pair = torch.stack([torch.zeros(3, 7, 5), logits[:, 0]], dim=1)
    expected = sigmoid_focal_loss(logits[:, 0], truth.float(), alpha=-1, gamma=1.5, reduction="mean")
    assert focal(pair, truth, gamma=1.5).item() == pytest.approx(expected.item(), rel=1e-5)


def test_focal_without_focus_is_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> None:
    class_weights = torch.tensor([0.5, 2.0, 1.0, 3.0])
    focused = focal(logits, targets, gamma=0.0, class_weights_C=class_weights)
    assert focused.item() == pytest.approx(cross_entropy(logits, targets, class_weights_C=class_weights).item())


def test_dice_is_the_librarys(logits: torch.Tensor, targets: torch.Tensor) -> None:
    """Its `smooth` counts twice, and its mean counts classes that do not occur as 0: here 3 of 4 do."""
    expected = library.losses.DiceLoss("multiclass", smooth=0.5, ignore_index=IGNORED)(logits, targets)
    assert dice(logits, targets).item() == pytest.approx(expected.item() * 4 / 3, rel=1e-5)


def test_lovasz_is_the_librarys(logits: torch.Tensor, targets: torch.Tensor) -> None:
    # Its public class takes probabilities or logits, depending on its version.
    expected = reference._lovasz_softmax(logits.softmax(dim=1), targets, per_image=True, ignore=IGNORED)
    assert lovasz(logits, targets).item() == pytest.approx(expected.item(), rel=1e-5)


def test_lovasz_of_a_hard_answer_is_what_iou_lacks() -> None:
    random = np.random.default_rng(0)
    actual, predicted = random.integers(0, 3, (2, 12, 12))
    ious = [
        ((actual == one) & (predicted == one)).sum() / ((actual == one) | (predicted == one)).sum() for one in range(3)
    ]
    hard = perfect(torch.from_numpy(predicted)[None])
    assert lovasz(hard, torch.from_numpy(actual)[None]).item() == pytest.approx(1 - np.mean(ious), abs=1e-5)


def test_values_of_a_uniform_answer() -> None:
    targets = torch.zeros(1, 10, 10, dtype=torch.int64)
    logits = torch.zeros(1, 2, 10, 10)
    assert cross_entropy(logits, targets, torch.ones(1, 10, 10)).item() == pytest.approx(math.log(2))
    assert dice(logits, targets).item() == pytest.approx(1 - 101 / 151)


def test_weights_move_the_loss() -> None:
    targets = torch.tensor([[[0, 1]]])
    logits = torch.tensor([[[[5.0, 5.0]], [[0.0, 0.0]]]])
    right, wrong = torch.tensor([[[9.0, 1.0]]]), torch.tensor([[[1.0, 9.0]]])
    for loss in (cross_entropy, focal):
        assert loss(logits, targets, right) < loss(logits, targets, wrong)
