"""Whether a run looks like the runs before it. Owns: which runs compare, what is compared, and when it is a drift.
Must not know: who is told.

Two distances per measure, each between the images of the run and those of up to seven comparable runs before it taken
together: the population stability index (PSI) over bins of equal share, and the Kolmogorov–Smirnov statistic (KS). A
measure has drifted when one of them is both large enough to matter and larger than chance allows: with many images any
difference is significant, with few images any difference is large.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from scipy import stats

from pipeline.config import DriftConfig
from pipeline.errors import UsageError
from pipeline.storage import normalize_uri, open_storage
from pipeline.table.catalog import open_table, sql_text

_MEASURES = ("mean_confidence", "mean_entropy", "foreground_fraction", "brightness", "contrast")


class Shift(BaseModel):
    """One measure, now and before. `psi_limit` and `ks_limit` are what chance and thresholds allow."""

    model_config = ConfigDict(frozen=True)

    measure: str
    psi: float
    psi_limit: float
    ks: float
    ks_limit: float
    p_value: float
    mean_now: float
    mean_before: float
    drifted: bool


class DriftReport(BaseModel):
    """What a run's images are like, beside those of the runs before. `state`: `compared`, or why it was not."""

    model_config = ConfigDict(frozen=True)

    run_id: str
    model: str
    model_version: str
    state: Literal["compared", "no_earlier_runs", "too_few_images"]
    earlier_runs: list[str] = []
    images: int = 0
    earlier_images: int = 0
    #: The most drifted first.
    shifts: list[Shift] = []

    @property
    def drifted(self) -> bool:
        """Whether any measure has."""
        return any(shift.drifted for shift in self.shifts)


def drift(
    dest: str, run_id: str | None = None, config: DriftConfig | None = None, *, profile: str | None = None
) -> DriftReport:
    """Compares a finished run (default: the newest) with the finished runs of the same model version and settings that
    were planned before it.

    Compared are, over the images that are `ok`: mean confidence, mean entropy, foreground, brightness, contrast, the
    share of every class (0 where an image has none of it), and for instance models the number of objects. Masks are not
    read. Raises UsageError where there is no such run, StorageError where the table cannot be read. Changes nothing.
    """
    dest = normalize_uri(dest)
    connection = open_table(open_storage(dest, profile=profile), dest, temp_path=os.environ.get("TMPDIR", "/tmp"))
    try:
        return drift_seen_by(connection, dest, run_id, config)
    finally:
        connection.close()


def drift_seen_by(
    connection: Any, dest: str, run_id: str | None = None, config: DriftConfig | None = None
) -> DriftReport:
    """As `drift`, for a table that is open already."""
    config = config or DriftConfig()
    chosen = _choose(connection, dest, run_id)
    earlier = _earlier(connection, chosen, config.runs)
    about: dict[str, Any] = {
        "run_id": chosen.run_id,
        "model": chosen.model,
        "model_version": chosen.version,
        "earlier_runs": earlier,
    }
    if not earlier:
        return DriftReport(state="no_earlier_runs", **about)
    now = _sample(connection, chosen, [chosen.run_id], config.sample_images)
    before = _sample(connection, chosen, earlier, config.sample_images)
    about |= {"images": now.images, "earlier_images": before.images}
    if min(now.images, before.images) < config.least_images:
        return DriftReport(state="too_few_images", **about)
    return DriftReport(state="compared", shifts=compare(now.filled(before), before.filled(now), config), **about)


class _Run(NamedTuple):
    run_id: str
    sequence: int
    model: str
    version: str
    settings_digest: str


class _Sample(NamedTuple):
    """Values by measure, one per image looked at; `images`: how many there are in all."""

    images: int
    looked_at: int
    values: dict[str, NDArray[np.float64]]

    def filled(self, other: _Sample) -> dict[str, NDArray[np.float64]]:
        """With the measures of `other` too: a class that no image has is in each with a share of 0."""
        return {name: np.zeros(self.looked_at) for name in other.values} | self.values


def _choose(connection: Any, dest: str, run_id: str | None) -> _Run:
    which = f"run_id = {sql_text(run_id)}" if run_id else "ok > 0"
    found = connection.execute(
        "SELECT run_id, sequence, model, model_version, settings_digest FROM runs "
        f"WHERE state = 'done' AND {which} ORDER BY sequence DESC LIMIT 1"
    ).fetchone()
    if found is None:
        what = f"no finished run {run_id!r}" if run_id else "no finished run with images"
        raise UsageError(f"{what} in {dest}: see `maskmill runs list {dest}`")
    return _Run(*found)


def _earlier(connection: Any, chosen: _Run, limit: int) -> list[str]:
    rows = connection.execute(
        f"SELECT run_id FROM runs WHERE state = 'done' AND ok > 0 AND sequence < {chosen.sequence} "
        f"AND model = {sql_text(chosen.model)} AND model_version = {sql_text(chosen.version)} "
        f"AND settings_digest = {sql_text(chosen.settings_digest)} ORDER BY sequence DESC LIMIT {limit}"
    ).fetchall()
    return [run_id for (run_id,) in rows]


