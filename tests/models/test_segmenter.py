from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from models.architectures import build, untrained_card
from models.card import ArgmaxPostprocessing, WatershedPostprocessing
from models.masks import decode_rle
from models.preprocessing import image_statistics
from models.segmenter import Prediction, Segmenter, default_device, supports_bf16

NAMES = ("background", "road", "tree", "car", "sky")
PRECISIONS = ["fp32", "bf16"]


def make_segmenter(task: str = "semantic", precision: str = "fp32", device: str = "cpu") -> Segmenter:
    names = NAMES if task == "semantic" else ("background", "nucleus")
    card = untrained_card("tiny", task=task, class_names=names)
    torch.manual_seed(3)
    module = build(card)
    # The default head is so small that every pixel would get nearly the same probabilities.
    with torch.no_grad():
        module.segmentation_head[0].weight.mul_(20)
        module.segmentation_head[0].bias[1] += 2.0
    return Segmenter(module, card, device=device, precision=precision)


def make_image(height: int, width: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    smooth = coarse.repeat(8, axis=0).repeat(8, axis=1)[:height, :width]
    return smooth // 2 + random.integers(0, 100, (height, width, 3), dtype=np.uint8)


def run(segmenter: Segmenter, slots: list[np.ndarray | None], canvas: tuple[int, int]) -> list[Prediction]:
    images = np.zeros((len(slots), *canvas, 3), dtype=np.uint8)
    sizes = np.zeros((len(slots), 2), dtype=np.int32)
    statistics = np.zeros((len(slots), 2), dtype=np.float32)
    for slot, image in enumerate(slots):
        if image is not None:
            height, width = image.shape[:2]
            padding = ((0, canvas[0] - height), (0, canvas[1] - width), (0, 0))
            images[slot] = np.pad(image, padding, mode="edge")
            sizes[slot] = height, width
            statistics[slot] = image_statistics(image)
    return segmenter.finish(segmenter.submit(images, sizes, statistics))


def assert_same(left: Prediction, right: Prediction) -> None:
    assert left.class_ids.tobytes() == right.class_ids.tobytes()
    assert left.pixels.tolist() == right.pixels.tolist()
    assert left.confidence.tobytes() == right.confidence.tobytes()
    assert (left.mean_confidence, left.mean_entropy) == (right.mean_confidence, right.mean_entropy)
    assert (left.instance_evidence is None) == (right.instance_evidence is None)
    for name, evidence in (left.instance_evidence or {}).items():
        assert right.instance_evidence is not None
        assert evidence.tobytes() == right.instance_evidence[name].tobytes()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("task", ["semantic", "instance"])
def test_neighbours_and_slots_do_not_matter(task: str, precision: str) -> None:
    segmenter = make_segmenter(task, precision)
    image = make_image(90, 75, seed=0)
    others = [make_image(96, 96, 1), make_image(70, 96, 2), make_image(1, 1, 3)]
    alone = run(segmenter, [image, None, None, None], (96, 96))
    assert len(alone) == 1
    for slot in range(4):
        slots = [*others[:slot], image, *others[slot:]]
        among = run(segmenter, slots, (96, 96))
        assert len(among) == 4
        assert_same(among[slot], alone[0])
        for mine, theirs in zip(segmenter.postprocess(among[slot])[1], segmenter.postprocess(alone[0])[1], strict=True):
            assert mine == theirs


@pytest.mark.parametrize("threads", [1, 3])
def test_neighbours_do_not_matter_with_an_odd_number_of_threads(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        segmenter = make_segmenter("semantic", "bf16")
        image = make_image(64, 33, seed=0)
        alone = run(segmenter, [None, None, image], (64, 64))[0]
        assert_same(run(segmenter, [image, make_image(64, 64, 1), make_image(9, 9, 2)], (64, 64))[0], alone)
    finally:
        torch.set_num_threads(before)


def test_figures_agree_with_the_definitions() -> None:
    segmenter = make_segmenter()
    image = make_image(50, 64, seed=5)
    prediction = run(segmenter, [image], (64, 64))[0]
    mean, std = image_statistics(image)
    padded = np.pad(image, ((0, 14), (0, 0), (0, 0)), mode="edge")
    inputs = torch.from_numpy((padded.astype(np.float32) - mean) / std).permute(2, 0, 1)[None].float()
    with torch.inference_mode():
        probabilities = segmenter._module(inputs).softmax(dim=1)[0, :, :50].double().numpy()
    winner = probabilities.max(axis=0)
    entropy = -(probabilities * np.log(probabilities)).sum(axis=0) / math.log(5)
    assert np.mean(prediction.class_ids == probabilities.argmax(axis=0)) > 0.999
    assert prediction.pixels.sum() == 50 * 64
    assert prediction.pixels.tolist() == np.bincount(prediction.class_ids.ravel(), minlength=5).tolist()
    assert np.count_nonzero(prediction.pixels) > 1
    assert prediction.mean_confidence == pytest.approx(winner.mean(), abs=1e-4)
    assert prediction.mean_entropy == pytest.approx(entropy.mean(), abs=1e-4)
    for class_id in range(5):
        of_class = prediction.class_ids == class_id
        if of_class.any():
            assert prediction.confidence[class_id] == pytest.approx(winner[of_class].mean(), abs=1e-3)
        else:
            assert np.isnan(prediction.confidence[class_id])


def test_instances_and_mask_agree() -> None:
    segmenter = make_segmenter("instance")
    prediction = run(segmenter, [make_image(60, 80, seed=1)], (64, 96))[0]
    class_ids, instances = segmenter.postprocess(prediction)
    assert class_ids.shape == (60, 80)
    assert instances
    union = np.zeros((60, 80), dtype=np.int64)
    for instance in instances:
        union += decode_rle(instance.rle)
        assert instance.class_id == 1
        assert 0 <= instance.score <= 1
    assert union.max() == 1
    assert np.array_equal(union, class_ids)


def test_semantic_models_have_no_instances() -> None:
    segmenter = make_segmenter()
    prediction = run(segmenter, [make_image(32, 32, seed=1)], (32, 32))[0]
    class_ids, instances = segmenter.postprocess(prediction)
    assert instances == []
    assert np.array_equal(class_ids, prediction.class_ids)


def test_class_ids_are_the_cards_and_not_the_channels() -> None:
    card = untrained_card("tiny", class_names=("road", "tree"))
    classes = [{**info.model_dump(), "id": new} for info, new in zip(card.classes, (7, 200), strict=True)]
    card = type(card).model_validate({**card.model_dump(), "classes": classes})
    segmenter = Segmenter(build(card), card, device="cpu", precision="fp32")
    prediction = run(segmenter, [make_image(32, 32, seed=1)], (32, 32))[0]
    assert set(np.unique(prediction.class_ids)) <= {7, 200}
    assert prediction.pixels[0] == np.count_nonzero(prediction.class_ids == 7)


@pytest.mark.parametrize(("size", "canvas"), [((1, 1), (32, 32)), ((32, 64), (32, 64)), ((33, 65), (64, 96))])
def test_canvas(size: tuple[int, int], canvas: tuple[int, int]) -> None:
    assert make_segmenter().canvas(*size) == canvas


def test_refuses_what_does_not_fit() -> None:
    segmenter = make_segmenter()
    sizes, statistics = np.ones((1, 2), dtype=np.int32), np.ones((1, 2), dtype=np.float32)
    with pytest.raises(ValueError, match="canvas of multiples of 32"):
        segmenter.submit(np.zeros((1, 33, 32, 3), dtype=np.uint8), sizes, statistics)
    with pytest.raises(ValueError, match="uint8"):
        segmenter.submit(np.zeros((1, 32, 32, 3), dtype=np.float32), sizes, statistics)
    with pytest.raises(ValueError, match=r"1 images need sizes and statistics of shape \(1, 2\)"):
        segmenter.submit(np.zeros((1, 32, 32, 3), dtype=np.uint8), sizes, statistics.repeat(2, axis=0))
    with pytest.raises(ValueError, match="fp16"):
        make_segmenter(precision="fp16")
    with pytest.raises(ValueError, match="unknown precision 'int8'"):
        make_segmenter(precision="int8")
    card = untrained_card("tiny")
    with pytest.raises(ValueError, match="does not fit"):
        Segmenter(build(card), card, device="cpu", precision="fp32", postprocessing=WatershedPostprocessing())


def test_postprocessing_of_the_caller_wins() -> None:
    card = untrained_card("tiny", task="instance", class_names=("background", "nucleus"))
    chosen = WatershedPostprocessing(min_area_px=10_000)
    segmenter = Segmenter(build(card), card, device="cpu", precision="fp32", postprocessing=chosen)
    class_ids, instances = segmenter.postprocess(run(segmenter, [make_image(64, 64, seed=1)], (64, 64))[0])
    assert instances == []
    assert not class_ids.any()


def test_blank_and_non_finite_input() -> None:
    segmenter = make_segmenter()
    blank = run(segmenter, [np.zeros((32, 32, 3), dtype=np.uint8)], (32, 32))[0]
    assert 0 < blank.mean_confidence <= 1
    with torch.no_grad():
        segmenter._module.segmentation_head[0].bias.fill_(float("nan"))
    broken = run(segmenter, [np.zeros((32, 32, 3), dtype=np.uint8)], (32, 32))[0]
    assert math.isnan(broken.mean_confidence)
    assert math.isnan(broken.mean_entropy)


def test_argmax_is_the_default_of_semantic_cards() -> None:
    assert make_segmenter().postprocessing == ArgmaxPostprocessing()


def test_default_device_is_one_that_works() -> None:
    device = default_device()
    assert torch.zeros(1, device=device).sum().item() == 0
    assert isinstance(supports_bf16(device), bool)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("task", ["semantic", "instance"])
def test_cuda_agrees_with_the_cpu_and_does_not_synchronise(task: str, precision: str) -> None:
    images = [make_image(90, 75, seed=0), make_image(64, 96, seed=1)]
    on_cpu = run(make_segmenter(task), [*images, None], (96, 96))
    segmenter = make_segmenter(task, precision, device="cuda")
    run(segmenter, [*images, None], (96, 96))
    arrays = (
        np.zeros((3, 96, 96, 3), dtype=np.uint8),
        np.full((3, 2), 96, dtype=np.int32),
        np.ones((3, 2), dtype=np.float32),
    )
    torch.cuda.set_sync_debug_mode("error")
    try:
        pending = segmenter.submit(*arrays)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(segmenter.finish(pending)) == 3
    on_cuda = run(segmenter, [*images, None], (96, 96))
    again = run(segmenter, [None, images[1], images[0]], (96, 96))
    for slot in range(2):
        assert np.mean(on_cuda[slot].class_ids == on_cpu[slot].class_ids) > 0.95
        assert_same(on_cuda[slot], again[1 - slot])
