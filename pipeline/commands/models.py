"""`maskmill models`. Owns: its options. Must not know: how anything is done."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

import pipeline
from pipeline import screen
from pipeline.commands.options import (
    INTERRUPTED,
    KEPT,
    DrawSplits,
    Json,
    LabelsOf,
    Layout,
    Registry,
    RegistryProfile,
    interruptible,
    local_file,
    splitting,
)
from pipeline.errors import StoppedError, UsageError
from pipeline.storage import without_secrets

app = typer.Typer(help="Models: what a name can reach, and which version it means.", no_args_is_help=True)

Ref = Annotated[str, typer.Argument(metavar="REF", help="A name, name@alias, name@version, path or URL.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="As `maskmill models list` shows it.")]
_STATES = {"promoted": "is the champion now", "kept": "is not promoted", "unchanged": "stays the champion"}
Reason = Annotated[str | None, typer.Option(metavar="TEXT", help="Kept in the history.")]


@app.command("list")
def models_list(registry: Registry = None, registry_profile: RegistryProfile = None, as_json: Json = False) -> None:
    """Models that a name can reach."""
    lines = pipeline.models(registry, profile=registry_profile)
    if as_json:
        print(json.dumps([line._asdict() | {"origin": without_secrets(line.origin)} for line in lines]))
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("name", "version", "aliases", "file"):
        table.add_column(column, overflow="fold")
    for line in lines:
        aliases, origin = ", ".join(line.aliases), without_secrets(line.origin)
        table.add_row(line.name, line.version, Text(screen.plain(aliases)), Text(screen.plain(origin)))
    screen.print_whole(table)


@app.command("show")
def models_show(reference: Ref, registry: Registry = None, registry_profile: RegistryProfile = None) -> None:
    """A model's card, as JSON."""
    from pipeline.registry import resolve

    model = resolve(reference, registry=registry, profile=registry_profile)
    body = {"version": model.version, "file": without_secrets(model.origin), "size_bytes": len(model.data)}
    print(json.dumps(body | model.card.model_dump(mode="json"), indent=2))


@app.command("push")
def models_push(  # noqa: PLR0917 - typer's way: every option of the command is a parameter
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Path or URL of a .safetensors file.")],
    registry: Registry = None,
    registry_profile: RegistryProfile = None,
    alias: Annotated[
        str, typer.Option(metavar="NAME", help="What it is called besides; '' for nothing.")
    ] = "challenger",
    reason: Reason = None,
    as_json: Json = False,
) -> None:
    """Put a model file into a registry, under the name on its card, as the challenger."""
    pushed = pipeline.push_model(model, registry, alias=alias or None, reason=reason, profile=registry_profile)
    screen.warn(pushed.warnings)
    if as_json:
        print(json.dumps(pushed._asdict() | {"uri": without_secrets(pushed.uri)}))
        return
    aliases = f" ({', '.join(pushed.aliases)})" if pushed.aliases else ""
    there = "" if pushed.new else ", there already"
    print(screen.plain(f"{pushed.name}@{pushed.version}{aliases}{there}: {without_secrets(pushed.uri)}"))


