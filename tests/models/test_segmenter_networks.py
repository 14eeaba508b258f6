"""Every architecture through the Segmenter, against the library's own forward and the documented steps after it."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from small_networks import DETECTORS, LARGE, SEMANTIC, distinct_network, library_logits, make_image, run, small_card
from torch.nn.functional import interpolate
from torchvision.transforms.v2 import functional as v2

from models.architectures import build, card_for
from models.card import ResizePolicy
from models.segmenter import Prediction, Segmenter

IMAGENET = {"normalization": "imagenet"}


pytestmark = pytest.mark.usefixtures("one_thread")


def names(slow: frozenset[str]) -> list[Any]:
    return [pytest.param(name, marks=[pytest.mark.slow] if name in slow else []) for name in SEMANTIC]


def assert_same(left: Prediction, right: Prediction) -> None:
    for one, other in zip(left, right, strict=True):
        if isinstance(one, dict):
            for name, evidence in one.items():
                assert evidence.tobytes() == other[name].tobytes()
        elif isinstance(one, tuple):
            for mine, theirs in zip(one, other, strict=True):
                assert np.asarray(mine).tobytes() == np.asarray(theirs).tobytes()
        elif one is not None:
            assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@pytest.mark.parametrize("name", SEMANTIC)
def test_class_ids_are_those_of_the_library(name: str) -> None:
    card = small_card(name, preprocessing=IMAGENET)
    network = distinct_network(card)
    pixels = make_image(64, 64, seed=1)
    expected = library_logits(network, pixels).argmax(dim=0).numpy()
    assert len(np.unique(expected)) >= 3
    prediction = run(Segmenter(network, card, device="cpu", precision="fp32"), [pixels])[0]
    assert np.mean(prediction.class_ids == expected) >= 0.9999


@pytest.mark.parametrize("name", names(LARGE))
def test_bf16_neighbours_and_slots_cost_nothing(name: str) -> None:
    card = small_card(name, preprocessing=IMAGENET)
    network = distinct_network(card)
    pixels = make_image(64, 64, seed=1)
    logits_CHW = library_logits(network, pixels)
    segmenter = Segmenter(network, card, device="cpu", precision="bf16")
    alone = run(segmenter, [pixels, None])[0]
    # Random weights leave pixels undecided between two classes, which any rounding tips over.
    best, second = logits_CHW.topk(2, dim=0).values
    decided = ((best - second) > 0.15 * logits_CHW.std()).numpy()
    assert decided.mean() > 0.75
    assert np.mean((alone.class_ids == logits_CHW.argmax(dim=0).numpy())[decided]) >= 0.995
    assert_same(run(segmenter, [make_image(64, 64, seed=2), pixels])[1], alone)
    if card.canvas_multiple > 1:
        small = make_image(59, 62, seed=3)
        alone = run(segmenter, [None, small])[0]
        assert alone.class_ids.shape == (59, 62)
        assert_same(run(segmenter, [small, pixels], (64, 64))[0], alone)


@pytest.mark.parametrize("name", ["pspnet", "unet", "lraspp_mobilenet_v3_large"])
def test_resized_images_are_answered_at_their_own_size(name: str) -> None:
    policy = ResizePolicy(short_side_px=64, long_side_px=120)
    card = small_card(name, preprocessing=IMAGENET, size_policy=policy)
    network = distinct_network(card)
    segmenter = Segmenter(network, card, device="cpu", precision="fp32")
    # On the canvas 64 x 96, exactly: nothing is padded, so the library's own steps are the reference.
    pixels = make_image(100, 150, seed=4)
    assert segmenter.canvas(100, 150) == (64, 96)
    small = v2.resize(torch.from_numpy(pixels).permute(2, 0, 1), [64], max_size=120, antialias=True)
    logits_CHW = library_logits(network, small.permute(1, 2, 0).numpy())
    expected = interpolate(logits_CHW[None], size=(100, 150), mode="bilinear")[0].argmax(dim=0).numpy()
    among = run(segmenter, [make_image(64, 96, 5), pixels, make_image(50, 75, 6), None])
    assert [one.class_ids.shape for one in among] == [(64, 96), (100, 150), (50, 75)]
    assert np.mean(among[1].class_ids == expected) >= 0.9999
    assert among[1].pixels.tolist() == np.bincount(among[1].class_ids.ravel(), minlength=4).tolist()
    assert_same(run(segmenter, [pixels, None, None, None])[0], among[1])


@pytest.mark.parametrize("name", ["fpn", "fcn_resnet50"])
def test_any_architecture_finds_instances_by_their_boundary(name: str) -> None:
    card = small_card(name, task="instance", size_policy=ResizePolicy(short_side_px=64))
    segmenter = Segmenter(distinct_network(card), card, device="cpu", precision="fp32")
    class_ids, instances = segmenter.postprocess(run(segmenter, [make_image(80, 90, seed=1)])[0])
    assert class_ids.shape == (80, 90)
    assert instances
    assert sum(one.area for one in instances) == np.count_nonzero(class_ids)
    assert all(one.rle["size"] == [80, 90] for one in instances)


def test_a_letterbox_is_one_canvas_for_every_size() -> None:
    card = small_card("unet", size_policy={"kind": "letterbox", "height_px": 64, "width_px": 96})
    segmenter = Segmenter(distinct_network(card), card, device="cpu", precision="fp32")
    images = [make_image(*size, 1) for size in ((64, 96), (10, 200), (300, 7), (1, 1))]
    assert {segmenter.canvas(*image.shape[:2]) for image in images} == {(64, 96)}
    together = run(segmenter, list(images))
    for image, prediction in zip(images, together, strict=True):
        assert prediction.class_ids.shape == image.shape[:2]
        assert prediction.pixels.sum() == image.shape[0] * image.shape[1]
    assert_same(run(segmenter, [None, None, images[1], None])[0], together[1])


def test_more_bands_and_wider_pixels() -> None:
    preprocessing = {
        "normalization": "mean_std", "mean": [0.5] * 4, "std": [0.25] * 4,
        "bands": [3, 2, 1, 0], "dtype": "uint16", "value_range": [0, 10_000],
    }  # fmt: skip
    card = small_card("unet", preprocessing=preprocessing)
    network = distinct_network(card)
    pixels = make_image(64, 72, seed=2, bands=5, dtype="uint16") // 7
    with torch.inference_mode():
        bands = pixels[:, :, [3, 2, 1, 0]].astype(np.float32) / 10_000
        logits_CHW = network(torch.from_numpy((bands - 0.5) / 0.25).permute(2, 0, 1)[None])[0]
    segmenter = Segmenter(network, card, device="cpu", precision="fp32")
    assert (segmenter.input_channels, segmenter.input_dtype, segmenter.lies_as_it_is) == (4, np.uint16, False)
    assert np.mean(run(segmenter, [pixels])[0].class_ids == logits_CHW.argmax(dim=0).numpy()) >= 0.9999
    with pytest.raises(ValueError, match=r"takes bands \[3, 2, 1, 0\] \(counted from 0\), the image has 3 bands"):
        run(segmenter, [pixels[:, :, :3]])
    with pytest.raises(ValueError, match="takes uint16 pixels, the image has uint8"):
        run(segmenter, [pixels.astype(np.uint8)])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_an_answer_that_is_not_finite_is_no_answer(value: float) -> None:
    for policy in ({"kind": "native"}, {"kind": "resize", "short_side_px": 40}):
        card = small_card("unet", size_policy=policy)
        network = distinct_network(card)
        with torch.no_grad():
            network.segmentation_head[0].bias[2] = value
        segmenter = Segmenter(network, card, device="cpu", precision="fp32")
        prediction = run(segmenter, [make_image(40, 40, seed=1)])[0]
        assert np.isnan(prediction.mean_confidence)
        assert np.isnan(prediction.mean_entropy)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "fields",
    [
        {"augmentation": {"flips": ["horizontal"]}},
        {"augmentation": {"scales": [1.0, 2.0]}},
        {"crf": {"iterations": 1, "window_px": 3}},
        {"size_policy": {"kind": "tile", "tile_px": 32}},
    ],
)
def test_probabilities_hide_no_answer_that_is_not_finite(fields: dict[str, Any], value: float) -> None:
    card = small_card("unet", **fields)
    network = distinct_network(card)
    with torch.no_grad():
        network.segmentation_head[0].bias[2] = value
    segmenter = Segmenter(network, card, device="cpu", precision="fp32")
    image = make_image(32, 64, seed=1)
    mosaic = segmenter.mosaic(32, 64)
    if mosaic is None:
        prediction = run(segmenter, [image])[0]
    else:
        for window in mosaic.grid.windows():
            pixels = image[:, window.x : window.x + window.width]
            sizes, statistics = np.full((1, 2), 32, np.int32), np.ones((1, 2), np.float32)
            answer = segmenter.finish(segmenter.submit(pixels[None], sizes, statistics, tiles=True))[0]
            mosaic.add(window, answer)
        prediction = segmenter.assemble(mosaic)
    assert np.isnan(prediction.mean_confidence)


def test_networks_that_pool_are_not_padded_to_a_tile() -> None:
    policy = {"kind": "tile", "tile_px": 64, "overlap_px": 16}
    pixels = make_image(40, 56, seed=1)
    answers, canvases = [], []
    for fields in ({}, {"size_policy": policy}):
        card = small_card("pspnet", preprocessing=IMAGENET, **fields)
        segmenter = Segmenter(distinct_network(card), card, device="cpu", precision="fp32")
        canvases.append(segmenter.canvas(40, 56))
        answers.append(run(segmenter, [pixels])[0])
    assert canvases == [(40, 56), (40, 56)]
    assert_same(*answers)
    card = small_card("unet", preprocessing=IMAGENET, size_policy=policy)
    assert Segmenter(distinct_network(card), card, device="cpu", precision="fp32").canvas(40, 56) == (64, 64)


def test_a_network_that_takes_one_size_alone_is_padded_to_it() -> None:
    args = {"encoder": "tu-swin_tiny_patch4_window7_224", "encoder_depth": 4, "decoder_channels": [8, 8, 8, 8]}
    card = card_for("m", "unet", args, size_policy={"kind": "tile", "tile_px": 224, "overlap_px": 32})
    segmenter = Segmenter(build(card, blank=True), card, device="cpu", precision="fp32")
    assert segmenter.canvas(96, 128) == (224, 224)


def test_a_resizing_card_needs_the_images_own_sizes() -> None:
    card = small_card("unet", size_policy={"kind": "resize", "short_side_px": 32})
    segmenter = Segmenter(build(card), card, device="cpu", precision="fp32")
    sizes, statistics = np.full((1, 2), 32, np.int32), np.ones((1, 2), np.float32)
    with pytest.raises(ValueError, match="needs the images' own sizes"):
        segmenter.submit(np.zeros((1, 32, 32, 3), np.uint8), sizes, statistics)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*SEMANTIC, *DETECTORS])
def test_a_gpu_answers_as_the_cpu_does_whatever_the_neighbours(name: str) -> None:
    """As a run has it: float32 without TensorFloat-32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        card = small_card(name, preprocessing=IMAGENET)
        network = distinct_network(card)
        pixels, other = make_image(64, 64, seed=1), make_image(64, 64, seed=2)
        on_cpu = run(Segmenter(copy.deepcopy(network), card, device="cpu", precision="fp32"), [pixels, None, None])[0]
        on_gpu = run(Segmenter(copy.deepcopy(network), card, device="cuda", precision="fp32"), [pixels, None, None])[0]
        if on_cpu.detections is None:
            assert np.mean(on_gpu.class_ids == on_cpu.class_ids) >= 0.999
        else:
            assert on_gpu.detections is not None
            assert np.abs(on_gpu.detections.boxes[:10] - on_cpu.detections.boxes[:10]).max() < 0.01
        segmenter = Segmenter(network, card, device="cuda", precision="bf16")
        alone = run(segmenter, [pixels, None, None])[0]
        for _ in range(3):
            assert_same(run(segmenter, [other, other, pixels])[2], alone)
    finally:
        torch.backends.cudnn.allow_tf32 = before


@pytest.mark.gpu
@pytest.mark.parametrize("policy", [{"kind": "resize", "short_side_px": 64}, {"kind": "tile", "tile_px": 64}])
def test_a_gpu_serves_other_sizes_without_waiting(policy: dict[str, Any]) -> None:
    card = small_card("unet", preprocessing=IMAGENET, size_policy=policy)
    segmenter = Segmenter(distinct_network(card), card, device="cuda", precision="bf16")
    images, sizes = np.full((2, 64, 96, 3), 9, np.uint8), np.full((2, 2), 64, np.int32)
    if policy["kind"] == "tile":
        images = np.ascontiguousarray(images[:, :, :64])
    arguments: dict[str, Any] = {"image_sizes_N2": sizes + 32} if policy["kind"] == "resize" else {"tiles": True}
    segmenter.finish(segmenter.submit(images, sizes, np.ones((2, 2), np.float32), **arguments))
    torch.cuda.set_sync_debug_mode("error")
    try:
        pending = segmenter.submit(images, sizes, np.ones((2, 2), np.float32), **arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(segmenter.finish(pending)) == 2
