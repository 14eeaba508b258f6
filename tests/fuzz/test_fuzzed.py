"""A short look at every fuzz target: its corpus is read, and so are the first mutations of it."""

from __future__ import annotations

import pytest
from fuzz.mutation import mutations
from fuzz.targets import TARGETS
from hypothesis import HealthCheck, Phase, given, settings

#: Networks are built there.
SLOW = {"model-card": 6}


@pytest.mark.parametrize("name", TARGETS)
def test_whatever_the_bytes_there_is_an_answer_or_an_error_of_our_own(name: str) -> None:
    target = TARGETS[name]
    seeds = target.seeds()
    for seed in seeds[: SLOW.get(name)]:
        target.run(seed)

    @settings(
        max_examples=SLOW.get(name, 60),
        database=None,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(mutations(seeds))
    def look(data: bytes) -> None:
        target.run(data)

    look()
