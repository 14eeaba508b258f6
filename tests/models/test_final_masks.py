"""Each setting of what comes after the network, as a run gives it: what it does to the shipped model's answer on a
shipped image, and to a detector's.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pytest
from scipy import ndimage
from small_networks import distinct_network, make_image, run, small_card

from models.file import load_module
from models.masks import Instance, decode_rle
from models.overrides import with_settings
from models.segmenter import Segmenter

ROOT = Path(__file__).parents[2]
#: Cut out of a shipped image: touching nuclei of many sizes.
PICTURE = ROOT / "examples" / "nuclei" / "2869fad54664677e81bacbf00c2256e89a7b90b69d9688c9342e2c736ff5421c.png"


#: With these the network's answer has holes.
HOLED: dict[str, Any] = {"postprocessing": {"foreground_threshold": 0.97}}


class Answer(NamedTuple):
    class_ids: np.ndarray
    instances: list[Instance]

    @property
    def foreground(self) -> np.ndarray:
        return self.class_ids > 0

    def least(self, name: str) -> float:
        return min(getattr(one, name) for one in self.instances)


pytestmark = pytest.mark.usefixtures("one_thread")


@functools.cache
def shipped() -> tuple[Any, Any, np.ndarray]:
    card, network = load_module((ROOT / "models" / "zoo" / "nuclei-unet.safetensors").read_bytes())
    return card, network, cv2.cvtColor(cv2.imread(str(PICTURE)), cv2.COLOR_BGR2RGB)[:256, :256]


@functools.cache
def detector() -> tuple[Any, Any, np.ndarray]:
    settings = {"kind": "detections", "score_threshold": 0.3}
    card = small_card("maskrcnn_mobilenet_v3_large_fpn", postprocessing=settings)
    return card, distinct_network(card), make_image(64, 80, seed=1)


@functools.cache
def plain(model: Callable[[], tuple[Any, Any, np.ndarray]]) -> Answer:
    return answer(model, {})


def answer(model: Callable[[], tuple[Any, Any, np.ndarray]], settings: dict[str, Any]) -> Answer:
    card, network, pixels = model()
    segmenter = Segmenter(copy.deepcopy(network), with_settings(card, settings), device="cpu", precision="fp32")
    class_ids, instances = segmenter.postprocess(run(segmenter, [pixels])[0])
    union = np.zeros(class_ids.shape, bool)
    for one in instances:
        mask = decode_rle(one.rle)
        assert one.area == mask.sum() > 0
        union |= mask
    assert np.array_equal(union, class_ids > 0), "the mask is that of the instances"
    return Answer(class_ids, instances)


def is_within(inner: np.ndarray, outer: np.ndarray) -> bool:
    return bool(inner.sum() < outer.sum() and not (inner & ~outer).any())


def holes_px(found: Answer) -> int:
    masks = [decode_rle(one.rle) for one in found.instances]
    return sum(int((ndimage.binary_fill_holes(mask) & ~mask).sum()) for mask in masks)


def nearly(old: Answer, new: Answer) -> bool:
    """Another answer, and a like one."""
    both, either = (old.foreground & new.foreground).sum(), (old.foreground | new.foreground).sum()
    return bool(0.85 < both / either < 1)


WATERSHED: list[tuple[dict[str, Any], Callable[[Answer, Answer], bool]]] = [
    ({"postprocessing": {"foreground_threshold": 0.95}}, lambda old, new: is_within(new.foreground, old.foreground)),
    ({"postprocessing": {"interior_threshold": 0.9}}, lambda old, new: len(new.instances) != len(old.instances)),
    ({"postprocessing": {"min_marker_px": 100}}, lambda old, new: 0 < len(new.instances) < len(old.instances)),
    (
        {"postprocessing": {"min_area_px": 150}},
        lambda old, new: old.least("area") < 150 <= new.least("area") and is_within(new.foreground, old.foreground),
    ),
    (
        {"postprocessing": {"score_threshold": 0.95}},
        lambda old, new: old.least("score") < 0.95 <= new.least("score") and is_within(new.foreground, old.foreground),
    ),
    ({"cleanup": {"opening_radius_px": 4}}, lambda old, new: is_within(new.foreground, old.foreground)),
    ({"cleanup": {"closing_radius_px": 5}}, lambda old, new: is_within(old.foreground, new.foreground)),
    (
        HOLED | {"cleanup": {"max_hole_area_px": 200}},
        lambda _, new: holes_px(new) == 0 < holes_px(answer(shipped, HOLED)),
    ),
    (
        {"cleanup": {"min_region_area_px": 150}},
        lambda old, new: old.least("area") < 150 <= new.least("area") and is_within(new.foreground, old.foreground),
    ),
    ({"augmentation": {"flips": ["horizontal"]}}, nearly),
    ({"augmentation": {"scales": [1.0, 1.25]}}, nearly),
    ({"crf": {"window_px": 5, "iterations": 1}}, nearly),
]


@pytest.mark.parametrize(("settings", "does_it"), WATERSHED, ids=[str(settings) for settings, _ in WATERSHED])
def test_a_setting_does_to_the_shipped_model_what_it_says(
    settings: dict[str, Any], does_it: Callable[[Answer, Answer], bool]
) -> None:
    assert does_it(plain(shipped), answer(shipped, settings))


def keys(found: Answer) -> list[tuple[float, int]]:
    return [(one.score, one.class_id) for one in found.instances]


DETECTIONS: list[tuple[dict[str, Any], Callable[[Answer, Answer], bool]]] = [
    (
        {"score_threshold": 0.6},
        lambda old, new: keys(new) == [key for key in keys(old) if key[0] > 0.6] and old.least("score") < 0.6,
    ),
    ({"top_k": 3}, lambda old, new: keys(new) == keys(old)[:3]),
    ({"nms_iou": 0.1}, lambda old, new: 0 < len(new.instances) < len(old.instances)),
    ({"nms_per_class": False}, lambda old, new: 0 < len(new.instances) < len(old.instances)),
    ({"mask_threshold": 0.8}, lambda old, new: is_within(new.foreground, old.foreground)),
]


@pytest.mark.parametrize(("settings", "does_it"), DETECTIONS, ids=[str(settings) for settings, _ in DETECTIONS])
def test_a_setting_does_to_a_detector_what_it_says(
    settings: dict[str, Any], does_it: Callable[[Answer, Answer], bool]
) -> None:
    assert len(plain(detector).instances) > 10
    assert does_it(plain(detector), answer(detector, {"postprocessing": settings}))
