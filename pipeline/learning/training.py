"""Training: a labelled data set in, a model file out. Owns: refusing what cannot be trained on, finding the run that
was begun before, the choice of an engine. Must not know: networks, losses, steps.

Modules: `configuration` what is asked for; `job` what each worker does, with `initialization` (first weights), `loop`,
`schedule`, `optimization`, `checkpoints`, `trace`, `curves`, `results`; `peers` and `ray_training` for several workers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from models.segmenter import default_device
from pipeline.engine.ray_crew import ray_address
from pipeline.errors import StorageError, UsageError
from pipeline.learning.checkpoints import CheckpointFolder
from pipeline.learning.configuration import TrainConfig, run_key
from pipeline.learning.dataset import Dataset
from pipeline.learning.initialization import begin
from pipeline.learning.job import Job, Summary, do_job, make_examples, open_source
from pipeline.learning.labels.check import LabelReport, check_labels
from pipeline.learning.labels.source import LabelSource
from pipeline.learning.loop import EpochEvent, StepEvent, TrainingError
from pipeline.learning.preview import draw_preview
from pipeline.learning.results import publish
from pipeline.registry import resolve
from pipeline.storage import join_uri, normalize_uri, open_storage

__all__ = ["BrokenLabelsError", "Note", "TrainConfig", "TrainOutcome", "TrainingError", "preview", "train"]


class BrokenLabelsError(UsageError):
    """A data set that is not trained on. `report` says why."""

    def __init__(self, report: LabelReport) -> None:
        errors = sum(problem.severity == "error" for problem in report.problems)
        super().__init__(
            f"the labels of {report.source} are broken ({errors} errors): mend them, or leave them unchecked"
        )
        self.report = report


class Note(NamedTuple):
    """One line for people."""

    text: str


class TrainOutcome(BaseModel):
    """What a call to `train` came to."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: `already`: an earlier call has finished the same run; its model is the answer.
    state: Literal["trained", "already"]
    name: str
    version: str
    #: Of the model file.
    uri: str
    key: str
    #: Trace, curves and checkpoints.
    folder: str
    steps: int
    epochs: int
    #: Of training, over all calls, without what was lost.
    minutes: float
    resumed_step: int
    kept_step: int
    images_per_s: float
    metrics: dict[str, Any]


Listen = Callable[[StepEvent | EpochEvent | Note], None]


def train(
    config: TrainConfig, *, listen: Listen | None = None, should_stop: Callable[[], bool] | None = None
) -> TrainOutcome:
    """Trains a model, publishes it, and says how good it is. The same call continues what was interrupted.

    A run is known by its settings, its data and its first weights. With epochs or steps, one worker, equal threads and
    equal hardware, a run that was interrupted ends with the same weights, bit for bit, as one that was not; with
    minutes the time spent is kept with the checkpoints, and the weights differ as two undisturbed runs do.

    Raises BrokenLabelsError for a data set with errors in it, UsageError for what cannot be done as asked,
    TrainingError for a loss that is not finite, StoppedError when asked to stop, InfrastructureError where storage or
    workers fail.
    """
    say = listen or (lambda event: None)
    stop = should_stop or (lambda: False)
    source = open_source(config)
    digests = _digests(config, source, say)
    initial = None
    if config.init:
        first = resolve(config.init, registry=config.registry, profile=config.registry_profile)
        initial = first.version
    key = run_key(config, initial=initial, **digests)
    uri = _folder(config, key)
    folder = CheckpointFolder(uri, profile=config.registry_profile)
    if config.restart:
        folder.clear()
    over = folder.outcome()
    if over is not None:
        folder.tidy()  # it may have been killed while it did
        say(Note(f"trained before: {over['version']} (restart to train again)"))
        return _again(config, key, uri, Summary(**over))
    begun = folder.latest()
    if begun is not None:
        done = begun.progress
        say(Note(f"continues after epoch {done.epoch}, step {done.step}, {done.elapsed_s / 60:.1f} min"))
    elif config.check:
        report = check_labels(source, used=_splits(config))
        if not report.ok:
            raise BrokenLabelsError(report)
    placed = _placed(config)
    if config.init:
        # By its file: an alias may come to mean another version while this runs.
        placed = placed.model_copy(update={"init": first.origin})
    job = Job(config=placed, key=key, folder=uri, train_sha256=digests[config.train_split])
    summary = _do(job, say, stop)
    return _outcome("trained", config, key, uri, summary)


