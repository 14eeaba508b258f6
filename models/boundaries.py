"""How well the outlines of classes agree. Owns: what a boundary is, and its counts of one image. Must not know: torch,
files, data sets.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

#: Of the image's diagonal (Csurka et al., What is a good evaluation measure for semantic segmentation?, BMVC 2013).
TOLERANCE = 0.0075
_NEIGHBOURS = np.ones((3, 3), dtype=np.uint8)


def tolerance_px(height: int, width: int) -> float:
    """How far apart two outlines may be and still agree: TOLERANCE of the diagonal, and at least 1 pixel."""
    return max(1.0, TOLERANCE * float(np.hypot(height, width)))


def boundary_counts(
    predicted: NDArray[np.uint8], actual: NDArray[np.uint8], *, ignore_id: int | None = None
) -> NDArray[np.int64]:
    """int64 [n, 5] of one image, a row for each class in either map: class id, actual boundary pixels, those of them
    within the tolerance of a predicted one, predicted boundary pixels, those of them within it of an actual one.

    A boundary is the pixels of a class that have one of another class among their eight neighbours; the image's border
    makes none, and pixels beside `ignore_id` are not looked at. Boundary F1 of counts, of one image or summed over
    many: 2 P R / (P + R) with P = matched / predicted, R = matched / actual. Raises ValueError when the shapes differ.
    """
    if predicted.shape != actual.shape:
        raise ValueError(f"masks differ in shape: predicted {predicted.shape}, actual {actual.shape}")
    limit = tolerance_px(*actual.shape)
    valid = np.ones(actual.shape, dtype=bool)
    if ignore_id is not None and (actual == ignore_id).any():
        ignored = (actual == ignore_id).astype(np.uint8)
        valid = cv2.dilate(ignored, _NEIGHBOURS) == 0
    rows = []
    for class_id in np.union1d(actual, predicted).tolist():
        if class_id == ignore_id:
            continue
        theirs, ours = actual == class_id, predicted == class_id
        window = _window(theirs | ours)
        edge_actual = _edge(theirs[window]) & valid[window]
        edge_predicted = _edge(ours[window]) & valid[window]
        rows.append(
            (
                class_id,
                np.count_nonzero(edge_actual), _near(edge_actual, edge_predicted, limit),
                np.count_nonzero(edge_predicted), _near(edge_predicted, edge_actual, limit),
            )
        )  # fmt: skip
    return np.array(rows, dtype=np.int64).reshape(-1, 5)


def _window(mask: NDArray[np.bool_]) -> tuple[slice, slice]:
    """What holds the mask and a pixel around it."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return (
        slice(max(0, int(rows[0]) - 1), int(rows[-1]) + 2),
        slice(max(0, int(columns[0]) - 1), int(columns[-1]) + 2),
    )


def _edge(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    inside = cv2.erode(mask.astype(np.uint8), _NEIGHBOURS, borderType=cv2.BORDER_CONSTANT, borderValue=1)
    return mask & (inside == 0)


def _near(edge: NDArray[np.bool_], other: NDArray[np.bool_], limit_px: float) -> int:
    """Pixels of `edge` at most `limit_px` from a pixel of `other`."""
    if not edge.any() or not other.any():
        return 0
    distance = cv2.distanceTransform((~other).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return int(np.count_nonzero(distance[edge] <= limit_px))
