from __future__ import annotations

import pytest

from pipeline.learning.schedule import rate_factor


@pytest.mark.parametrize("shape", ["cosine", "poly"])
def test_rises_then_falls_to_nothing(shape: str) -> None:
    factors = [rate_factor(step / 100, shape=shape, warmup=0.1) for step in range(101)]  # type: ignore[arg-type]
    assert max(factors) == factors[10] == 1.0
    assert factors[:11] == sorted(factors[:11])
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[0] > 0
    assert factors[100] == 0
    assert rate_factor(1.3, shape=shape) == 0  # type: ignore[arg-type]


def test_no_warm_up_begins_at_the_top() -> None:
    assert rate_factor(0.0, warmup=0) == 1
