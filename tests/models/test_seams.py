from __future__ import annotations

import cv2
import numpy as np
import pytest

from models.card import WatershedPostprocessing
from models.masks import Instance, decode_rle
from models.postprocessing import describe_instances, split_instances
from models.seams import InstanceEvidence, encode_runs, flood, split_in_blocks
from models.tiling import Band

SETTINGS = WatershedPostprocessing()


def landscape(seed: int, height: int, width: int, *, scale_px: float = 4.0) -> tuple[np.ndarray, np.ndarray]:
    """Interior and foreground of hilly ground: regions of all sizes, which touch, with and without markers."""
    noise = np.random.default_rng(seed).normal(size=(height, width)).astype(np.float32)
    ground = cv2.GaussianBlur(noise, (0, 0), scale_px)
    ground /= ground.std()
    foreground = 1 / (1 + np.exp(-3 * (ground + 0.2)))
    interior = 1 / (1 + np.exp(-4 * (ground - 0.7)))
    return (interior * 255).round().astype(np.uint8), (foreground * 255).round().astype(np.uint8)


def in_blocks(
    interior: np.ndarray, foreground: np.ndarray, settings: WatershedPostprocessing, *, block_px: int, halo_px: int
) -> tuple[np.ndarray, list[Instance]]:
    evidence = InstanceEvidence(*foreground.shape, settings)
    for y in range(0, len(foreground), 29):
        evidence.add(y, interior[y : y + 29], foreground[y : y + 29])
    return split_in_blocks(evidence, class_id=7, background_id=3, block_px=block_px, halo_px=halo_px)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("block_px", "halo_px"), [(64, 48), (100, 40), (512, 64)])
def test_blocks_give_exactly_the_instances_of_the_whole(seed: int, block_px: int, halo_px: int) -> None:
    interior, foreground = landscape(seed, 230, 310)
    labels = split_instances(interior, foreground, SETTINGS)
    expected = describe_instances(labels, foreground, 7)
    class_ids, instances = in_blocks(interior, foreground, SETTINGS, block_px=block_px, halo_px=halo_px)
    assert len(expected) > 60
    assert instances == expected
    assert np.array_equal(class_ids, np.where(labels > 0, 7, 3))


@pytest.mark.parametrize("seed", range(3))
def test_blocks_agree_with_split_instances_up_to_ties(seed: int) -> None:
    interior, foreground = landscape(seed, 230, 310, scale_px=6)
    labels = split_instances(interior, foreground, SETTINGS)
    _, instances = in_blocks(interior, foreground, SETTINGS, block_px=64, halo_px=60)
    assert len(instances) == labels.max()
    found = np.zeros_like(labels)
    for number, instance in enumerate(instances, start=1):
        found[decode_rle(instance.rle)] = number
    assert (found != labels).mean() < 0.002


@pytest.mark.parametrize(
    "changes", [{"min_area_px": 60}, {"min_marker_px": 25}, {"foreground_threshold": 0.3}, {"score_threshold": 0.7}]
)
def test_objects_and_markers_are_judged_as_a_whole(changes: dict) -> None:
    settings = SETTINGS.model_copy(update=changes)
    interior, foreground = landscape(9, 200, 200)
    labels = split_instances(interior, foreground, settings)
    assert not np.array_equal(labels, split_instances(interior, foreground, SETTINGS))
    class_ids, instances = in_blocks(interior, foreground, settings, block_px=50, halo_px=50)
    assert instances == describe_instances(labels, foreground, 7)
    assert np.array_equal(class_ids == 7, labels > 0)


def test_an_object_over_four_blocks_is_one() -> None:
    interior, foreground = np.zeros((2, 60, 80), np.uint8)
    foreground[20:44, 25:55] = 220
    interior[24:40, 29:51] = 200
    class_ids, (instance,) = in_blocks(interior, foreground, SETTINGS, block_px=32, halo_px=8)
    assert instance.bbox == (25.0, 20.0, 30.0, 24.0)
    assert instance.area == 24 * 30 and instance.class_id == 7
    assert instance.score == pytest.approx(220 / 255)
    assert np.array_equal(decode_rle(instance.rle), foreground > 0)
    assert np.array_equal(class_ids == 7, foreground > 0)


