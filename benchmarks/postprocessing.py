"""What the steps after the network cost, beside what else could do the same. CPU time of one thread, so that other
jobs on the machine show less (a GPU's: on the clock); medians of K.

    python benchmarks/postprocessing.py [--repeat K]

1. Morphology on a class map of 1024 × 1024 pixels and 11 classes, and on a label map of that size with 300 instances:
   where a candidate answers otherwise than `models.cleanup`, the script fails.
2. The steps as a user gets them, alone and together.
3. The CRF on this machine's devices, and suppression.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import cc3d
import cv2
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy import ndimage
from skimage import measure, morphology

from models import cleanup
from models.crf import refine
from models.masks import Instance, encode_label_rles
from models.refinement import CleanupSettings, CrfSettings, SuppressionSettings
from models.suppression import kept_instances

SIDE_PX, CLASSES, INSTANCES = 1024, 11, 300
RADIUS_PX, MAX_HOLE_PX, MIN_REGION_PX = 3, 64, 50
EIGHT = np.ones((3, 3), bool)
Ids = np.ndarray[Any, Any]


def class_map() -> Ids:
    """Large areas of 11 classes with ragged edges, specks and holes, uint8 [1024, 1024]."""
    random = np.random.default_rng(0)
    scores = np.empty((CLASSES, SIDE_PX, SIDE_PX), np.float32)
    for score in scores:
        coarse = cv2.GaussianBlur(random.normal(size=score.shape).astype(np.float32), (0, 0), 40)
        fine = cv2.GaussianBlur(random.normal(size=score.shape).astype(np.float32), (0, 0), 2)
        score[:] = coarse / coarse.std() + 0.25 * fine / fine.std()
    return scores.argmax(axis=0).astype(np.uint8)


def label_map() -> Ids:
    """300 round instances with ragged edges and holes, some of them touching, int32 [1024, 1024]."""
    random = np.random.default_rng(0)
    labels = np.zeros((SIDE_PX, SIDE_PX), np.int32)
    for label in range(1, INSTANCES + 1):
        center = tuple(int(x) for x in random.integers(20, SIDE_PX - 20, 2))
        axes = tuple(int(x) for x in random.integers(10, 30, 2))
        cv2.ellipse(labels, center, axes, float(random.uniform(0, 180)), 0, 360, label, -1)
    labels[cv2.GaussianBlur(random.normal(size=labels.shape).astype(np.float32), (0, 0), 1.5) > 0.4] = 0
    return labels


def milliseconds(work: Callable[[], object], repeat: int, clock: Callable[[], float] = time.process_time) -> float:
    work()
    times = []
    for _ in range(repeat):
        began_s = clock()
        work()
        times.append(clock() - began_s)
    return statistics.median(times) * 1e3


def each(ids: Ids, work: Callable[[Ids], Ids], margin_px: int | None = None) -> Ids:
    """`work` on the mask of every id above 0, as uint8, whole or in its box with a margin; the union of the answers."""
    union = np.zeros(ids.shape, bool)
    for own, box in enumerate(ndimage.find_objects(ids.astype(np.int32)), start=1):
        if box is None:
            continue
        rows, columns = box
        part = (slice(None), slice(None))
        if margin_px is not None:
            part = (
                slice(max(0, rows.start - margin_px), rows.stop + margin_px),
                slice(max(0, columns.start - margin_px), columns.stop + margin_px),
            )
        union[part] |= work((ids[part] == own).astype(np.uint8)).astype(bool)
    return union


def openings(ids: Ids) -> Mapping[str, Callable[[], Ids]]:
    """Where the opening of the own id is, but for background 0."""
    disk = cleanup._disk(RADIUS_PX)
    margin_px = 2 * RADIUS_PX + 1

    def by_opencv(mask: Ids) -> Ids:
        return cv2.morphologyEx(mask, cv2.MORPH_OPEN, disk)

    def by_scipy(mask: Ids) -> Ids:
        return ndimage.binary_dilation(ndimage.binary_erosion(mask, disk, border_value=1), disk)

    def by_skimage(mask: Ids) -> Ids:
        return morphology.opening(mask.astype(bool), disk, mode="ignore")

    def by_distance(mask: Ids) -> Ids:
        core = cv2.distanceTransform(mask, cv2.DIST_L2, cv2.DIST_MASK_PRECISE) > RADIUS_PX
        if not core.any():
            return core
        return cv2.distanceTransform((~core).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE) <= RADIUS_PX

    found = {
        "OpenCV, all ids at once (ours)": lambda: cleanup._opened(ids, RADIUS_PX, 0) & (ids > 0),
        "OpenCV, each id in its box": lambda: each(ids, by_opencv, margin_px),
        "OpenCV distance, each in its box": lambda: each(ids, by_distance, margin_px),
        "SciPy, each in its box": lambda: each(ids, by_scipy, margin_px),
        "scikit-image, each in its box": lambda: each(ids, by_skimage, margin_px),
    }
    if ids.max() < 2 * CLASSES:
        found["OpenCV, each id on the whole map"] = lambda: each(ids, by_opencv)
    return found


def closings(ids: Ids) -> Mapping[str, Callable[[], Ids]]:
    """Where background 0 is in the closing of some id."""
    disk = cleanup._disk(RADIUS_PX)
    margin_px = 2 * RADIUS_PX + 1

    def by_opencv(mask: Ids) -> Ids:
        return cv2.morphologyEx(mask, cv2.MORPH_CLOSE, disk)

    def by_scipy(mask: Ids) -> Ids:
        return ndimage.binary_erosion(ndimage.binary_dilation(mask, disk), disk, border_value=1)

    def by_skimage(mask: Ids) -> Ids:
        return morphology.closing(mask.astype(bool), disk, mode="ignore")

    found = {
        "OpenCV, each id in its box (ours)": lambda: cleanup._closed(ids, RADIUS_PX, 0) != ids,
        "SciPy, each in its box": lambda: each(ids, by_scipy, margin_px) & (ids == 0),
        "scikit-image, each in its box": lambda: each(ids, by_skimage, margin_px) & (ids == 0),
    }
    if ids.max() < 2 * CLASSES:
        found["OpenCV, each id on the whole map"] = lambda: each(ids, by_opencv) & (ids == 0)
    return found


def holes(ids: Ids) -> Mapping[str, Callable[[], Ids]]:
    """Where one id encloses at most MAX_HOLE_PX pixels of background 0 and nothing else."""

    def purely_background(filled: Callable[[Ids], Ids]) -> Ids:
        # What an id encloses may hold other ids: only regions of background with one id around them count.
        claimed = each(ids, filled, 1)
        regions, count = ndimage.label(ids == 0)
        whole = np.ones(count + 1, bool)
        whole[regions[~claimed]] = False
        whole[0] = False
        ringed = ndimage.grey_dilation(ids, footprint=ndimage.generate_binary_structure(2, 1))
        low = ndimage.grey_erosion(
            np.where(ids == 0, ids.max(), ids), footprint=ndimage.generate_binary_structure(2, 1)
        )
        edge = (regions > 0) & (ringed > 0)
        top, bottom = np.zeros(count + 1, np.int64), np.full(count + 1, 1 << 40)
        np.maximum.at(top, regions[edge], ringed[edge])
        np.minimum.at(bottom, regions[edge], low[edge])
        areas = np.bincount(regions.ravel())
        return (whole & (top == bottom) & (areas <= MAX_HOLE_PX))[regions]

    return {
        "OpenCV components of background (ours)": lambda: cleanup._background_holes_filled(ids, MAX_HOLE_PX, 0) != ids,
        "SciPy binary_fill_holes, each in its box": lambda: purely_background(ndimage.binary_fill_holes),
    }


def small_regions(ids: Ids) -> Mapping[str, Callable[[], Ids]]:
    def small(regions: Ids) -> Ids:
        few = np.bincount(regions.ravel()) < MIN_REGION_PX
        few[0] = False
        return few[regions]

    def by_opencv(mask: Ids) -> Ids:
        _, regions, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
        few = stats[:, cv2.CC_STAT_AREA] < MIN_REGION_PX
        few[0] = False
        return few[regions]

    return {
        "cc3d, all ids at once (ours)": lambda: cleanup._small_regions(ids, MIN_REGION_PX, 0),
        "cc3d.dust": lambda: cc3d.dust(ids, threshold=MIN_REGION_PX, connectivity=8) != ids,
        "OpenCV, each id in its box": lambda: each(ids, by_opencv, 0),
        "SciPy label, each in its box": lambda: each(ids, lambda mask: small(ndimage.label(mask, EIGHT)[0]), 0),
        "scikit-image label, all at once": lambda: small(measure.label(ids, background=0, connectivity=2)),
    }


def given_away(ids: Ids) -> Mapping[str, Callable[[], Ids]]:
    """The map without its small regions; each candidate has ties, and a distance, of its own."""
    small = cleanup._small_regions(ids, MIN_REGION_PX, None)

    def by_opencv() -> Ids:
        _, nearest = cv2.distanceTransformWithLabels(
            small.astype(np.uint8), cv2.DIST_L1, cv2.DIST_MASK_3, labelType=cv2.DIST_LABEL_PIXEL
        )
        id_of = np.zeros(int(nearest.max()) + 1, np.uint8)
        id_of[nearest[~small]] = ids[~small]
        return id_of[nearest]

    def by_scipy() -> Ids:
        rows, columns = ndimage.distance_transform_edt(small, return_distances=False, return_indices=True)
        return ids[rows, columns]

    return {
        "NumPy, from the edge inwards (ours)": lambda: cleanup._given_away(ids, small, None, may_return=True),
        "OpenCV distance, |dx| + |dy|": by_opencv,
        "SciPy distance, Euclidean": by_scipy,
    }


def compared(title: str, sets: list[Mapping[str, Callable[[], Ids]]], repeat: int, *, equal: bool = True) -> Table:
    """One row per candidate; `sets` are of the class map and, where there is one, of the label map."""
    table = Table(title=title)
    table.add_column("candidate")
    for name in ("11 classes, ms", f"{INSTANCES} instances, ms")[: len(sets)]:
        table.add_column(name, justify="right")
    for name in dict.fromkeys(name for candidates in sets for name in candidates):
        cells = []
        for candidates in sets:
            if name not in candidates:
                cells.append("")
                continue
            if equal:
                ours, theirs = next(iter(candidates.values()))(), candidates[name]()
                assert np.array_equal(ours, theirs), f"{title}: {name} differs in {(ours != theirs).sum()} pixels"
            cells.append(f"{milliseconds(candidates[name], repeat):.1f}")
        table.add_row(name, *cells)
    return table


def steps(classes: Ids, labels: Ids, repeat: int) -> Table:
    table = Table(title=f"the steps as they are used (radius {RADIUS_PX}, hole {MAX_HOLE_PX}, region {MIN_REGION_PX})")
    table.add_column("step")
    for name in ("classes, no background", "classes, background 0", "instances"):
        table.add_column(f"{name}, ms", justify="right")
    parts: dict[str, dict[str, int]] = {
        "opening": {"opening_radius_px": RADIUS_PX},
        "closing": {"closing_radius_px": RADIUS_PX},
        "holes": {"max_hole_area_px": MAX_HOLE_PX},
        "small regions": {"min_region_area_px": MIN_REGION_PX},
    }
    parts["all four"] = {key: value for part in parts.values() for key, value in part.items()}
    for name, part in parts.items():
        settings = CleanupSettings.model_validate(part)
        works: list[Callable[[], Ids]] = [
            lambda s=settings: cleanup.clean_class_ids(classes, s, background_id=None),
            lambda s=settings: cleanup.clean_class_ids(classes, s, background_id=0),
            lambda s=settings: cleanup.clean_labels(labels, s),
        ]
        table.add_row(name, *(f"{milliseconds(work, repeat):.1f}" for work in works))
    return table


def crf_answered(logits: torch.Tensor, images: torch.Tensor) -> float:
    return float(refine(logits, images, CrfSettings()).sum())


def crf_and_suppression(labels: Ids, repeat: int) -> Table:
    table = Table(title="CRF (default settings, 512 × 512) and suppression")
    table.add_column("what")
    table.add_column("ms", justify="right")
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        for channels in (3, CLASSES):
            logits = torch.randn(1, channels, 512, 512, device=device)
            images = torch.randint(0, 256, (1, 512, 512, 3), dtype=torch.uint8, device=device)
            clock = time.perf_counter if device == "cuda" else time.process_time
            work = functools.partial(crf_answered, logits, images)
            took_ms = milliseconds(work, max(1, repeat // 3), clock)
            table.add_row(f"CRF, {device}, {channels} channels", f"{took_ms:,.0f}")
    random = np.random.default_rng(0)
    # Each instance twice, the second time shifted, so that half of them go.
    rles = encode_label_rles(labels, INSTANCES) + encode_label_rles(np.roll(labels, 2, axis=1), INSTANCES)
    instances = [Instance(1, float(random.random()), (0, 0, 0, 0), 0, rle) for rle in rles]
    took_ms = milliseconds(lambda: kept_instances(instances, SuppressionSettings()), repeat)
    table.add_row(f"{len(instances)} masks of one class", f"{took_ms:.1f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=7)
    repeat = parser.parse_args().repeat
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    console = Console()
    console.print(f"one thread, load {os.getloadavg()[0]:.1f}, OpenCV {cv2.__version__}, torch {torch.__version__}")
    classes, labels = class_map(), label_map()
    both = [classes, labels]
    console.print(compared(f"opening, radius {RADIUS_PX}", [openings(ids) for ids in both], repeat))
    console.print(compared(f"closing, radius {RADIUS_PX}", [closings(ids) for ids in both], repeat))
    console.print(compared(f"holes up to {MAX_HOLE_PX} px", [holes(ids) for ids in both], repeat))
    console.print(compared(f"regions below {MIN_REGION_PX} px", [small_regions(ids) for ids in both], repeat))
    console.print(compared("giving small regions away", [given_away(classes)], repeat, equal=False))
    console.print(steps(classes, labels, repeat))
    console.print(crf_and_suppression(labels, repeat))


if __name__ == "__main__":
    main()