def _sample(connection: Any, chosen: _Run, run_ids: list[str], images: int) -> _Sample:
    """The same images every time: those whose URI's hash is low."""
    of_runs = (
        f"version = {sql_text(chosen.version)} AND status = 'ok' "
        f"AND run_id IN ({', '.join(sql_text(run_id) for run_id in run_ids)})"
    )
    total = connection.execute(f"SELECT count(*) FROM segments WHERE {of_runs}").fetchone()[0]
    few = f"AND hash(image_uri) % 1000000 < {1e6 * images / total:.0f}" if total > images else ""
    columns = ", ".join(_MEASURES)
    connection.execute(
        f"CREATE OR REPLACE TEMP TABLE looked_at AS SELECT {columns}, len(instances) AS objects, "
        "list_transform(classes, lambda c: {'name': c.name, 'fraction': c.fraction}) AS classes, "
        f"row_number() OVER () - 1 AS number FROM segments WHERE {of_runs} {few}"
    )
    flat = connection.execute(f"SELECT {columns}, objects FROM looked_at").fetchnumpy()
    count = len(flat["objects"])
    values = {name: _known(flat[name]) for name in _MEASURES}
    objects = _known(flat["objects"])
    if len(objects):
        values["objects"] = objects
    shares = connection.execute(
        "SELECT number, c.name AS name, c.fraction AS fraction "
        "FROM (SELECT number, unnest(classes) AS c FROM looked_at)"
    ).fetchnumpy()
    for name in sorted(set(shares["name"].tolist())):
        mine = shares["name"] == name
        values[f"share of {name}"] = np.zeros(count)
        values[f"share of {name}"][shares["number"][mine]] = shares["fraction"][mine]
    return _Sample(total, count, {name: column for name, column in values.items() if len(column)})


def _known(column: Any) -> NDArray[np.float64]:
    """Without NULLs."""
    if np.ma.isMaskedArray(column):
        column = column.compressed()
    column = np.asarray(column, np.float64)
    return column[np.isfinite(column)]


def compare(
    now: Mapping[str, NDArray[np.float64]], before: Mapping[str, NDArray[np.float64]], config: DriftConfig
) -> list[Shift]:
    """One Shift a measure, the most drifted first. Both hold the same measures, a value per image; none is empty."""
    # Bonferroni: two tests of each measure share what is allowed to chance.
    alpha = config.alpha / (2 * max(1, len(now)))
    shifts = [_shift(measure, now[measure], before[measure], config, alpha) for measure in sorted(now)]
    return sorted(shifts, key=lambda one: (not one.drifted, -max(one.psi / one.psi_limit, one.ks / one.ks_limit)))


def _shift(
    measure: str, now: NDArray[np.float64], before: NDArray[np.float64], config: DriftConfig, alpha: float
) -> Shift:
    one_over = 1 / len(now) + 1 / len(before)
    psi, bins = population_stability_index(now, before, config.bins)
    # Without drift, PSI / (1/n + 1/m) is distributed as chi-square with bins - 1 degrees of freedom: Yurdakul,
    # Statistical Properties of Population Stability Index, 2018.
    psi_by_chance = float(stats.chi2.isf(alpha, bins - 1)) * one_over if bins > 1 else 0.0
    test = stats.ks_2samp(now, before, method="asymp")
    # What sqrt(1/n + 1/m) times Kolmogorov's distribution exceeds with probability alpha.
    ks_by_chance = float(stats.kstwobign.isf(alpha)) * one_over**0.5
    psi_limit, ks_limit = max(config.psi_threshold, psi_by_chance), max(config.ks_threshold, ks_by_chance)
    return Shift(
        measure=measure, psi=psi, psi_limit=psi_limit, ks=float(test.statistic), ks_limit=ks_limit,
        p_value=float(test.pvalue), mean_now=float(now.mean()), mean_before=float(before.mean()),
        drifted=psi > psi_limit or float(test.statistic) > ks_limit,
    )  # fmt: skip


def population_stability_index(
    now: NDArray[np.float64], before: NDArray[np.float64], bins: int = 10
) -> tuple[float, int]:
    """(PSI, bins used): the sum over bins of (p - q) ln(p / q), for the shares p of `now` and q of `before`.

    The bins have equal shares of `before`, as far as equal values allow: what fills a bin alone, such as the 0 of a
    rare class, has it for itself. Half an image is added to each bin, so that empty ones stay finite. Neither column
    may be empty.
    """
    edges = np.unique(np.quantile(before, np.linspace(0, 1, bins + 1)[1:-1]))
    counts = [np.bincount(np.searchsorted(edges, one, side="left"), minlength=len(edges) + 1) for one in (now, before)]
    used = (counts[0] + counts[1]) > 0
    p, q = ((one[used] + 0.5) / (one[used].sum() + 0.5 * used.sum()) for one in counts)
    return float(((p - q) * np.log(p / q)).sum()), int(used.sum())
