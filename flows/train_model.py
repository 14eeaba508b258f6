"""The flow `train-model`. Owns: what is tried again, what is told meanwhile. Must not know: how a model learns."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE

import pipeline
from flows import model_artifacts
from flows.driving import follow
from flows.parameters import with_fields_of
from flows.retries import worth_another_try
from pipeline.learning.configuration import TrainConfig

if TYPE_CHECKING:
    from pipeline.learning.training import TrainOutcome


@flow(name="train-model")
@with_fields_of(TrainConfig)
def train_model(**settings: Any) -> TrainOutcome:
    """Trains a model and puts it into the registry, as `maskmill train` does with the same settings.

    Another run with the same settings, or a retry of this one, continues from the last checkpoint.
    """
    return train(TrainConfig(**settings))


@task(
    name="train",
    cache_policy=NO_CACHE,
    retries=2,
    retry_delay_seconds=[10, 60],
    retry_condition_fn=worth_another_try,
)
def train(config: TrainConfig) -> TrainOutcome:
    """Trains, in this process or on Ray, and shows figures and curves."""
    logger = get_run_logger()
    outcome = follow(
        lambda listen, should_stop: pipeline.train(config, listen=listen, should_stop=should_stop), logger, line=_line
    )
    logger.info("%s %s: %s, %s", outcome.name, outcome.version, outcome.state, outcome.metrics)
    model_artifacts.show_training(outcome, profile=config.registry_profile)
    return outcome


def _line(event: Any) -> tuple[int, str] | None:
    """One for each note and each epoch; steps are too many."""
    if hasattr(event, "text"):
        return logging.INFO, event.text
    row = getattr(event, "row", None)
    if row is None:
        return None
    shown = ", ".join(f"{name} {value:.4g}" for name, value in row.items() if isinstance(value, int | float))
    return logging.INFO, shown
