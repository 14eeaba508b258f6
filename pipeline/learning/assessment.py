"""What a model is worth on a labelled corpus: masks by the fleet, counts by image, scores by query. Owns: the order of
these steps, and what makes two evaluations the same. Must not know: how masks are made, how a score is computed, how
any of it looks.

    images of the split ─▶ a run of `segment` ─▶ Parts of segments ─▶ Parts of evaluations ─▶ scores, slices
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field, JsonValue

from models.card import Card
from models.overrides import with_settings
from pipeline.config import (
    Actors,
    BatchSize,
    Engine,
    GpusPerActor,
    LeaseTtl,
    MaxPixels,
    MemoryBytes,
    PrecisionChoice,
    SegmentConfig,
    ShardSize,
    Threads,
)
from pipeline.corpus.manifest import Corpus, read_source
from pipeline.engine import run
from pipeline.engine.outcome import Event, Listener, Outcome
from pipeline.errors import InfrastructureError, StoppedError, StorageError, UsageError
from pipeline.learning.dataset import Dataset
from pipeline.learning.evaluations import align_classes, counting_score
from pipeline.learning.labels.source import Layout, open_labels
from pipeline.learning.labels.splits import Splitting
from pipeline.learning.measurement import Measurer
from pipeline.learning.question import Masks, Question, ask
from pipeline.learning.scores import Scores, score
from pipeline.learning.slices import Slice, slices_of
from pipeline.learning.tallies import MAX_DETECTIONS, chosen_rows
from pipeline.machine import cores
from pipeline.registry import Model, registry_uri, resolve
from pipeline.storage import Storage, join_uri, normalize_uri, open_storage, recorded_uri, uri_name
from pipeline.table.catalog import files_below
from pipeline.table.evaluations import evaluation_folder, read_evaluation
from pipeline.table.scratch import scratch_folder

_TELL_EVERY_S = 10.0
#: Fields that are handed on to `segment`.
_HANDED_ON = (
    "model", "engine", "actors", "gpus_per_actor", "batch_size", "shard_size", "threads", "precision", "compile",
    "max_error_rate", "wait", "ray_address", "source_profile", "registry_profile", "shared_filesystem", "settings",
    "max_pixels", "memory_bytes", "lease_ttl_s", "retry_errors",
)  # fmt: skip


class EvaluateConfig(BaseModel):
    """One `maskmill evaluate` command. Fields that `SegmentConfig` has too mean the same."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str = Field(description="A labelled data set: a folder or URL in one of the layouts, or a DEST.")
    model: str = Field(description="A model's name, name@version or name@alias, or a .safetensors file.")
    registry: str | None = Field(None, description="A folder or URL with models by name. Default: MASKMILL_REGISTRY.")
    split: str = Field("val", description="Which images; `all` for every labelled one.")
    dest: str | None = Field(None, description="Where masks and evaluations live. Default: see `default_dest`.")
    layout: Layout | None = Field(None, description="Of the data set. Default: by its files.")
    labels_of: str | None = Field(None, description="Whose masks are the truth, where the data set is a DEST.")
    splitting: Splitting | None = Field(None, description="Draw splits, whatever the data set says of its own.")
    renamed: dict[str, str] = Field({}, description="Names of the data set's classes by those of the model.")
    min_score: float | None = Field(
        None, ge=0, le=1, description="Objects below do not count for PQ and F1. Default: 0.5 for detectors, else 0."
    )
    where: str | None = Field(None, description="An SQL condition on rows: only these are scored.")
    slices: tuple[str, ...] = Field((), description="Columns, or SQL expressions, to score piece by piece.")
    resamples: int = Field(1000, ge=0, le=1_000_000, description="Of the bootstrap; 0: no intervals.")
    confidence: float = Field(0.95, gt=0, lt=1, description="Share of the resamples within an interval.")
    seed: int = Field(0, ge=0, description="Of the bootstrap.")
    max_detections: int = Field(MAX_DETECTIONS, ge=1, description="Of one class in one image, that AP takes.")
    engine: Engine = "auto"
    actors: Actors | None = None
    gpus_per_actor: GpusPerActor | None = None
    batch_size: BatchSize | None = None
    shard_size: ShardSize | None = None
    threads: Threads | None = None
    precision: PrecisionChoice = "auto"
    compile: bool = False
    settings: dict[str, JsonValue] = {}
    max_pixels: MaxPixels = 200_000_000
    memory_bytes: MemoryBytes = 1 << 30
    max_error_rate: float = Field(0.05, ge=0, le=1)
    retry_errors: bool = False
    wait: bool = False
    ray_address: str | None = None
    source_profile: str | None = None
    dest_profile: str | None = None
    registry_profile: str | None = None
    shared_filesystem: bool = False
    lease_ttl_s: LeaseTtl = 30.0

    @property
    def table_profile(self) -> str | None:
        """AWS profile for where masks and evaluations live: by default that is in the registry."""
        return self.registry_profile if self.dest is None and self.dest_profile is None else self.dest_profile


