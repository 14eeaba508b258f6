"""The gate before a champion. Owns: what a challenger must show, how that is decided, and that the decision is kept.
Must not know: how registries are written, how images are measured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, JsonValue

from pipeline.engine.outcome import Listener
from pipeline.errors import ChampionChangedError, StoppedError, UsageError
from pipeline.learning.assessment import EvaluateConfig, evaluate
from pipeline.learning.comparison import Comparison, Metric, compare
from pipeline.registry.changes import change_champion, registry_warnings
from pipeline.registry.history import CHALLENGER, Entry
from pipeline.registry.shelf import Model, Shelf, parse_reference, read_shelf, required_registry, resolve
from pipeline.storage import join_uri, normalize_uri, recorded_uri
from pipeline.table.evaluations import read_evaluations


class Gate(BaseModel):
    """What a challenger must show, and on what."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    split: str = Field("val", description="Which of the labelled images; `all` for every one.")
    evaluations: str | None = Field(
        None, description="DEST of the evaluations. With no data set: of both models, and there already."
    )
    evaluation: dict[str, JsonValue] = Field(
        {}, description="How they are evaluated: further fields of EvaluateConfig, such as engine, actors, layout."
    )
    metric: Metric | None = Field(
        None, description="What is compared. Default: miou, or pq where objects are told apart."
    )
    confidence: float = Field(
        0.95, gt=0, lt=1, description="Share of resamples in which the challenger must be better."
    )
    max_class_drop: float = Field(0.02, ge=0, le=1, description="No class may fall by more than this.")
    resamples: int = Field(2000, ge=100, le=1_000_000, description="Of the images, in the paired bootstrap.")
    seed: int = Field(0, ge=0, description="Of the resamples.")


class PromoteConfig(Gate):
    """One promotion that is asked for."""

    model: str = Field(description="NAME, whose challenger is meant, or NAME@alias or NAME@version.")
    registry: str | None = Field(None, description="Folder or URL of the registry. Default: MASKMILL_REGISTRY.")
    dataset: str | None = Field(None, description="Labelled images on which both models are evaluated.")
    force: bool = Field(False, description="Promote whatever the comparison says. Needs a reason.")
    reason: str | None = Field(None, description="Kept in the history.")
    profile: str | None = Field(None, description="AWS profile of the registry.")
    dataset_profile: str | None = Field(None, description="AWS profile of the data set.")
    evaluations_profile: str | None = Field(
        None, description="AWS profile of the evaluations. Default: that of the registry."
    )


