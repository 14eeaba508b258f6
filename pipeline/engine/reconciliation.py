"""How a run ends. Owns: counting its rows from its Parts, closing it, giving it up.
Must not know: workers, what was left to do, the command that started it.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.engine.fleet import FleetProgress
from pipeline.engine.lease import Lease
from pipeline.engine.ledger import Ledger, Plan, RunRecord
from pipeline.engine.limits import Ceilings, RunLimits, Traits, assess
from pipeline.engine.messages import Device
from pipeline.engine.plan import shard_lists
from pipeline.engine.settings import setup_digest
from pipeline.errors import ReconciliationError
from pipeline.storage import store_root
from pipeline.table.catalog import open_duckdb, read_parts_sql, sql_text
from pipeline.table.parts import commit_empty
from pipeline.table.scratch import scratch_folder

_MEMORY_BYTES = 3 << 30
_ROWS_AT_ONCE = 1_000_000
_STAGES = ("fetch", "decode", "infer", "encode")


class Terms(NamedTuple):
    """What a driver knows of its run's limits: `threads` of each worker that decode and encode; `listed` images of
    SOURCE in `listing_s`, 0 where it listed none; the ceilings of its machines, where they were given."""

    threads: int = 1
    listed: int = 0
    listing_s: float = 0.0
    ceilings: Ceilings | None = None


class Session(NamedTuple):
    """One driver's share of a run: what it took, what its workers did, and what they ran on."""

    seconds: float
    progress: FleetProgress
    devices: list[Device]
    terms: Terms = Terms()

    @property
    def images_per_s(self) -> float:
        """0 where nothing was done."""
        return self.progress.rows / self.seconds if self.seconds else 0.0


class RowSums(NamedTuple):
    """What the rows of some Parts come to."""

    ok: int
    errors_by_kind: dict[str, int]
    instances: int
    megapixels: float
    stage_ms: dict[str, float]
    megapixels_by_format: dict[str, float]
    image_bytes: int
    #: One of the images; "" where there is no row.
    image_uri: str
    #: Rows that say how large their image is.
    sized: int

    @property
    def errors(self) -> int:
        return sum(self.errors_by_kind.values())

    @property
    def rows(self) -> int:
        return self.ok + self.errors


def reconcile(ledger: Ledger, plan: Plan, session: Session) -> RunRecord:
    """Checks from the Parts themselves that every listed (uri, etag) of `plan` has its row, and sums them up.

    Raises ReconciliationError where a row is missing or there is one too many; the run then stays open.
    """
    sizes = ledger.committed(plan)
    shards = len(plan.bounds())
    if set(sizes) != set(range(shards)):
        raise ReconciliationError(
            f"run {plan.run_id}: {len(set(range(shards)) - set(sizes))} of {shards} Parts are not there; "
            "the same command continues"
        )
    known = {plan.part_uri(ordinal): size for ordinal, size in sizes.items()}
    with scratch_folder() as folder:  # one that the next command removes, should this driver be killed here
        connection = open_duckdb(ledger.storage, sizes=known, memory_bytes=_MEMORY_BYTES, temp_path=str(folder))
        try:
            rows = read_parts_sql([plan.part_uri(ordinal) for ordinal in range(shards)])
            path = folder / "manifest.parquet"
            path.write_bytes(ledger.storage.get(ledger.uri(plan.run_id, "manifest.parquet")).data)
            if (listed := pq.read_metadata(path).num_rows) != plan.counts.planned:
                raise ReconciliationError(
                    f"run {plan.run_id}: its frozen list has {listed} images, its plan {plan.counts.planned}; "
                    f"`maskmill verify {plan.dest}` says what else is damaged"
                )
            missing, example_uri = _without_row(connection, plan, path)
            strangers = connection.execute(
                f"SELECT count(*) FROM {rows} WHERE run_id IS DISTINCT FROM {sql_text(plan.run_id)}"
            ).fetchone()[0]
            sums = _sum_rows(connection, rows)
        finally:
            connection.close()
    if strangers:
        raise ReconciliationError(f"run {plan.run_id}: {strangers} rows in its Parts name another run")
    if missing or sums.rows != plan.counts.planned:
        example = f"{missing} have none, for example {example_uri!r}" if missing else "some images have more than one"
        raise ReconciliationError(
            f"run {plan.run_id}: {sums.rows} rows for {plan.counts.planned} listed images; {example}"
        )
    progress = session.progress
    return RunRecord(
        state="done",
        closed_at=dt.datetime.now(dt.UTC),
        plan=plan,
        ok=sums.ok,
        errors=sums.errors,
        errors_by_kind=sums.errors_by_kind,
        parts=shards,
        parts_bytes=sum(sizes.values()),
        instances=sums.instances,
        megapixels=sums.megapixels,
        stage_ms=sums.stage_ms,
        seconds=session.seconds,
        images_per_s=session.images_per_s,
        megapixels_per_s=session.images_per_s * sums.megapixels / max(1, sums.rows),
        model_busy_fraction=progress.busy_s / progress.active_s if progress.active_s else 0.0,
        workers=[device._asdict() for device in session.devices],
        limits=_limits(plan, sums, session, sum(sizes.values())),
    )


def _without_row(connection: Any, plan: Plan, list_path: Path) -> tuple[int, str | None]:
    """How many listed images have no row in the Part of their shard, and one of them. Some shards at a time, so that a
    list of any length takes no more memory than they do."""
    missing, example_uri = 0, None
    for ordinals, listed in _some_shards(shard_lists(plan, list_path, without=set())):
        connection.register("listed", listed)
        rows = read_parts_sql([plan.part_uri(ordinal) for ordinal in ordinals])
        without_row = f"listed l ANTI JOIN {rows} r ON l.uri = r.image_uri AND l.etag = r.listed_etag"
        ((count, uri),) = connection.execute(f"SELECT count(*), min(l.uri) FROM {without_row}").fetchall()
        connection.unregister("listed")
        missing, example_uri = missing + count, example_uri or uri
    return missing, example_uri


