"""The demo: segments the nuclei images beside this file through Ray, and shows what came out. Run by `make demo`."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

import pipeline
from pipeline.engine.outcome import Event
from pipeline.errors import MaskmillError
from pipeline.insight.contact_sheet import SheetConfig, draw_contact_sheet

SOURCE = Path(__file__).resolve().parent / "nuclei"
DEST = Path("demo-out")
SHEET = DEST / "contact-sheet.png"
MODEL = os.environ.get("MASKMILL_DEMO_MODEL", "nuclei-unet")

CROWDED = (
    "SELECT parse_filename(image_uri)[:12] AS image, width || ' x ' || height AS size, count(*) AS nuclei, "
    "round(avg(area)) AS mean_area_px, round(avg(score), 3) AS mean_score "
    "FROM instances GROUP BY ALL ORDER BY nuclei DESC LIMIT 8"
)
MICROSCOPY = (
    "SELECT if(brightness < 0.4, 'fluorescence', 'bright field') AS looks_like, count(*) AS images, "
    "sum(len(instances)) AS nuclei, round(avg(mean_confidence), 3) AS confidence, round(avg(infer_ms)) AS ms_each "
    "FROM images GROUP BY 1 ORDER BY 2 DESC"
)


def main() -> int:
    console = Console(highlight=False)
    console.print(f"[bold]Maskmill demo[/]: {MODEL} over [cyan]{escape(_short(SOURCE))}[/] into [cyan]{DEST}[/]\n")
    with console.status("starting Ray and a worker on this machine") as status:

        def listen(event: Event) -> None:
            if event.kind == "progress" and event.progress and event.progress.actors:
                status.update(f"{event.progress.rows} of {event.total} images")
            elif event.kind == "warning":
                console.print(f"[yellow]warning:[/] {escape(event.text)}")

        outcome = pipeline.segment(source=str(SOURCE), dest=str(DEST), model=MODEL, engine="ray", listen=listen)
    if outcome.runs:
        console.print(f"[green]done[/] in {outcome.seconds:.1f} s of work: run {outcome.run_id}")
    else:
        console.print("[green]nothing to do[/]: every image has its row already (`make clean` starts over)")
    started_s = time.monotonic()
    tiles = draw_contact_sheet(str(DEST), SHEET, SheetConfig(columns=7))
    sheet_s = time.monotonic() - started_s

    [(images, ok, errors, nuclei)] = (
        pipeline.connect(str(DEST))
        .sql(
            "SELECT count(*), count(*) FILTER (status = 'ok'), count(*) FILTER (status = 'error'), "
            "coalesce(sum(len(instances)), 0) FROM images"
        )
        .fetchall()
    )
    newest = pipeline.list_runs(str(DEST))[0]["run_id"]
    run = pipeline.show_run(str(DEST), newest)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("images", f"{images}: {ok} ok, {errors} errors")
    table.add_row("nuclei found", f"[bold]{int(nuclei):,}[/]")
    busy = f"the model busy {run['model_busy_fraction']:.0%} of the time"
    table.add_row("speed", f"{run['images_per_s']:.1f} images/s, {busy}")
    size = f"{run['parts']} Parquet files, {run['parts_bytes'] / 1e3:.0f} kB"
    table.add_row("table", f"[cyan]{escape(_short(DEST.resolve() / 'segments'))}[/]: {size}")
    sheet = f"[cyan]{escape(_short(SHEET.resolve()))}[/] ({tiles} images, drawn in {sheet_s:.1f} s)"
    table.add_row("contact sheet", sheet)
    console.print(Padding(table, (1, 0, 1, 2)))

    console.print("Next, ask the table. The most crowded images:\n")
    _print_query(console, CROWDED)
    console.print("Or one line per kind of microscopy:\n")
    _print_query(console, MICROSCOPY)
    return 0


def _print_query(console: Console, sql: str) -> None:
    """On one line, so that it can be copied whole."""
    console.print(f'  .venv/bin/maskmill query {DEST} "{sql}"\n', style="cyan", markup=False, soft_wrap=True)


def _short(path: Path) -> str:
    """Relative to where the demo was started, if it is below."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except MaskmillError as error:
        Console(stderr=True, highlight=False).print(f"[red]the demo failed:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(1)
