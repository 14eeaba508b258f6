from __future__ import annotations

import pytest

from pipeline.engine.breaker import Breaker


def test_it_trips_on_more_than_half_of_enough() -> None:
    breaker = Breaker(10)
    for _ in range(9):
        breaker.note(1, 1)
    assert not breaker.tripped, "nine outcomes are too few to judge"
    breaker.note(1, 0)
    assert breaker.tripped


def test_half_is_not_more_than_half() -> None:
    breaker = Breaker(10)
    for i in range(100):
        breaker.note(1, i % 2)
    assert not breaker.tripped


def test_old_outcomes_are_forgotten() -> None:
    breaker = Breaker(10)
    breaker.note(1000, 0)
    for _ in range(6):
        breaker.note(1, 1)
    assert not breaker.tripped, "the last ten still hold some of the thousand"
    for _ in range(4):
        breaker.note(1, 1)
    assert breaker.tripped


@pytest.mark.parametrize(("notes", "tripped"), [([(4, 4), (4, 4), (4, 0)], True), ([(20, 10), (1, 1)], True)])
def test_notes_of_many_outcomes_count_whole(notes: list[tuple[int, int]], tripped: bool) -> None:
    breaker = Breaker(10)
    for images, failures in notes:
        breaker.note(images, failures)
    assert breaker.tripped is tripped
