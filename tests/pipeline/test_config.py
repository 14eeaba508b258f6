"""What a user may choose."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.config import DEFAULT_SUFFIXES, SegmentConfig
from pipeline.learning.assessment import EvaluateConfig

NEEDED: dict[str, Any] = {"source": "photos", "dest": "masks", "model": "street"}


def test_three_choices_are_enough() -> None:
    config = SegmentConfig(**NEEDED)
    assert (config.engine, config.precision, config.max_error_rate) == ("auto", "auto", 0.05)
    assert config.suffixes == DEFAULT_SUFFIXES


@pytest.mark.parametrize("field", sorted(SegmentConfig.model_fields))
def test_every_field_is_explained(field: str) -> None:
    """The same sentences are Prefect's parameter form."""
    assert str(SegmentConfig.model_fields[field].description).endswith(".")


@pytest.mark.parametrize(
    "wrong",
    [{"actors": 0}, {"gpus_per_actor": -1}, {"batch_size": 0}, {"shard_size": 0}, {"limit": 0}, {"canary": 0},
     {"threads": 0}, {"max_error_rate": 1.5}, {"max_error_rate": -0.1}, {"precision": "fp8"},
     {"engine": "spark"}, {"lease_ttl_s": 0}, {"memory_bytes": 1}, {"max_pixels": 0}, {"colour": "red"},
     {"run_date": "today"}, {"actors": 100_001}, {"gpus_per_actor": math.inf}, {"batch_size": 16_385},
     {"shard_size": 10**20}, {"limit": 10**20}, {"canary": 10**20}, {"threads": 1025}, {"max_pixels": 10**20},
     {"memory_bytes": 1 << 45}, {"lease_ttl_s": math.inf}, {"lease_ttl_s": math.nan}, {"lease_ttl_s": 86_401},
     {"drain_timeout_s": math.inf}, {"drain_timeout_s": 86_401}, {"max_error_rate": math.nan}],
    ids=str,
)  # fmt: skip
def test_what_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as failed:
        SegmentConfig(**NEEDED, **wrong)
    assert failed.value.errors()[0]["loc"][0] == next(iter(wrong))


def test_an_evaluation_refuses_what_a_run_would_refuse() -> None:
    bounds = {name: field for name, field in SegmentConfig.model_json_schema()["properties"].items()}
    for name, field in EvaluateConfig.model_json_schema()["properties"].items():
        if name in bounds and name not in ("source", "dest", "model", "registry"):
            about = ("title", "description")
            assert {k: v for k, v in field.items() if k not in about} == {
                k: v for k, v in bounds[name].items() if k not in about
            }, name


def test_a_config_is_frozen_and_travels() -> None:
    config = SegmentConfig(**NEEDED, run_date="2026-01-02", limit=3)
    with pytest.raises(ValidationError):
        config.limit = 4  # type: ignore[misc]
    assert SegmentConfig.model_validate_json(config.model_dump_json()) == config
    assert pickle.loads(pickle.dumps(config)) == config


def test_no_secret_has_a_place() -> None:
    assert not [
        name for name in SegmentConfig.model_fields if any(w in name for w in ("key", "secret", "token", "pass"))
    ]
