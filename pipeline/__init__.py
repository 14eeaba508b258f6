"""Maskmill: images in object storage in, a Parquet table of masks and metrics out.

import pipeline
outcome = pipeline.segment(source="photos/", dest="masks/", model="nuclei-unet")
pipeline.connect("masks/").sql("SELECT image_uri, foreground_fraction FROM images").show()
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from pipeline.config import DriftConfig, SegmentConfig
    from pipeline.engine.limits import Ceilings
    from pipeline.engine.outcome import Outcome, Preview
    from pipeline.insight.export.job import ExportOutcome
    from pipeline.learning.assessment import Assessment
    from pipeline.learning.labels.check import LabelReport
    from pipeline.learning.promotion import Promotion
    from pipeline.learning.training import TrainOutcome
    from pipeline.registry import Entry, Pushed
    from pipeline.table.forget import Forgetting
    from pipeline.table.prune import Pruning

__version__ = "0.1.0"
__all__ = [
    "abandon_run",
    "check_labels",
    "connect",
    "drift",
    "evaluate",
    "export",
    "forget",
    "limits",
    "list_runs",
    "model_history",
    "models",
    "plan",
    "preview_training",
    "promote_model",
    "prune",
    "push_model",
    "report",
    "rollback_model",
    "segment",
    "show_run",
    "train",
    "verify",
]


def segment(config: Any = None, /, **settings: Any) -> Outcome:
    """Brings the table at `dest` up to date with `source`: `segment(source=..., dest=..., model=..., ...)`.

    The keywords are the fields of `pipeline.config.SegmentConfig`; a ready config may be given instead. `listen`,
    `should_stop` and `corpus` are handed on to `pipeline.engine.run.segment`, which says what is guaranteed and raised.

    Unless `report` is off, every run that this call closes gets its `report.html` and `drift.json`; where that fails it
    is a warning. See `pipeline.insight.aftermath.leave_behind`.
    """
    from pipeline.config import SegmentConfig
    from pipeline.engine import run

    hooks = {key: settings.pop(key) for key in ("listen", "should_stop", "corpus") if key in settings}
    config = config or SegmentConfig(**settings)
    outcome = run.segment(config, **hooks)
    should_stop = hooks.get("should_stop")
    if config.report and outcome.runs and not (should_stop and should_stop()):
        _leave_reports(config, outcome, hooks.get("listen"))
    return outcome


def _leave_reports(config: SegmentConfig, outcome: Outcome, listen: Any) -> None:
    from pipeline.engine.outcome import Event
    from pipeline.insight.aftermath import leave_behind
    from pipeline.insight.gallery import GalleryConfig
    from pipeline.insight.report import ReportConfig

    warn = (lambda text: listen(Event("warning", text))) if listen else None
    gallery = GalleryConfig(source_profile=config.source_profile)
    wanted = ReportConfig(gallery=gallery, drift=config.drift, dest_profile=config.dest_profile)
    for uri in leave_behind(config.dest, outcome.runs, wanted, warn=warn):
        if listen:
            listen(Event("note", f"report: {uri}"))


def plan(config: SegmentConfig, *, scratch: Path) -> Preview:
    """What `segment(config)` would find to do, and whether it could: see `pipeline.engine.run.plan`."""
    from pipeline.engine import run

    return run.plan(config, scratch=scratch)


def train(config: Any = None, /, **settings: Any) -> TrainOutcome:
    """Trains a model and publishes it: `train(dataset=..., name=..., registry=..., minutes=..., ...)`.

    The keywords are the fields of `pipeline.learning.configuration.TrainConfig`; a ready config may be given instead.
    `listen` and `should_stop` are handed on to `pipeline.learning.training.train`, which says what is guaranteed and
    raised.
    """
    from pipeline.learning import training

    hooks = {key: settings.pop(key) for key in ("listen", "should_stop") if key in settings}
    return training.train(config or training.TrainConfig(**settings), **hooks)


def preview_training(config: Any = None, /, **settings: Any) -> bytes:
    """A PNG of what `train` would show the network: see `pipeline.learning.training.preview`."""
    from pipeline.learning import training

    return training.preview(config or training.TrainConfig(**settings))


def check_labels(source: str, **options: Any) -> LabelReport:
    """What is wrong with a labelled data set: see `pipeline.learning.labels.check.check_labels`."""
    from pipeline.learning.labels import check

    return check.check_labels(source, **options)


def connect(dest: str, *, profile: str | None = None) -> Any:
    """A DuckDB connection with the views of the table at `dest`."""
    from pipeline.table import catalog

    return catalog.connect(dest, profile=profile)


def verify(dest: str, *, deep: bool = False, profile: str | None = None) -> list[Any]:
    """What is wrong with the table at `dest`: see `pipeline.table.verify.verify`. [] where nothing is."""
    from pipeline.table import verify as verification

    return verification.verify(dest, deep, profile=profile)


def prune(dest: str, *, keep_versions: int, yes: Any = False, profile: str | None = None) -> Pruning:
    """Deletes all but the newest versions of each model: see `pipeline.table.prune.prune`. Without `yes`, only says."""
    from pipeline.table import prune as pruning

    return pruning.prune(dest, keep_versions=keep_versions, yes=yes, profile=profile)


def forget(dest: str, where: str | None = None, *, yes: Any = False, profile: str | None = None) -> Forgetting:
    """Takes images out for good: see `pipeline.table.forget.forget`. Without `yes`, only says."""
    from pipeline.table import forget as forgetting

    return forgetting.forget(dest, where, yes=yes, profile=profile)


def drift(dest: str, run_id: str | None = None, config: Any = None, *, profile: str | None = None) -> Any:
    """A run beside the runs before it: see `pipeline.insight.drift.drift`."""
    from pipeline.insight import drift as comparison

    return comparison.drift(dest, run_id, config, profile=profile)


def evaluate(config: Any = None, /, **settings: Any) -> Assessment:
    """What a model is worth on a labelled corpus: `evaluate(dataset=..., model=..., split="val", dest=...)`.

    The keywords are the fields of `pipeline.learning.assessment.EvaluateConfig`; a ready config may be given instead.
    `listen` and `should_stop` are handed on to `pipeline.learning.assessment.evaluate`, which says what is guaranteed
    and raised.
    """
    from pipeline.learning import assessment

    hooks = {key: settings.pop(key) for key in ("listen", "should_stop") if key in settings}
    return assessment.evaluate(config or assessment.EvaluateConfig(**settings), **hooks)


def report(
    dest: str,
    run_id: str | None = None,
    *,
    out: str | Path = "report.html",
    drift: DriftConfig | None = None,
    source_profile: str | None = None,
    dest_profile: str | None = None,
) -> Any:
    """A run of `dest` as one HTML page at `out`, a path or URL; default: the newest finished run that has rows. See
    `pipeline.insight.report.write_report`; its `ReportConfig` says what is shown, and how much of it."""
    from pipeline import config as settings
    from pipeline.insight.gallery import GalleryConfig
    from pipeline.insight.report import ReportConfig, write_report

    gallery = GalleryConfig(source_profile=source_profile)
    config = ReportConfig(gallery=gallery, drift=drift or settings.DriftConfig(), dest_profile=dest_profile)
    return write_report(dest, run_id, out=out, config=config)


def export(config: Any = None, /, **settings: Any) -> ExportOutcome:
    """The masks of a table for other tools: `export(dest=..., out=..., format="coco", where="...", images=True)`.

    The keywords are the fields of `pipeline.insight.export.job.ExportConfig`; a ready config may be given instead.
    `listen` is handed on to `pipeline.insight.export.job.export`, which says what is guaranteed and raised.
    """
    from pipeline.insight.export import job

    hooks = {key: settings.pop(key) for key in ("listen",) if key in settings}
    return job.export(config or job.ExportConfig(**settings), **hooks)


def limits(source: str, model: str, *, out: str | Path | None = None, **options: Any) -> Ceilings:
    """What this machine can do at most, stage by stage, and writes it to `out`, a path or URL, for `segment(limits=…)`:
    see `pipeline.engine.ceilings.measure`, which takes the options."""
    from pipeline.engine.ceilings import measure
    from pipeline.engine.limits import write_ceilings
    from pipeline.table.scratch import scratch_folder

    with scratch_folder() as scratch:
        found = measure(source, model, scratch=scratch, **options)
    if out is not None:
        write_ceilings(found, str(out))
    return found


def list_runs(dest: str, *, profile: str | None = None) -> list[dict[str, Any]]:
    """Every run of `dest`, newest first."""
    from pipeline.engine import status

    return status.list_runs(dest, profile=profile)


def show_run(dest: str, run_id: str, *, profile: str | None = None) -> dict[str, Any]:
    """One run whole: its plan, who holds it, how far it is or what became of it."""
    from pipeline.engine import status

    return status.show_run(dest, run_id, profile=profile)


def abandon_run(dest: str, run_id: str, *, profile: str | None = None) -> dict[str, Any]:
    """Gives an open run up; what it committed stays."""
    from pipeline.engine import status

    return status.abandon_run(dest, run_id, profile=profile)


def models(registry: str | None = None, *, profile: str | None = None) -> list[Any]:
    """The models that a name can reach. `registry`: a folder or URL, by default `MASKMILL_REGISTRY`."""
    from pipeline.registry import listings

    return listings(registry=registry, profile=profile)


def push_model(model: Any, registry: str | None = None, **options: Any) -> Pushed:
    """Puts a model file into a registry, as the challenger: see `pipeline.registry.changes.push_model`."""
    from pipeline.registry import changes

    return changes.push_model(model, registry, **options)


def promote_model(model: Any, registry: str | None = None, **settings: Any) -> Promotion:
    """Makes a challenger the champion if it is better, or says why not: `promote_model("street", dataset=...)`.

    The keywords are the fields of `pipeline.learning.promotion.PromoteConfig`; a ready config may be given instead.
    `listen` and `should_stop` are handed on to `pipeline.learning.promotion.promote_model`, which says what is
    guaranteed and raised.
    """
    from pipeline.learning import promotion

    hooks = {key: settings.pop(key) for key in ("listen", "should_stop") if key in settings}
    if isinstance(model, promotion.PromoteConfig):
        return promotion.promote_model(model, **hooks)
    return promotion.promote_model(promotion.PromoteConfig(model=model, registry=registry, **settings), **hooks)


def rollback_model(name: str, registry: str | None = None, **options: Any) -> Entry:
    """Makes the champion before the present one the champion: see `pipeline.registry.changes.rollback_model`."""
    from pipeline.registry import changes

    return changes.rollback_model(name, registry=registry, **options)


def model_history(name: str, registry: str | None = None, *, profile: str | None = None) -> list[Any]:
    """Every decision about the models of `name`, the oldest first: see `pipeline.registry.shelf.model_history`."""
    from pipeline.registry import shelf

    return shelf.model_history(name, registry=registry, profile=profile)
