"""The curves of a training run as one picture. Owns: what is drawn, and how. Must not know: where it goes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any


def draw_curves(rows: Sequence[Mapping[str, Any]], *, title: str = "") -> bytes:
    """A PNG of a trace (see pipeline/learning/trace.py): the loss and its parts, the figures of the validation split,
    the learning rate. `rows` may be few, or none.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    names = list(dict.fromkeys(name for row in rows for name in row))
    panels = (
        ("loss", [name for name in names if name.startswith("loss")]),
        ("validation", [name for name in names if name.startswith("val_") and _is_share(rows, name)]),
        ("learning rate", ["learning_rate"]),
    )
    for axes, (label, chosen) in zip(figure.subplots(1, 3), panels, strict=True):
        for name in chosen:
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            marker = "." if len(points) < 40 else ""
            axes.plot(
                [step for step, _ in points], [value for _, value in points], marker=marker,
                label=name.removeprefix("val_").removeprefix("loss_"),
            )  # fmt: skip
        axes.set_title(label, fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if len(chosen) > 1:
            axes.legend(fontsize=8)
    if title:
        figure.suptitle(title, fontsize=11)
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=100)
    return sink.getvalue()


def _is_share(rows: Sequence[Mapping[str, Any]], name: str) -> bool:
    """Figures from 0 to 1 share an axis; counts and seconds do not fit on it."""
    values = [row[name] for row in rows if row.get(name) is not None]
    return name not in ("val_s", "val_images") and all(0 <= value <= 1 for value in values)