def _some_shards(shards: Iterable[tuple[int, pa.Table]]) -> Iterator[tuple[list[int], pa.Table]]:
    """Put together so that each has `_ROWS_AT_ONCE` images at least, but for the last."""
    ordinals: list[int] = []
    tables: list[pa.Table] = []
    rows = 0
    for ordinal, refs in shards:
        ordinals.append(ordinal)
        tables.append(refs.select(["uri", "etag"]))
        rows += len(refs)
        if rows >= _ROWS_AT_ONCE:
            yield ordinals, pa.concat_tables(tables)
            ordinals, tables, rows = [], [], 0
    if ordinals:
        yield ordinals, pa.concat_tables(tables)


def _limits(plan: Plan, sums: RowSums, session: Session, parts_bytes: int) -> RunLimits | None:
    """Of this driver's share; all rows of the run stand for its own."""
    progress, terms = session.progress, session.terms
    rows = max(1, sums.rows)
    return assess(
        Traits(
            rows=progress.rows,
            seconds=session.seconds,
            stage_ms={stage: spent_ms / rows for stage, spent_ms in sums.stage_ms.items()},
            threads=terms.threads,
            active_s=progress.active_s,
            busy_s=progress.busy_s,
            listed=terms.listed,
            listing_s=terms.listing_s,
            store=store_root(sums.image_uri),
            image_bytes=sums.image_bytes / rows,
            part_bytes=parts_bytes / rows,
            megapixels={kind: size / rows for kind, size in sums.megapixels_by_format.items()},
            model=f"{plan.model_name}@{plan.model_version}",
            precision=plan.precision,
            setup=setup_digest(plan.settings),
            resized=plan.card.get("size_policy", {}).get("kind") in ("resize", "letterbox"),
            image_megapixels=sums.megapixels / max(1, sums.sized),
            workers=[device._asdict() for device in session.devices],
        ),
        terms.ceilings,
    )


def abandon(ledger: Ledger, plan: Plan, *, ttl_s: float) -> RunRecord:
    """Gives a run up for good: takes every name that is still free, so that late workers find it taken, then closes it.

    Raises HeldError where a live driver holds it. What was committed stays.
    """
    # What a driver that slept through the end of its run has written beside it must not hold anybody up.
    if (over := ledger.record(plan.run_id)) is not None:
        return over
    ledger.storage.check_create_only()  # taking names relies on it, and so does the lease
    with Lease(ledger.storage, ledger.uri(plan.run_id, "lease.json"), ttl_s=ttl_s):
        closed = ledger.record(plan.run_id)
        if closed is not None:
            return closed
        for ordinal in sorted(set(range(len(plan.bounds()))) - set(ledger.committed(plan))):
            commit_empty(ledger.storage, plan.part_uri(ordinal))
        sums = sum_parts(ledger, plan, set(range(len(plan.bounds()))))
        sizes = ledger.committed(plan)
        record = RunRecord(
            state="abandoned", closed_at=dt.datetime.now(dt.UTC), plan=plan, ok=sums.ok, errors=sums.errors,
            errors_by_kind=sums.errors_by_kind, parts=len(sizes), parts_bytes=sum(sizes.values()),
            instances=sums.instances, megapixels=sums.megapixels, stage_ms=sums.stage_ms, seconds=0.0,
            images_per_s=0.0, megapixels_per_s=0.0, model_busy_fraction=0.0, workers=[],
        )  # fmt: skip
        ledger.close(record)
        return record


def sum_parts(ledger: Ledger, plan: Plan, ordinals: set[int]) -> RowSums:
    """The rows of these Parts of a run, which must be there."""
    connection = open_duckdb(ledger.storage, memory_bytes=_MEMORY_BYTES)
    try:
        return _sum_rows(connection, read_parts_sql([plan.part_uri(ordinal) for ordinal in sorted(ordinals)]))
    finally:
        connection.close()


def _sum_rows(connection: Any, rows: str) -> RowSums:
    """`rows`: a FROM clause."""
    instances, image_bytes, image_uri, *stages = connection.execute(
        "SELECT coalesce(sum(len(instances)), 0), coalesce(sum(image_bytes), 0), coalesce(any_value(image_uri), ''), "
        + ", ".join(f"coalesce(sum({stage}_ms), 0)" for stage in _STAGES)
        + f" FROM {rows}"
    ).fetchone()
    by_kind: dict[str | None, int] = {}
    by_format: dict[str, float] = {}
    sized = 0
    for kind, image_format, count, size, with_size in connection.execute(
        "SELECT error_kind, image_format, count(*), coalesce(sum(width::DOUBLE * height), 0) / 1e6, count(width) "
        f"FROM {rows} GROUP BY ALL ORDER BY 3 DESC, 1"
    ).fetchall():
        by_kind[kind] = by_kind.get(kind, 0) + count
        sized += with_size
        if size:
            by_format[image_format] = by_format.get(image_format, 0.0) + size
    ok = by_kind.pop(None, 0)
    kinds = {str(kind): count for kind, count in sorted(by_kind.items(), key=lambda one: (-one[1], str(one[0])))}
    stage_ms = dict(zip(_STAGES, stages, strict=True))
    megapixels = sum(by_format.values())
    return RowSums(ok, kinds, int(instances), megapixels, stage_ms, by_format, int(image_bytes), image_uri, sized)
