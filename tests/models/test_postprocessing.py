from __future__ import annotations

import numpy as np
import pytest

from models.card import WatershedPostprocessing
from models.masks import decode_rle
from models.postprocessing import describe_instances, split_instances, threshold_level

SETTINGS = WatershedPostprocessing(min_marker_px=1, min_area_px=1)


def blank(height: int = 20, width: int = 30) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((height, width), dtype=np.uint8), np.zeros((height, width), dtype=np.uint8)


def two_touching() -> tuple[np.ndarray, np.ndarray]:
    interior, foreground = blank()
    foreground[5:15, 5:25] = 255
    foreground[5:15, 14:16] = 180
    interior[6:14, 6:14] = 255
    interior[6:14, 16:24] = 255
    return interior, foreground


def test_touching_instances_are_split_at_the_boundary() -> None:
    interior, foreground = two_touching()
    labels = split_instances(interior, foreground, SETTINGS)
    assert labels.dtype == np.int32
    assert labels.max() == 2
    assert np.array_equal(labels > 0, foreground >= 128)
    assert set(labels[5:15, 5:14].ravel()) == {1}
    assert set(labels[5:15, 16:25].ravel()) == {2}


def test_foreground_without_interior_is_kept() -> None:
    interior, foreground = two_touching()
    foreground[0:3, 0:3] = 200
    labels = split_instances(interior, foreground, SETTINGS)
    assert labels.max() == 3
    assert set(labels[0:3, 0:3].ravel()) == {1}


def test_small_markers_and_small_instances_are_dropped() -> None:
    interior, foreground = two_touching()
    interior[6:14, 15:24] = 0
    interior[8, 18:20] = 255
    foreground[0:3, 0:3] = 200
    settings = WatershedPostprocessing(min_marker_px=4, min_area_px=10)
    labels = split_instances(interior, foreground, settings)
    assert labels.max() == 1
    assert labels[10, 20] == 1
    assert labels[1, 1] == 0


def test_what_scores_too_low_is_dropped() -> None:
    interior, foreground = two_touching()
    foreground[0:3, 0:3] = 150
    expected = split_instances(interior, foreground, SETTINGS)
    scores = [one.score for one in describe_instances(expected, foreground, 1)]
    assert min(scores) == scores[0] == 150 / 255
    settings = SETTINGS.model_copy(update={"score_threshold": 150 / 255})
    assert np.array_equal(split_instances(interior, foreground, settings), expected), "as much as is asked for counts"
    settings = SETTINGS.model_copy(update={"score_threshold": 151 / 255})
    assert np.array_equal(split_instances(interior, foreground, settings), np.maximum(expected - 1, 0))


def test_settings_from_before_scores_counted_stay_what_they_were() -> None:
    assert "score_threshold" not in WatershedPostprocessing().model_dump_json()
    chosen = WatershedPostprocessing(score_threshold=0.5)
    assert WatershedPostprocessing.model_validate_json(chosen.model_dump_json()) == chosen


def test_labels_are_in_order_of_first_pixel() -> None:
    interior, foreground = blank()
    for row, column in ((12, 2), (1, 20), (1, 3)):
        interior[row : row + 4, column : column + 4] = 255
        foreground[row : row + 4, column : column + 4] = 255
    labels = split_instances(interior, foreground, SETTINGS)
    assert [int(labels[1, 3]), int(labels[1, 20]), int(labels[12, 2])] == [1, 2, 3]


def test_interior_outside_the_foreground_marks_nothing() -> None:
    interior, foreground = blank()
    interior[:] = 255
    assert split_instances(interior, foreground, SETTINGS).max() == 0


def test_full_image() -> None:
    interior, foreground = np.full((2, 7, 9), 255, dtype=np.uint8)
    labels = split_instances(interior, foreground, SETTINGS)
    assert np.array_equal(labels, np.ones((7, 9), dtype=np.int32))
    (instance,) = describe_instances(labels, foreground, 1)
    assert instance.bbox == (0.0, 0.0, 9.0, 7.0)
    assert instance.area == 63
    assert instance.score == 1.0


def test_descriptions_are_those_of_the_label_map() -> None:
    interior, foreground = two_touching()
    labels = split_instances(interior, foreground, SETTINGS)
    instances = describe_instances(labels, foreground, 7)
    assert len(instances) == 2
    for label, instance in enumerate(instances, start=1):
        mask = labels == label
        rows, columns = np.nonzero(mask)
        assert instance.class_id == 7
        assert instance.area == mask.sum()
        assert instance.bbox == (
            columns.min(),
            rows.min(),
            columns.max() - columns.min() + 1,
            rows.max() - rows.min() + 1,
        )
        assert instance.score == pytest.approx(foreground[mask].mean() / 255)
        assert np.array_equal(decode_rle(instance.rle), mask)
    assert describe_instances(np.zeros_like(labels), foreground, 7) == []


@pytest.mark.parametrize(("threshold", "level"), [(0.5, 128), (1 / 255, 1), (0.2, 51), (0.999, 255)])
def test_threshold_level(threshold: float, level: int) -> None:
    assert threshold_level(threshold) == level


def test_equal_maps_give_equal_labels() -> None:
    random = np.random.default_rng(0)
    foreground = random.integers(0, 256, (64, 64), dtype=np.uint8)
    interior = np.minimum(foreground, random.integers(0, 256, (64, 64), dtype=np.uint8))
    first = split_instances(interior, foreground, SETTINGS)
    assert first.max() > 10
    assert np.array_equal(first, split_instances(interior.copy(), foreground.copy(), SETTINGS))
    assert np.array_equal(np.unique(first), np.arange(first.max() + 1))
