"""The flow `evaluate-model`. Owns: the gate of the error rate, what is tried again. Must not know: how masks are made
or scored.
"""

from __future__ import annotations

from typing import Any

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE

import pipeline
from flows import model_artifacts
from flows.driving import event_line, follow
from flows.parameters import with_fields_of
from flows.retries import worth_another_try
from flows.segment_corpus import TooManyErrorsError
from pipeline.errors import StoppedError
from pipeline.learning.assessment import Assessment, EvaluateConfig


@flow(name="evaluate-model")
@with_fields_of(EvaluateConfig)
def evaluate_model(**settings: Any) -> Assessment:
    """Measures a model on labelled images, as `maskmill evaluate` does with the same settings.

    What was measured before is only read; another run continues what this one leaves.
    """
    config = EvaluateConfig(**settings)
    found = evaluate(config)
    if found.error_rate > config.max_error_rate:
        kinds = ", ".join(f"{number} {kind}" for kind, number in found.failed_by_kind.items())
        raise TooManyErrorsError(
            f"{sum(found.failed_by_kind.values())} images could not be measured ({kinds}), more than max_error_rate "
            f"{config.max_error_rate:g} allows"
        )
    return found


@task(
    name="evaluate",
    cache_policy=NO_CACHE,
    retries=2,
    retry_delay_seconds=[10, 60],
    retry_condition_fn=worth_another_try,
)
def evaluate(config: EvaluateConfig) -> Assessment:
    """Masks by the fleet, counts by image, scores; shows them."""
    logger = get_run_logger()
    found = follow(
        lambda listen, should_stop: pipeline.evaluate(config, listen=listen, should_stop=should_stop),
        logger,
        line=event_line,
    )
    if found.state != "done":
        raise StoppedError("the evaluation was stopped; another run continues it")
    model_artifacts.show_assessment(found)
    return found
