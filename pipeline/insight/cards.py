"""What the figures of a run become on a page. Owns: which charts there are, their words, labels and tooltips.
Must not know: how SQL is run, how a page looks.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pipeline.insight import charts
from pipeline.insight.drift import DriftReport
from pipeline.insight.questions import MEASURES, Answer, Questions

_BARS = 24
_TABLE_ROWS = 60
_STAGES = {"fetch": "var(--s1)", "decode": "var(--s2)", "model": "var(--s3)", "encode": "var(--s4)"}
_ROWS = {"ok": "var(--accent)", "errors": "var(--alert)"}
_MODEL_IS_BUSY = 0.8
_WORDS = {
    "mean_confidence": "mean confidence", "mean_entropy": "mean entropy", "foreground_fraction": "foreground",
    "brightness": "brightness", "contrast": "contrast",
}  # fmt: skip


class Card(NamedTuple):
    """One chart. `svg` is markup and safe to insert: Vega escapes what it is given. `alt`: the chart in a sentence."""

    key: str
    title: str
    note: str
    svg: str
    alt: str
    sql: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    more_rows: int = 0


def _card(key: str, title: str, note: str, svg: str, *, alt: str, answer: Answer) -> Card:
    rows = [tuple(_cell(value) for value in row) for row in answer.rows[:_TABLE_ROWS]]
    return Card(key, title, note, svg, alt, answer.sql, answer.columns, rows, max(0, len(answer.rows) - _TABLE_ROWS))


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dt.datetime):
        return value.strftime("%Y-%m-%d %H:%M:%S")
    return visible(str(value))


def visible(text: str) -> str:
    """`text` with what cannot be seen, and what turns the direction of writing, as an escape such as `\\u202e`."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def count_text(number: float, noun: str) -> str:
    """`1 image`, `2,000 images`."""
    return f"{number:,.0f} {noun}{'' if number == 1 else 's'}"


def color_text(rgb: Sequence[int]) -> str:
    """As style sheets write it."""
    red, green, blue = (int(value) for value in rgb)
    return f"rgb({red}, {green}, {blue})"


def pace(questions: Questions, totals: Mapping[str, Any]) -> list[Card]:
    """Rows a second, and milliseconds a stage, over the time of the run."""
    answer, step_s = questions.pace(totals["seconds"] or 0, totals["images"])
    found = answer.records()
    if not found or not totals["seconds"]:
        return []
    start = found[0]["began"]
    unit, unit_s = next((name, s) for name, s in (("hours", 3600), ("minutes", 60), ("s", 1)) if
                        totals["seconds"] >= 3 * s or s == 1)  # fmt: skip
    rows = []
    for one in found:
        at_s = (one["began"] - start).total_seconds()
        for order, part in enumerate(_ROWS):
            if not one[part]:
                continue
            says = f"{at_s / unit_s:.3g} {unit} on: {one[part] / step_s:,.1f} {part} a second"
            rows.append(
                {"began": at_s / unit_s, "ended": (at_s + step_s) / unit_s, "part": part, "order": order,
                 "value": one[part] / step_s, "says": says}
            )  # fmt: skip
    fastest = max((one["ok"] + one["errors"]) / step_s for one in found)
    x = {"field": "began", "type": "quantitative", "axis": {"title": f"{unit} since the first row", "grid": False}}
    alt = f"Images per second over the run, in steps of {step_s:g} s: {fastest:,.1f} at most."
    colors = _ROWS if totals["errors"] else {"ok": _ROWS["ok"]}
    svg = charts.columns("pace", alt, rows, title="images/s", colors=colors, x=x)
    note = f"Steps of {step_s:g} s; the first and last are cut."
    cards = [_card("pace", "Throughput", note, svg, alt=alt, answer=answer)]
    lines = [
        {"at": (one["began"] - start).total_seconds() / unit_s, "part": stage, "value": one[stage],
         "says": f"{stage}: {one[stage]:,.1f} ms an image"}
        for one in found for stage in _STAGES if one[stage] is not None
    ]  # fmt: skip
    if lines:
        x = {"field": "at", "type": "quantitative", "axis": {"title": f"{unit} since the first row", "grid": False}}
        means = ", ".join(f"{stage} {totals[_column(stage)]:,.1f}" for stage in _STAGES if totals[_column(stage)])
        alt = f"Milliseconds an image in each stage over the run; means: {means}."
        svg = charts.lines("stages", alt, lines, title="ms/image", colors=_STAGES, x=x)
        note = "Stages overlap, and several images are in each at once: the longest is not always the one that limits."
        cards.append(_card("stages", "Time in each stage", note, svg, alt=alt, answer=answer))
    return cards