@app.command("promote")
def models_promote(  # noqa: PLR0917 - typer's way: every option of the command is a parameter
    model: Annotated[str, typer.Argument(metavar="NAME", help="NAME (its challenger), NAME@alias or NAME@version.")],
    registry: Registry = None,
    dataset: Annotated[
        str | None, typer.Option(metavar="DATASET", help="Labelled images on which both are evaluated.")
    ] = None,
    split: Annotated[str, typer.Option(metavar="NAME", help="Which of them; `all`: every labelled one.")] = "val",
    layout: Layout = None,
    labels_of: LabelsOf = None,
    draw_splits: DrawSplits = None,
    evaluations: Annotated[
        str | None, typer.Option(metavar="DEST", help="Where evaluations lie; without --dataset: of both models.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option(metavar="miou|mean_dice|boundary_f1|pq|ap", help="Default: miou, or pq for instances.")
    ] = None,
    confidence: Annotated[
        float, typer.Option(metavar="SHARE", help="Of the resamples: in so many it must be better.")
    ] = 0.95,
    max_class_drop: Annotated[float, typer.Option(metavar="X", help="No class may fall by more than this.")] = 0.02,
    force: Annotated[bool, typer.Option("--force", help="Whatever the comparison says; needs --reason.")] = False,
    reason: Reason = None,
    engine: Annotated[str, typer.Option(metavar="auto|local|ray", help="Of the evaluations.")] = "auto",
    actors: Annotated[int | None, typer.Option(metavar="N", help="Workers of the evaluations, at most.")] = None,
    dataset_profile: Annotated[str | None, typer.Option(metavar="NAME", help="AWS profile for DATASET.")] = None,
    registry_profile: RegistryProfile = None,
    evaluations_profile: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="AWS profile for the evaluations. Default: that of the registry."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a challenger the champion, if it beats the present one on the same images; exit status 5 if it does not.

    Example: maskmill models promote street --dataset s3://bucket/labelled
    """
    evaluation = {"engine": engine, "actors": actors, "layout": layout, "labels_of": labels_of}
    if draw_splits:
        evaluation["splitting"] = splitting(draw_splits).model_dump(mode="json")
    display = screen.Screen(quiet=as_json)
    try:
        with redirect_stdout(sys.stderr), interruptible(display.console) as should_stop:
            done = pipeline.promote_model(
                model, registry, dataset=dataset, split=split, evaluations=evaluations, metric=metric,
                confidence=confidence, max_class_drop=max_class_drop, force=force, reason=reason,
                evaluation=evaluation, profile=registry_profile, dataset_profile=dataset_profile,
                evaluations_profile=evaluations_profile, listen=display.listen, should_stop=should_stop,
            )  # fmt: skip
    except StoppedError as stopped:
        display.console.print(str(stopped), soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from None
    finally:
        display.close()
    screen.warn(done.warnings)
    if as_json:
        print(done.model_dump_json(indent=2))
    else:
        print(screen.plain(f"{done.name}@{done.version} {_STATES[done.state]}: {done.why}"))
        if done.comparison:
            screen.print_whole(_classes_table(done.comparison.class_differences))
    if done.state == "kept":
        raise typer.Exit(KEPT)


@app.command("rollback")
def models_rollback(
    name: Name,
    registry: Registry = None,
    registry_profile: RegistryProfile = None,
    reason: Reason = None,
    as_json: Json = False,
) -> None:
    """Make the champion before the present one the champion again."""
    entry = pipeline.rollback_model(name, registry, reason=reason, profile=registry_profile)
    print(
        entry.model_dump_json(indent=2)
        if as_json
        else screen.plain(f"{name}@{entry.version} is the champion again, instead of {entry.champion_before}")
    )


@app.command("alias")
def models_alias(
    reference: Annotated[str, typer.Argument(metavar="REF", help="name@version or name@alias.")],
    alias: Annotated[str, typer.Argument(metavar="ALIAS", help="Any name but champion.")],
    registry: Registry = None,
    registry_profile: RegistryProfile = None,
    reason: Reason = None,
) -> None:
    """Give a version of a registry one more name, which another version then loses."""
    from pipeline.registry import set_alias

    entry = set_alias(reference, alias, registry=registry, reason=reason, profile=registry_profile)
    print(screen.plain(f"{alias} is {entry.version}" if entry else f"{alias} is {reference} already"))


@app.command("history")
def models_history(
    name: Name, registry: Registry = None, registry_profile: RegistryProfile = None, as_json: Json = False
) -> None:
    """Every decision about a name, the oldest first, with its numbers."""
    entries = pipeline.model_history(name, registry, profile=registry_profile)
    if as_json:
        print(json.dumps([entry.model_dump(mode="json") for entry in entries], indent=2))
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("", "at", "by", "what", "version", "champion", "why"):
        table.add_column(column, overflow="fold")
    for entry in entries:
        why = str((entry.decision or {}).get("why") or entry.reason or "")
        table.add_row(
            str(entry.number), f"{entry.at:%Y-%m-%d %H:%M}", Text(screen.plain(entry.by)), entry.action,
            *(Text(screen.plain(one)) for one in (entry.version, entry.aliases.get("champion", "none"), why)),
        )  # fmt: skip
    screen.print_whole(table)


@app.command("import")
def models_import(  # noqa: PLR0917 - typer's way: every option of the command is a parameter
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="torchvision:NAME, or smp:ARCHITECTURE/ENCODER.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The .safetensors file to write.", parser=local_file)],
    weights: Annotated[
        str | None, typer.Option(metavar="NAME", help="Published weights (torchvision: DEFAULT unless told otherwise).")
    ] = None,
    weights_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A state dict, as .pth or .safetensors.", parser=local_file)
    ] = None,
    random: Annotated[bool, typer.Option("--random", help="Random weights, for tests and measurements.")] = False,
    seed: Annotated[int, typer.Option(help="Of the random weights.")] = 0,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Of the model.")] = None,
    classes: Annotated[str | None, typer.Option(metavar="A,B,...", help="Class names, by channel.")] = None,
    task: Annotated[str, typer.Option(metavar="semantic|instance", help="What the channels mean.")] = "semantic",
    arg: Annotated[
        list[str] | None, typer.Option(metavar="KEY=JSON", help="An argument of the architecture; may be repeated.")
    ] = None,
    normalization: Annotated[
        str | None, typer.Option(metavar="imagenet|per_image|unit", help="Of the pixels, where no weights say it.")
    ] = None,
) -> None:
    """Make a model file out of published weights.

    Example: maskmill models import torchvision:deeplabv3_resnet50 --out street.safetensors
    """
    from pipeline.registry import import_model

    arguments: dict[str, Any] = {}
    for text in arg or []:
        key, _, value = text.partition("=")
        try:
            arguments[key] = json.loads(value)
        except ValueError as error:
            raise UsageError(f"--arg is {text!r}: give KEY=JSON, such as encoder_depth=4 or name='\"text\"'") from error
    model = import_model(
        out, source=source, weights=weights, weights_file=weights_file, seed=seed if random else None, name=name,
        classes=tuple(part.strip() for part in classes.split(",")) if classes else None, task=task, args=arguments,
        normalization=normalization,
    )  # fmt: skip
    print(f"{screen.plain(str(out))}: {model.card.name}, version {model.version}, {len(model.card.classes)} classes")


def _classes_table(differences: dict[str, float]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("class", overflow="fold")
    table.add_column("change", justify="right")
    for name, difference in sorted(differences.items(), key=lambda pair: pair[1]):
        table.add_row(Text(screen.plain(name)), f"{difference:+.4f}")
    return table