class Promotion(BaseModel):
    """What became of it. `unchanged`: the version is champion already, and nothing was written."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    #: The version that asked to be champion.
    version: str
    state: Literal["promoted", "kept", "unchanged"]
    #: One sentence.
    why: str
    champion_before: str | None
    #: The champion now.
    champion: str
    forced: bool = False
    #: None where nothing was compared.
    comparison: Comparison | None = None
    #: Number of the entry in the history.
    entry: int | None = None
    warnings: tuple[str, ...] = ()


class _Verdict(NamedTuple):
    promoted: bool
    why: str
    forced: bool = False
    comparison: Comparison | None = None
    #: Ids of the evaluations that were compared: the champion's, the challenger's.
    evaluations: tuple[str, str] | None = None


def promote_model(
    config: PromoteConfig, *, listen: Listener | None = None, should_stop: Callable[[], bool] | None = None
) -> Promotion:
    """Makes a version the champion of its name if it beats the present one on the same images, or says why not.

    It beats it where it is better in at least `confidence` of the resamples of a paired bootstrap, and no class's score
    falls by more than `max_class_drop`. Where there is no champion it is promoted with that said. Either way the
    decision and its numbers become an entry of the history.

    With a `dataset` both are evaluated on it first, as `maskmill evaluate` does, under `evaluations` or in the
    registry; what is there already is not done again. `listen` and `should_stop` are handed on to that. Raises
    UsageError where there is nothing to compare by, StoppedError when asked to stop, and ChampionChangedError where the
    champion changed meanwhile: of promotions at the same moment one wins, and the others were decided against a
    champion that is no more. Safe to call again, after anything.
    """
    registry = required_registry(config.registry)
    if config.force and not (config.reason or "").strip():
        raise UsageError("a forced promotion needs a reason, which the history keeps: give --reason TEXT")
    name, which = parse_reference(config.model)
    shelf = read_shelf(name, registry=registry, profile=config.profile)
    version, before = shelf.line(which or CHALLENGER).version, shelf.champion()
    if version == before:
        return _unchanged(name, version)
    # A file that does not load, or is not what it is called, shall not become champion.
    candidate = resolve(f"{name}@{version}", registry=registry, profile=config.profile)

    def measure(of: str) -> pa.Table:
        if config.dataset is None:
            assert config.evaluations is not None
            profile = config.evaluations_profile or config.profile
            return read_evaluations(config.evaluations, model_version=of, profile=profile)
        return _evaluated(config, config.dataset, shelf, of, registry, listen=listen, should_stop=should_stop)

    verdict = _judge(config, shelf, candidate, measure)
    try:
        entry = change_champion(
            registry, name, version, "promote" if verdict.promoted else "keep", instead_of=before,
            profile=config.profile, reason=config.reason, decision=_kept(config, verdict),
        )  # fmt: skip
    except ChampionChangedError:
        if read_shelf(name, registry=registry, profile=config.profile).champion() == version:
            return _unchanged(name, version)
        raise
    return Promotion(
        name=name,
        version=version,
        state="promoted" if verdict.promoted else "kept",
        why=verdict.why,
        champion_before=before,
        champion=version if verdict.promoted or before is None else before,
        forced=verdict.forced,
        comparison=verdict.comparison,
        entry=entry.number,
        warnings=registry_warnings(registry, profile=config.profile),
    )


def promotion_of(name: str, entry: Entry) -> Promotion:
    """What `promote_model` returned when it made this `promote` entry of a history, its warnings apart."""
    decision = entry.decision or {}
    return Promotion(
        name=name,
        version=entry.version,
        state="promoted",
        why=str(decision.get("why", "")),
        champion_before=entry.champion_before,
        champion=entry.version,
        forced=bool(decision.get("forced", False)),
        comparison=Comparison.model_validate(decision["comparison"]) if decision.get("comparison") else None,
        entry=entry.number,
    )


def judge(comparison: Comparison, gate: Gate) -> tuple[bool, str]:
    """Whether the challenger may be champion, and why, in one sentence."""
    found = (
        f"{comparison.metric} {comparison.candidate:.4f} against {comparison.baseline:.4f} on {comparison.images} "
        f"images, better in {comparison.confidence:.1%} of the resamples"
    )
    faults = []
    if comparison.confidence < gate.confidence:
        faults.append(f"{gate.confidence:.1%} is asked for")
    if comparison.worst_drop > gate.max_class_drop:
        faults.append(
            f"class {comparison.worst_class!r} falls by {comparison.worst_drop:.4f}, "
            f"and {gate.max_class_drop:g} is allowed"
        )
    return not faults, f"{found}; {' and '.join(faults)}" if faults else found


def _judge(config: PromoteConfig, shelf: Shelf, candidate: Model, measure: Callable[[str], pa.Table]) -> _Verdict:
    before = shelf.champion()
    if before is None:
        return _Verdict(True, f"{shelf.name} had no champion")
    if config.evaluations is None and config.dataset is None:
        if config.force:
            return _Verdict(True, f"forced, with nothing compared: {config.reason}", forced=True)
        raise UsageError(
            f"{shelf.name} has the champion {before}, and {candidate.version} must be held against it: give --dataset "
            "D, or --evaluations DEST with evaluations of both on the same images, or --force with a --reason"
        )
    champion, challenger = measure(before), measure(candidate.version)
    found = compare(
        champion, challenger, metric=config.metric or ("pq" if candidate.card.task == "instance" else "miou"),
        resamples=config.resamples, confidence=config.confidence, seed=config.seed,
    )  # fmt: skip
    ids = champion["evaluation_id"][0].as_py(), challenger["evaluation_id"][0].as_py()
    passed, why = judge(found, config)
    if config.force and not passed:
        return _Verdict(True, f"forced ({config.reason}), although: {why}", True, found, ids)
    return _Verdict(passed, why, False, found, ids)


def _evaluated(
    config: PromoteConfig, dataset: str, shelf: Shelf, version: str, registry: str, **hooks: Any
) -> pa.Table:
    """The rows of a version's evaluation, which is brought up to date first."""
    dest = config.evaluations or join_uri(registry, "_evaluations", shelf.name, version)
    profile = config.evaluations_profile or config.profile
    settings: dict[str, Any] = {
        "resamples": 0, "source_profile": config.dataset_profile, "dest_profile": profile,
        "registry_profile": config.profile,
    } | config.evaluation  # fmt: skip
    found = evaluate(
        EvaluateConfig(dataset=dataset, split=config.split, model=shelf.line(version).origin, dest=dest, **settings),
        **hooks,
    )
    if found.state != "done":
        raise StoppedError("stopped while the models were being evaluated: the same command continues")
    return read_evaluations(dest, model_version=version, evaluation_id=found.evaluation_id, profile=profile)


def _kept(config: PromoteConfig, verdict: _Verdict) -> dict[str, Any]:
    """What the history keeps: the rule, what was found, what followed."""
    asked = config.model_dump(mode="json", include={"confidence", "max_class_drop", "seed", "split"})
    return {
        **asked,
        # Histories are read by many: no signature of an address is among it, and no path that means nothing elsewhere.
        "dataset": recorded_uri(normalize_uri(config.dataset)) if config.dataset else None,
        "promoted": verdict.promoted,
        "forced": verdict.forced,
        "why": verdict.why,
        "evaluations": list(verdict.evaluations) if verdict.evaluations else None,
        "comparison": verdict.comparison.model_dump(mode="json") if verdict.comparison else None,
    }


def _unchanged(name: str, version: str) -> Promotion:
    why = f"{version} is the champion of {name} already"
    return Promotion(name=name, version=version, state="unchanged", why=why, champion_before=version, champion=version)
