from __future__ import annotations

from typing import Any

import pytest
import torch

from models.architectures import build, card_for
from models.detection_losses import DetectionTraining


@pytest.fixture(scope="module")
def network() -> Any:
    torch.manual_seed(0)
    args = {"min_size_px": 64, "max_size_px": 96, "norm": "group", "anchor_sizes_px": [16, 32]}
    return build(card_for("boxes", "maskrcnn_mobilenet_v3_large_fpn", args)).train()


def target(*boxes: tuple[int, int, int, int], size: tuple[int, int] = (64, 64)) -> dict[str, torch.Tensor]:
    masks = torch.zeros(len(boxes), *size, dtype=torch.uint8)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[y0:y1, x0:x1] = 1
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.ones(len(boxes), dtype=torch.int64),
        "masks": masks,
        "ignored": torch.zeros(size, dtype=torch.bool),
    }


def images(*sizes: tuple[int, int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, *size, generator=generator) for size in sizes]


def test_losses_are_torchvisions_own(network: Any) -> None:
    """With its normalisation out of the way, and nothing ignored."""
    pictures = images((64, 64), (64, 80))
    truth = [target((4, 4, 30, 28), (34, 30, 60, 60)), target((10, 8, 40, 50), size=(64, 80))]
    network.transform.image_mean, network.transform.image_std = [0.0] * 3, [1.0] * 3
    few = {"anchors_per_image": 64, "regions_per_image": 32, "positive_share": 0.25}
    training = DetectionTraining(network, **few)  # type: ignore[arg-type]
    torch.manual_seed(5)
    theirs = network(pictures, [{name: one[name] for name in ("boxes", "labels", "masks")} for one in truth])
    torch.manual_seed(5)
    ours = training(pictures, truth)
    names = {
        "objectness": "loss_objectness", "proposal_boxes": "loss_rpn_box_reg",
        "classes": "loss_classifier", "boxes": "loss_box_reg", "masks": "loss_mask",
    }  # fmt: skip
    assert {name: ours[name].item() for name in names} == pytest.approx(
        {name: theirs[other].item() for name, other in names.items()}, rel=1e-5
    )


def test_ignored_pixels_are_no_background(network: Any) -> None:
    """The only difference between a crowd that is ignored and one that nobody marked: its boxes teach nothing."""
    training = DetectionTraining(network, anchors_per_image=4096, regions_per_image=16)
    pictures, marked = images((64, 64)), target((4, 4, 20, 20))
    # All but the object and what touches it.
    marked["ignored"] = torch.ones(64, 64, dtype=torch.bool)
    marked["ignored"][:24, :24] = False

    def objectness_gradient(truth: dict[str, torch.Tensor]) -> torch.Tensor:
        training.zero_grad()
        seen: list[torch.Tensor] = []
        hook = network.rpn.head.cls_logits.register_full_backward_hook(lambda *args: seen.append(args[2][0]))
        training(pictures, [truth])["objectness"].backward()
        hook.remove()
        # Levels come back in any order; the finest is the largest.
        return max(seen, key=torch.Tensor.numel)[0].abs().sum(dim=0)

    unmarked = target((4, 4, 20, 20))
    assert objectness_gradient(unmarked)[-1, -1] > 0
    assert objectness_gradient(marked)[-1, -1] == 0
    assert objectness_gradient(marked)[0, 0] > 0


def test_an_image_without_objects_teaches_background(network: Any) -> None:
    training = DetectionTraining(network, regions_per_image=16)
    losses = training(images((64, 64)), [target()])
    assert all(loss.isfinite() for loss in losses.values())
    assert losses["objectness"] > 0
    assert losses["classes"] > 0
    assert losses["proposal_boxes"] == losses["boxes"] == 0
    sum(losses.values()).backward()  # type: ignore[union-attr]


def test_numbers_of_examples_are_those_asked_for(network: Any) -> None:
    training = DetectionTraining(network, anchors_per_image=8, regions_per_image=12, positive_share=0.5)
    counts: list[int] = []
    hook = network.roi_heads.box_head.register_forward_hook(lambda _, inputs, __: counts.append(len(inputs[0])))
    training(images((64, 64)), [target((4, 4, 20, 20))])
    hook.remove()
    assert counts == [12]


def test_every_part_learns_from_the_losses(network: Any) -> None:
    training = DetectionTraining(network, regions_per_image=16)
    training.zero_grad()
    sum(training(images((64, 64)), [target((4, 4, 40, 40))]).values()).backward()
    without = [name for name, one in network.named_parameters() if one.grad is None]
    assert not without
