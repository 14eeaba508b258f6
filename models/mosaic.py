"""One image in tiles, from the grid to one answer. Owns: what is kept of the tiles until all have come.
Must not know: how tiles are read, batches, threads' order.
"""

from __future__ import annotations

import threading
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from models.card import Card, DetectionsPostprocessing, WatershedPostprocessing
from models.detections import TileDetections, merge_detections
from models.masks import Instance
from models.pasting import Detections, paste_detections
from models.refinement import SuppressionSettings
from models.runs import moved
from models.seams import InstanceEvidence
from models.suppression import kept_instances
from models.tiling import Band, Summary, TileBlender, TileGrid, Window


class Mosaic:
    """Takes what the network says of each tile, in any order and from any thread, until nothing is missing.

    The result is equal bit for bit whatever the order. Memory: one byte a pixel of the image (two for instances), and
    what `TileBlender` holds of tiles whose neighbours have not come.
    """

    def __init__(self, grid: TileGrid, card: Card) -> None:
        self.grid = grid
        self._blender = TileBlender(grid, card)
        self.class_ids: NDArray[np.uint8] = np.empty((grid.height, grid.width), np.uint8)
        self.evidence: InstanceEvidence | None = None
        if isinstance(card.postprocessing, WatershedPostprocessing):
            self.evidence = InstanceEvidence(grid.height, grid.width, card.postprocessing)
        self._lock = threading.Lock()
        self._left = len(grid)

    def add(self, window: Window, probabilities_CHW: torch.Tensor | NDArray[np.generic]) -> bool:
        """Takes one tile, as `TileBlender.add` does. True for the one after which nothing is missing."""
        for band in self._blender.add(window, probabilities_CHW):
            self._keep(band)
        with self._lock:
            self._left -= 1
            return self._left == 0

    def summary(self) -> Summary:
        """Figures of the whole image. Raises ValueError while tiles are missing."""
        return self._blender.summary()

    def _keep(self, band: Band) -> None:
        self.class_ids[band.y : band.y + len(band.class_ids)] = band.class_ids
        if self.evidence is not None:
            self.evidence.add_band(band)


class FoundInTiles(NamedTuple):
    """The objects of an image, each once, and the means over them; NaN where a tile's answer meant nothing."""

    instances: list[Instance]
    mean_confidence: float
    mean_entropy: float


class TilePrediction(Protocol):
    """What is asked of `models.prediction.Prediction` here."""

    @property
    def detections(self) -> Detections | None: ...
    @property
    def mean_confidence(self) -> float: ...
    @property
    def mean_entropy(self) -> float: ...


class DetectionMosaic:
    """The same for models of detections: objects are found in each tile, and merged where tiles overlap.

    The card's post-processing then counts once more, for the image: of what tiles say over classes where
    `nms_per_class` is false (by the IoU of masks), and `top_k`. Memory: the objects, as run lengths; `top_k` of a tile
    at most.
    """

    def __init__(self, grid: TileGrid, card: Card) -> None:
        """Raises ValueError for a model that finds no objects by itself."""
        if not isinstance(card.postprocessing, DetectionsPostprocessing):
            raise ValueError(f"model {card.name!r} ({card.postprocessing.kind}) finds no objects by itself")
        self.grid = grid
        self._settings = card.postprocessing
        self._ids = [info.id for info in card.classes]
        self._background_id = card.background_id or 0
        self._lock = threading.Lock()
        self._tiles: list[tuple[TileDetections, float, float]] = []

    def add(self, window: Window, prediction: TilePrediction) -> bool:
        """Takes what was found in one tile. True for the one after which nothing is missing."""
        if prediction.detections is None:
            raise ValueError("this prediction holds no detections")
        _, instances = paste_detections(
            prediction.detections,
            self._ids,
            background_id=self._background_id,
            mask_threshold=self._settings.mask_threshold,
        )
        grid = self.grid
        placed = [moved(one, y=window.y, x=window.x, height=grid.height, width=grid.width) for one in instances]
        with self._lock:
            means = prediction.mean_confidence, prediction.mean_entropy
            self._tiles.append((TileDetections(window, placed), *means))
            return len(self._tiles) == len(grid)

    def found(self) -> FoundInTiles:
        """The image's objects, best score first; of equals, the one further up, then further left. The mean entropy is
        over all that the tiles found. Raises ValueError while tiles are missing.
        """
        if len(self._tiles) < len(self.grid):
            raise ValueError(f"{len(self.grid) - len(self._tiles)} of {len(self.grid)} tiles are missing")
        tiles = sorted(self._tiles, key=lambda entry: (entry[0].window.row, entry[0].window.column))
        merged = merge_detections([tile for tile, _, _ in tiles], height=self.grid.height, width=self.grid.width)
        settings = SuppressionSettings(
            # Within a class merging has done it.
            iou_threshold=None if self._settings.nms_per_class else self._settings.nms_iou,
            across_classes=True,
            max_count=self._settings.top_k,
        )
        instances = [merged[index] for index in kept_instances(merged, settings)]
        counts = np.array([len(tile.instances) for tile, _, _ in tiles], np.float64)
        entropies = np.array([entropy for _, _, entropy in tiles])
        scores = [one.score for one in instances]
        broken = any(np.isnan(confidence) for _, confidence, _ in tiles)
        return FoundInTiles(
            instances=instances,
            mean_confidence=float("nan") if broken else float(np.mean(scores)) if scores else 0.0,
            mean_entropy=float(counts @ entropies / counts.sum()) if counts.sum() else 0.0,
        )
