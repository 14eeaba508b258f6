"""A model that looks at no pixels but one: it sleeps, and answers with street-like masks made beforehand.
Owns: the stand-in, and its model file. Must not know: engines.

Which of 16 masks an image gets depends on its middle pixel, so an engine that mixes images up is found out.
"""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from models.architectures import untrained_card
from models.card import Card
from models.prediction import Prediction

CLASSES = 11
_MASKS = 16


class StandIn:
    """What the stream asks of a model (`pipeline.engine.forward.SegmenterLike`), at `seconds_per_image` of sleep."""

    def __init__(self, seconds_per_image: float) -> None:
        self.card: Card = untrained_card("stand-in", class_names=tuple(f"class-{i}" for i in range(CLASSES)))
        self._seconds_per_image = seconds_per_image
        for seed in range(_MASKS):  # a network is ready when it is loaded, too
            street(seed)

    input_dtype = np.dtype(np.uint8)
    input_channels = 3
    lies_as_it_is = True

    def canvas(self, height: int, width: int) -> tuple[int, int]:
        return height, width

    def fit(self, pixels: np.ndarray, out: np.ndarray) -> tuple[int, int]:
        height, width = pixels.shape[:2]
        out[:height, :width] = pixels
        return height, width

    def mosaic(self, height: int, width: int) -> None:
        return None

    def assemble(self, mosaic: Any) -> Any:
        raise NotImplementedError("no image is large enough for tiles")

    def submit(
        self,
        images_NHWC: np.ndarray,
        sizes_N2: np.ndarray,
        statistics_N2: np.ndarray,
        image_sizes_N2: np.ndarray,
        *,
        tiles: bool = False,
    ) -> list[Prediction]:
        answers = [
            answer(height, width, int(image_HWC[height // 2, width // 2].sum()) % _MASKS)
            for image_HWC, (height, width) in zip(images_NHWC, sizes_N2.tolist(), strict=True)
            if height > 0
        ]
        if self._seconds_per_image:
            time.sleep(self._seconds_per_image * len(answers))
        return answers

    def finish(self, pending: list[Prediction]) -> list[Prediction]:
        return pending

    def postprocess(self, prediction: Prediction) -> tuple[np.ndarray, list[Any]]:
        return prediction.class_ids, []


@functools.lru_cache(maxsize=64)
def answer(height: int, width: int, seed: int) -> Prediction:
    """One of the masks made beforehand, at the size of the image."""
    class_ids = street(seed)
    if (height, width) != class_ids.shape:
        class_ids = cv2.resize(class_ids, (width, height), interpolation=cv2.INTER_NEAREST)
    pixels = np.bincount(class_ids.reshape(-1), minlength=CLASSES).astype(np.int64)
    return Prediction(class_ids, pixels, np.full(CLASSES, 0.9), 0.9, 0.1, None)


@functools.cache
def street(seed: int, height: int = 360, width: int = 480) -> np.ndarray:
    """A label map with the statistics of a street scene: bands, boxes and poles in 11 classes, uint8 [h, w]."""
    random = np.random.default_rng(seed)
    coarse = random.normal(size=(9, 12, CLASSES)).astype(np.float32)
    coarse += np.linspace(2, -2, 9)[:, None, None] * np.linspace(1, -1, CLASSES)
    fine = np.dstack(
        [cv2.resize(coarse[..., i], (width, height), interpolation=cv2.INTER_CUBIC) for i in range(CLASSES)]
    )
    fine += cv2.GaussianBlur(random.normal(size=fine.shape).astype(np.float32), (0, 0), 8)[..., :CLASSES] * 1.8
    return fine.argmax(-1).astype(np.uint8)


def write_model_file(path: Path) -> None:
    """A model file that carries the stand-in's card. Its weights are of a network that is never run."""
    from models.architectures import build
    from models.file import save_model

    card = StandIn(0.0).card
    save_model(path, build(card).state_dict(), card)