def preview(config: TrainConfig) -> bytes:
    """A PNG of what the network would see, with its labels drawn: see `draw_preview`. Trains nothing, writes nothing.

    Raises UsageError for what cannot be trained as asked.
    """
    dataset = Dataset(open_source(config), config.train_split)
    return draw_preview(make_examples(config, dataset, begin(config, dataset).card))


def _digests(config: TrainConfig, source: LabelSource, say: Listen) -> dict[str, str]:
    """Of the splits that are used, by their names. Raises BrokenLabelsError where images or labels are not there,
    unless labels are not to be checked.
    """
    splits = _splits(config)
    for split in splits:
        if not source.splits.get(split, True):
            measured = ", or measure nothing (an empty --val-split)" if split == config.val_split else ""
            raise UsageError(f"split {split!r} of {source.title} has no images: name another{measured}")
    try:
        datasets = [Dataset(source, split) for split in splits]
        say(Note(f"{source.title}: {', '.join(f'{len(one)} images in {one.split}' for one in datasets)}"))
        return {str(one.split): one.digest() for one in datasets}
    except (UsageError, StorageError) as error:
        missing = not isinstance(error, StorageError) or error.kind == "missing"
        if config.check and missing and all(split in source.splits for split in splits):
            report = check_labels(source, used=splits)
            if not report.ok:
                raise BrokenLabelsError(report) from error
        raise


def _splits(config: TrainConfig) -> list[str]:
    return [split for split in (config.train_split, config.val_split) if split is not None]


def _do(job: Job, say: Listen, stop: Callable[[], bool]) -> Summary:
    config = job.config
    address = ray_address(config.ray_address)
    engine = config.engine
    if engine == "auto":
        engine = "ray" if config.workers > 1 or address else "local"
    if engine == "ray":
        from pipeline.learning.ray_training import train_on_ray

        return train_on_ray(job, say=say, should_stop=stop)
    device = "cpu" if config.use_gpu is False else default_device()
    if config.use_gpu and device == "cpu":
        raise UsageError("use_gpu: this machine has no GPU that torch can use")
    summary = do_job(job, device=device, tell=say, should_stop=stop)
    assert summary is not None
    return summary


def _again(config: TrainConfig, key: str, uri: str, summary: Summary) -> TrainOutcome:
    """The model of a run that is over, put where this call wants it."""
    try:
        data = open_storage(summary.uri, profile=config.registry_profile).get(summary.uri).data
    except StorageError as error:
        raise error.told(
            f"this was trained before, as {summary.uri}, which cannot be read ({error}): restart it"
        ) from error
    return _outcome("already", config, key, uri, summary._replace(uri=publish(data, config)))


def _outcome(
    state: Literal["trained", "already"], config: TrainConfig, key: str, uri: str, summary: Summary
) -> TrainOutcome:
    return TrainOutcome(state=state, name=config.name, key=key, folder=uri, **summary._asdict())


def _placed(config: TrainConfig) -> TrainConfig:
    """The same with absolute addresses: workers of Ray have another working folder."""
    places = {name: getattr(config, name) for name in ("dataset", "registry", "out", "checkpoints")}
    found = {name: normalize_uri(place) for name, place in places.items() if place}
    if config.backbone_weights and Path(config.backbone_weights).is_file():
        found["backbone_weights"] = str(Path(config.backbone_weights).resolve())
    return config.model_copy(update=found)


def _folder(config: TrainConfig, key: str) -> str:
    if config.checkpoints is not None:
        return join_uri(normalize_uri(config.checkpoints), key)
    if config.registry is not None:
        return join_uri(normalize_uri(config.registry), "_training", key)
    assert config.out is not None
    return join_uri(normalize_uri(config.out).rpartition("/")[0], "_training", key)