class Assessment(BaseModel):
    """What an `evaluate` call came to. `scores` is None unless `state` is `done`."""

    model_config = ConfigDict(frozen=True)

    state: Literal["done", "interrupted"]
    dataset: str
    split: str
    dest: str
    model_name: str
    model_version: str
    settings_digest: str = ""
    task: str
    #: Names of the model's classes, by id; for the page, and no part of what is told.
    classes: dict[int, str] = Field({}, exclude=True)
    #: The SQL condition on the rows that are scored; None: all.
    where: str | None = None
    #: Names the rows in DEST/evaluations; None before there are any.
    evaluation_id: str | None = None
    #: Objects below it do not count for PQ, F1, precision and recall.
    min_score: float
    #: Classes that the data set does not have: wrong wherever they are predicted.
    only_in_model: tuple[str, ...] = ()
    #: Classes that the model does not have: never found.
    only_in_dataset: tuple[str, ...] = ()
    scores: Scores | None = None
    slices: dict[str, tuple[Slice, ...]] = {}
    #: Images that no score speaks of, by why.
    failed_by_kind: dict[str, int] = {}
    #: What the run of `segment` came to.
    segmented: Outcome

    @property
    def error_rate(self) -> float:
        """Share of the images that no score speaks of."""
        failed = sum(self.failed_by_kind.values())
        return failed / max(1, failed + (self.scores.images if self.scores else 0))

    @property
    def folder(self) -> str | None:
        """Where the rows lie."""
        if self.evaluation_id is None:
            return None
        return join_uri(self.dest, evaluation_folder(self.model_name, self.model_version, self.evaluation_id))


