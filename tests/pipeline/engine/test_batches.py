from __future__ import annotations

import numpy as np

from pipeline.engine.batches import Rack, Shape

ONE = 64 * 64 * 3


def rack(**changes: int) -> Rack:
    return Rack(**({"batch_size": 2, "batch_pixels": 1 << 20, "memory_bytes": 4 * ONE} | changes))


def test_a_batch_is_ready_when_its_last_slot_is_written() -> None:
    here = rack()
    first, second = here.take(Shape(64, 64)), here.take(Shape(64, 64))
    assert first is not None and second is not None and first.batch is second.batch
    second.batch.items[second.position] = "b"
    assert not here.written(second) and not here.ready
    first.batch.items[first.position] = "a"
    assert here.written(first) and list(here.ready) == [first.batch]
    assert first.batch.filled() == 2


def test_the_budget_holds_and_a_batch_larger_than_it_goes_alone() -> None:
    here = rack()
    assert here.take(Shape(64, 64)) and here.take(Shape(64, 32)) and here.in_use_bytes == 3 * ONE
    assert here.take(Shape(64, 64)), "there is a free slot in the open batch"
    assert here.take(Shape(64, 64)) is None and here.take(Shape(512, 512)) is None
    alone = rack()
    assert alone.take(Shape(512, 512)) is not None and alone.in_use_bytes > 4 * ONE


def test_slots_given_back_are_used_again_and_empty_batches_vanish() -> None:
    here = rack()
    first, second = here.take(Shape(64, 64)), here.take(Shape(64, 64))
    assert first and second
    here.give_back(first)
    again = here.take(Shape(64, 64))
    assert again is not None and (again.batch, again.position) == (first.batch, first.position)
    here.give_back(again)
    here.give_back(second)
    assert here.fullest() is None and here.in_use_bytes == 0


def test_the_fullest_goes_first_and_its_buffer_is_kept() -> None:
    here = rack(batch_size=3, memory_bytes=100 * ONE)
    for shape, count in ((Shape(64, 64), 1), (Shape(32, 64), 2)):
        for _ in range(count):
            slot = here.take(shape)
            assert slot
            slot.batch.items[slot.position] = shape
            here.written(slot)
    batch = here.fullest()
    assert batch is not None and batch.shape == Shape(32, 64)
    here.retire(batch)
    assert here.spare_bytes == batch.size_bytes
    reused = here.take(Shape(32, 64))
    assert reused and np.shares_memory(reused.batch.images_NHWC, batch.images_NHWC) and here.spare_bytes == 0


def test_a_limit_changes_batches_to_come_of_that_canvas_only() -> None:
    here = rack(batch_size=8, memory_bytes=100 * ONE)
    here.limit(Shape(64, 64), 3)
    here.limit(Shape(64, 64), 5)
    assert here.slots(Shape(64, 64)) == 3 and here.slots(Shape(32, 32)) == 8
    here.limit(Shape(64, 64), 0)
    assert here.slots(Shape(64, 64)) == 1
