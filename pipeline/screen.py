"""What people and pipes see: the progress bar, tables, JSON. Owns: wording and layout.
Must not know: options, exit statuses, how anything is done, results of queries.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from pipeline.wording import counted

_LINE_EVERY_S = 30.0


class Screen:
    """Everything that `segment` shows, on stderr: stdout belongs to results."""

    def __init__(self, quiet: bool) -> None:
        self.console = Console(stderr=True, highlight=False)
        self._quiet = quiet
        self._live = self.console.is_terminal and not quiet
        self._bar: Progress | None = None
        self._task: Any = None
        self._told_s = time.monotonic()
        self._seen: tuple[float, int] | None = None

    def listen(self, event: Any) -> None:
        if event.kind == "progress":
            self._progress(event.progress, event.total)
        elif event.kind == "warning":
            self.console.print(Text.assemble(("warning:", "yellow"), " ", plain(event.text)), soft_wrap=True)
        elif event.kind == "note" and not self._quiet:
            self.console.print(Text(plain(event.text), style="dim"), soft_wrap=True)

    def _progress(self, progress: Any, total: int) -> None:
        now_s = time.monotonic()
        self._seen = self._seen or (now_s, progress.rows)
        elapsed_s = now_s - self._seen[0]
        rate = (progress.rows - self._seen[1]) / elapsed_s if elapsed_s > 0 else 0.0
        if self._live:
            if self._bar is None:
                self._bar = Progress(
                    TextColumn("{task.completed}/{task.total} images{task.description}"),
                    BarColumn(),
                    TextColumn("{task.fields[rate]:.1f}/s"),
                    TimeRemainingColumn(),
                    TextColumn("left, {task.fields[errors]}, {task.fields[actors]}"),
                    console=self.console,
                )
                self._bar.start()
                self._task = self._bar.add_task("", total=total, rate=0.0, errors="", actors="")
            self._bar.update(
                self._task,
                description=_tiles(progress),
                completed=progress.rows,
                total=total,
                rate=rate,
                errors=counted(progress.errors, "error"),
                actors=counted(progress.actors, "actor"),
            )
        elif now_s - self._told_s >= _LINE_EVERY_S:
            self._told_s = now_s
            left = f"{(total - progress.rows) / rate:.0f} s left, " if rate else ""
            self.console.print(
                f"{progress.rows}/{total} images{_tiles(progress)}, {rate:.1f}/s, {left}"
                f"{counted(progress.errors, 'error')}, {counted(progress.actors, 'actor')}",
                soft_wrap=True,
            )

    def close(self) -> None:
        if self._bar:
            self._bar.stop()


class TrainingScreen:
    """Everything that `train` shows while it trains, on stderr."""

    def __init__(self, quiet: bool) -> None:
        self.console = Console(stderr=True, highlight=False)
        self._quiet = quiet
        self._live = self.console.is_terminal and not quiet
        self._bar: Progress | None = None
        self._task: Any = None
        self._told_s = time.monotonic()

    def listen(self, event: Any) -> None:
        if self._quiet:
            return
        if hasattr(event, "text"):
            self.console.print(Text(plain(event.text), style="dim"), soft_wrap=True)
        elif hasattr(event, "row"):
            self.console.print(_epoch_line(event.row, best=event.best), soft_wrap=True)
        else:
            self._progress(event)

    def _progress(self, event: Any) -> None:
        left_s = event.elapsed_s / event.share * (1 - event.share) if event.share > 0 else math.nan
        line = f"epoch {event.epoch}, step {event.step}, loss {event.loss:.4f}, {event.images_per_s:.1f} images/s"
        left = f", {left_s / 60:.1f} min left" if math.isfinite(left_s) else ""
        if self._live:
            if self._bar is None:
                self._bar = Progress(BarColumn(), TextColumn("{task.description}"), console=self.console)
                self._bar.start()
                self._task = self._bar.add_task("", total=1.0)
            self._bar.update(self._task, completed=min(event.share, 1.0), description=line + left)
        elif time.monotonic() - self._told_s >= _LINE_EVERY_S:
            self._told_s = time.monotonic()
            self.console.print(f"{100 * event.share:.0f}%: {line}{left}", soft_wrap=True)

    def close(self) -> None:
        if self._bar:
            self._bar.stop()


def _epoch_line(row: dict[str, Any], *, best: bool) -> str:
    measured = {name.removeprefix("val_"): row[name] for name in row if name.startswith("val_")}
    shown = ", ".join(
        f"{name} {value:.4f}" for name, value in measured.items() if name not in ("s", "images") and value is not None
    )
    loss = "?" if row.get("loss") is None else f"{row['loss']:.4f}"
    return (
        f"epoch {row['epoch']}: step {row['step']}, {row['elapsed_s'] / 60:.1f} min, loss {loss}"
        f"{', ' + shown if shown else ''}{' (best)' if best else ''}, {row['images_per_s']:.1f} images/s"
    )


def print_training(outcome: Any) -> None:
    out = stdout()
    word = "trained" if outcome.state == "trained" else "trained before"
    out.print(f"[bold]{word}[/]: {outcome.name}@{outcome.version}")
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("file", Text(plain(outcome.uri)))
    table.add_row(
        "training",
        f"{outcome.steps} steps in {outcome.epochs} epochs, {outcome.minutes:.1f} min, {outcome.images_per_s:.1f} "
        f"images/s; weights of step {outcome.kept_step}"
        + (f"; continued after step {outcome.resumed_step}" if outcome.resumed_step else ""),
    )
    for split, by_precision in outcome.metrics.items():
        for precision, figures in by_precision.items():
            shown = ", ".join(f"{name} {value:g}" for name, value in figures.items())
            table.add_row(f"{plain(split)}, {precision}", shown)
    table.add_row("trace, curves", Text(plain(outcome.folder)))
    out.print(table)


def _tiles(progress: Any) -> str:
    """Of a huge image this is all that moves for minutes."""
    return f", {progress.tiles_done}/{progress.tiles} tiles" if progress.tiles else ""


def as_json(outcome: Any) -> dict[str, Any]:
    body = outcome.model_dump(mode="json", exclude={"work", "estimate", "shards"})
    if outcome.state == "planned":
        body |= {"shards": outcome.shards, "work": outcome.work.model_dump(mode="json")}
        body["estimate"] = outcome.estimate.model_dump(mode="json") if outcome.estimate else None
    return dict(body)


def print_outcome(outcome: Any, dest: str) -> None:
    out = stdout()
    if not outcome.runs and outcome.state == "interrupted":
        out.print("interrupted before anything was planned: nothing was changed")
        return
    if not outcome.runs:
        out.print(
            f"nothing to do: {counted(outcome.images, 'image')}, {outcome.skipped:,} done before, "
            f"{outcome.held:,} held by open runs"
        )
        return
    word = {"done": "done", "interrupted": "interrupted", "canary_failed": "stopped after the canary"}[outcome.state]
    out.print(f"[bold]{word}[/]: run {', '.join(outcome.runs)}, model {outcome.model_name} {outcome.model_version}")
    if outcome.state == "done" and not outcome.planned:
        out.print("no image was left to process: the run records what `images` shows from now on")
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row(
        "images",
        f"{outcome.images:,} ({outcome.skipped:,} done before, {outcome.held:,} held, "
        f"{counted(outcome.duplicates, 'duplicate')})",
    )
    if outcome.removed or outcome.returned:
        table.add_row("source", f"{outcome.removed:,} gone, {outcome.returned:,} back as done before")
    if outcome.planned:
        errors = counted(outcome.errors, "error")
        table.add_row("rows", f"{outcome.ok:,} ok, {errors}{_kinds(outcome.errors_by_kind)}")
        if outcome.instances:
            table.add_row("instances", f"{outcome.instances:,}")
        table.add_row("parts", f"{counted(outcome.parts, 'file')}, {size_text(outcome.parts_bytes)}")
    if outcome.seconds:
        table.add_row(
            "speed",
            f"{outcome.images_per_s:.1f} images/s, {outcome.megapixels_per_s:.1f} Mpixel/s, {outcome.seconds:.1f} s, "
            f"model busy {outcome.model_busy_fraction:.0%}",
        )
    out.print(table)
    if outcome.state == "interrupted":
        out.print("the same command continues where this one stopped")


def print_plan(outcome: Any, dest: str) -> None:
    work = outcome.work
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("images", f"{work.images:,} ({counted(work.duplicates, 'duplicate URI')})")
    table.add_row("done", str(work.done))
    table.add_row("given up", f"{work.exhausted} (failed too often; --retry-errors takes them up)")
    table.add_row("held", f"{work.held} by open runs")
    for run_id, number in work.held_by.items():
        table.add_row(
            "",
            Text(f"{number} by {run_id}: its own command continues it; maskmill runs abandon {plain(dest)} {run_id}"),
        )
    table.add_row(
        "left",
        f"{work.left}: {work.new} new, {work.changed} changed, {work.failed_before} failed before"
        + (f", {work.repeated} forced again" if work.repeated else ""),
    )
    table.add_row(
        "planned",
        f"{counted(work.planned, 'image')}, {size_text(work.planned_bytes)}, in {counted(outcome.shards, 'shard')}",
    )
    if outcome.estimate:
        estimate = outcome.estimate
        table.add_row(
            "estimate",
            f"{estimate.seconds:.0f} s, {size_text(estimate.output_bytes)} of Parquet, from {estimate.basis}",
        )
    stdout().print(table)


def stdout() -> Console:
    """Wide where nobody looks, so that scripts and logs get one line a row."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 200)