def evaluate(
    config: EvaluateConfig,
    *,
    listen: Listener | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Assessment:
    """Brings DEST up to date with the model's masks of the split and with their counts, and scores them.

    The same call again does nothing but score: masks are a run of `segment`, and a file of counts is created once, for
    each Part of masks; both continue where they were interrupted. Raises UsageError (a data set, split or model that
    cannot be used; no class in common), InfrastructureError. Safe to call again, after anything.
    """
    listen = listen or (lambda event: None)
    should_stop = should_stop or (lambda: False)
    model = resolve(config.model, registry=config.registry, profile=config.registry_profile)
    card = _card(model, config)
    dataset = open_split(config)
    classes = {info.id: info.name for info in card.classes}
    alignment = align_classes(classes, dataset.class_names, renamed=config.renamed)
    dest = normalize_uri(config.dest) if config.dest else default_dest(model, config.registry)
    min_score = counting_score(card) if config.min_score is None else config.min_score
    storage = open_storage(dest, profile=config.table_profile)
    items = {dataset.source.image_uri(item.name): item for item in dataset.items}
    with scratch_folder() as scratch:
        # By its file: an alias may come to mean another version while this runs.
        corpus, segment_config = _corpus(
            config.model_copy(update={"model": model.origin}), dest, storage, list(items), scratch
        )
        outcome = run.segment(segment_config, listen=listen, should_stop=should_stop, corpus=corpus)
        names = {alignment.names[alignment.index_of[class_id]] for class_id in classes}
        found = Assessment(
            state="done" if outcome.state == "done" else "interrupted",
            dataset=recorded_uri(normalize_uri(config.dataset)),
            split=config.split,
            dest=dest,
            model_name=model.card.name,
            model_version=model.version,
            settings_digest=outcome.settings_digest,
            task=card.task,
            classes=classes,
            min_score=min_score,
            where=config.where,
            only_in_model=tuple(name for name in alignment.names if name not in dataset.class_names),
            only_in_dataset=tuple(name for name in dataset.class_names if name not in names),
            segmented=outcome,
        )
        if found.state != "done":
            return found
        masks = Masks(dest, model.card.name, model.version, outcome.settings_digest)
        counting = {
            "dataset": [found.dataset, found.split],
            "classes": alignment.names,
            "renamed": config.renamed,
            "min_score": min_score,
        }
        question = ask(masks, storage, corpus, dataset, counting)
    found = found.model_copy(update={"evaluation_id": question.evaluation_id})
    stamp = {
        "evaluation_id": question.evaluation_id,
        "model_name": found.model_name,
        "dataset": found.dataset,
        "split": found.split,
    }
    measurer = Measurer(
        dataset.source, items, alignment, has_instances=card.task == "instance", min_score=min_score, stamp=stamp,
        threads=cores() + 1,
    )  # fmt: skip
    try:
        _measure(measurer, question, storage, listen=listen, should_stop=should_stop)
    except StoppedError:
        return found.model_copy(update={"state": "interrupted"})
    table = read_evaluation(storage, dest, found.model_name, found.model_version, question.evaluation_id)
    return _scored(config, found, table, len(items))


def default_dest(model: Model, registry: str | None = None) -> str:
    """Where evaluations of a model lie unless somebody says otherwise: `_evaluations/<name>/<version>` in the registry,
    the one given or that of the environment, else in this user's cache.
    """
    registry = registry_uri(registry)
    if registry:
        return join_uri(registry, "_evaluations", model.card.name, model.version)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return normalize_uri(str(cache / "maskmill" / "evaluations" / model.card.name / model.version))


def open_split(config: EvaluateConfig) -> Dataset:
    """The images and labels that are asked for. Raises UsageError."""
    source = open_labels(
        config.dataset, layout=config.layout, splitting=config.splitting, model=config.labels_of,
        profile=config.source_profile,
    )  # fmt: skip
    every = config.split == "all" and "all" not in source.splits
    dataset = Dataset(source, None if every else config.split)
    if not dataset.items:
        raise UsageError(f"split {config.split!r} of {config.dataset} has no images: there is nothing to evaluate")
    return dataset


def _card(model: Model, config: EvaluateConfig) -> Card:
    try:
        return with_settings(model.card, config.settings)
    except ValueError as error:
        raise UsageError(f"--set: {error}") from error


def _corpus(
    config: EvaluateConfig, dest: str, storage: Storage, uris: list[str], scratch: Path
) -> tuple[Corpus, SegmentConfig]:
    """The images as they are now, and the command that segments them: the same for the same list, so that it
    continues its own run.
    """
    text = "".join(json.dumps({"uri": uri}, ensure_ascii=False) + "\n" for uri in sorted(uris)).encode()
    profile = config.table_profile
    source = join_uri(dest, "evaluations", "_images", f"{hashlib.sha256(text).hexdigest()[:12]}.jsonl")
    try:
        storage.put_new(source, text)
    except StorageError as error:
        raise error.told(f"DEST cannot be written: {error}") from error
    # From here: the profile of the images need not reach DEST.
    listed = scratch / "images.jsonl"
    listed.write_bytes(text)
    corpus = read_source(str(listed), scratch=scratch, profile=config.source_profile)._replace(source=source)
    handed_on = config.model_dump(include=set(_HANDED_ON))
    return corpus, SegmentConfig(source=source, dest=dest, dest_profile=profile, **handed_on)


def _measure(
    measurer: Measurer,
    question: Question,
    storage: Storage,
    *,
    listen: Listener,
    should_stop: Callable[[], bool],
) -> None:
    """Commits what is missing of the evaluation. Raises StoppedError between two Parts."""
    there = {uri_name(uri) for uri in files_below(storage, question.folder)}
    left = {uri: images for uri, images in question.wanted.items() if uri_name(uri) not in there}
    total = sum(map(len, left.values()))
    if left:
        listen(Event("note", f"evaluation {question.evaluation_id}: holding {total} masks against their labels"))
    done, told_s = 0, time.monotonic()
    for part_uri, images in left.items():
        if should_stop():
            raise StoppedError("stopped between two files of the evaluation")
        measurer.measure_part(storage, part_uri, images, join_uri(question.folder, uri_name(part_uri)))
        done += len(images)
        if time.monotonic() - told_s > _TELL_EVERY_S:
            told_s = time.monotonic()
            listen(Event("note", f"{done} of {total} masks held against their labels"))


def _scored(config: EvaluateConfig, found: Assessment, table: pa.Table, images: int) -> Assessment:
    if table.num_rows != images:
        raise InfrastructureError(
            f"{found.folder} has {table.num_rows} rows for {images} images: remove it, and give the command again"
        )
    failed = table.filter(pc.not_equal(table["status"], "ok"))
    if failed.num_rows == table.num_rows:
        raise InfrastructureError(
            f"none of {images} images could be measured: {failed['error_message'][0].as_py()} (and others in "
            f"{found.folder})"
        )
    settings: dict[str, Any] = {
        "resamples": config.resamples, "confidence": config.confidence, "seed": config.seed,
        "max_detections": config.max_detections,
    }  # fmt: skip
    # Failures and slices are of the rows that are scored, as the scores are.
    chosen = chosen_rows(table, config.where)
    kinds = chosen.filter(pc.not_equal(chosen["status"], "ok"))["error_kind"].value_counts().to_pylist()
    return found.model_copy(
        update={
            "failed_by_kind": {one["values"]: one["counts"] for one in kinds},
            "scores": score(table, where=config.where, **settings),
            "slices": {by: slices_of(chosen, by, **settings) for by in config.slices},
        }
    )