def _column(stage: str) -> str:
    return "infer_ms" if stage == "model" else f"{stage}_ms"


def bottleneck(totals: Mapping[str, Any], busy: float | None) -> tuple[str, str]:
    """(The stage that limits the run, why). The model, where it was hardly ever idle; else the stage in which an image
    spent most of its time before and after it: a hint, since the record does not say how many were in it at once."""
    if busy is not None and busy >= _MODEL_IS_BUSY:
        return "model", f"busy {busy:.0%} of the time"
    waits = {stage: totals[_column(stage)] for stage in ("fetch", "decode", "encode") if totals[_column(stage)]}
    if not waits:
        return "unknown", "no stage was timed"
    longest = max(waits, key=lambda stage: waits[stage])
    idle = "" if busy is None else f"; the model was busy {busy:.0%} of the time"
    return longest, f"{waits[longest]:,.1f} ms an image{idle}"


def history(questions: Questions) -> list[Card]:
    """Rows of the last runs."""
    answer = questions.history()
    found = answer.records()
    if len(found) < 2:
        return []
    rows = []
    for one in found:
        about = f"{one['run_id']}: {one['ok']:,} ok, {one['errors']:,} errors, {one['images_per_s']:,.1f} images/s"
        rows += [
            {"began": one["run_id"], "part": part, "order": order, "value": one[part], "says": about}
            for order, part in enumerate(_ROWS)
        ]
    labels = "slice(datum.value, 4, 6) + '-' + slice(datum.value, 6, 8)"
    x = {"field": "began", "type": "ordinal", "sort": None,
         "axis": {"title": "run (month-day)", "labelExpr": labels, "labelAngle": 0, "labelOverlap": True}}  # fmt: skip
    alt = f"Images of the last {len(found)} runs of this model; this one has {found[-1]['ok'] + found[-1]['errors']:,}."
    svg = charts.columns("history", alt, rows, title="images", colors=_ROWS, x=x)
    return [_card("history", "Run by run", "The last one is this one.", svg, alt=alt, answer=answer)]


def classes(questions: Questions, colors: Mapping[str, str], ok: int) -> list[Card]:
    """Share of all pixels, and of all images, by class."""
    answer = questions.classes()
    found = answer.records()
    if not found:
        return []
    shown = found[:_BARS]
    note = f"The first {_BARS} of {len(found)} classes; the figures below have more." if len(found) > _BARS else ""
    pixels = [
        {"label": visible(one["name"]), "value": one["share"], "color": colors.get(one["name"], "var(--accent)"),
         "says": f"{visible(one['name'])}: {one['share']:.2%} of all pixels"}
        for one in shown
    ]  # fmt: skip
    images = [
        {"label": visible(one["name"]), "value": one["images"] / ok, "color": colors.get(one["name"], "var(--accent)"),
         "says": f"{visible(one['name'])}: {count_text(one['images'], 'image')}, {one['images'] / ok:.1%}"}
        for one in sorted(shown, key=lambda one: -one["images"])
    ]  # fmt: skip
    alt = "Share of all pixels by class: " + ", ".join(f"{one['name']} {one['share']:.1%}" for one in found[:8]) + "."
    coverage = charts.bars("coverage", alt, pixels, title="share of all pixels", style=".0%")
    cards = [_card("coverage", "Class coverage", note, coverage, alt=visible(alt), answer=answer)]
    alt = "Share of images that have the class: " + ", ".join(
        f"{one['name']} {one['images'] / ok:.0%}" for one in found[:8]
    )
    presence = charts.bars("presence", alt, images, title="share of images", style=".0%")
    return [*cards, _card("presence", "Images with each class", note, presence, alt=visible(alt) + ".", answer=answer)]


