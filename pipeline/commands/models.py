"""`maskmill models`. Owns: its options. Must not know: how anything is done, or how it looks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

import pipeline
from pipeline import screen
from pipeline.commands.options import Json
from pipeline.errors import UsageError

app = typer.Typer(help="Models that a name can reach: list, show, import.", no_args_is_help=True)


@app.command("list")
def models_list(as_json: Json = False) -> None:
    """Models that a name can reach."""
    lines = pipeline.models()
    if as_json:
        print(json.dumps([line._asdict() for line in lines]))
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("name", "version", "aliases", "file"):
        table.add_column(column, overflow="fold")
    for line in lines:
        table.add_row(line.name, line.version, ", ".join(line.aliases), Text(screen.plain(line.origin)))
    screen.print_whole(table)


@app.command("show")
def models_show(
    reference: Annotated[str, typer.Argument(metavar="REF", help="A name, name@alias, name@version, path or URL.")],
) -> None:
    """A model's card, as JSON."""
    from pipeline.registry import resolve

    model = resolve(reference)
    body = {"version": model.version, "file": model.origin, "size_bytes": len(model.data)}
    print(json.dumps(body | model.card.model_dump(mode="json"), indent=2))


@app.command("import")
def models_import(  # noqa: PLR0917 - typer's way: every option of the command is a parameter
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="torchvision:NAME, or smp:ARCHITECTURE/ENCODER.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The .safetensors file to write.")],
    weights: Annotated[
        str | None, typer.Option(metavar="NAME", help="Published weights (torchvision: DEFAULT unless told otherwise).")
    ] = None,
    weights_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A state dict, as .pth or .safetensors.")
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
    print(f"{out}: {model.card.name}, version {model.version}, {len(model.card.classes)} classes")
