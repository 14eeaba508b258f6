"""The flow `refresh-model`: train → evaluate challenger and champion → promote, or keep and say why → segment again.
Owns: their order. Must not know: what makes a model better.
"""

from __future__ import annotations

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE

import pipeline
from flows import model_artifacts
from flows.driving import event_line, follow
from flows.parameters import refuse_secrets
from flows.promotions import announce_promotions
from flows.retries import worth_another_try
from flows.segment_corpus import segment_corpus
from flows.train_model import train
from pipeline.config import SegmentConfig
from pipeline.learning.configuration import TrainConfig
from pipeline.learning.promotion import Gate, PromoteConfig, Promotion
from pipeline.registry import required_registry


@flow(name="refresh-model")
def refresh_model(
    training: TrainConfig, gate: Gate | None = None, segmentation: SegmentConfig | None = None
) -> Promotion:
    """A new model is trained, and becomes the champion of its name if it beats the present one on the same images.

    Args:
        training: What is trained, on what, and into which registry it goes.
        gate: What it must show, on a split of the same data set. Default: better on `val` in 95% of the resamples, no
            class worse by more than 0.02.
        segmentation: What is segmented when the new model is the champion, as `segment-corpus` does. Default: nothing.
    """
    refuse_secrets({"training": training, "gate": gate, "segmentation": segmentation})
    training = training.model_copy(update={"registry": required_registry(training.registry)})
    trained = train(training)
    done = promote(training, gate or Gate(), trained.uri)
    # "unchanged": an earlier run of these settings promoted this very model, and may have been killed before the rest.
    if done.state != "kept" and segmentation is not None:
        segment_corpus(**{"registry": training.registry} | segmentation.model_dump(exclude_unset=True))
    return done


@task(
    name="promote",
    cache_policy=NO_CACHE,
    retries=2,
    retry_delay_seconds=[10, 60],
    retry_condition_fn=worth_another_try,
)
def promote(training: TrainConfig, gate: Gate, model_uri: str) -> Promotion:
    """Makes the model the challenger, evaluates it and the champion, decides, shows the decision, and tells of it."""
    logger = get_run_logger()
    registry, profile = required_registry(training.registry), training.registry_profile
    pushed = pipeline.push_model(model_uri, registry, profile=profile)
    announce_promotions(pushed.name, registry, logger, profile=profile)
    # Measured on the split that was not trained on, however that was drawn.
    same = training.model_dump(mode="json", include={"layout", "labels_of", "splitting"}, exclude_none=True)
    if training.dataset_profile:
        same["source_profile"] = training.dataset_profile
    asked = PromoteConfig(
        **gate.model_dump() | {"evaluation": same | gate.evaluation}, model=f"{pushed.name}@{pushed.version}",
        registry=registry, dataset=training.dataset, profile=profile,
    )  # fmt: skip
    done = follow(
        lambda listen, should_stop: pipeline.promote_model(asked, listen=listen, should_stop=should_stop),
        logger,
        line=event_line,
    )
    logger.info("%s %s %s: %s", done.name, done.version, done.state, done.why)
    announce_promotions(pushed.name, registry, logger, profile=profile)
    model_artifacts.show_promotion(done)
    return done
