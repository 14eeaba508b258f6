from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage

from models.cleanup import clean_class_ids, clean_labels, clean_mask
from models.refinement import CleanupSettings

EIGHT = np.ones((3, 3), dtype=bool)
SHAPES = st.tuples(st.integers(1, 16), st.integers(1, 16))
#: Blocks, not single pixels: noise has neither openings nor holes.
MAPS = SHAPES.flatmap(lambda shape: arrays(np.uint8, shape, elements=st.integers(0, 3))).flatmap(
    lambda cells: st.integers(1, 3).map(lambda size_px: np.kron(cells, np.ones((size_px, size_px), np.uint8)))
)
BACKGROUNDS = st.sampled_from([None, 0, 2])
RADII = st.integers(1, 4)
AREAS = st.integers(2, 60)


def disk(radius_px: int) -> np.ndarray:
    y, x = np.mgrid[-radius_px : radius_px + 1, -radius_px : radius_px + 1]
    return x * x + y * y <= radius_px * radius_px


def opening(mask: np.ndarray, radius_px: int) -> np.ndarray:
    eroded = ndimage.binary_erosion(mask, disk(radius_px), border_value=1)
    return ndimage.binary_dilation(eroded, disk(radius_px), border_value=0)


def closing(mask: np.ndarray, radius_px: int) -> np.ndarray:
    dilated = ndimage.binary_dilation(mask, disk(radius_px), border_value=0)
    return ndimage.binary_erosion(dilated, disk(radius_px), border_value=1)


def holes_of(mask: np.ndarray, max_area_px: int) -> list[np.ndarray]:
    holes, count = ndimage.label(ndimage.binary_fill_holes(mask) & ~mask)
    regions = [holes == index for index in range(1, count + 1)]
    return [region for region in regions if region.sum() <= max_area_px]


def small_regions(mask: np.ndarray, min_area_px: int) -> np.ndarray:
    regions, _ = ndimage.label(mask, EIGHT)
    return mask & (np.bincount(regions.ravel())[regions] < min_area_px)


def things(class_ids: np.ndarray, background_id: int | None) -> list[int]:
    return [int(class_id) for class_id in np.unique(class_ids) if class_id != background_id]


def given_away(
    class_ids: np.ndarray, given_px: np.ndarray, background_id: int | None, *, may_return: bool
) -> np.ndarray:
    """Round by round, pixel by pixel."""
    settled = {(int(y), int(x)): int(class_ids[y, x]) for y, x in np.argwhere(~given_px)}
    waiting = {(int(y), int(x)) for y, x in np.argwhere(given_px)}
    while True:
        newly = {}
        for y, x in waiting:
            beside = {settled.get(at, -1) for at in ((y, x + 1), (y, x - 1), (y + 1, x), (y - 1, x))}
            beside -= {-1} if may_return else {-1, int(class_ids[y, x])}
            if beside:
                newly[y, x] = min(beside)
        if not newly:
            break
        settled |= newly
        waiting -= newly.keys()
    expected = class_ids.copy()
    for at in waiting:
        expected[at] = class_ids[at] if background_id is None else background_id
    for at, class_id in settled.items():
        expected[at] = class_id
    return expected


@given(MAPS, BACKGROUNDS, RADII)
@settings(max_examples=60, deadline=None)
def test_opening_leaves_each_class_its_binary_opening(ids: np.ndarray, background_id: int | None, radius: int) -> None:
    opened = clean_class_ids(ids, CleanupSettings(opening_radius_px=radius), background_id=background_id)
    stays = np.zeros(ids.shape, bool) if background_id is None else ids == background_id
    for own in things(ids, background_id):
        stays |= opening(ids == own, radius)
    assert np.array_equal(opened, given_away(ids, ~stays, background_id, may_return=False))
    if background_id is not None:
        for own in things(ids, background_id):
            assert np.array_equal((opened == own) & (ids == own), opening(ids == own, radius))


@given(MAPS, BACKGROUNDS, RADII)
@settings(max_examples=60, deadline=None)
def test_closing_is_scipys_class_by_class(ids: np.ndarray, background_id: int | None, radius: int) -> None:
    expected = ids.copy()
    free = np.ones(ids.shape, bool) if background_id is None else ids == background_id
    for own in things(ids, background_id):
        gained = closing(expected == own, radius) & (expected != own) & free
        expected[gained] = own
        free &= ~gained
    closed = clean_class_ids(ids, CleanupSettings(closing_radius_px=radius), background_id=background_id)
    assert np.array_equal(closed, expected)


