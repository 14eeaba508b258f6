"""Charts as SVG that stands in a page. Owns: their Vega-Lite and how it becomes SVG in the page's own colours.
Must not know: SQL, pages.

Every colour is a variable of the page's style sheet, so light and dark need one drawing. Marks carry their figures as
`aria-label`, which Vega writes for screen readers and the page's script shows as tooltips.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import vl_convert

_WIDTH_PX = 400
_HEIGHT_PX = 210
_ROW_PX = 26
_ID = re.compile(r'(id="|url\(#)')
_SIZE = re.compile(r'<svg ([^>]*?)width="([\d.]+)" height="([\d.]+)"')

_CONFIG: dict[str, Any] = {
    "background": "transparent",
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelColor": "var(--ink-2)", "titleColor": "var(--ink-2)", "gridColor": "var(--line)",
        "domainColor": "var(--line)", "tickColor": "var(--line)", "labelFontSize": 12, "titleFontSize": 12,
        "titleFontWeight": "normal", "labelLimit": 120, "tickCount": 4, "titlePadding": 6,
    },
    "legend": {
        "labelColor": "var(--ink-2)", "titleColor": "var(--ink-2)", "labelFontSize": 12, "orient": "top",
        "title": None, "symbolType": "square", "padding": 0, "offset": 6,
    },
    "text": {"color": "var(--ink-2)", "fontSize": 12},
}  # fmt: skip


def _svg(name: str, description: str, spec: Mapping[str, Any], *, height_px: int = _HEIGHT_PX) -> str:
    whole = {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "description": description,
        "width": _WIDTH_PX,
        "height": height_px,
        "autosize": {"type": "fit", "contains": "padding"},
        "padding": 2,
        "config": _CONFIG,
        **spec,
    }
    svg = vl_convert.vegalite_to_svg(whole, allowed_base_urls=[])
    # Several drawings share one page, and with it one space of ids.
    svg = _ID.sub(lambda found: f"{found[1]}{name}-", svg)
    return _SIZE.sub(r'<svg \1class="chart" data-width="\2" ', svg, count=1).replace('class="marks" ', "", 1)


def _records(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {"values": [dict(row) for row in rows]}


def bars(
    name: str, description: str, rows: Sequence[Mapping[str, Any]], *, title: str, style: str = "", whole: bool = False
) -> str:
    """Horizontal bars in the order of `rows`: `label`, `value`, `says` (its tooltip), perhaps `color`.

    `style`: a d3 format of the values, such as `.0%`. `whole`: values are counts, without halves between them.
    """
    axis: dict[str, Any] = {"title": title, "grid": True} | ({"format": style} if style else {})
    if whole:
        axis["tickMinStep"] = 1
    spec = {
        "data": _records(rows),
        "mark": {"type": "bar", "stroke": "var(--edge)", "strokeWidth": 1, "height": {"band": 0.7}},
        "encoding": {
            "y": {"field": "label", "type": "nominal", "sort": None, "axis": {"title": None, "ticks": False}},
            "x": {"field": "value", "type": "quantitative", "axis": axis},
            "description": {"field": "says", "type": "nominal"},
            "color": {"field": "color", "type": "nominal", "scale": None, "legend": None},
        },
    }
    filled = [{"color": "var(--accent)"} | dict(row) for row in rows]
    return _svg(name, description, spec | {"data": _records(filled)}, height_px=50 + _ROW_PX * max(1, len(rows)))


def histogram(name: str, description: str, rows: Sequence[Mapping[str, Any]], *, title: str, style: str = ",~f") -> str:
    """Columns from `low` to `high` (in units of `title`) of height `images`, with `says`."""
    spec = {
        "data": _records(rows),
        "mark": {"type": "bar", "color": "var(--accent)", "stroke": "var(--surface)", "strokeWidth": 0.5},
        "encoding": {
            "x": {
                "field": "low", "type": "quantitative", "bin": "binned", "scale": {"zero": False, "nice": False},
                "axis": {"title": title, "grid": False, "format": style},
            },
            "x2": {"field": "high"},
            "y": {"field": "images", "type": "quantitative", "axis": {"title": "images", "tickMinStep": 1}},
            "description": {"field": "says", "type": "nominal"},
        },
    }  # fmt: skip
    return _svg(name, description, spec)


def columns(
    name: str,
    description: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    title: str,
    colors: Mapping[str, str],
    x: Mapping[str, Any],
) -> str:
    """Stacked columns: `began` (and `ended` on a quantitative axis), `part` (a key of `colors`), `value`, `says`."""
    spec = {
        "data": _records(rows),
        "mark": {"type": "bar", "stroke": "var(--surface)", "strokeWidth": 0.5},
        "encoding": {
            **_values_by_part(x, title, colors, stack=True),
            "order": {"field": "order", "type": "quantitative"},
            "description": {"field": "says", "type": "nominal"},
        },
    }
    if "ended" in rows[0]:
        spec["encoding"] |= {"x": {"bin": "binned"} | dict(x), "x2": {"field": "ended"}}  # type: ignore[operator]
    return _svg(name, description, spec)


def lines(
    name: str,
    description: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    title: str,
    colors: Mapping[str, str],
    x: Mapping[str, Any],
) -> str:
    """Lines with points: `at`, `part` (a key of `colors`), `value`, `says`."""
    encoding = _values_by_part(x, title, colors)
    points = encoding | {"description": {"field": "says", "type": "nominal"}}
    spec = {
        "data": _records(rows),
        "layer": [
            {"mark": {"type": "line", "strokeWidth": 2, "aria": False}, "encoding": encoding},
            {"mark": {"type": "point", "filled": True, "size": 32}, "encoding": points},
        ],
    }
    return _svg(name, description, spec)


def band(name: str, description: str, rows: Sequence[Mapping[str, Any]], *, color: str) -> str:
    """A small line of `mean` by `run`, within the band from `p10` to `p90`; the last point stands out. With `says`."""
    order = [row["run"] for row in rows]
    x = {
        "field": "run", "type": "ordinal", "sort": order, "scale": {"type": "point", "padding": 0.3},
        "axis": {"title": None, "labels": False, "ticks": False},
    }  # fmt: skip
    scale = {"zero": False, "nice": True}
    low, high = {"field": "p10", "type": "quantitative", "scale": scale}, {"field": "p90"}
    mean = {
        "field": "mean",
        "type": "quantitative",
        "scale": scale,
        "axis": {"title": None, "tickCount": 3, "format": ".3~g"},
    }
    says = {"field": "says", "type": "nominal"}
    spec = {
        "data": _records(rows),
        "layer": [
            {
                "mark": {"type": "area", "color": color, "opacity": 0.18, "aria": False},
                "encoding": {"x": x, "y": low, "y2": high},
            },
            {
                "mark": {"type": "line", "color": color, "strokeWidth": 2, "aria": False},
                "encoding": {"x": x, "y": mean},
            },
            {
                "mark": {"type": "point", "filled": True, "color": color},
                "encoding": {
                    "x": x, "y": mean, "description": says,
                    "size": {"condition": {"test": "datum.last", "value": 110}, "value": 36},
                },
            },
        ],
    }  # fmt: skip
    return _svg(name, description, spec, height_px=120)


def _values_by_part(x: Mapping[str, Any], title: str, colors: Mapping[str, str], **y: Any) -> dict[str, Any]:
    """`value` over `x`, one colour for each `part`."""
    scale = {"domain": list(colors), "range": list(colors.values())}
    legend = {} if len(colors) > 1 else {"legend": None}
    return {
        "x": x,
        "y": {"field": "value", "type": "quantitative", "axis": {"title": title}, **y},
        "color": {"field": "part", "type": "nominal", "scale": scale, **legend},
    }
