from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

from models.architectures import untrained_card
from models.card import ArgmaxPostprocessing, Card, WatershedPostprocessing


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
