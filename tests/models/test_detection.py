"""Mask R-CNN through the Segmenter, against torchvision's own forward on each image alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from small_networks import CLASSES, DETECTORS, distinct_network, make_image, run, small_card
from torchvision.models.detection import MaskRCNN
from torchvision.ops import box_iou, nms

from models import detection
from models.card import Card, DetectionsPostprocessing
from models.masks import decode_rle
from models.segmenter import Segmenter

LENIENT = DetectionsPostprocessing(score_threshold=0.0, top_k=25)


pytestmark = pytest.mark.usefixtures("one_thread")


def detector(name: str, **changes: Any) -> tuple[Card, Any]:
    settings = LENIENT.model_copy(update=changes)
    card = small_card(name, preprocessing={"normalization": "imagenet"}, postprocessing=settings)
    return card, distinct_network(card)


def torchvisions_own(network: MaskRCNN, pixels: np.ndarray, settings: DetectionsPostprocessing) -> dict[str, Any]:
    heads = network.roi_heads
    heads.score_thresh, heads.nms_thresh, heads.detections_per_img = (
        settings.score_threshold, settings.nms_iou, settings.top_k,
    )  # fmt: skip
    heads.box_roi_pool.scales = heads.mask_roi_pool.scales = None
    with torch.inference_mode():
        (found,) = network([torch.from_numpy(pixels).permute(2, 0, 1).float() / 255])
    return {key: value.numpy() for key, value in found.items()}


def assert_agree(segmenter: Segmenter, prediction: Any, expected: dict[str, Any]) -> None:
    found = prediction.detections
    # Of two regions with one score, the last bit decides which is kept.
    tied = np.abs(found.boxes - expected["boxes"]).max(axis=1) >= 1e-3
    assert tied.sum() <= 1
    assert (np.diag(box_iou(torch.from_numpy(found.boxes), torch.from_numpy(expected["boxes"])))[tied] > 0.95).all()
    assert np.array_equal(found.labels, expected["labels"])
    assert np.allclose(found.scores, expected["scores"], atol=1e-4)
    class_ids, instances = segmenter.postprocess(prediction)
    kept = (expected["masks"][:, 0] >= 0.5).any(axis=(1, 2))
    probabilities, boxes, labels = (expected[name][kept] for name in ("masks", "boxes", "labels"))
    assert len(instances) == len(labels) > 5
    picture = np.zeros(class_ids.shape, np.uint8)
    rows = list(zip(instances, probabilities[:, 0], boxes, labels, tied[kept], strict=True))
    for one, probability, box, label, is_other in reversed(rows):
        mine = decode_rle(one.rle)
        # Of a mask of a hundred pixels, one at 0.4999999 is more than a thousandth.
        decided = np.abs(probability - 0.5) > 1e-4
        inside = (probability >= 0.5) & decided
        assert is_other or (mine & inside).sum() / ((mine & decided) | inside).sum() >= 0.999
        assert one.area == mine.sum()
        assert one.bbox == pytest.approx(
            (box[0], box[1], box[2] - box[0], box[3] - box[1]), abs=1 if is_other else 1e-3
        )
        assert one.class_id == label
        picture[mine] = label
    assert np.array_equal(picture, class_ids)


@pytest.mark.parametrize("name", DETECTORS)
def test_one_image_gives_what_torchvision_gives(name: str) -> None:
    card, network = detector(name)
    pixels = make_image(64, 71, seed=1)
    expected = torchvisions_own(network, pixels, LENIENT)
    segmenter = Segmenter(network, card, device="cpu", precision="fp32")
    assert_agree(segmenter, run(segmenter, [pixels])[0], expected)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if "mobilenet" in name else [pytest.mark.slow]) for name in DETECTORS]
)
@pytest.mark.parametrize("images_at_once", [1, 2])
def test_batches_give_what_torchvision_gives_for_each_image_alone(
    name: str, images_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(detection._IMAGES_AT_ONCE, "cpu", images_at_once)
    card, network = detector(name)
    images = [make_image(70, 91, seed) for seed in (1, 2)]
    expected = [torchvisions_own(network, pixels, LENIENT) for pixels in images]
    segmenter = Segmenter(network, card, device="cpu", precision="fp32")
    assert segmenter.canvas(70, 91) == (70, 91)
    predictions = run(segmenter, [images[0], None, images[1]])
    assert len(predictions) == 2
    for prediction, one in zip(predictions, expected, strict=True):
        assert_agree(segmenter, prediction, one)


def test_neither_neighbours_nor_earlier_sizes_matter() -> None:
    card, network = detector("maskrcnn_mobilenet_v3_large_fpn")
    segmenter = Segmenter(network, card, device="cpu", precision="bf16")
    pixels = make_image(64, 80, seed=1)
    alone = run(segmenter, [pixels, None])[0]
    # torchvision's poolers would keep the scales of the first image for ever.
    run(segmenter, [make_image(3, 90, seed=2), None])
    among = run(segmenter, [make_image(64, 80, seed=3), pixels])[1]
    assert alone.detections is not None
    assert among.detections is not None
    assert len(alone.detections.scores) > 5
    for mine, theirs in zip(alone.detections, among.detections, strict=True):
        assert np.asarray(mine).tobytes() == np.asarray(theirs).tobytes()
    assert (alone.mean_confidence, alone.mean_entropy) == (among.mean_confidence, among.mean_entropy)
    assert 0 < alone.mean_confidence < 1
    assert 0 < alone.mean_entropy < 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_images_that_share_the_head_of_boxes_do_not_matter_to_each_other(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where several images go through it together, each with another number of regions."""
    card, network = detector("maskrcnn_mobilenet_v3_large_fpn")
    propose = network.rpn.filter_proposals

    def some(*args: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """A number that depends on the image: random weights propose as much for one as for another."""
        boxes_of_images, scores = propose(*args)
        return [boxes[: 20 + int(boxes.double().sum() * 1e6) % 30] for boxes in boxes_of_images], scores

    network.rpn.filter_proposals = some
    images = [make_image(64, 80, seed) for seed in range(3)]
    segmenter = Segmenter(network, card, device="cpu", precision=precision)
    regions: list[int] = []
    best = detection._best

    def noted(boxes_RC4: torch.Tensor, *rest: Any) -> dict[str, torch.Tensor]:
        regions.append(len(boxes_RC4))
        return best(boxes_RC4, *rest)

    monkeypatch.setattr(detection, "_best", noted)
    monkeypatch.setitem(detection._IMAGES_AT_ONCE, "cpu", 2)
    together = run(segmenter, [images[0], images[1], None, images[2]])
    assert len(set(regions)) > 1
    apart = [run(segmenter, [None, None, pixels, None])[0] for pixels in images]
    for one, other in zip(together, apart, strict=True):
        for mine, theirs in zip(one.detections, other.detections, strict=True):
            assert np.asarray(mine).tobytes() == np.asarray(theirs).tobytes()


def test_suppression_within_a_class_or_over_classes() -> None:
    for per_class in (True, False):
        card, network = detector("maskrcnn_mobilenet_v3_large_fpn", nms_per_class=per_class, nms_iou=0.3, top_k=1000)
        segmenter = Segmenter(network, card, device="cpu", precision="fp32")
        found = run(segmenter, [make_image(64, 80, seed=1)])[0].detections
        assert found is not None
        left = nms(torch.from_numpy(found.boxes), torch.from_numpy(found.scores), 0.3)
        assert (len(left) == len(found.scores)) is not per_class


def test_nothing_found_is_an_answer() -> None:
    card, network = detector("maskrcnn_mobilenet_v3_large_fpn", score_threshold=0.999999)
    segmenter = Segmenter(network, card, device="cpu", precision="fp32")
    prediction = run(segmenter, [make_image(40, 50, seed=1)])[0]
    class_ids, instances = segmenter.postprocess(prediction)
    assert (prediction.mean_confidence, prediction.mean_entropy, instances) == (0.0, 0.0, [])
    assert class_ids.shape == (40, 50)
    assert not class_ids.any()


@pytest.mark.parametrize("part", ["roi_heads.box_predictor.cls_score", "roi_heads.mask_predictor.mask_fcn_logits",
                                  "rpn.head.cls_logits", "backbone.fpn.layer_blocks.0.0"])  # fmt: skip
def test_an_answer_that_is_not_finite_is_no_answer(part: str) -> None:
    card, network = detector("maskrcnn_mobilenet_v3_large_fpn")
    with torch.no_grad():
        network.get_submodule(part).bias[0] = float("nan")
    segmenter = Segmenter(network, card, device="cpu", precision="fp32")
    assert np.isnan(run(segmenter, [make_image(40, 50, seed=1)])[0].mean_confidence)


def test_padding_is_refused() -> None:
    card, network = detector("maskrcnn_mobilenet_v3_large_fpn")
    segmenter = Segmenter(network, card, device="cpu", precision="fp32")
    sizes, statistics = np.array([[30, 32]], np.int32), np.ones((1, 2), np.float32)
    with pytest.raises(ValueError, match="without padding"):
        segmenter.submit(np.zeros((1, 32, 32, 3), np.uint8), sizes, statistics)


def test_classes_of_coco_keep_their_ids() -> None:
    card, network = detector("maskrcnn_mobilenet_v3_large_fpn")
    classes = [info.model_dump() | {"id": 2 * info.id} for info in card.classes]
    card = Card.model_validate(card.model_dump() | {"classes": classes})
    segmenter = Segmenter(network, card, device="cpu", precision="fp32")
    prediction = run(segmenter, [make_image(64, 80, seed=1)])[0]
    class_ids, instances = segmenter.postprocess(prediction)
    assert {one.class_id for one in instances} <= {2, 4, 6}
    assert set(np.unique(class_ids)) <= {0, 2, 4, 6}
    assert prediction.confidence.shape == (len(CLASSES),)
    assert np.isnan(prediction.confidence[0])