def test_a_region_without_markers_is_one_instance_however_long() -> None:
    interior, foreground = np.zeros((2, 40, 400), np.uint8)
    foreground[18:22, 5:395] = 200
    _, (instance,) = in_blocks(interior, foreground, SETTINGS, block_px=32, halo_px=8)
    assert instance.area == 4 * 390


def test_what_no_marker_reaches_within_the_halo_is_kept() -> None:
    interior, foreground = np.zeros((2, 40, 400), np.uint8)
    foreground[18:22, 5:395] = 200
    interior[18:22, 5:15] = 200
    class_ids, instances = in_blocks(interior, foreground, SETTINGS, block_px=32, halo_px=16)
    assert np.array_equal(class_ids == 7, foreground > 0)
    assert sum(instance.area for instance in instances) == 4 * 390
    assert len(instances) == 2


def test_nothing_and_everything() -> None:
    empty = np.zeros((50, 70), np.uint8)
    class_ids, instances = in_blocks(empty, empty, SETTINGS, block_px=20, halo_px=5)
    assert instances == [] and (class_ids == 3).all()
    full = np.full((50, 70), 255, np.uint8)
    class_ids, (instance,) = in_blocks(full, full, SETTINGS, block_px=20, halo_px=5)
    assert instance.area == 50 * 70 and instance.score == 1.0 and (class_ids == 7).all()
    assert instance.bbox == (0.0, 0.0, 70.0, 50.0)


def test_a_flood_does_not_depend_on_what_else_is_in_the_image() -> None:
    interior, foreground = landscape(11, 120, 120, scale_px=8)
    foreground = foreground // 32 * 32  # plateaus: ties everywhere
    inside = foreground >= 128
    _, markers = cv2.connectedComponents(((interior >= 128) & inside).astype(np.uint8), connectivity=4)
    alone = flood(foreground, markers, inside)
    size = (260, 330)
    large_foreground = np.random.default_rng(1).integers(0, 255, size, dtype=np.uint8)
    large_inside, large_markers = large_foreground > 60, np.zeros(size, np.int32)
    large_markers[::9, ::7] = 10_000 + np.arange(29 * 48).reshape(29, 48)
    for border in (large_inside, large_markers):
        border[99:221, 99:221] = 0
    place = np.s_[100:220, 100:220]
    large_foreground[place], large_inside[place], large_markers[place] = foreground, inside, markers
    assert np.array_equal(flood(large_foreground, large_markers, large_inside)[place], alone)


def test_bands_are_taken_and_wrong_calls_refused() -> None:
    interior, foreground = landscape(3, 90, 100)
    evidence = InstanceEvidence(90, 100, SETTINGS)
    for y in (0, 40):
        rows = slice(y, 40 if y == 0 else 90)
        evidence.add_band(Band(y, foreground[rows], interior[rows], foreground[rows]))
    _, instances = split_in_blocks(evidence, class_id=7, background_id=3)
    assert instances == in_blocks(interior, foreground, SETTINGS, block_px=40, halo_px=40)[1]
    with pytest.raises(ValueError, match="semantic"):
        evidence.add_band(Band(0, foreground, None, None))
    with pytest.raises(ValueError, match="halo"):
        split_in_blocks(evidence, class_id=7, background_id=3, block_px=10, halo_px=11)


def test_runs_that_touch_are_encoded_as_one() -> None:
    mask = np.zeros((6, 5), bool)
    mask[4:, 1] = mask[:2, 2] = mask[5, 4] = True
    rle = encode_runs(np.array([10, 12, 29]), np.array([12, 14, 30]), 6, 5)
    assert np.array_equal(decode_rle(rle), mask)
    from models.masks import encode_rle

    assert rle == encode_rle(mask)
