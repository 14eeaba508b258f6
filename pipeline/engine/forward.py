"""A batch's way through the model, and what to do when it fails. Owns: the order of submit and finish, smaller batches
where memory runs out, single images where one is poisoned. Must not know: threads, decoding, rows, tables.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from models.masks import Instance
from models.mosaic import DetectionMosaic, Mosaic
from pipeline.engine.batches import Batch
from pipeline.errors import DeviceLostError

log = logging.getLogger(__name__)


class SegmenterLike(Protocol):
    """What the stream asks of a model: `models.segmenter.Segmenter`, or a stand-in in a benchmark."""

    @property
    def card(self) -> Any: ...
    @property
    def input_dtype(self) -> np.dtype[Any]: ...
    @property
    def input_channels(self) -> int: ...
    @property
    def lies_as_it_is(self) -> bool: ...
    def canvas(self, height: int, width: int) -> tuple[int, int]: ...
    def fit(self, pixels: np.ndarray, out: np.ndarray) -> tuple[int, int]: ...
    def mosaic(self, height: int, width: int) -> Mosaic | DetectionMosaic | None: ...
    def submit(
        self,
        images_NHWC: np.ndarray,
        sizes_N2: np.ndarray,
        statistics_N2: np.ndarray,
        image_sizes_N2: np.ndarray,
        *,
        tiles: bool,
    ) -> Any: ...
    def finish(self, pending: Any) -> Sequence[Any]: ...
    def assemble(self, mosaic: Mosaic | DetectionMosaic) -> Any: ...
    def postprocess(self, prediction: Any) -> tuple[np.ndarray, Sequence[Instance]]: ...


class Started(NamedTuple):
    """A batch on the device. `pending` is what the model gave, or the exception that it raised."""

    batch: Batch
    pending: Any
    spent_s: float


class Answered(NamedTuple):
    """A batch that the model is done with. An answer is a prediction, or the exception that stands for one; there is
    one for each item, in the slots' order. `slots`: images at once that the device's memory held."""

    batch: Batch
    answers: Sequence[Any]
    infer_ms: float
    slots: int


class Forward:
    """Runs batches on one model, for one thread. `busy_s`: time spent in the model so far."""

    def __init__(self, segmenter: SegmenterLike) -> None:
        self._segmenter = segmenter
        self.busy_s = 0.0

    def start(self, batch: Batch) -> Started:
        """Submits `batch`; never raises."""
        began_s = time.perf_counter()
        try:
            pending = self._submit(batch, batch.images_NHWC, batch.sizes_N2, range(len(batch.items)))
        except Exception as error:  # noqa: BLE001 - tried again in smaller pieces, and recorded there
            # A traceback keeps the frames, and those the tensors, of a failed call: memory that the next one needs.
            pending = error.with_traceback(None)
        spent_s = time.perf_counter() - began_s
        self.busy_s += spent_s
        return Started(batch, pending, spent_s)

    def finish(self, started: Started) -> Answered:
        """Waits for the answers. Raises DeviceLostError where the device will answer no more; all else is an answer.

        Out of memory: the batch is halved, its canvas kept, until it fits. Any other failure: each image alone in a
        batch of the same shape, so that one poisoned image costs only itself.
        """
        batch, pending, spent_s = started
        began_s = time.perf_counter()
        slots = len(batch.items)
        try:
            if isinstance(pending, Exception):
                raise pending
            answers = list(self._segmenter.finish(pending))
        except Exception as error:  # noqa: BLE001 - tried again in smaller pieces, and recorded there
            _raise_if_device_is_lost(error)
            answers, slots = self._in_pieces(batch, error.with_traceback(None))
        spent_more_s = time.perf_counter() - began_s
        self.busy_s += spent_more_s
        return Answered(batch, answers, (spent_s + spent_more_s) * 1e3 / batch.filled(), slots)

    def _in_pieces(self, batch: Batch, error: Exception) -> tuple[list[Any], int]:
        """All answers, and how many images at once they took. `error` is what the whole batch came to."""
        slots = len(batch.items)
        filled = [slot for slot, item in enumerate(batch.items) if item is not None]
        answers: list[Any] = []
        take = len(filled)
        while filled:
            if is_out_of_memory(error) and slots > 1:
                slots = max(1, slots // 2)
                take = slots
                log.warning("the device's memory does not hold the batch: going on with %d images at once", slots)
            else:
                log.warning("a batch of %d failed (%s); trying its images one by one", len(filled[:take]), error)
                take = 1
            while filled:
                answer = self._some(batch, filled[:take], slots)
                if isinstance(answer, Exception):
                    if take > 1 or (is_out_of_memory(answer) and slots > 1):
                        error = answer
                        break
                    answer = [answer]
                answers += answer
                filled = filled[take:]
        return answers, slots

    def _some(self, batch: Batch, chosen: list[int], slots: int) -> list[Any] | Exception:
        """Answers for the chosen images in a batch of `slots`, the rest of which stays empty."""
        at = chosen + [chosen[0]] * (slots - len(chosen))
        sizes_N2 = batch.sizes_N2[at]
        sizes_N2[len(chosen) :] = 0
        try:
            return list(self._segmenter.finish(self._submit(batch, batch.images_NHWC[at], sizes_N2, at)))
        except Exception as error:  # noqa: BLE001 - the per-image boundary: it becomes a row
            _raise_if_device_is_lost(error)
            return error.with_traceback(None)

    def _submit(self, batch: Batch, images_NHWC: np.ndarray, sizes_N2: np.ndarray, at: Sequence[int]) -> Any:
        chosen = list(at)
        return self._segmenter.submit(
            images_NHWC,
            sizes_N2,
            batch.statistics_N2[chosen],
            batch.image_sizes_N2[chosen],
            tiles=batch.shape.tiles,
        )


def is_out_of_memory(error: BaseException) -> bool:
    """True for what Python, torch on the CPU, CUDA, cuBLAS and cuDNN say when memory runs out."""
    text = str(error).lower()
    signs = ("out of memory", "can't allocate memory", "not enough memory", "status_alloc_failed")
    return isinstance(error, MemoryError) or any(sign in text for sign in signs)


def _raise_if_device_is_lost(error: Exception) -> None:
    """After some CUDA errors every later call of the process fails: no image is to blame, and the process must go."""
    text = str(error)
    lost = any(sign in text for sign in ("CUDA error", "CUBLAS_STATUS", "CUDNN_STATUS"))
    if lost and not is_out_of_memory(error):
        raise DeviceLostError(f"the device failed: {text.splitlines()[0]}") from error
