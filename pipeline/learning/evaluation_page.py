"""An evaluation as one HTML file that people look at. Owns: what is on the page, and where it lies. Must not know: how
scores are computed, how pictures are drawn.

The page holds all that it shows, runs no script, and its Content-Security-Policy lets no request leave it. Whatever
comes from a data set or a model is escaped by Jinja.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray

from pipeline.errors import StorageError, UsageError
from pipeline.learning.assessment import Assessment, EvaluateConfig, open_split
from pipeline.learning.evaluation_pictures import CROWD, FOUND, WRONG, Pair, class_color, worst_pairs
from pipeline.learning.evaluations import align_classes
from pipeline.learning.scores import Scores, confusion_matrix
from pipeline.learning.slices import Slice
from pipeline.storage import join_uri, normalize_uri, open_storage
from pipeline.table.evaluations import read_evaluation
from pipeline.wording import counted

#: Images that are drawn.
WORST_IMAGES = 24
#: Classes of the confusion matrix at most, those with most pixels.
MATRIX_CLASSES = 32

#: Scores in the order in which they are shown, with the words for them. Those that are None are left out.
FIGURES = (
    ("mIoU", "miou"), ("mean Dice", "mean_dice"), ("pixel accuracy", "pixel_accuracy"),
    ("frequency-weighted IoU", "frequency_weighted_iou"), ("boundary F1", "boundary_f1"),
    ("AP", "ap"), ("AP50", "ap50"), ("AP75", "ap75"), ("AP small", "ap_small"), ("AP medium", "ap_medium"),
    ("AP large", "ap_large"), ("AR, 1 an image", "ar1"), ("AR, 10 an image", "ar10"), ("AR, 100 an image", "ar100"),
    ("AR small", "ar_small"), ("AR medium", "ar_medium"), ("AR large", "ar_large"),
    ("PQ", "pq"), ("F1 of objects", "instance_f1"), ("precision of objects", "instance_precision"),
    ("recall of objects", "instance_recall"),
)  # fmt: skip
CLASS_COLUMNS = (
    ("IoU", "iou_per_class"), ("Dice", "dice_per_class"), ("precision", "precision_per_class"),
    ("recall", "recall_per_class"), ("boundary F1", "boundary_f1_per_class"), ("AP", "ap_per_class"),
    ("PQ", "pq_per_class"),
)  # fmt: skip
_SLICE_COLUMNS = ("miou", "pixel_accuracy", "boundary_f1", "ap", "ap50", "pq", "instance_f1")


def write_page(config: EvaluateConfig, found: Assessment, out: Path | None = None) -> list[str]:
    """Writes `page.html` beside the rows of a finished evaluation (replacing it) and, where it is given, the file
    `out`. Returns where they are, as URIs.

    Reads the worst images and their masks once more. Raises UsageError where `out` cannot be written, StorageError
    where the table, the labels or DEST fail. Safe to retry.
    """
    if found.scores is None or found.folder is None or found.evaluation_id is None:
        raise UsageError("the evaluation is not finished: give the command again")
    storage = open_storage(found.dest, profile=config.table_profile)
    table = read_evaluation(storage, found.dest, found.model_name, found.model_version, found.evaluation_id)
    dataset = open_split(config)
    # The classes of the model that was evaluated: its name may mean another by now.
    alignment = align_classes(found.classes, dataset.class_names, renamed=config.renamed)
    pairs = worst_pairs(table, dataset, alignment, storage, dest=found.dest, where=config.where, limit=WORST_IMAGES)
    matrix = confusion_matrix(table, where=config.where)
    html = render_page(found, matrix, pairs, background_id=dataset.background_id)
    uri = join_uri(found.folder, "page.html")
    storage.put(uri, html.encode())
    if out is None:
        return [uri]
    copy = normalize_uri(str(out))
    try:
        open_storage(copy).put(copy, html.encode())
    except (StorageError, OSError) as error:
        raise UsageError(f"{out} cannot be written: {error}") from error
    return [uri, copy]


def render_page(
    found: Assessment, matrix: NDArray[np.int64], pairs: list[Pair], *, background_id: int | None = None
) -> str:
    """The page. `matrix` int64 [classes, classes], row = actual, column = predicted."""
    scores = found.scores
    assert scores is not None
    by_class = class_columns(scores)
    shown = [(number, name) for number, name in enumerate(scores.class_names) if name not in scores.left_out]
    source = resources.files("pipeline.learning").joinpath("page", "evaluation.html.j2").read_text("utf-8")
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(source)
    told_apart = scores.pq is not None
    failed = sum(found.failed_by_kind.values())
    return template.render(
        model=visible(found.model_name),
        version=found.model_version,
        split=visible(found.split),
        dataset=visible(found.dataset),
        evaluation_id=found.evaluation_id,
        folder=visible(found.folder or ""),
        images=scores.images,
        images_counted=counted(scores.images, "image"),
        failed=counted(failed, "image") if failed else "",
        failed_kinds=", ".join(f"{number} {kind}" for kind, number in found.failed_by_kind.items()),
        remarks=remarks(found),
        figures=list(_figures(scores)),
        interval_words=f"Below a score: where it lies in {scores.confidence:.0%} of {scores.resamples} resamples of "
        "the images." if scores.intervals else "",
        class_columns=[words for words, _ in by_class],
        classes=[_class_row(scores, number, name, by_class) for number, name in shown],
        matrix=_matrix(scores.class_names, matrix),
        slices=[_slice(by, pieces) for by, pieces in found.slices.items()],
        pair_score="PQ" if told_apart else "mIoU",
        legend=_legend(scores, told_apart, background_id),
        pairs=[pair._replace(name=visible(pair.name), trouble=visible(pair.trouble)) for pair in pairs],
    )  # fmt: skip


def class_columns(scores: Scores) -> list[tuple[str, dict[str, float | None]]]:
    """Words and values by class of what applies."""
    columns = [(words, getattr(scores, name)) for words, name in CLASS_COLUMNS]
    return [(words, values) for words, values in columns if values and set(values.values()) != {None}]


def remarks(found: Assessment) -> list[str]:
    """What has to be known to read the scores, a sentence each; names as `visible` shows them."""
    scores = found.scores
    assert scores is not None
    lines = []
    if found.where:
        lines.append(f"Only images for which {visible(found.where)}.")
    if scores.left_out:
        lines.append(f"In neither labels nor masks, and so in no mean: {_listed(scores.left_out)}.")
    if found.only_in_model:
        lines.append(f"Classes of the model alone, wrong wherever they are: {_listed(found.only_in_model)}.")
    if found.only_in_dataset:
        lines.append(f"Classes that the model does not have, and so never finds: {_listed(found.only_in_dataset)}.")
    if scores.pq is not None and found.min_score:
        lines.append(f"PQ, F1, precision and recall count objects with a score of at least {found.min_score:g}.")
    if scores.ap is not None:
        lines.append(f"AP takes at most {scores.max_detections} objects of a class in an image.")
    return lines


def visible(text: str) -> str:
    """`text` with every character that is not seen, or that turns the writing, as its escape."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "backslashreplace").decode() for char in text
    )


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(visible(name) for name in names)


