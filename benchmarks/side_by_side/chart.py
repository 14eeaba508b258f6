"""The comparison as a picture. Owns: how it is drawn. Must not know: how it was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import vl_convert

_INK, _QUIET, _LINE = "#24292f", "#57606a", "#d0d7de"
_OURS, _THEIRS = "#0969da", "#a5b1bd"


def draw(panels: Sequence[tuple[str, Mapping[str, float]]], *, ours: str) -> str:
    """SVG: a panel of bars for each (title, images/s by name), each with a scale of its own."""
    spec = {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "background": "white",
        "padding": 12,
        "columns": 2,
        "spacing": {"row": 22, "column": 48},
        "concat": [_panel(title, rates, ours) for title, rates in panels],
        "config": {
            "font": "system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif",
            "view": {"stroke": None},
            "axis": {"labelColor": _INK, "labelFontSize": 12, "domainColor": _LINE},
            "title": {"color": _INK, "fontSize": 13, "fontWeight": 600, "anchor": "start", "offset": 8},
        },
    }
    return str(vl_convert.vegalite_to_svg(spec, allowed_base_urls=[]))


def _panel(title: str, rates: Mapping[str, float], ours: str) -> dict[str, Any]:
    rows = [
        {"name": name, "rate": rate, "says": f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"}
        for name, rate in rates.items()
    ]
    bars = {
        "mark": {"type": "bar", "height": {"band": 0.72}, "cornerRadiusEnd": 2},
        "encoding": {
            "color": {
                "condition": {"test": f"datum.name === {ours!r}", "value": _OURS},
                "value": _THEIRS,
            }
        },
    }
    labels = {
        "mark": {"type": "text", "align": "left", "dx": 5, "fontSize": 12, "color": _QUIET},
        "encoding": {"text": {"field": "says"}},
    }
    return {
        "title": {"text": title, "subtitle": "images/s", "subtitleColor": _QUIET, "subtitleFontSize": 11},
        "data": {"values": rows},
        "width": 270,
        "height": {"step": 22},
        "encoding": {
            "y": {"field": "name", "type": "nominal", "sort": None, "axis": {"title": None, "ticks": False}},
            "x": {
                "field": "rate",
                "type": "quantitative",
                "axis": None,
                "scale": {"domain": [0, max(rates.values()) * 1.18], "nice": False},
            },
        },
        "layer": [bars, labels],
    }
