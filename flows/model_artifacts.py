"""What Prefect's UI shows of models: how they were trained, what they are worth, who became champion. Owns: these
artifacts. Must not know: how any of it came about.
"""

from __future__ import annotations

import base64
import logging
from typing import TYPE_CHECKING, Any

from prefect.artifacts import create_image_artifact, create_table_artifact

from pipeline.errors import StorageError
from pipeline.storage import join_uri, open_storage

if TYPE_CHECKING:
    from pipeline.learning.assessment import Assessment
    from pipeline.learning.promotion import Promotion
    from pipeline.learning.training import TrainOutcome

log = logging.getLogger(__name__)


def show_training(outcome: TrainOutcome, *, profile: str | None = None) -> None:
    """A table of figures, and the curves as a picture in the page itself."""
    figures = outcome.model_dump(mode="json", exclude={"metrics"})
    for split, by_precision in outcome.metrics.items():
        for precision, values in by_precision.items():
            figures |= {f"{split}, {precision}: {name}": value for name, value in values.items()}
    _show_figures(figures, "train-outcome", f"Training of {outcome.name}")
    uri = join_uri(outcome.folder, "curves.png")
    try:
        data = bytes(open_storage(uri, profile=profile).get(uri).data)
    except StorageError as error:
        log.warning("no curves: %s", error)
        return
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    create_image_artifact(url, key="train-curves", description=f"Training of {outcome.name}")


def show_assessment(found: Assessment) -> None:
    """A table of scores with their intervals, and one of IoU by class."""
    scores = found.scores
    if scores is None:
        return
    about = f"{found.model_name} {found.model_version} on {found.split} of {found.dataset}: {scores.images} images"
    rows = []
    for name, value in scores.model_dump().items():
        if isinstance(value, float) and name != "confidence":
            between = scores.intervals.get(name)
            shown = f"{between.low:.4f} to {between.high:.4f}" if between else ""
            rows.append({"score": name, "value": f"{value:.4f}", "interval": shown})
    create_table_artifact(rows, key="evaluate-scores", description=about)
    classes = [
        {"class": name, "IoU": "-" if value is None else f"{value:.4f}"} for name, value in scores.iou_per_class.items()
    ]
    create_table_artifact(classes, key="evaluate-classes", description=about)


def show_promotion(done: Promotion) -> None:
    """A table of what was decided, and why."""
    figures = done.model_dump(mode="json", exclude={"comparison", "warnings"})
    if done.comparison:
        told = done.comparison.model_dump(mode="json", exclude={"interval", "class_differences"})
        between = done.comparison.interval
        told["difference, interval"] = f"{between.low:+.4f} to {between.high:+.4f}"
        changes = {f"class {name}": f"{change:+.4f}" for name, change in done.comparison.class_differences.items()}
        figures |= told | changes
    _show_figures(figures, "promotion", done.why)


def _show_figures(figures: dict[str, Any], key: str, description: str) -> None:
    rows = [{"figure": name, "value": "-" if value is None else str(value)} for name, value in figures.items()]
    create_table_artifact(rows, key=key, description=description)
