from __future__ import annotations

from typing import Any

import pytest
import torch
from torchvision.ops.misc import FrozenBatchNorm2d

from models.architectures import build, card_for

MOBILE = "maskrcnn_mobilenet_v3_large_fpn"


def network(name: str = MOBILE, **args: object) -> Any:
    return build(card_for("boxes", name, args, canvas_multiple=1), blank=True)


@pytest.mark.parametrize(
    ("norm", "kind"),
    [("frozen", FrozenBatchNorm2d), ("batch", torch.nn.BatchNorm2d), ("group", torch.nn.GroupNorm)],
)
def test_the_backbone_has_the_norm_that_was_asked_for(norm: str, kind: type[torch.nn.Module]) -> None:
    kinds = (FrozenBatchNorm2d, torch.nn.BatchNorm2d, torch.nn.GroupNorm)
    found = {type(part) for part in network(norm=norm).modules() if isinstance(part, kinds)}
    assert found == {kind}


def test_lower_stages_and_small_anchors_are_for_small_objects() -> None:
    made = network(backbone_stages=[5, 2, 3], anchor_sizes_px=[12, 24], norm="batch")
    with torch.no_grad():
        levels = list(made.backbone(torch.zeros(1, 3, 128, 128)).values())
    assert [level.shape[-1] for level in levels] == [16, 8, 4, 2]
    anchors = made.rpn.anchor_generator
    assert anchors.sizes == ((12, 24),) * 4
    assert anchors.num_anchors_per_location() == [6] * 4
    assert made.rpn.head.cls_logits.out_channels == 6
    usual = network()
    with torch.no_grad():
        levels = list(usual.backbone(torch.zeros(1, 3, 128, 128)).values())
    assert [level.shape[-1] for level in levels] == [4, 4, 2]
    assert usual.rpn.anchor_generator.sizes == ((32, 64, 128, 256, 512),) * 3


@pytest.mark.parametrize("name", ["maskrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn_v2"])
def test_resnet_has_one_size_of_anchor_on_each_level(name: str) -> None:
    made = network(name, anchor_sizes_px=[8, 16, 32, 64, 128])
    assert made.rpn.anchor_generator.sizes == ((8,), (16,), (32,), (64,), (128,))
    assert made.rpn.head.cls_logits.out_channels == made.rpn.anchor_generator.num_anchors_per_location()[0] == 3
    assert network(name).rpn.anchor_generator.sizes == ((32,), (64,), (128,), (256,), (512,))


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("maskrcnn_resnet50_fpn", {"backbone_stages": [2, 3]}, "backbone_stages are for maskrcnn_mobilenet"),
        ("maskrcnn_resnet50_fpn", {"anchor_sizes_px": [8, 16]}, r"has 5 levels.*got \(8, 16\)"),
        ("maskrcnn_resnet50_fpn_v2", {"norm": "group"}, "norm is not for maskrcnn_resnet50_fpn_v2"),
        (MOBILE, {"backbone_stages": [2, 6]}, "less than or equal to 5"),
    ],
)
def test_what_does_not_fit_is_a_sentence(name: str, args: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        network(name, **args)
