from __future__ import annotations

import json
import subprocess
import sys

import pytest
from pydantic import ValidationError

from models.architectures import untrained_card
from models.card import (
    ArgmaxPostprocessing,
    Card,
    DetectionsPostprocessing,
    NativeSize,
    Preprocessing,
    WatershedPostprocessing,
)


def changed(card: Card, **changes: object) -> Card:
    return Card.model_validate({**card.model_dump(), **changes})


def test_json_round_trip() -> None:
    for task, names in (("semantic", ("road", "tree", "sky")), ("instance", ("background", "nucleus"))):
        card = untrained_card("a-model", task=task, class_names=names)
        assert Card.model_validate_json(card.model_dump_json()) == card


def test_is_frozen_and_refuses_unknown_fields() -> None:
    card = untrained_card("a-model")
    with pytest.raises(ValidationError, match="frozen"):
        card.name = "other"  # type: ignore[misc]
    with pytest.raises(ValidationError, match="surprise"):
        changed(card, surprise=1)


@pytest.mark.parametrize("name", ["", "Nuclei", "a b", "../x", "1st", "a_b", "a/b"])
def test_names_are_safe_in_paths(name: str) -> None:
    with pytest.raises(ValidationError, match="name"):
        untrained_card(name)


def test_parts_must_agree() -> None:
    semantic = untrained_card("a-model")
    instance = untrained_card("a-model", task="instance", class_names=("background", "nucleus"))
    with pytest.raises(ValidationError, match="unique"):
        changed(semantic, classes=[semantic.classes[0], semantic.classes[0]])
    with pytest.raises(ValidationError, match="background_id 9"):
        changed(semantic, background_id=9)
    with pytest.raises(ValidationError, match="needs postprocessing 'argmax'"):
        changed(semantic, postprocessing=WatershedPostprocessing().model_dump())
    with pytest.raises(ValidationError, match="needs postprocessing 'watershed'"):
        changed(instance, postprocessing=ArgmaxPostprocessing().model_dump())
    with pytest.raises(ValidationError, match="exactly two classes"):
        untrained_card("a-model", task="instance", class_names=("background", "nucleus", "debris"))


def test_channels_palette_and_foreground() -> None:
    card = untrained_card("a-model", task="instance", class_names=("background", "nucleus"))
    assert card.network_channels == 3
    assert card.foreground_id == 1
    assert len(card.palette) == 2
    semantic = untrained_card("a-model", class_names=("background", "a", "b"))
    assert semantic.network_channels == 3
    assert semantic.class_names() == {0: "background", 1: "a", 2: "b"}
    with pytest.raises(ValueError, match="no single foreground"):
        _ = semantic.foreground_id


def test_palette_has_gray_where_ids_are_missing() -> None:
    card = untrained_card("a-model", class_names=("a", "b"))
    classes = [{**card.classes[0].model_dump(), "id": 0}, {**card.classes[1].model_dump(), "id": 3}]
    palette = changed(card, classes=classes).palette
    assert palette == (card.classes[0].color, (128, 128, 128), (128, 128, 128), card.classes[1].color)


def test_with_metrics_replaces_them() -> None:
    card = untrained_card("a-model").with_metrics({"val": {"mean_iou": 0.5}})
    assert card.metrics == {"val": {"mean_iou": 0.5}}


def test_cards_need_no_torch() -> None:
    code = "import sys, models.card, models.file; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_cards_of_the_first_release_are_read() -> None:
    body = untrained_card("a-model").model_dump(mode="json")
    old = {**body, "size_policy": "native", "pools_whole_image": False}
    old["preprocessing"] = {"normalization": "per_image", "std_floor": 1.0}
    card = Card.model_validate_json(json.dumps(old))
    assert card.size_policy == NativeSize()
    assert card.preprocessing == Preprocessing()
    assert card.input_channels == 3


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("squeeze", "size_policy"),
        ({"kind": "resize"}, "short_side_px"),
        ({"kind": "resize", "short_side_px": 100, "long_side_px": 100}, "must be above short_side_px 100"),
        ({"kind": "letterbox", "height_px": 0, "width_px": 5}, "height_px"),
        ({"kind": "tile", "tile_px": 64, "overlap_px": 64}, "overlap_px 64 must be smaller than tile_px 64"),
        ({"kind": "tile", "tile_px": 64, "stride": 3}, "stride"),
    ],
)
def test_size_policies_that_make_no_sense(policy: object, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        changed(untrained_card("a-model"), size_policy=policy)


@pytest.mark.parametrize(
    ("preprocessing", "message"),
    [
        ({"normalization": "imagenet", "bands": [0, 1, 2, 3]}, "'imagenet' is for 3 bands, got 4"),
        ({"normalization": "mean_std"}, "needs mean"),
        ({"normalization": "mean_std", "mean": [0.1], "std": [1, 1, 1]}, "mean has 1 numbers for 3 bands"),
        ({"normalization": "mean_std", "mean": [0, 0, 0], "std": [0, 1, 1]}, "greater than 0"),
        ({"normalization": "unit", "mean": [0, 0, 0]}, "no other has it"),
        ({"bands": []}, "bands"),
        ({"bands": [-1]}, "bands"),
        ({"dtype": "int8"}, "dtype"),
        ({"value_range": [3, 3]}, "from low to high"),
    ],
)
def test_preprocessing_that_makes_no_sense(preprocessing: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Preprocessing.model_validate(preprocessing)


def test_detections_have_any_number_of_classes() -> None:
    body = untrained_card("a-model", class_names=("background", "a", "b", "c")).model_dump()
    body |= {"task": "instance", "postprocessing": DetectionsPostprocessing().model_dump()}
    card = Card.model_validate(body)
    assert card.network_channels == 4
    with pytest.raises(ValueError, match="no single foreground"):
        _ = card.foreground_id
    with pytest.raises(ValidationError, match="needs postprocessing 'argmax'"):
        Card.model_validate(body | {"task": "semantic"})
    with pytest.raises(ValidationError, match="background as its first class"):
        Card.model_validate(body | {"background_id": 2})
    with pytest.raises(ValidationError, match="its size_policy is 'native' or 'tile', not 'resize'"):
        Card.model_validate(body | {"size_policy": {"kind": "resize", "short_side_px": 9}})
    with pytest.raises(ValidationError, match="a model of detections needs an overlap_px"):
        Card.model_validate(body | {"size_policy": {"kind": "tile", "tile_px": 256}})
    Card.model_validate(body | {"size_policy": {"kind": "tile", "tile_px": 256, "overlap_px": 64}})
