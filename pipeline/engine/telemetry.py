"""What an actor exports to Ray's metrics port. Owns: the metrics' names, units and tags. Must not know: how a shard is
done, who scrapes.

Ray's agent on every node serves them to Prometheus, under `ray_` and these names; counters end in `_total` there. Ray
collects them every ten seconds (`RAY_metrics_report_interval_ms`), so what a worker does last, before it ends, may be
missing: the table is the account.

| name | |
|---|---|
| maskmill_images | rows made, those with errors too |
| maskmill_errors | of them with an error, by `kind` |
| maskmill_read_bytes | bytes of images read |
| maskmill_stage_seconds | by `stage` (fetch, decode, infer, encode), summed over images |
| maskmill_model_busy_fraction | share of the time in which the model was at work, since the last look |
| maskmill_queue_images | images given to this worker that have no row yet |
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.engine.messages import ShardTask, StreamCounts, WorkerSpec

_STAGES = ("fetch", "decode", "infer", "encode")
_LOOK_EVERY_S = 1.0


class Telemetry:
    """Counts for one actor, tagged `model` (name@version). Needs Ray; may be called from several threads."""

    def __init__(self) -> None:
        from ray.util.metrics import Counter, Gauge

        keys = ("model",)
        self._images = Counter("maskmill_images", "Rows made, those with errors too.", keys)
        self._errors = Counter("maskmill_errors", "Rows with an error, by kind.", (*keys, "kind"))
        self._bytes = Counter("maskmill_read_bytes", "Bytes of images read.", keys)
        self._stages = Counter("maskmill_stage_seconds", "Seconds of each stage, summed over images.", (*keys, "stage"))
        self._busy = Gauge("maskmill_model_busy_fraction", "Share of the time in which the model was at work.", keys)
        self._queue = Gauge("maskmill_queue_images", "Images given to the worker that have no row yet.", keys)
        self._tags = {"model": ""}
        self._lock = threading.Lock()
        self._queued = 0
        self._before = StreamCounts(0, 0, 0.0, 0.0)

    def begin(self, spec: WorkerSpec) -> None:
        """From here on it is about this model."""
        with self._lock:
            self._tags = {"model": f"{spec.model_name}@{spec.model_version}"}
            self._queued, self._before = 0, StreamCounts(0, 0, 0.0, 0.0)

    def take(self, task: ShardTask) -> None:
        """A shard has come."""
        self._wait(len(task.refs) - len(task.killers))

    def rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows have been made."""
        self._wait(-len(rows))
        tags = self._tags
        self._images.inc(len(rows), tags)
        for row in rows:
            if row.get("error_kind"):
                self._errors.inc(1, tags | {"kind": row["error_kind"]})
        _add(self._bytes, sum(row.get("image_bytes") or 0 for row in rows), tags)
        for stage in _STAGES:
            _add(self._stages, sum(row.get(f"{stage}_ms") or 0.0 for row in rows) / 1e3, tags | {"stage": stage})

    def look(self, counts: StreamCounts) -> None:
        """The driver has asked how far the stream is."""
        with self._lock:
            passed_s = counts.active_s - self._before.active_s
            if passed_s < _LOOK_EVERY_S:
                return
            busy_s, self._before = counts.busy_s - self._before.busy_s, counts
        self._busy.set(min(1.0, max(0.0, busy_s / passed_s)), self._tags)

    def _wait(self, images: int) -> None:
        with self._lock:
            self._queued += images
            self._queue.set(max(0, self._queued), self._tags)


def _add(counter: Any, amount: float, tags: dict[str, str]) -> None:
    """Ray's counters refuse to count nothing."""
    if amount > 0:
        counter.inc(amount, tags)
