"""Charts are SVG of their own: with their figures in words, the page's colours, and nothing that acts."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Callable

import pytest

from pipeline.insight import charts

HOSTILE = '"><script>alert(1)</script>&'
X = {"field": "began", "type": "quantitative"}
DRAWINGS: dict[str, Callable[[str], str]] = {
    "bars": lambda name: charts.bars(name, "alt", [{"label": HOSTILE, "value": 0.5, "says": HOSTILE}], title="t"),
    "histogram": lambda name: charts.histogram(
        name, "alt", [{"low": 0.1, "high": 0.2, "images": 3, "says": HOSTILE}], title="t"
    ),
    "columns": lambda name: charts.columns(
        name, "alt", [{"began": 0, "ended": 1, "part": "ok", "order": 0, "value": 3, "says": HOSTILE}],
        title="t", colors={"ok": "var(--accent)", "errors": "var(--alert)"}, x=X,
    ),
    "lines": lambda name: charts.lines(
        name, "alt", [{"at": at, "part": "ok", "value": at, "says": HOSTILE} for at in (0, 1)],
        title="t", colors={"ok": "var(--accent)"}, x=X | {"field": "at"},
    ),
    "band": lambda name: charts.band(
        name, "alt",
        [{"run": run, "mean": 0.5, "p10": 0.1, "p90": 0.9, "last": run == "b", "says": HOSTILE} for run in "ab"],
        color="var(--alert)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", DRAWINGS)
def test_what_it_says_is_text(kind: str) -> None:
    root = ET.fromstring(DRAWINGS[kind]("one"))
    assert not [one for one in root.iter() if one.tag.endswith(("script", "image", "foreignObject", "a"))]
    labels = [one.get("aria-label") for one in root.iter() if one.get("role") == "graphics-symbol"]
    assert HOSTILE in labels
    marks = [one for one in root.iter() if one.get("aria-label") == HOSTILE and one.get("d")]
    assert len(marks) == (2 if kind in ("lines", "band") else 1)
    # A bar that became a tick would still have its words.
    assert kind in ("lines", "band") or max(float(part) for part in _numbers(marks[0].get("d") or "")) > 20


def _numbers(path: str) -> list[str]:
    return "".join(char if char.isdigit() or char == "." else " " for char in path).split()


@pytest.mark.parametrize("kind", DRAWINGS)
def test_two_on_one_page_share_no_id(kind: str) -> None:
    def ids(name: str) -> set[str]:
        return {one.get("id", "") for one in ET.fromstring(DRAWINGS[kind](name)).iter()} - {""}

    assert not ids("one") & ids("two")


@pytest.mark.parametrize("kind", DRAWINGS)
def test_colours_are_the_page_s(kind: str) -> None:
    svg = DRAWINGS[kind]("one")
    assert "var(--" in svg and 'fill="#000"' not in svg and "#ddd" not in svg and 'class="chart"' in svg