def _figures(scores: Scores) -> Any:
    for words, name in FIGURES:
        value = getattr(scores, name)
        if value is not None:
            between = scores.intervals.get(name)
            text = f"{between.low:.4f} to {between.high:.4f}" if between else ""
            yield {"words": words, "value": f"{value:.4f}", "between": text}


def _class_row(scores: Scores, number: int, name: str, columns: list[tuple[str, Any]]) -> dict[str, Any]:
    between = scores.iou_intervals_per_class.get(name)
    return {
        "name": visible(name),
        # Where objects are told apart, pictures show which are right, and not their classes.
        "color": _css(class_color(number)) if scores.pq is None else "",
        "iou": scores.iou_per_class.get(name),
        "low": between.low if between else None,
        "high": between.high if between else None,
        "values": [_figure(values.get(name)) for _, values in columns],
    }


def _matrix(names: tuple[str, ...], matrix: NDArray[np.int64]) -> dict[str, Any]:
    pixels = matrix.sum(axis=0) + matrix.sum(axis=1)
    there = [int(index) for index in np.argsort(-pixels, kind="stable") if pixels[index]]
    kept = sorted(there[:MATRIX_CLASSES])
    rows = []
    for index in kept:
        total = max(1, int(matrix[index].sum()))
        cells = [
            {
                "name": visible(names[other]),
                "pixels": int(matrix[index, other]),
                "share": int(matrix[index, other]) / total,
                "text": _percent(int(matrix[index, other]) / total) if matrix[index, other] else "",
            }
            for other in kept
        ]
        rows.append({"name": visible(names[index]), "cells": cells})
    return {
        "names": [visible(names[index]) for index in kept],
        "rows": rows,
        "left": ", ".join(visible(names[index]) for index in sorted(there[MATRIX_CLASSES:])),
    }


def _percent(share: float) -> str:
    return "<0.1" if share < 0.001 else f"{100 * share:.1f}"


def _slice(by: str, pieces: tuple[Slice, ...]) -> dict[str, Any]:
    words = {name: shown for shown, name in FIGURES}
    columns = [
        name for name in _SLICE_COLUMNS if any(one.scores and getattr(one.scores, name) is not None for one in pieces)
    ]
    rows = [
        {
            "value": visible(one.value),
            "images": f"{one.images} ({one.failed} failed)" if one.failed else str(one.images),
            "values": [_figure(getattr(one.scores, name) if one.scores else None) for name in columns],
        }
        for one in pieces
    ]
    return {"by": visible(by), "columns": [words[name] for name in columns], "rows": rows}


def _legend(scores: Scores, told_apart: bool, background_id: int | None) -> list[dict[str, str]]:
    if told_apart:
        return [
            {"color": _css(FOUND), "words": "found, and there (IoU above 0.5)"},
            {"color": _css(WRONG), "words": "left: not there; right: not found"},
            {"color": _css(CROWD), "words": "a crowd, which counts for nothing"},
        ]
    shown = [
        {"color": _css(class_color(number)), "words": visible(name)}
        for number, name in enumerate(scores.class_names)
        if name not in scores.left_out and number != background_id
    ]
    return [*shown, {"color": _css(CROWD), "words": "not labelled, which counts for nothing"}]


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _css(color: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)