@given(MAPS, BACKGROUNDS, AREAS)
@settings(max_examples=60, deadline=None)
def test_holes_are_scipys_class_by_class(ids: np.ndarray, background_id: int | None, max_area: int) -> None:
    expected = ids.copy()
    for own in things(ids, background_id):
        for hole in holes_of(expected == own, max_area):
            if background_id is None or (ids[hole] == background_id).all():
                expected[hole] = own
    filled = clean_class_ids(ids, CleanupSettings(max_hole_area_px=max_area), background_id=background_id)
    assert np.array_equal(filled, expected)


@given(MAPS, BACKGROUNDS, AREAS)
@settings(max_examples=60, deadline=None)
def test_small_regions_are_scipys_and_none_is_left(ids: np.ndarray, background_id: int | None, min_area: int) -> None:
    cleaned = clean_class_ids(ids, CleanupSettings(min_region_area_px=min_area), background_id=background_id)
    small = np.zeros(ids.shape, bool)
    for own in things(ids, background_id):
        small |= small_regions(ids == own, min_area)
    assert np.array_equal(cleaned, given_away(ids, small, background_id, may_return=True))
    if not small.all():
        for own in things(cleaned, background_id):
            assert not small_regions(cleaned == own, min_area).any()


@given(MAPS, st.integers(0, 3), st.integers(0, 3), st.integers(0, 40), st.integers(0, 30))
@settings(max_examples=60, deadline=None)
def test_a_mask_is_cleaned_by_scipys_definitions(
    ids: np.ndarray, opening_radius: int, closing_radius: int, max_hole: int, min_region: int
) -> None:
    mask = ids > 0
    chosen = CleanupSettings(
        opening_radius_px=opening_radius,
        closing_radius_px=closing_radius,
        max_hole_area_px=max_hole,
        min_region_area_px=min_region,
    )
    expected = opening(mask, opening_radius) if opening_radius else mask.copy()
    expected = closing(expected, closing_radius) if closing_radius else expected
    for hole in holes_of(expected, max_hole):
        expected |= hole
    expected = expected & ~small_regions(expected, min_region)
    assert np.array_equal(clean_mask(mask, chosen), expected)
    # A mask and a class on a background are one thing, and so is a single instance.
    as_classes = clean_class_ids(mask.astype(np.uint8), chosen, background_id=0)
    assert np.array_equal(as_classes, expected.astype(np.uint8))
    assert np.array_equal(clean_labels(mask.astype(np.int32), chosen), expected.astype(np.int32))


def in_order_of_first_pixel(labels: np.ndarray) -> np.ndarray:
    present = [int(label) for label in dict.fromkeys(labels.ravel().tolist()) if label]
    table = np.zeros(int(labels.max(initial=0)) + 1, np.int32)
    table[present] = np.arange(1, len(present) + 1)
    return table[labels]


@pytest.mark.parametrize("spread", [1, 1_000, 100_000])
@given(MAPS, st.integers(0, 3), st.integers(0, 3), st.integers(0, 30))
@settings(max_examples=60, deadline=None)
def test_each_instance_is_cleaned_by_itself(
    spread: int, ids: np.ndarray, opening_radius: int, closing_radius: int, min_region: int
) -> None:
    """Also with labels that do not fit into 8 or 16 bits."""
    labels = ids.astype(np.int32) + np.where(ids > 0, (spread - 1) * np.int32(ids > 1), 0).astype(np.int32)
    chosen = CleanupSettings(
        opening_radius_px=opening_radius, closing_radius_px=closing_radius, min_region_area_px=min_region
    )
    expected = labels.copy()
    present = things(labels, 0)
    if opening_radius:
        for own in present:
            expected[(labels == own) & ~opening(labels == own, opening_radius)] = 0
    for own in present:
        if closing_radius:
            expected[closing(expected == own, closing_radius) & (expected == 0)] = own
    for own in present:
        expected[small_regions(expected == own, min_region)] = 0
    cleaned = clean_labels(labels, chosen)
    assert cleaned.dtype == np.int32
    assert np.array_equal(cleaned, in_order_of_first_pixel(expected))


