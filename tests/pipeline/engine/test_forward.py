"""Batches through a model that fails in chosen ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from handmade import EightBitRgb

from pipeline.engine.batches import Batch, Shape
from pipeline.engine.forward import Forward, is_out_of_memory
from pipeline.errors import DeviceLostError


class Echo(EightBitRgb):
    """Answers each image with its first value. `check` may raise, at the submission or at the finish."""

    card = None

    def __init__(self, check: Callable[[list[int], int], None], *, late: bool) -> None:
        self._check = check
        self._late = late

    def canvas(self, height: int, width: int) -> tuple[int, int]:
        return height, width

    def submit(self, images_NHWC: np.ndarray, sizes_N2: np.ndarray, *_: np.ndarray, tiles: bool) -> Any:
        values = [int(image[0, 0, 0]) for image, size in zip(images_NHWC, sizes_N2, strict=True) if size[0]]
        if not self._late:
            self._check(values, len(images_NHWC))
        return values, len(images_NHWC)

    def finish(self, pending: Any) -> list[int]:
        if self._late:
            self._check(*pending)
        return pending[0]

    def postprocess(self, prediction: Any) -> Any:
        raise NotImplementedError


def batch(slots: int, filled: list[int]) -> Batch:
    made = Batch(Shape(4, 4), np.zeros((slots, 4, 4, 3), np.uint8))
    for slot in filled:
        made.free.remove(slot)
        made.images_NHWC[slot] = slot
        made.sizes_N2[slot] = (4, 4)
        made.items[slot] = slot
    return made


def answers(check: Callable[[list[int], int], None], made: Batch, *, late: bool) -> tuple[list[Any], int]:
    forward = Forward(Echo(check, late=late))
    answered = forward.finish(forward.start(made))
    return list(answered.answers), answered.slots


both = pytest.mark.parametrize("late", [False, True])


@both
@pytest.mark.parametrize("holds", [1, 2, 3, 5, 8])
def test_batches_shrink_until_memory_holds_them(late: bool, holds: int) -> None:
    def check(values: list[int], slots: int) -> None:
        if slots > holds:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    given, slots = answers(check, batch(8, [0, 1, 3, 4, 6, 7]), late=late)
    assert given == [0, 1, 3, 4, 6, 7]
    assert slots == max(size for size in (8, 4, 2, 1) if size <= holds)


@both
def test_an_image_too_large_alone_is_an_answer_of_its_own(late: bool) -> None:
    def check(values: list[int], slots: int) -> None:
        if 3 in values:
            raise MemoryError("no more")

    given, _ = answers(check, batch(4, [0, 1, 2, 3]), late=late)
    assert given[:3] == [0, 1, 2] and isinstance(given[3], MemoryError)


@both
def test_poison_costs_only_itself_and_keeps_the_shape(late: bool) -> None:
    shapes = []

    def check(values: list[int], slots: int) -> None:
        shapes.append(slots)
        if 2 in values:
            raise ValueError("poison")

    given, slots = answers(check, batch(4, [1, 2, 3]), late=late)
    assert given[0] == 1 and isinstance(given[1], ValueError) and given[2] == 3
    assert set(shapes) == {4} and slots == 4


@both
def test_poison_among_images_that_memory_does_not_hold(late: bool) -> None:
    def check(values: list[int], slots: int) -> None:
        if slots > 2:
            raise RuntimeError("CUDA out of memory")
        if 5 in values:
            raise ValueError("poison")

    given, slots = answers(check, batch(8, list(range(8))), late=late)
    assert given[:5] == [0, 1, 2, 3, 4] and isinstance(given[5], ValueError) and given[6:] == [6, 7] and slots == 2


@both
def test_a_lost_device_is_nobodys_answer(late: bool) -> None:
    def check(values: list[int], slots: int) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    with pytest.raises(DeviceLostError, match="device-side assert"):
        answers(check, batch(2, [0, 1]), late=late)


def test_a_failed_submission_holds_on_to_no_frame() -> None:
    def check(values: list[int], slots: int) -> None:
        raise ValueError("poison")

    started = Forward(Echo(check, late=False)).start(batch(2, [0]))
    assert isinstance(started.pending, ValueError) and started.pending.__traceback__ is None


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (MemoryError(), True),
        (RuntimeError("CUDA out of memory. Tried to allocate"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("shape mismatch"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception, memory: bool) -> None:
    assert is_out_of_memory(error) is memory
