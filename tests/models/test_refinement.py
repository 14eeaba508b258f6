from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from models.refinement import AugmentationSettings, CleanupSettings, CrfSettings, SuppressionSettings


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        (AugmentationSettings, {"flips": ("vertical", "vertical")}, "a view counts once"),
        (AugmentationSettings, {"scales": (1.0, 1.0)}, "a view counts once"),
        (AugmentationSettings, {"scales": ()}, "at least 1"),
        (AugmentationSettings, {"scales": (0.0,)}, "greater than or equal to 0.125"),
        (CrfSettings, {"window_px": 10}, "must be odd"),
        (CrfSettings, {"bilateral_weight": float("nan")}, "finite number"),
        (CrfSettings, {"smoothness_sigma_px": 0}, "greater than 0"),
        (CleanupSettings, {"opening_radius_px": -1}, "greater than or equal to 0"),
        (SuppressionSettings, {"iou_threshold": 1.5}, "less than or equal to 1"),
        (SuppressionSettings, {"max_count": 0}, "greater than or equal to 1"),
    ],
)
def test_what_cannot_be_meant_is_refused(kind: type[BaseModel], given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        kind.model_validate(given)


@pytest.mark.parametrize(
    "settings",
    [
        AugmentationSettings(flips=("both",), scales=(0.5, 1.0)),
        CrfSettings(iterations=2),
        CleanupSettings(opening_radius_px=2, min_region_area_px=20),
        SuppressionSettings(iou_threshold=None, max_count=100),
    ],
)
def test_settings_survive_the_json_of_a_card(settings: BaseModel) -> None:
    assert type(settings).model_validate_json(settings.model_dump_json()) == settings


def test_views_are_every_scale_with_and_without_every_flip() -> None:
    settings = AugmentationSettings(flips=("horizontal", "both"), scales=(1.0, 0.5))
    assert settings.views == (
        (1.0, None), (1.0, "horizontal"), (1.0, "both"), (0.5, None), (0.5, "horizontal"), (0.5, "both"),
    )  # fmt: skip
    assert AugmentationSettings().views == ((1.0, None),)


def test_cleanup_knows_when_it_does_nothing() -> None:
    assert CleanupSettings().does_nothing
    assert CleanupSettings(min_region_area_px=1).does_nothing
    assert not CleanupSettings(max_hole_area_px=1).does_nothing
    assert not CleanupSettings(min_region_area_px=2).does_nothing
