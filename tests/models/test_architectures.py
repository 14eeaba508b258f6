from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_networks import SMALL, small_card

from models.architectures import ARCHITECTURES, build, card_for, untrained_card
from models.card import ArgmaxPostprocessing, Card, DetectionsPostprocessing
from models.file import ModelFileError, load_module, save_model


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


def test_near_names_are_told() -> None:
    with pytest.raises(ValueError, match="unknown architecture 'deeplabv3_resnet5': did you mean deeplabv3_resnet50"):
        build(untrained_card("tiny").model_copy(update={"architecture": "deeplabv3_resnet5"}))
    with pytest.raises(ValueError, match="no encoder 'resnet-18': did you mean resnet18"):
        card_for("tiny", "fpn", {"encoder": "resnet-18"})
    with pytest.raises(ValueError, match="no encoder 'tu-resnet1O': did you mean tu-resnet"):
        card_for("tiny", "fpn", {"encoder": "tu-resnet1O"})


@pytest.mark.parametrize("encoder", ["tu-hf_hub:somebody/model", "tu-hf-hub:a/b", "tu-local-dir:/tmp/x"])
def test_an_encoder_never_leads_elsewhere(encoder: str) -> None:
    with pytest.raises(ValueError, match="there is no encoder"):
        card_for("tiny", "unet", {"encoder": encoder})


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if "resnet" in name else []) for name in ARCHITECTURES]
)
def test_a_card_and_its_file_come_back_as_they_were(name: str, tmp_path: Path) -> None:
    card = small_card(name)
    torch.manual_seed(1)
    state = build(card).state_dict()
    save_model(tmp_path / "m.safetensors", state, card)
    again, network = load_module((tmp_path / "m.safetensors").read_bytes())
    assert again == card
    assert all(torch.equal(tensor, state[key]) for key, tensor in network.state_dict().items())


@pytest.mark.parametrize(
    ("name", "encoder", "pools"),
    [
        ("unet", "resnet18", False),
        ("linknet", "resnet18", False),
        ("unet", "mobilenet_v2", False),
        ("unet", "tu-convnext_atto", False),
        ("unet", "efficientnet-b0", True),
        ("unet", "tu-mobilenetv3_small_050", True),
        ("fpn", "resnet18", True),
        ("upernet", "resnet18", True),
        ("pspnet", "resnet18", True),
        ("deeplabv3plus", "resnet18", True),
        ("segformer", "mit_b0", True),
        ("fcn_resnet50", None, False),
        ("lraspp_mobilenet_v3_large", None, True),
        ("deeplabv3_mobilenet_v3_large", None, True),
        ("maskrcnn_mobilenet_v3_large_fpn", None, True),
    ],
)
def test_whether_a_network_pools_is_seen_and_not_believed(name: str, encoder: str | None, pools: bool) -> None:
    stride = {"pspnet": 8, "deeplabv3plus": 16}.get(name, 32 if encoder else 1)
    card = card_for("tiny", name, {"encoder": encoder} if encoder else None, canvas_multiple=stride)
    wider = card.model_copy(update={"canvas_multiple": 2 * card.canvas_multiple})
    silent = card.model_copy(update={"pools_whole_image": False})
    if pools:
        with pytest.raises(ValueError, match=f"canvas_multiple must be its stride, {card.canvas_multiple}, not"):
            build(wider, blank=True)
        with pytest.raises(ValueError, match="the card says that it does not"):
            build(silent, blank=True)
    else:
        build(wider, blank=True)
        build(silent, blank=True)
        with pytest.raises(ValueError, match="pools over the whole image"):
            build(wider.model_copy(update={"pools_whole_image": True}), blank=True)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"kind": "tile", "tile_px": 4}, "tile_px 4 is smaller than the network's stride 8"),
        ({"kind": "tile", "tile_px": 60}, "tile_px 60 is not a multiple of the network's stride 8"),
        ({"kind": "letterbox", "height_px": 64, "width_px": 63}, "width_px 63 is not a multiple"),
    ],
)
def test_fixed_sizes_must_fit_the_stride(policy: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(small_card("unet", size_policy=policy))
    build(small_card("unet", size_policy={"kind": "tile", "tile_px": 64, "overlap_px": 16}))


def test_detectors_take_tiles_no_smaller_than_their_stride() -> None:
    policy = {"kind": "tile", "tile_px": 31, "overlap_px": 8}
    with pytest.raises(ValueError, match="tile_px 31 is smaller than the network's stride 32"):
        build(small_card("maskrcnn_mobilenet_v3_large_fpn", size_policy=policy), blank=True)
    build(small_card("maskrcnn_mobilenet_v3_large_fpn", size_policy=policy | {"tile_px": 33}), blank=True)


@pytest.mark.slow
def test_a_network_of_one_size_needs_a_policy_of_one_size() -> None:
    args = {"encoder": "tu-swin_s3_tiny_224", "decoder_channels": 16}
    with pytest.raises(ValueError, match=r"does not take 64 x 96 pixels .* size_policy 'native' needs: Input height"):
        build(card_for("tiny", "upernet", args))
    build(card_for("tiny", "upernet", args, size_policy={"kind": "letterbox", "height_px": 224, "width_px": 224}))


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("fcn_resnet50", {"preprocessing": {"bands": [0, 1, 2, 3]}}, "takes 3 bands, the card's preprocessing has 4"),
        ("maskrcnn_resnet50_fpn", {"preprocessing": {"bands": [0]}}, "takes 3 bands, the card's preprocessing has 1"),
        ("maskrcnn_resnet50_fpn", {"postprocessing": ArgmaxPostprocessing(), "task": "semantic"}, "finds instances by"),
        ("unet", {"postprocessing": DetectionsPostprocessing(), "task": "instance"}, "finds no instances by itself"),
    ],
)
def test_cards_that_ask_for_what_the_network_cannot_do(name: str, fields: dict[str, Any], message: str) -> None:
    card = small_card(name)
    with pytest.raises(ValueError, match=message):
        build(Card.model_validate(card.model_dump() | fields))


def test_weights_of_another_card_are_refused_before_any_image(tmp_path: Path) -> None:
    four = small_card("unet", preprocessing={"bands": [0, 1, 2, 3]})
    with pytest.raises(ModelFileError, match=r"not \(64, 3, 7, 7\) \(the card says 4 channels out, 3 bands in\)"):
        save_model(tmp_path / "m.safetensors", build(four).state_dict(), small_card("unet"))
    fewer = card_for("small", "unet", SMALL["unet"], class_names=("a", "b"))
    with pytest.raises(ModelFileError, match="the card says 2 channels out, 3 bands in"):
        save_model(tmp_path / "m.safetensors", build(small_card("unet")).state_dict(), fewer)


def test_making_a_card_leaves_the_generator_alone() -> None:
    before = torch.get_rng_state()
    card_for("tiny", "pspnet")
    assert torch.equal(torch.get_rng_state(), before)


def test_blank_networks_differ_in_their_numbers_only() -> None:
    for name in ("unet", "segformer", "maskrcnn_mobilenet_v3_large_fpn"):
        card = small_card(name)
        before = torch.get_rng_state()
        blank = build(card, blank=True).state_dict()
        assert torch.equal(torch.get_rng_state(), before)
        assert {key: tensor.shape for key, tensor in blank.items()} == {
            key: tensor.shape for key, tensor in build(card).state_dict().items()
        }


def test_a_misspelt_argument_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'encoder_depht': did you mean 'encoder_depth'\? unet takes encoder"):
        card_for("m", "unet", {"encoder_depht": 3})
