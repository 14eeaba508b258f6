"""One worker's whole job in a training run: from a data set to, on the first worker, a published model. Owns: what is
put together, and what is told of the outcome. Must not know: Ray, the order of steps, commands.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict

from models.architectures import build
from models.card import Card
from models.file import model_version, read_card
from models.segmenter import supports_bf16
from pipeline.errors import UsageError
from pipeline.learning.checkpoints import CheckpointFolder
from pipeline.learning.configuration import TrainConfig
from pipeline.learning.curves import draw_curves
from pipeline.learning.dataset import Dataset
from pipeline.learning.evaluation import evaluate
from pipeline.learning.examples import Examples
from pipeline.learning.initialization import begin
from pipeline.learning.labels.source import LabelSource, open_labels
from pipeline.learning.loop import EpochEvent, Loop, State, StepEvent
from pipeline.learning.objective import Objective
from pipeline.learning.peers import Peers
from pipeline.learning.results import DECISIVE, finished_model, origin_of, publish, segmenter_of
from pipeline.machine import cores

_CURVES_EVERY_S = 30.0


class Job(BaseModel):
    """What every worker is given."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: TrainConfig
    #: Of the run: its settings, data and first weights.
    key: str
    #: URI of the run's folder of checkpoints.
    folder: str
    train_sha256: str


class Summary(NamedTuple):
    """What came of a run: the first worker's answer."""

    version: str
    uri: str
    steps: int
    epochs: int
    minutes: float
    resumed_step: int
    #: The step whose weights are kept.
    kept_step: int
    images_per_s: float
    #: By split and precision: figures of the model file.
    metrics: dict[str, Any]


def do_job(
    job: Job,
    *,
    device: str,
    tell: Callable[[StepEvent | EpochEvent], None],
    should_stop: Callable[[], bool],
) -> Summary | None:
    """Trains, and on the first worker publishes the model and closes the run. None on the others.

    Raises what `begin` and `Loop.fit` do, and StorageError where the model cannot be written.
    """
    config = job.config
    peers = Peers(device)
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if supports_bf16(device) else "fp32"
    torch.set_num_threads(config.threads or min(torch.get_num_threads(), cores()))
    source = open_source(config)
    train = Dataset(source, config.train_split)
    val = Dataset(source, config.val_split) if config.val_split is not None else None
    card, first_weights, origin = begin(config, train)
    examples = make_examples(config, train, card)
    weights = examples.class_weights(config.loss.class_weights, config.loss.class_weight_power)
    module = build(card, blank=True)
    module.load_state_dict(first_weights)
    module = module.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if peers.world > 1 and device.startswith("cuda"):
        module = torch.nn.SyncBatchNorm.convert_sync_batchnorm(module)
    folder = CheckpointFolder(job.folder, profile=config.registry_profile)
    judged = _thinned(val, config.val_images) if val is not None and peers.first else None

    def measure(weights: State) -> dict[str, float]:
        assert judged is not None
        segmenter = segmenter_of(card, _on_cpu(weights), device=device, precision=precision)
        return evaluate(segmenter, judged)

    loop = Loop(
        config,
        module=module,
        examples=examples,
        objective=Objective(card, config.loss, weights),
        folder=folder,
        peers=peers,
        precision=precision,
        epoch_steps=math.ceil((config.epoch_images or len(train)) / config.batch_size),
        measure=measure if val is not None else None,
        score=lambda figures: _finite_or_worst(figures[DECISIVE[card.task]]),
        tell=_with_curves(tell, folder),
        should_stop=should_stop,
    )
    fitted = loop.fit()
    if fitted.weights is None:
        return None
    progress = fitted.progress
    keeps_best = config.keep == "best" and progress.best_step is not None
    kept_step = progress.best_step if keeps_best and progress.best_step is not None else progress.step
    provenance = origin | origin_of(
        config, train, data_sha256=job.train_sha256, device=device, precision=precision, workers=peers.world
    )
    provenance |= {"steps": progress.step, "epochs": progress.epoch, "minutes": round(progress.elapsed_s / 60, 1)}
    # As the checkpoint says it: a run that is killed while it publishes shall not make the same model anew.
    provenance |= {"trained_at": progress.finished_at or provenance["trained_at"]}
    provenance |= {"kept_step": kept_step, "chosen_by": config.val_split if keeps_best else None}
    data = finished_model(
        card, fitted.weights, provenance=provenance, train=train, val=val, device=device, precision=precision
    )
    uri = publish(data, config)
    folder.put("curves.png", draw_curves(progress.trace, title=config.name), replace=True)
    speeds = [row["images_per_s"] for row in progress.trace if row["images_per_s"]]
    summary = Summary(
        version=model_version(data),
        uri=uri,
        steps=progress.step,
        epochs=progress.epoch,
        minutes=progress.elapsed_s / 60,
        resumed_step=fitted.resumed_step,
        kept_step=kept_step,
        images_per_s=sorted(speeds)[len(speeds) // 2] if speeds else 0.0,  # type: ignore[type-var, arg-type]
        metrics=dict(read_card(data).metrics),
    )
    folder.finish(summary._asdict())
    return summary


def open_source(config: TrainConfig) -> LabelSource:
    """The data set that is asked for, with all of its splits. Raises what `open_labels` does."""
    return open_labels(
        config.dataset, layout=config.layout, splitting=config.splitting, model=config.labels_of,
        profile=config.dataset_profile,
    )  # fmt: skip


def make_examples(config: TrainConfig, dataset: Dataset, card: Card) -> Examples:
    """Raises UsageError where data set, network and settings do not fit together."""
    try:
        return Examples(
            dataset,
            card,
            augmentation=config.augmentation,
            sampling=config.sampling,
            batch_size=config.portion_size,
            seed=config.seed,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error


def _thinned(dataset: Dataset, most: int | None) -> Dataset:
    """At most so many images, evenly taken."""
    if most is not None and most < len(dataset):
        dataset.items = tuple(dataset.items[int(index * len(dataset) / most)] for index in range(most))
    return dataset


def _on_cpu(weights: Mapping[str, torch.Tensor]) -> State:
    return {name: tensor.detach().cpu() for name, tensor in weights.items()}


def _finite_or_worst(score: float) -> float:
    return score if math.isfinite(score) else -math.inf


def _with_curves(
    tell: Callable[[StepEvent | EpochEvent], None], folder: CheckpointFolder
) -> Callable[[StepEvent | EpochEvent], None]:
    """Draws the curves anew now and then, for whoever looks on."""
    rows: list[dict[str, Any]] = []
    drawn_s = time.monotonic()

    def told(event: StepEvent | EpochEvent) -> None:
        nonlocal drawn_s
        tell(event)
        if isinstance(event, EpochEvent):
            rows.append(event.row)
            if time.monotonic() - drawn_s > _CURVES_EVERY_S:
                folder.put("curves.png", draw_curves(rows), replace=True)
                drawn_s = time.monotonic()

    return told
