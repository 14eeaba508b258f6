from __future__ import annotations

from typing import Any

import pytest

from models.architectures import untrained_card
from models.overrides import parse_settings, with_settings


def test_lines_become_a_nested_mapping() -> None:
    lines = ["postprocessing.min_area_px=30", 'augmentation.flips=["horizontal"]', "size_policy.kind=tile"]
    assert parse_settings(lines) == {
        "postprocessing": {"min_area_px": 30},
        "augmentation": {"flips": ["horizontal"]},
        "size_policy": {"kind": "tile"},
    }


@pytest.mark.parametrize("lines", [["min_area"], ["=3"], ["a..b=3"], ["crf=3", "crf.window_px=5"]])
def test_lines_that_say_nothing(lines: list[str]) -> None:
    with pytest.raises(ValueError, match=r"KEY=VALUE|has a value already"):
        parse_settings(lines)


def test_what_is_not_named_stays() -> None:
    card = untrained_card("m", task="instance")
    changed = with_settings(card, {"postprocessing": {"min_area_px": 30}})
    assert changed.postprocessing.min_area_px == 30  # type: ignore[union-attr]
    assert changed.postprocessing.min_marker_px == card.postprocessing.min_marker_px  # type: ignore[union-attr]
    assert with_settings(card, {}) == card


def test_another_kind_leaves_nothing_of_the_old() -> None:
    card = with_settings(untrained_card("m"), {"size_policy": {"kind": "resize", "short_side_px": 64}})
    tiled = with_settings(card, {"size_policy": {"kind": "tile", "tile_px": 128}})
    assert tiled.size_policy.model_dump() == {"kind": "tile", "tile_px": 128, "overlap_px": 0}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"posprocessing": {}}, "did you mean 'postprocessing'"),
        ({"classes": []}, "cannot be set for a run"),
        ({"postprocessing": {"min_aera_px": 3}}, "did you mean 'min_area_px'"),
        ({"postprocessing": {"min_area_px": -3}}, "postprocessing.min_area_px does not fit"),
        ({"postprocessing": {"kind": "argmax"}}, "the settings do not fit model 'm': .* needs postprocessing"),
        ({"size_policy": {"kind": "resize"}}, r"^size_policy\.short_side_px does not fit .*: it has to be set too"),
        ({"size_policy": "resize"}, r"^size_policy\.short_side_px does not fit .*: it has to be set too"),
        ({"size_policy": {"kind": "tile", "tile_px": 32, "overlap_px": 32}}, "smaller than tile_px"),
        ({"cleanup": {"opening_radius": 3}}, "did you mean 'opening_radius_px'"),
        ({"crf": {"window": 3}}, "did you mean 'window_px'"),
    ],
)
def test_what_does_not_fit_is_named(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        with_settings(untrained_card("m", task="instance"), settings)
