"""`maskmill train` and `maskmill labels`. Owns: their options. Must not know: how anything is done, or how it looks."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

import pipeline
from models.overrides import parse_settings
from pipeline import screen
from pipeline.commands.options import (
    INFRASTRUCTURE,
    DrawSplits,
    Json,
    LabelsOf,
    Layout,
    interruptible,
    local_file,
    option,
    splitting,
)
from pipeline.errors import UsageError

_WHAT, _LONG, _HOW, _WHERE = "What is trained", "How long", "How", "Where the work is done"
_DATASET = typer.Argument(metavar="DATASET", help="A labelled data set: a folder or URL, in any of the layouts.")

labels_app = typer.Typer(help="Labelled data sets: check.", no_args_is_help=True)


def train(  # noqa: PLR0917 - typer's way: every option of the command is a parameter
    dataset: Annotated[str, _DATASET],
    name: Annotated[str | None, option("Of the model.", metavar="NAME")] = None,
    registry: Annotated[
        str | None, typer.Option(envvar="MASKMILL_REGISTRY", metavar="URL", help="Where the model goes.")
    ] = None,
    out: Annotated[str | None, option("Write the model to this file (too).", metavar="FILE")] = None,
    recipe: Annotated[
        Path | None,
        option("JSON of settings; options on the command line come before them.", metavar="FILE", parser=local_file),
    ] = None,
    as_json: Annotated[bool, option("Print exactly one JSON object on stdout.", "--json")] = False,
    preview: Annotated[
        Path | None,
        option(
            "Train nothing: draw what the network would see, with its labels, to this PNG.",
            metavar="FILE",
            parser=local_file,
        ),
    ] = None,
    arch: Annotated[
        str | None, option("An architecture. Default: that of INIT, else unet.", panel=_WHAT, metavar="A")
    ] = None,
    encoder: Annotated[str | None, option("Its encoder.", panel=_WHAT, metavar="E")] = None,
    arg: Annotated[
        list[str] | None,
        option("Another argument of the architecture; may be repeated.", panel=_WHAT, metavar="KEY=JSON"),
    ] = None,
    task: Annotated[
        str | None, option("auto: by the labels and the architecture.", panel=_WHAT, metavar="auto|semantic|instance")
    ] = None,
    init: Annotated[
        str | None, option("A model to start from; a new head where classes differ.", panel=_WHAT, metavar="MODEL")
    ] = None,
    backbone_weights: Annotated[
        str | None, option("Published weights of the backbone, or a file.", panel=_WHAT, metavar="DEFAULT|NAME|FILE")
    ] = None,
    freeze: Annotated[
        str | None, option("The backbone: never, always, or for N epochs.", panel=_WHAT, metavar="none|backbone|N")
    ] = None,
    train_split: Annotated[str | None, option("Trained on.", panel=_WHAT, metavar="NAME")] = None,
    val_split: Annotated[
        str | None, option("Measured as training goes on; an empty name: nothing is.", panel=_WHAT, metavar="NAME")
    ] = None,
    layout: Layout = None,
    labels_of: LabelsOf = None,
    draw_splits: DrawSplits = None,
    epochs: Annotated[int | None, option("One pass over the images is one.", panel=_LONG, metavar="N")] = None,
    steps: Annotated[int | None, option("Batches.", panel=_LONG, metavar="N")] = None,
    minutes: Annotated[float | None, option("Of wall time.", panel=_LONG, metavar="M")] = None,
    epoch_images: Annotated[
        int | None, option("Images drawn in an epoch: more make fewer checkpoints.", panel=_LONG, metavar="N")
    ] = None,
    patience: Annotated[
        int | None, option("Stop after so many measurements without a better one.", panel=_LONG, metavar="N")
    ] = None,
    keep: Annotated[str | None, option("Which weights.", panel=_LONG, metavar="best|last")] = None,
    batch_size: Annotated[int | None, option("Images of a step, over all workers.", panel=_HOW, metavar="N")] = None,
    accumulate: Annotated[int | None, option("Portions of a step.", panel=_HOW, metavar="N")] = None,
    optimizer: Annotated[str | None, option("", panel=_HOW, metavar="adamw|sgd")] = None,
    learning_rate: Annotated[float | None, option("The highest.", panel=_HOW, metavar="X")] = None,
    weight_decay: Annotated[float | None, option("", panel=_HOW, metavar="X")] = None,
    schedule: Annotated[str | None, option("After a warm-up.", panel=_HOW, metavar="cosine|poly")] = None,
    ema_decay: Annotated[float | None, option("Of the averaged weights.", panel=_HOW, metavar="X")] = None,
    seed: Annotated[int | None, option("Of everything that is random.", panel=_HOW, metavar="N")] = None,
    precision: Annotated[str | None, option("", panel=_HOW, metavar="auto|fp32|bf16")] = None,
    change: Annotated[
        list[str] | None,
        option(
            "Any setting of TrainConfig: augmentation.crop_px=256, loss.class_weights=median; may be repeated.",
            "--set",
            panel=_HOW,
            metavar="KEY=VALUE",
        ),
    ] = None,
    engine: Annotated[
        str | None, option("auto: ray for several workers.", panel=_WHERE, metavar="auto|local|ray")
    ] = None,
    workers: Annotated[int | None, option("That train together.", panel=_WHERE, metavar="N")] = None,
    threads: Annotated[int | None, option("CPU threads of each worker.", panel=_WHERE, metavar="N")] = None,
    use_gpu: Annotated[bool | None, option("Default: where there is one.", "--gpu/--cpu", panel=_WHERE)] = None,
    ray_address: Annotated[str | None, option("A running Ray cluster.", panel=_WHERE, metavar="ADDRESS")] = None,
    shared_filesystem: Annotated[
        bool | None, option("Local paths mean the same on every node.", "--shared-filesystem", panel=_WHERE)
    ] = None,
    dataset_profile: Annotated[str | None, option("AWS profile for DATASET.", panel=_WHERE, metavar="NAME")] = None,
    registry_profile: Annotated[
        str | None,
        option("AWS profile for the registry, --out, checkpoints and --init.", panel=_WHERE, metavar="NAME"),
    ] = None,
    checkpoints: Annotated[
        str | None, option("Default: _training in the registry, or beside the file.", panel=_WHERE, metavar="URL")
    ] = None,
    restart: Annotated[
        bool | None, option("Forget what an earlier, equal run has done.", "--restart", panel=_WHERE)
    ] = None,
    check: Annotated[
        bool | None, option("Refuse a data set with broken labels.", "--check/--no-check", panel=_WHERE)
    ] = None,
) -> None:
    """Train a model on a labelled data set.

    The same command again continues what was stopped, whatever stopped it.

    Exit status: 0 trained; 1 infrastructure or training failed, checkpoints are kept; 2 wrong usage, or broken labels;
    130 interrupted.
    """
    from pipeline.learning.training import BrokenLabelsError, TrainConfig

    given = {
        "dataset": dataset, "layout": layout, "labels_of": labels_of, "splitting": splitting(draw_splits),
        "name": name, "registry": registry, "out": out, "arch": arch, "encoder": encoder,
        "task": task, "init": init, "backbone_weights": backbone_weights, "freeze": _number(freeze),
        "train_split": train_split, "epochs": epochs, "steps": steps, "minutes": minutes, "epoch_images": epoch_images,
        "patience": patience, "keep": keep, "batch_size": batch_size, "accumulate": accumulate, "optimizer": optimizer,
        "learning_rate": learning_rate, "weight_decay": weight_decay, "schedule": schedule, "ema_decay": ema_decay,
        "seed": seed, "precision": precision, "engine": engine, "workers": workers, "threads": threads,
        "use_gpu": use_gpu, "ray_address": ray_address, "shared_filesystem": shared_filesystem,
        "dataset_profile": dataset_profile, "registry_profile": registry_profile,
        "checkpoints": checkpoints, "restart": restart, "check": check,
    }  # fmt: skip
    settings = _settings(recipe, change)
    told = {key: value for key, value in given.items() if value is not None}
    if told.keys() & {"epochs", "steps", "minutes"}:
        settings = {key: value for key, value in settings.items() if key not in ("epochs", "steps", "minutes")}
    settings |= told
    if val_split is not None:
        settings["val_split"] = val_split or None
    if arg:
        settings["args"] = {**settings.get("args", {}), **_parsed("--arg", arg)}
    if preview is not None:
        settings = {"name": "preview", "out": str(preview), "steps": 1} | settings
    try:
        config = TrainConfig(**settings)
    except ValidationError as error:
        raise UsageError(_first_wrong(error)) from error
    if preview is not None:
        _write_preview(preview, pipeline.preview_training(config))
        print(screen.plain(str(preview)))
        return
    display = screen.TrainingScreen(quiet=as_json)
    try:
        # Ray prints what it has to say of dying nodes on stdout, which is for the outcome alone.
        with redirect_stdout(sys.stderr), interruptible(display.console) as should_stop:
            outcome = pipeline.train(config, listen=display.listen, should_stop=should_stop)
    except BrokenLabelsError as error:
        display.close()
        print(screen.plain_lines(error.report.text()), file=sys.stderr)
        raise
    finally:
        display.close()
    if as_json:
        print(outcome.model_dump_json())
    else:
        screen.print_training(outcome)


@labels_app.command("check")
def labels_check(  # noqa: PLR0917 - typer's way
    dataset: Annotated[str, _DATASET],
    layout: Layout = None,
    labels_of: LabelsOf = None,
    draw_splits: DrawSplits = None,
    dataset_profile: Annotated[str | None, typer.Option(metavar="NAME", help="AWS profile for DATASET.")] = None,
    as_json: Json = False,
) -> None:
    """What is wrong with the labels, and how often each class occurs.

    Exit status: 0 fit for training; 1 there are errors; 2 no data set.
    """
    report = pipeline.check_labels(
        dataset, layout=layout, model=labels_of, splitting=splitting(draw_splits), profile=dataset_profile
    )
    print(report.model_dump_json() if as_json else screen.plain_lines(report.text()))
    if not report.ok:
        raise typer.Exit(INFRASTRUCTURE)


def _write_preview(path: Path, png: bytes) -> None:
    try:
        path.write_bytes(png)
    except OSError as error:
        raise UsageError(f"--preview {path} cannot be written: {error.strerror or error}") from error


def _settings(recipe: Path | None, changes: list[str] | None) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    if recipe is not None:
        try:
            settings = json.loads(recipe.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"--recipe {recipe} cannot be read: {error}") from error
        if not isinstance(settings, dict):
            raise UsageError(f"--recipe {recipe} must be a JSON object of settings")
    return _merged(settings, _parsed("--set", changes or []))


def _parsed(flag: str, lines: list[str]) -> dict[str, Any]:
    try:
        return parse_settings(lines)
    except ValueError as error:
        raise UsageError(f"{flag}: {error}") from error


def _merged(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(settings)
    for key, value in changes.items():
        before = merged.get(key)
        merged[key] = _merged(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return merged


def _first_wrong(error: ValidationError) -> str:
    first = error.errors()[0]
    where, reason = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
    if not where:
        return reason
    if first["type"] == "missing":
        return f"--{where} is missing"
    return f"{where.replace('_', '-')} is {first['input']!r}: {reason.lower()}"


def _number(text: str | None) -> str | int | None:
    return int(text) if text is not None and text.isdigit() else text