def test_neither_a_car_on_the_road_nor_a_hole_that_two_share_is_a_hole() -> None:
    road, car, sky = 1, 2, 0
    ids = np.full((20, 30), sky, np.uint8)
    ids[2:18, 2:28] = road
    ids[5:9, 5:9] = car
    ids[12:14, 5:7] = sky
    ids[5:9, 15:17], ids[5:9, 17:20], ids[6:8, 16:18] = road, car, sky
    chosen = CleanupSettings(max_hole_area_px=1000)
    filled = clean_class_ids(ids, chosen, background_id=sky)
    expected = ids.copy()
    expected[12:14, 5:7] = road
    assert np.array_equal(filled, expected)
    # Where nothing is background, everything inside is a hole (and the road, but for the limit, one in the sky).
    chosen = CleanupSettings(max_hole_area_px=100)
    assert (clean_class_ids(ids, chosen, background_id=None)[2:18, 2:28] == road).all()


def test_a_thin_class_gives_way_to_its_neighbours() -> None:
    ids = np.zeros((20, 20), np.uint8)
    ids[:, 10:] = 1
    ids[:, 9:11] = 7
    opened = clean_class_ids(ids, CleanupSettings(opening_radius_px=2), background_id=None)
    assert np.array_equal(opened, np.repeat([[0] * 10 + [1] * 10], 20, axis=0).astype(np.uint8))


def test_what_one_class_gained_by_closing_no_later_one_takes() -> None:
    ids = np.full((9, 9), 3, np.uint8)
    ids[3:6, 3:6] = [[0, 1, 0], [1, 2, 1], [0, 1, 0]]
    # The corners close over the centre, then the edges would, then what is around over all of it.
    expected = np.full((9, 9), 3, np.uint8)
    expected[4, 4] = 0
    assert np.array_equal(clean_class_ids(ids, CleanupSettings(closing_radius_px=2), background_id=None), expected)


@pytest.mark.parametrize("background_id", [None, 0])
def test_areas_at_the_limits(background_id: int | None) -> None:
    ids = np.ones((12, 12), np.uint8)
    ids[4:6, 4:6] = 0
    for max_area, remains in ((3, 4), (4, 0)):
        filled = clean_class_ids(ids, CleanupSettings(max_hole_area_px=max_area), background_id=background_id)
        assert (filled == 0).sum() == remains
    for min_area, remains in ((4, 4), (5, 0)):
        kept = clean_class_ids(1 - ids, CleanupSettings(min_region_area_px=min_area), background_id=background_id)
        assert (kept == 1).sum() == remains


def test_the_side_of_the_image_eats_nothing() -> None:
    full = np.full((9, 12), 255, np.uint8)
    chosen = CleanupSettings(opening_radius_px=3, closing_radius_px=3, max_hole_area_px=50, min_region_area_px=50)
    for background_id in (None, 0):
        assert np.array_equal(clean_class_ids(full, chosen, background_id=background_id), full)
    assert np.array_equal(clean_mask(full > 0, chosen), full > 0)


def test_nothing_asked_for_is_nothing_changed_and_inputs_stay_as_they_are() -> None:
    random = np.random.default_rng(0)
    ids = random.integers(0, 5, (30, 40), dtype=np.uint8)
    labels = in_order_of_first_pixel(ids.astype(np.int32))
    assert np.array_equal(clean_class_ids(ids, CleanupSettings(), background_id=0), ids)
    assert np.array_equal(clean_labels(labels, CleanupSettings()), labels)
    chosen = CleanupSettings(opening_radius_px=1, closing_radius_px=2, max_hole_area_px=9, min_region_area_px=9)
    before = ids.copy(), labels.copy()
    first = clean_class_ids(ids, chosen, background_id=None)
    assert not np.array_equal(first, ids)
    assert np.array_equal(first, clean_class_ids(ids, chosen, background_id=None))
    clean_labels(labels, chosen)
    assert np.array_equal(ids, before[0]) and np.array_equal(labels, before[1])
    ids.flags.writeable = False
    assert np.array_equal(clean_class_ids(ids, chosen, background_id=None), first)
