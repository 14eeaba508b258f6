from __future__ import annotations

import pytest
import torch

from models.architectures import build, untrained_card
from models.card import Card


@pytest.mark.parametrize(("channels", "size"), [((16, 8, 8), 32), ((16, 8, 8, 8), 48), ((16, 8, 8, 8, 8), 64)])
def test_output_has_the_inputs_size(channels: tuple[int, ...], size: int) -> None:
    card = untrained_card("tiny", class_names=("a", "b", "c", "d"), decoder_channels=channels)
    with torch.inference_mode():
        logits_NCHW = build(card)(torch.zeros(2, 3, size, size))
    assert logits_NCHW.shape == (2, 4, size, size)


def test_instance_networks_have_three_channels() -> None:
    card = untrained_card("tiny", task="instance", class_names=("background", "nucleus"))
    with torch.inference_mode():
        assert build(card)(torch.zeros(1, 3, 32, 32)).shape == (1, 3, 32, 32)


def test_every_parameter_is_used() -> None:
    module = build(untrained_card("tiny")).train()
    module(torch.randn(2, 3, 32, 32)).sum().backward()
    assert [name for name, parameter in module.named_parameters() if parameter.grad is None] == []


def test_is_in_eval_mode_and_follows_the_generator() -> None:
    card = untrained_card("tiny")
    torch.manual_seed(1)
    first = build(card)
    torch.manual_seed(1)
    second = build(card)
    assert not first.training
    assert torch.equal(first.encoder.conv1.weight, second.encoder.conv1.weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": "no-such"}, "no encoder 'no-such'"),
        ({"encoder_depth": 4}, "needs 4 decoder_channels, got 3"),
        ({"encoder_depth": 9}, "'encoder_depth'"),
        ({"output_channels": 5}, "puts out 5 channels, the card needs 2"),
        ({"surprise": 1}, "'surprise'"),
    ],
)
def test_arguments_that_do_not_fit(changes: dict[str, object], message: str) -> None:
    card = untrained_card("tiny")
    args = {**card.architecture_args, **changes}
    with pytest.raises(ValueError, match=message):
        build(Card.model_validate({**card.model_dump(), "architecture_args": args}))


def test_canvas_must_fit_the_stride() -> None:
    card = untrained_card("tiny").model_copy(update={"canvas_multiple": 12})
    with pytest.raises(ValueError, match="canvas_multiple 12 is not a multiple of the network's stride 8"):
        build(card)
