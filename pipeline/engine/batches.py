"""Batches of decoded pixels: their slots, their buffers and the budget of bytes. Owns: which image sits where.
Must not know: threads, files, models, rows.

Every method of the Rack is called with its owner's lock held; a slot's pixels are written outside of it.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any, NamedTuple

import numpy as np


class Slot(NamedTuple):
    """A place for one image."""

    batch: Batch
    position: int

    @property
    def canvas_pixels(self) -> np.ndarray:
        """[H, W, C]: the slot's canvas, to be written."""
        return self.batch.images_NHWC[self.position]

    def fill(
        self, item: Any, *, size: tuple[int, int], image_size: tuple[int, int], statistics: tuple[float, float]
    ) -> None:
        """Says whose pixels these are: height and width on the canvas, of the image itself, and mean and standard
        deviation to normalise by."""
        self.batch.sizes_N2[self.position] = size
        self.batch.image_sizes_N2[self.position] = image_size
        self.batch.statistics_N2[self.position] = statistics
        self.batch.items[self.position] = item


class Shape(NamedTuple):
    """What is equal in a batch: the canvas, and whether it holds tiles of larger images or whole ones."""

    height: int
    width: int
    tiles: bool = False


class Batch:
    """Slots for images of one shape. `writing` counts slots that a decoding thread holds."""

    __slots__ = (
        "free", "image_sizes_N2", "images_NHWC", "items", "shape", "size_bytes", "sizes_N2", "statistics_N2", "writing",
    )  # fmt: skip

    def __init__(self, shape: Shape, images_NHWC: np.ndarray) -> None:
        slots = len(images_NHWC)
        self.shape = shape
        self.images_NHWC = images_NHWC
        self.sizes_N2 = np.zeros((slots, 2), np.int32)
        self.image_sizes_N2 = np.zeros((slots, 2), np.int32)
        self.statistics_N2 = np.tile(np.array([0.0, 1.0], np.float32), (slots, 1))
        self.items: list[Any] = [None] * slots
        self.free = list(range(slots - 1, -1, -1))
        self.writing = 0
        self.size_bytes = images_NHWC.nbytes

    def filled(self) -> int:
        """Slots that hold an image."""
        return len(self.items) - len(self.free) - self.writing


class Rack:
    """All batches of one stream: open ones by shape, full ones in order, and used buffers kept for the next.

    Bytes of open, full and answered batches stay within `memory_bytes`, but for one batch larger than that, alone.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        batch_pixels: int,
        memory_bytes: int,
        channels: int = 3,
        dtype: np.dtype[Any] | None = None,
    ) -> None:
        self._channels = channels
        self._dtype = dtype or np.dtype(np.uint8)
        self._batch_size = batch_size
        self._batch_pixels = batch_pixels
        self._memory_bytes = memory_bytes
        self._open: dict[Shape, Batch] = {}
        self._limits: dict[Shape, int] = {}
        self._spare: deque[np.ndarray] = deque()
        self.spare_bytes = 0
        self.in_use_bytes = 0
        self.ready: deque[Batch] = deque()

    def slots(self, shape: Shape) -> int:
        """Images per batch of this shape: the frozen shape, or what a device's memory was found to hold."""
        slots = max(1, min(self._batch_size, self._batch_pixels // (shape.height * shape.width)))
        return min(slots, self._limits.get(shape, slots))

    def limit(self, shape: Shape, slots: int) -> None:
        """Batches of this shape opened from now on hold no more than `slots` images."""
        self._limits[shape] = max(1, min(slots, self.slots(shape)))

    def take(self, shape: Shape) -> Slot | None:
        """A free slot, in a batch opened for it if need be; None where one more batch would pass the budget."""
        batch = self._open.get(shape)
        if batch is None:
            pixels = (self.slots(shape), shape.height, shape.width, self._channels)
            size_bytes = math.prod(pixels) * self._dtype.itemsize
            if self.in_use_bytes and self.in_use_bytes + size_bytes > self._memory_bytes:
                return None
            batch = Batch(shape, self._buffer(pixels, size_bytes))
            self._open[shape] = batch
            self.in_use_bytes += size_bytes
        position = batch.free.pop()
        batch.writing += 1
        if not batch.free:
            del self._open[shape]
        return Slot(batch, position)

    def written(self, slot: Slot) -> bool:
        """The slot's image is in. True where that changed what the others may do."""
        return self._released(slot.batch)

    def give_back(self, slot: Slot) -> bool:
        """No image came into the slot. True where that changed what the others may do."""
        slot.batch.free.append(slot.position)
        self._open.setdefault(slot.batch.shape, slot.batch)
        return self._released(slot.batch)

    def fullest(self) -> Batch | None:
        """Takes the fullest open batch out, to be run as it is. Empty ones are dropped on the way."""
        while self._open:
            batch = max(self._open.values(), key=Batch.filled)
            del self._open[batch.shape]
            if batch.filled():
                return batch
            self.in_use_bytes -= batch.size_bytes
        return None

    def retire(self, batch: Batch) -> None:
        """The rows of a batch are made: its bytes are free, and its buffer is kept where the budget allows."""
        self.in_use_bytes -= batch.size_bytes
        if self.in_use_bytes + self.spare_bytes + batch.size_bytes <= self._memory_bytes:
            self._spare.append(batch.images_NHWC)
            self.spare_bytes += batch.size_bytes

    def _released(self, batch: Batch) -> bool:
        batch.writing -= 1
        if batch.writing or self._open.get(batch.shape) is batch:
            return False
        if batch.filled():
            self.ready.append(batch)
        else:
            self.in_use_bytes -= batch.size_bytes
        return True

    def _buffer(self, shape: tuple[int, ...], size_bytes: int) -> np.ndarray:
        """A used buffer of this shape where there is one: fresh pages cost more than the copy into them. Others make
        room."""
        for position, spare in enumerate(self._spare):
            if spare.shape == shape:
                del self._spare[position]
                self.spare_bytes -= spare.nbytes
                return spare
        while self._spare and self.in_use_bytes + self.spare_bytes + size_bytes > self._memory_bytes:
            self.spare_bytes -= self._spare.popleft().nbytes
        return np.empty(shape, self._dtype)