def print_whole(table: Table) -> None:
    """Every cell in full, wrapped by the terminal where it is narrow: a run's id is there to be copied."""
    console = stdout()
    console.width = max(console.width, console.measure(table, options=console.options.update_width(100_000)).maximum)
    console.print(table, soft_wrap=True)


def warn(warnings: Iterable[str]) -> None:
    """One line each on stderr."""
    console = Console(stderr=True, highlight=False)
    for text in warnings:
        console.print(Text.assemble(("warning:", "yellow"), " ", plain(text)), soft_wrap=True)


def _kinds(kinds: dict[str, int]) -> str:
    return " (" + ", ".join(f"{number} {kind}" for kind, number in kinds.items()) + ")" if kinds else ""


def size_text(size_bytes: int | None) -> str:
    """`12.3 MB`."""
    value = float(size_bytes or 0)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def print_drift(report: Any) -> None:
    """A run beside the runs before it, the most drifted measure first."""
    out = stdout()
    if report.state != "compared":
        why = {
            "no_earlier_runs": "there is no earlier run of the same model version and settings",
            "too_few_images": f"{report.images} images now and {report.earlier_images} before are too few to compare",
        }
        out.print(f"run {report.run_id}: {why[report.state]}", soft_wrap=True)
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("measure", "before", "now", "PSI", "limit", "KS", "limit", ""):
        table.add_column(column, no_wrap=True)
    for shift in report.shifts:
        figures = (f"{value:.3f}" for value in (shift.psi, shift.psi_limit, shift.ks, shift.ks_limit))
        verdict = Text("drifted", style="red") if shift.drifted else Text("")
        name = Text(plain(shift.measure))
        table.add_row(name, f"{shift.mean_before:.4g}", f"{shift.mean_now:.4g}", *figures, verdict)
    out.print(table)
    runs = f"{len(report.earlier_runs)} earlier run{'' if len(report.earlier_runs) == 1 else 's'}"
    out.print(f"run {report.run_id}: {report.images} images, beside {report.earlier_images} of {runs}", soft_wrap=True)


def plain_lines(text: str) -> str:
    """As `plain`, line by line: what SQL says of itself points at a place in the line above."""
    return "\n".join(plain(line) for line in text.strip().split("\n"))


def plain(text: str) -> str:
    """`text` with every character that would steer a terminal shown as its escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)
