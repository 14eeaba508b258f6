"""`maskmill limits`. Owns: its options, and how ceilings look in a terminal. Must not know: how they are measured."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

import pipeline
from pipeline import screen
from pipeline.commands.options import (
    BatchSize,
    Changes,
    Compiled,
    Json,
    ModelRef,
    Precision,
    Registry,
    card_changes,
    option,
)
from pipeline.storage import without_secrets


def limits(  # noqa: PLR0917 - typer's way: every option of the command is a parameter
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="Images like those of the runs: a folder or URL, listed whole."),
    ],
    model: ModelRef,
    registry: Registry = None,
    out: Annotated[
        str | None, option("The file to write: a path or URL, for --limits of `segment`.", metavar="FILE")
    ] = None,
    precision: Precision = "auto",
    compiled: Compiled = False,
    change: Changes = None,
    batch_size: BatchSize = None,
    seconds: Annotated[float, option("For each stage.", metavar="SECONDS")] = 3.0,
    source_profile: Annotated[str | None, option("AWS profile for SOURCE.", metavar="NAME")] = None,
    as_json: Json = False,
) -> None:
    """Measure what this machine can do at most: reading, decoding, the network, encoding, writing, each by itself.

    The record and the report of a run that is given the file (`segment --limits FILE`, or MASKMILL_LIMITS) say what
    share of each it reached, and which one bounds it; of the network, where its --set and --compile are those of here.
    Let nothing else run meanwhile. SOURCE is only read.
    """
    found = pipeline.limits(
        source, model, out=out, registry=registry, precision=precision, settings=card_changes(change),
        compile=compiled, batch_size=batch_size, seconds=seconds, profile=source_profile,
    )  # fmt: skip
    if as_json:
        print(found.model_dump_json())
    else:
        screen.stdout().print(ceilings_table(found))
        if out:
            print(f"written to {screen.plain(without_secrets(out))}")


def ceilings_table(found: Any) -> Table:
    """One line a ceiling. `found`: `pipeline.engine.limits.Ceilings`."""
    busy = f", load {found.load:.1f} before it began" if found.load >= 1 else ""
    table = Table(title=f"{found.device_name}, {found.cores} cores{busy}", box=None, padding=(0, 2, 0, 0))
    table.add_column("stage")
    table.add_column("at most", justify="right")
    table.add_column("")
    for store, one in found.stores.items():
        where = screen.plain(store)
        if one.listed_per_s:
            table.add_row(f"list {where}", f"{one.listed_per_s:,.0f}", "objects/s, into a Parquet file")
        cpu = f"{one.core_ms_per_get:.3f} core-ms each"
        table.add_row(f"read {where}", f"{one.gets_per_s:,.0f}", f"objects/s of {one.mean_bytes / 1e3:,.0f} kB; {cpu}")
    for kind, rate in found.decode_mpx_per_core_s.items():
        table.add_row(f"decode {kind}", f"{rate:,.1f}", "Mpixel/s and core")
    for name, rate in found.forward_mpx_per_s.items():
        what = "GPU" if found.device == "cuda" else "machine"
        table.add_row(f"model {name}", f"{rate:,.2f}", f"Mpixel/s and {what}")
    for name, rate in found.encode_mpx_per_core_s.items():
        table.add_row(f"encode {name}", f"{rate:,.1f}", "Mpixel/s and core, from prediction to row")
    table.add_row("write Parts", f"{found.write_mb_per_core_s:,.1f}", "MB/s and core")
    return table
