from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_networks import CLASSES, DETECTORS, small_card
from torch import distributed, multiprocessing

from models.architectures import ARCHITECTURES, build, card_for, untrained_card
from models.detection_losses import DetectionTraining
from models.losses import IGNORED, cross_entropy, dice, focal, lovasz
from pipeline.learning.examples import Batch
from pipeline.learning.objective import Objective
from pipeline.learning.recipe import LossConfig, LossTerm


def batch(images: int = 2, *, channels: int = 3, emphasis: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, channels, (images, 32, 32), generator=generator)
    targets[0, :6] = IGNORED
    names = tuple(f"{index}.png" for index in range(images))
    inputs = torch.randn(images, 3, 32, 32, generator=generator)
    marked = torch.randint(0, 3, targets.shape, generator=generator, dtype=torch.uint8) if emphasis else None
    return Batch(names, inputs, targets, marked)


class Heads(torch.nn.Module):
    """Answers as torchvision's networks with an auxiliary classifier do."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.side = torch.nn.Conv2d(3, 3, 1), torch.nn.Conv2d(3, 3, 1)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"out": self.main(images), "aux": self.side(images)}


def test_parts_are_the_losses_that_were_asked_for_weighted() -> None:
    card = untrained_card("street", class_names=("a", "b", "c"))
    terms = (
        LossTerm(kind="cross_entropy", weight=0.5, label_smoothing=0.1), LossTerm(kind="dice", weight=2),
        LossTerm(kind="focal", weight=3, gamma=1.5), LossTerm(kind="lovasz", weight=4),
    )  # fmt: skip
    weights = (1.0, 2.0, 0.5)
    torch.manual_seed(0)
    network = build(card)
    seen = batch()
    with torch.no_grad():
        parts = Objective(card, LossConfig(terms=terms), weights).parts(network, seen)
        logits: Any = network(seen.inputs)
    by_class = torch.tensor(weights)
    targets: Any = seen.targets
    assert {name: part.item() for name, part in parts.items()} == pytest.approx(
        {
            "cross_entropy": 0.5 * cross_entropy(logits, targets, class_weights_C=by_class, label_smoothing=0.1).item(),
            "dice": 2 * dice(logits, targets).item(),
            "focal": 3 * focal(logits, targets, gamma=1.5, class_weights_C=by_class).item(),
            "lovasz": 4 * lovasz(logits, targets).item(),
        }
    )


def test_borders_weigh_what_the_settings_say() -> None:
    card = untrained_card("discs", task="instance", class_names=("background", "disc"))
    network, seen = build(card), batch(emphasis=True)
    loss = LossConfig(terms=(LossTerm(kind="cross_entropy"),), touching_weight=6, border_weight=2)
    assert seen.emphasis is not None
    targets: Any = seen.targets
    with torch.no_grad():
        expected = cross_entropy(network(seen.inputs), targets, torch.tensor([1.0, 3.0, 7.0])[seen.emphasis.long()])
        assert Objective(card, loss).parts(network, seen)["cross_entropy"].item() == pytest.approx(expected.item())


def test_an_auxiliary_head_learns_too() -> None:
    card = untrained_card("street", class_names=("a", "b", "c"))
    network = Heads()
    parts = Objective(card, LossConfig(auxiliary_weight=0.3)).parts(network, batch())
    assert list(parts) == ["cross_entropy", "dice", "aux_cross_entropy", "aux_dice"]
    sum(parts.values()).backward()  # type: ignore[union-attr]
    assert network.side.weight.grad is not None
    seen = batch()
    targets: Any = seen.targets
    assert parts["aux_dice"].item() == pytest.approx(0.3 * dice(network(seen.inputs)["aux"], targets).item())
    assert list(Objective(card, LossConfig(auxiliary_weight=0)).parts(network, batch())) == ["cross_entropy", "dice"]


def test_a_network_that_detects_has_its_own_losses() -> None:
    args = {"min_size_px": 32, "max_size_px": 64, "norm": "group", "anchor_sizes_px": [16]}
    card = card_for("boxes", "maskrcnn_mobilenet_v3_large_fpn", args, canvas_multiple=1)
    objective = Objective(card, LossConfig(regions_per_image=8, anchors_per_image=8, positive_share=0.5))
    network: Any = build(card).train()
    trainee = objective.trainee(network)
    assert isinstance(trainee, DetectionTraining)
    assert objective.trainee(trainee) is trainee
    assert {id(one) for one in trainee.parameters()} == {id(one) for one in network.parameters()}
    masks = torch.zeros(1, 32, 32, dtype=torch.uint8)
    masks[0, 8:24, 8:24] = 1
    target = {
        "boxes": torch.tensor([[8.0, 8, 24, 24]]), "labels": torch.tensor([1]),
        "masks": masks, "ignored": torch.zeros(32, 32, dtype=torch.bool),
    }  # fmt: skip
    seen = Batch(("a",), [torch.randn(3, 32, 32)], [target])
    for module in (trainee, network):
        parts = objective.parts(module, seen)
        assert set(parts) == {"objectness", "proposal_boxes", "classes", "boxes", "masks"}
    assert network.roi_heads.fg_bg_sampler.batch_size_per_image == 8


#: One of each family; the others take seconds.
QUICK = frozenset({"unet", "pspnet", "segformer", "lraspp_mobilenet_v3_large", "maskrcnn_mobilenet_v3_large_fpn"})


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in ARCHITECTURES]
)
def test_every_weight_of_every_architecture_can_learn(name: str) -> None:
    card = small_card(name)
    torch.manual_seed(0)
    network: Any = build(card).train()
    generator = torch.Generator().manual_seed(0)
    inputs: Any = torch.randn(2, 3, 64, 64, generator=generator)
    targets: Any = torch.randint(0, len(CLASSES), (2, 64, 64), generator=generator)
    if name in DETECTORS:
        inputs, targets = list(inputs), [square(16, 48, label=label) for label in (1, 2)]
    objective = Objective(card, LossConfig())
    parts = objective.parts(objective.trainee(network), Batch(("a", "b"), inputs, targets))
    torch.stack(list(parts.values())).sum().backward()
    # The library keeps the classifier of DPT's transformer, and never calls it.
    weights = {
        key: weight
        for key, weight in network.named_parameters()
        if not key.startswith(("encoder.model.norm.", "encoder.model.head."))
    }
    assert [key for key, weight in weights.items() if weight.grad is None or not weight.grad.any()] == []
    assert all(weight.grad.isfinite().all() for weight in weights.values())


def square(low: int, high: int, *, label: int) -> dict[str, torch.Tensor]:
    """What a detector learns from: one object in 64 × 64 pixels."""
    masks = torch.zeros(1, 64, 64, dtype=torch.uint8)
    masks[0, low:high, low:high] = 1
    return {
        "boxes": torch.tensor([[low, low, high, high]], dtype=torch.float32), "labels": torch.tensor([label]),
        "masks": masks, "ignored": torch.zeros(64, 64, dtype=torch.bool),
    }  # fmt: skip


def test_class_weights_are_one_for_each_channel() -> None:
    card = untrained_card("street", class_names=("a", "b", "c"))
    with pytest.raises(ValueError, match="2 class weights for 3 channels"):
        Objective(card, LossConfig(), (1.0, 2.0))


def test_two_workers_learn_what_one_would(tmp_path: Path) -> None:
    """Gradients of a step shared unevenly by two processes, averaged as DistributedDataParallel does."""
    whole = _gradients(batch(3))
    other = multiprocessing.get_context("spawn").Process(target=_work, args=(1, str(tmp_path)))
    other.start()
    _work(0, str(tmp_path))
    other.join(120)
    assert other.exitcode == 0
    shared = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert shared[0]["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert shared[1]["loss"] == shared[0]["loss"]
    mean = (shared[0]["gradient"] + shared[1]["gradient"]) / 2
    assert torch.allclose(mean, whole["gradient"], atol=1e-6, rtol=1e-4)


def _gradients(seen: Batch) -> dict[str, Any]:
    card = untrained_card("street", class_names=("a", "b", "c"))
    torch.manual_seed(0)
    network = torch.nn.Conv2d(3, 3, 3, padding=1)
    kinds = ("cross_entropy", "dice", "focal", "lovasz")
    loss = LossConfig(terms=tuple(LossTerm(kind=kind) for kind in kinds))  # type: ignore[arg-type]
    value = torch.stack(list(Objective(card, loss, (1.0, 2.0, 0.5)).parts(network, seen).values())).sum()
    value.backward()
    return {"loss": value.item(), "gradient": network.weight.grad}


def _work(rank: int, folder: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        seen = batch(3)
        mine = slice(0, 1) if rank == 0 else slice(1, 3)
        share = Batch(seen.names[mine], seen.inputs[mine], seen.targets[mine])
        torch.save(_gradients(share), f"{folder}/{rank}.pt")
    finally:
        distributed.destroy_process_group()