def objects(questions: Questions, colors: Mapping[str, str], totals: Mapping[str, Any]) -> list[Card]:
    """Objects by class, and objects per image."""
    if totals["task"] != "instance" or not totals["objects"]:
        return []
    answer = questions.instances()
    found = answer.records()[:_BARS]
    rows = [
        {"label": visible(one["name"]), "value": one["objects"], "color": colors.get(one["name"], "var(--accent)"),
         "says": f"{visible(one['name'])}: {count_text(one['objects'], 'object')} in "
                 f"{count_text(one['images'], 'image')}, mean score {one['mean_score']:.2f}"}
        for one in found
    ]  # fmt: skip
    alt = "Objects by class: " + ", ".join(f"{one['name']} {one['objects']:,}" for one in found[:8]) + "."
    svg = charts.bars("objects", alt, rows, title="objects", style="~s", whole=True)
    cards = [_card("objects", "Objects by class", "", svg, alt=visible(alt), answer=answer)]
    answer = questions.crowding(totals["most_objects"])
    starts = [one["objects"] for one in answer.records()]
    step = max(1, -(-(totals["most_objects"] + 1) // 40))
    bins = [
        {"low": one["objects"], "high": one["objects"] + step, "images": one["images"],
         "says": f"{_range(one['objects'], step)}: {count_text(one['images'], 'image')}"}
        for one in answer.records()
    ]  # fmt: skip
    alt = f"How many objects images have: {min(starts)} to {totals['most_objects']}, {totals['objects']:,} in all."
    svg = charts.histogram("crowding", alt, bins, title="objects in an image")
    return [*cards, _card("crowding", "Objects per image", "", svg, alt=alt, answer=answer)]


def _range(low: int, step: int) -> str:
    return count_text(low, "object") if step == 1 else f"{low} to {low + step - 1} objects"


def confidence(questions: Questions, totals: Mapping[str, Any]) -> list[Card]:
    """How sure the model was."""
    if totals["confidence"] is None:
        return []
    answer, step = questions.confidence(totals["least_confidence"], totals["most_confidence"])
    bins = [
        {"low": one["confidence"], "high": one["confidence"] + step, "images": one["images"],
         "says": f"{one['confidence']:.4g} to {one['confidence'] + step:.4g}: {count_text(one['images'], 'image')}"}
        for one in answer.records()
    ]  # fmt: skip
    alt = (
        f"Mean confidence of images: {totals['least_confidence']:.3f} to {totals['most_confidence']:.3f}, "
        f"{totals['confidence']:.3f} on average."
    )
    svg = charts.histogram("confidence", alt, bins, title="mean confidence of an image")
    return [_card("confidence", "Confidence", f"Mean {totals['confidence']:.3f}.", svg, alt=alt, answer=answer)]


def errors(questions: Questions) -> list[Card]:
    """Failed images by kind."""
    answer = questions.errors()
    found = answer.records()
    if not found:
        return []
    rows = [
        {"label": one["error_kind"], "value": one["images"], "color": "var(--alert)",
         "says": f"{one['error_kind']}: {count_text(one['images'], 'image')}"}
        for one in found
    ]  # fmt: skip
    alt = "Failed images by kind: " + ", ".join(f"{one['error_kind']} {one['images']:,}" for one in found) + "."
    svg = charts.bars("errors", alt, rows, title="images", style="~s", whole=True)
    return [_card("errors", "Errors by kind", "", svg, alt=alt, answer=answer)]


def drift(questions: Questions, report: DriftReport) -> list[Card]:
    """The course of each measure over the runs that are compared; the drifted ones in the colour of alarm."""
    if not report.earlier_runs:
        return []
    answer = questions.course([*report.earlier_runs, report.run_id])
    found = answer.records()
    moved = {shift.measure for shift in report.shifts if shift.drifted}
    cards = []
    for name in MEASURES:
        rows = [
            {"run": one["run_id"], "mean": one[name], "p10": one[f"{name}_p10"], "p90": one[f"{name}_p90"],
             "last": one["run_id"] == report.run_id,
             "says": f"{one['run_id']}: mean {one[name]:.4g}, of {count_text(one['images'], 'image')}"}
            for one in found if one[name] is not None
        ]  # fmt: skip
        if len(rows) < 2:
            continue
        before, now = rows[-2]["mean"], rows[-1]["mean"]
        alt = f"{_WORDS[name]} over the last {len(rows)} runs: {before:.4g} before, {now:.4g} now."
        svg = charts.band(f"drift-{name}", alt, rows, color="var(--alert)" if name in moved else "var(--accent)")
        note = f"{before:.3g} → {now:.3g}" + (": drifted" if name in moved else "")
        cards.append(_card(f"drift-{name}", _WORDS[name].capitalize(), note, svg, alt=alt, answer=answer))
    return cards
