"""Every architecture in bf16 against its library's own float32 forward, on all pixels, once the network has decided.

Of random weights nothing can be asked: torch's own autocast changes the class of a tenth to two thirds of the pixels.
Published networks have decided, and so have these after some tens of steps on drawn shapes.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from fitted_networks import draw_shapes, fitted_network
from small_detector import SIDE_PX, detector_card, disc_detector, draw_discs, fit_detector, training_picture
from small_networks import SEMANTIC, library_logits, run, small_card
from torchvision.ops import box_iou

from models.architectures import build
from models.card import Card
from models.masks import decode_rle
from models.segmenter import Segmenter

#: Steps, pictures in each, and the highest rate of learning.
RECIPES: dict[str, tuple[int, int, float]] = {
    "fpn": (60, 4, 2e-3),
    "upernet": (60, 4, 2e-3),
    "segformer": (60, 4, 1e-3),
    "dpt": (60, 4, 5e-4),
    "fcn_resnet50": (60, 4, 1e-3),
    "fcn_resnet101": (60, 4, 1e-3),
    "deeplabv3_resnet50": (60, 4, 1e-3),
    "deeplabv3_resnet101": (90, 4, 5e-4),
}
DETECTOR_ARGS: dict[str, dict[str, Any]] = {
    "maskrcnn_resnet50_fpn": {"norm": "batch", "anchor_sizes_px": [12, 24, 48, 96, 192]},
    "maskrcnn_resnet50_fpn_v2": {"anchor_sizes_px": [12, 24, 48, 96, 192]},
    "maskrcnn_mobilenet_v3_large_fpn": {"norm": "batch", "backbone_stages": [2, 3], "anchor_sizes_px": [12, 24]},
}
#: The score from which on a detector has decided: others come and go with any rounding.
SURE = 0.75
#: Those that take seconds.
QUICK = frozenset({"unet"})


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in SEMANTIC]
)
def test_bf16_gives_the_classes_of_the_library_in_float32(name: str) -> None:
    card = small_card(name, preprocessing={"normalization": "imagenet"})
    steps, batch, learning_rate = RECIPES.get(name, (60, 4, 3e-3))
    network = fitted_network(card, steps=steps, batch=batch, learning_rate=learning_rate)
    drawn = [draw_shapes(64, 64, seed=seed) for seed in range(8)]
    expected = np.stack([library_logits(network, pixels).argmax(dim=0).numpy() for pixels, _ in drawn])
    truth = np.stack([classes for _, classes in drawn])
    assert np.mean(expected == truth) > 0.65, f"it tells them apart: {np.mean(expected == truth):.3f}"
    for precision, least in (("fp32", 0.9999), ("bf16", 0.995)):
        segmenter = Segmenter(copy.deepcopy(network), card, device="cpu", precision=precision)
        found = np.stack([run(segmenter, [pixels])[0].class_ids for pixels, _ in drawn])
        agreement = float(np.mean(found == expected))
        print(f"{name}, right in {np.mean(expected == truth):.3f}, {precision}: {agreement:.5f}")
        assert agreement >= least


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_bf16_finds_what_a_small_detector_finds_in_float32() -> None:
    pictures = [draw_discs(SIDE_PX, 2 * SIDE_PX, 8, seed=seed)[0] for seed in range(8)]
    assert assert_found_by_both(disc_detector(), detector_card(), pictures) >= 60


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", DETECTOR_ARGS)
def test_bf16_finds_the_objects_of_the_library_in_float32(name: str) -> None:
    card = detector_card(name, DETECTOR_ARGS[name])
    torch.manual_seed(0)
    network: Any = build(card)
    heads, rpn = network.roi_heads, network.rpn
    heads.fg_bg_sampler.batch_size_per_image, rpn.fg_bg_sampler.batch_size_per_image = 16, 64
    rpn._pre_nms_top_n, rpn._post_nms_top_n = ({"training": few, "testing": 200} for few in (200, 40))
    fit_detector(network, steps=80, batch=2, learning_rate=1e-3, pictures=2)
    assert assert_found_by_both(network, card, [training_picture(number)[0] for number in range(2)]) >= 6


def assert_found_by_both(network: Any, card: Card, pictures: list[np.ndarray]) -> int:
    """How many objects the library is sure of. Whatever one of them is sure of, the other finds too; and what it finds
    is one of the library's own boxes before suppression: of two with nearly equal scores, rounding may let the other
    win.
    """
    network = copy.deepcopy(network)
    network.roi_heads.score_thresh = card.postprocessing.score_threshold  # type: ignore[union-attr]
    segmenter = Segmenter(copy.deepcopy(network), card, device="cpu", precision="bf16")
    all_boxes = copy.deepcopy(network)
    all_boxes.roi_heads.nms_thresh = all_boxes.rpn.nms_thresh = 1.0
    all_boxes.roi_heads.detections_per_img = 1_000_000
    all_boxes.rpn._post_nms_top_n = all_boxes.rpn._pre_nms_top_n
    furthest_px, least_iou, furthest_score, others, sure = 0.0, 1.0, 0.0, 0, 0
    behind = 0.0
    common_px = either_px = 0
    for pixels in pictures:
        image = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
        with torch.inference_mode():
            (library,), (candidates,) = network([image]), all_boxes([image])
        prediction = run(segmenter, [pixels])[0]
        _, instances = segmenter.postprocess(prediction)
        assert prediction.detections is not None
        assert len(instances) == len(prediction.detections.scores)
        boxes, scores = (torch.from_numpy(array) for array in prediction.detections[:2])
        overlaps = box_iou(library["boxes"], boxes)
        assert (overlaps[library["scores"] > SURE].max(dim=1).values > 0.5).all()
        assert (overlaps[:, scores > SURE].max(dim=0).values > 0.5).all()
        sure += int((library["scores"] > SURE).sum())
        for index in torch.where(scores > SURE)[0].tolist():
            partner = int((candidates["boxes"] - boxes[index]).abs().amax(dim=1).argmin())
            theirs, mine = (candidates["masks"][partner, 0] >= 0.5).numpy(), decode_rle(instances[index].rle)
            furthest_px = max(furthest_px, float((candidates["boxes"][partner] - boxes[index]).abs().max()))
            furthest_score = max(furthest_score, float((candidates["scores"][partner] - scores[index]).abs()))
            common, either = np.count_nonzero(theirs & mine), np.count_nonzero(theirs | mine)
            common_px, either_px = common_px + common, either_px + either
            least_iou = min(least_iou, common / either)
            if (overlaps[:, index] <= 0.9).all():
                others += 1
                chosen = library["scores"][overlaps[:, index] > 0.5].max()
                behind = max(behind, float(chosen - candidates["scores"][partner]))
    print(
        f"{card.architecture}: of {sure} boxes within {furthest_px:.3f} px, scores within {furthest_score:.4f}, masks "
        f"an IoU of {common_px / either_px:.4f} together, {least_iou:.4f} at least; {others} times another box of the "
        f"same object, {behind:.4f} behind the library's own choice"
    )
    assert furthest_px < 0.5 and furthest_score < 0.05
    # A mask of a hundred pixels has thirty at its edge, of which the network may be sure of few.
    assert common_px / either_px > 0.95 and least_iou > 0.8
    assert others <= max(2, sure // 10) and behind < 0.05
    return sure
