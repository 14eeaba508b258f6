"""The measurement behind 0011-rle-encoder.md: ways from a label map to COCO run lengths. Prints CPU milliseconds of one
thread for a map, and whether all ways give the same bytes. `faster-coco-eval` is measured where it is installed."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from models.masks import encode_label_rles

Labels = np.ndarray
Rles = list[dict[str, Any]]


def cells(height: int, width: int, count: int, radius_px: int, seed: int) -> tuple[Labels, int]:
    """Ellipses that may touch, numbered from 1; those that are covered whole are not counted."""
    random = np.random.default_rng(seed)
    labels = np.zeros((height, width), np.int32)
    for number in range(1, count + 1):
        at = (int(random.integers(width)), int(random.integers(height)))
        axes = tuple(int(value) for value in random.integers(radius_px // 2, radius_px + 1, 2))
        cv2.ellipse(labels, at, axes, float(random.integers(180)), 0, 360, number, -1)
    present = np.unique(labels)
    return np.searchsorted(present, labels).astype(np.int32), len(present) - 1


def street(seed: int) -> tuple[Labels, int]:
    """11 classes over the whole of 480 × 360."""
    random = np.random.default_rng(seed)
    coarse = random.normal(size=(9, 12, 11)).astype(np.float32)
    fine = np.dstack([cv2.resize(coarse[..., i], (480, 360), interpolation=cv2.INTER_CUBIC) for i in range(11)])
    present, labels = np.unique(fine.argmax(-1), return_inverse=True)
    return (labels.reshape(360, 480) + 1).astype(np.int32), len(present)


def each_whole(labels: Labels, count: int) -> Rles:
    """pycocotools on the mask of one object after the other."""
    return [coco_mask.encode(np.asfortranarray(labels == number, np.uint8)) for number in range(1, count + 1)]


def all_whole(labels: Labels, count: int) -> Rles:
    """pycocotools on all masks at once: memory grows with pixels times objects."""
    masks = labels[..., None] == np.arange(1, count + 1)
    return coco_mask.encode(np.asfortranarray(masks, np.uint8))


def faster_coco(labels: Labels, count: int) -> Rles:
    from faster_coco_eval.core import mask as faster_mask

    return [faster_mask.encode(np.asfortranarray(labels == number, np.uint8)) for number in range(1, count + 1)]


def numpy_strings(labels: Labels, count: int) -> Rles:
    """Our pass, and COCO's five-bit groups written by NumPy for all objects together."""
    height, width = labels.shape
    columns = cv2.transpose(labels).ravel()
    starts = np.concatenate(([0], np.flatnonzero(columns[1:] != columns[:-1]) + 1))
    ends = np.append(starts[1:], columns.size)
    values = columns[starts]
    keep = values > 0
    starts, ends, values = starts[keep], ends[keep], values[keep]
    order = np.argsort(values, kind="stable")
    edges = np.stack([starts[order], ends[order]], axis=1).ravel()
    bounds = 2 * np.searchsorted(values[order], np.arange(1, count + 2))
    # Every object: its edges, with 0 before and the size of the map behind, unless that is where it ends.
    sizes = np.diff(bounds)
    owner_starts = bounds[:-1] + np.arange(count)
    padded = np.empty(edges.size + 2 * count, np.int64)
    at_padded = np.arange(edges.size) + np.repeat(2 * np.arange(count) + 1, sizes)
    padded[at_padded] = edges
    padded[bounds[:-1] + 2 * np.arange(count)] = 0
    padded[bounds[1:] + 2 * np.arange(count) + 1] = columns.size
    steps = np.diff(padded)
    inside = np.ones(steps.size, np.bool_)
    inside[(bounds[1:] + 2 * np.arange(count) + 1)[:-1]] = False
    counts = steps[inside]
    position = np.arange(counts.size) - np.repeat(owner_starts, sizes + 1)
    x = counts.copy()
    late = np.flatnonzero(position > 2)
    x[late] -= counts[late - 2]
    drop = (counts == 0) & (position == np.repeat(sizes, sizes + 1)) & (position > 0)
    groups = np.empty((counts.size, 7), np.uint8)
    used = np.zeros((counts.size, 7), np.bool_)
    more = ~drop
    for k in range(7):
        low = (x & 31).astype(np.uint8)
        x >>= 5
        used[:, k] = more
        goes_on = np.where(low & 16, x != -1, x != 0)
        groups[:, k] = low + np.where(goes_on, np.uint8(32 + 48), np.uint8(48))
        more = more & goes_on
        if not more.any():
            break
    text = groups[used].tobytes()
    lengths = used.sum(1)
    stops = np.concatenate(([0], np.cumsum(np.add.reduceat(lengths, owner_starts)))) if count else [0]
    return [{"size": [height, width], "counts": text[stops[i] : stops[i + 1]]} for i in range(count)]


WAYS: dict[str, Callable[[Labels, int], Rles]] = {
    "ours: one pass over the map": encode_label_rles,
    "the same, strings by NumPy": numpy_strings,
    "pycocotools, object by object": each_whole,
    "pycocotools, all at once": all_whole,
    "faster-coco-eval, object by object": faster_coco,
}


def main() -> None:
    cv2.setNumThreads(1)
    ways = {name: way for name, way in WAYS.items() if way is not faster_coco}
    if importlib.util.find_spec("faster_coco_eval"):
        ways = WAYS
    maps = {
        "480×360, 11 classes": [street(seed) for seed in range(8)],
        "256×256, 30 objects": [cells(256, 256, 30, 12, seed) for seed in range(8)],
        "1024×1024, 400 objects": [cells(1024, 1024, 400, 16, seed) for seed in range(3)],
        "4000×3000, 60 large objects": [cells(3000, 4000, 60, 400, 0)],
    }
    for what, some in maps.items():
        answers: dict[str, list[bytes]] = {}
        best_s = dict.fromkeys(ways, float("inf"))
        for _ in range(5):  # in turns, so that a change of clock speed meets them all
            for name, way in ways.items():
                if name == "pycocotools, all at once" and some[0][0].size * some[0][1] > 1e8:
                    continue
                began_s = time.thread_time()
                found = [way(labels, count) for labels, count in some]
                best_s[name] = min(best_s[name], time.thread_time() - began_s)
                answers[name] = [one["counts"] for rles in found for one in rles]
        alike = all(answer == answers["ours: one pass over the map"] for answer in answers.values())
        print(f"{what}: {'the same bytes' if alike else 'DIFFERENT BYTES'}")
        for name, seconds in best_s.items():
            print(f"  {name:36}{seconds / len(some) * 1e3:9.3f} ms")


if __name__ == "__main__":
    main()
