"""Polygons give back the masks that they were made of."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from scipy import ndimage

from pipeline.insight.export.polygons import Points, object_polygon, region_polygons

SIZE = (60, 80)


def drawn(points: Points) -> NDArray[np.bool_]:
    """As Ultralytics fills a polygon: even-odd, its outline too, whole pixels."""
    canvas = np.zeros(SIZE, np.uint8)
    cv2.fillPoly(canvas, [points.astype(np.int32)], 1)
    return canvas.astype(bool)


def sampled(points: Points) -> NDArray[np.bool_]:
    """As pycocotools does: pixels whose centres are inside."""
    rles = coco_mask.frPyObjects([points.ravel().tolist()], *SIZE)
    return coco_mask.decode(coco_mask.merge(rles)).astype(bool)


def iou(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    return float((one & other).sum() / (one | other).sum())


def disc(x: float, y: float, radius: float) -> NDArray[np.bool_]:
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    return (rows - y) ** 2 + (columns - x) ** 2 <= radius**2


def test_a_disc_comes_back_exactly() -> None:
    mask = disc(40, 30, 17)
    points = object_polygon(mask)
    assert points is not None and (drawn(points) == mask).all()
    points = object_polygon(mask, finer=2)
    assert points is not None and (sampled(points) == mask).all()


def test_a_hole_stays_a_hole() -> None:
    mask = disc(40, 30, 25) & ~disc(33, 30, 8) & ~disc(53, 28, 4)
    points = object_polygon(mask)
    assert points is not None and (drawn(points) == mask).all()
    points = object_polygon(mask, finer=2)
    assert points is not None and iou(sampled(points), mask) > 0.98


def test_parts_are_joined_by_a_bridge() -> None:
    mask = disc(15, 30, 10) | disc(60, 25, 14)
    polygons = region_polygons(mask)
    assert len(polygons) == 2
    together = np.logical_or.reduce([drawn(points) for points in polygons])
    assert (together == mask).all()
    points = object_polygon(mask)
    assert points is not None
    extra = drawn(points) & ~mask
    assert (drawn(points) & mask == mask).all() and 0 < extra.sum() < 2 * (60 - 15), "one line between them"


def test_regions_touch_by_corners() -> None:
    mask = np.zeros(SIZE, bool)
    mask[5, 5] = mask[6, 6] = mask[20, 30] = True
    assert len(region_polygons(mask)) == ndimage.label(mask, np.ones((3, 3)))[1] == 2


@pytest.mark.parametrize("mask", [np.zeros(SIZE, bool), np.ones(SIZE, bool)])
def test_nothing_and_everything(mask: NDArray[np.bool_]) -> None:
    points = object_polygon(mask)
    assert (points is None) == (not mask.any())
    if points is not None:
        assert drawn(points).all() and points.max() < max(SIZE)


def test_one_pixel_has_a_polygon() -> None:
    mask = np.zeros(SIZE, bool)
    mask[59, 79] = True
    points = object_polygon(mask)
    assert points is not None and len(points) >= 3 and (drawn(points) == mask).all()
    points = object_polygon(mask, finer=2, tolerance_px=0.35)
    assert points is not None and (sampled(points) == mask).all()


def test_any_mask_comes_back() -> None:
    random = np.random.default_rng(1)
    for _ in range(20):
        mask = ndimage.gaussian_filter(random.random(SIZE), 3) > 0.5
        exact = np.logical_or.reduce([drawn(points) for points in region_polygons(mask)])
        # A bridge to a hole may cross another one.
        assert (exact & mask == mask).all() and iou(exact, mask) > 0.99
        finer = [sampled(points) for points in region_polygons(mask, finer=2, tolerance_px=0.35)]
        assert iou(np.logical_or.reduce(finer), mask) > 0.97
