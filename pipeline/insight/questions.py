"""What a report asks of the table about one run. Owns: the SQL of its figures, word for word as the page shows it.
Must not know: pictures, charts, pages.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import duckdb

from pipeline.errors import UsageError
from pipeline.table.catalog import sql_text, unreadable

_BUCKETS = 60
#: With fewer images in a step the pace is noise.
_STEP_IMAGES = 10
_BINS = 40
_STEPS_S = (
    0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 43200, 86400, 604800,
)  # fmt: skip
#: Measures per image that are followed from run to run.
MEASURES = ("mean_confidence", "mean_entropy", "foreground_fraction", "brightness", "contrast")


class Answer(NamedTuple):
    """Rows, by column, and the SQL that gave them: `maskmill query DEST` gives the same."""

    sql: str
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]

    def records(self) -> list[dict[str, Any]]:
        """One dict a row."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]


class Asked(NamedTuple):
    """The run that is asked about."""

    run_id: str
    sequence: int
    state: str
    model: str
    version: str
    settings_digest: str
    date: str

    @property
    def rows(self) -> str:
        """FROM and WHERE: all rows of the run. The path keys come first, so that other files are not opened."""
        return (
            f"FROM segments\nWHERE model = {sql_text(self.model)} AND version = {sql_text(self.version)} "
            f"AND date = DATE '{self.date}'\n  AND run_id = {sql_text(self.run_id)}"
        )


def choose_run(connection: Any, dest: str, run_id: str | None) -> Asked:
    """The run of that id, or the newest finished one that has rows. Raises UsageError where there is none."""
    which = f"run_id = {sql_text(run_id)}" if run_id else "state = 'done' AND ok + errors > 0"
    found = connection.execute(
        "SELECT run_id, sequence, state, model, model_version, settings_digest, strftime(run_date, '%Y-%m-%d') "
        f"FROM runs WHERE {which} ORDER BY sequence DESC LIMIT 1"
    ).fetchone()
    if found is None:
        what = f"no run {run_id!r}" if run_id else "no finished run with images"
        raise UsageError(f"{what} in {dest}: see `maskmill runs list {dest}`")
    return Asked(*found)


class Questions:
    """The figures of one run. Every method runs one query, of flat columns unless it says otherwise; only `masks` reads
    masks."""

    def __init__(self, connection: Any, dest: str, asked: Asked) -> None:
        self._connection = connection
        self._dest = dest
        self._asked = asked
        self._classes: Answer | None = None

    def ask(self, sql: str) -> Answer:
        """Raises InfrastructureError where DEST cannot be read."""
        sql = textwrap.dedent(sql).strip()
        try:
            cursor = self._connection.execute(sql)
            return Answer(sql, tuple(column[0] for column in cursor.description), cursor.fetchall())
        except duckdb.Error as error:
            raise unreadable(self._dest, error) from error

    def totals(self) -> dict[str, Any]:
        """One row of sums, extremes and means; NULL where there is nothing to sum."""
        return self.ask(
            "SELECT count(*) AS images, count(*) FILTER (status = 'ok') AS ok,\n"
            "  count(*) FILTER (status = 'error') AS errors,\n"
            "  coalesce(sum(len(instances)), 0)::BIGINT AS objects, max(task) AS task,\n"
            "  epoch(max(processed_at) - min(processed_at)) AS seconds,\n"
            "  avg(mean_confidence) AS confidence, min(mean_confidence) AS least_confidence,\n"
            "  max(mean_confidence) AS most_confidence, avg(foreground_fraction) AS foreground,\n"
            "  max(len(instances)) AS most_objects, median(width * height / 1e6) AS median_megapixels,\n"
            "  avg(fetch_ms) AS fetch_ms, avg(decode_ms) AS decode_ms, avg(infer_ms) AS infer_ms,\n"
            f"  avg(encode_ms) AS encode_ms\n{self._asked.rows}"
        ).records()[0]

    def pace(self, seconds: float, images: int) -> tuple[Answer, float]:
        """Rows and mean milliseconds per stage, over time; and the length of a step in seconds."""
        steps = max(_BUCKETS // 5, min(_BUCKETS, images // _STEP_IMAGES))
        step_s = next((step for step in _STEPS_S if seconds / step <= steps), _STEPS_S[-1])
        answer = self.ask(
            f"SELECT time_bucket(INTERVAL '{round(step_s * 1000)} milliseconds', processed_at) AS began,\n"
            "  count(*) FILTER (status = 'ok') AS ok, count(*) FILTER (status = 'error') AS errors,\n"
            "  avg(fetch_ms) AS fetch, avg(decode_ms) AS decode, avg(infer_ms) AS model, avg(encode_ms) AS encode\n"
            f"{self._asked.rows}\nGROUP BY began ORDER BY began"
        )
        return answer, step_s

    def history(self, limit: int = 30) -> Answer:
        """The last runs of this model up to this one, the oldest first."""
        return self.ask(
            "FROM (SELECT run_id, sequence, run_date, model_version, ok, errors, images_per_s, seconds\n"
            f"  FROM runs WHERE model = {sql_text(self._asked.model)} AND sequence <= {self._asked.sequence}\n"
            f"    AND state = 'done' AND ok + errors > 0\n  ORDER BY sequence DESC LIMIT {limit})\nORDER BY sequence"
        )

    def classes(self) -> Answer:
        """Pixels, images and confidence of every class, the largest share first. Reads `classes`, once."""
        self._classes = self._classes or self.ask(
            "SELECT c.class_id, c.name, sum(c.pixels) / any_value(total) AS share, count(*) AS images,\n"
            "  sum(c.mean_confidence * c.pixels) / sum(c.pixels) AS confidence, sum(c.regions)::BIGINT AS regions\n"
            "FROM (SELECT unnest(classes) AS c, (\n"
            f"{textwrap.indent('SELECT sum(width::BIGINT * height) ' + self._ok_rows(), '    ')}) AS total\n"
            f"{textwrap.indent(self._ok_rows(), '  ')})\n"
            "GROUP BY ALL ORDER BY share DESC, c.name"
        )
        return self._classes

    def instances(self) -> Answer:
        """Objects of every class, the most frequent first. Reads `instances`, without their outlines."""
        return self.ask(
            "SELECT i.name, count(*) AS objects, count(DISTINCT image_uri) AS images, avg(i.score) AS mean_score,\n"
            "  median(i.area) AS median_area_px\n"
            "FROM (SELECT image_uri, unnest(list_transform(instances,\n"
            "    lambda i: {'name': i.name, 'score': i.score, 'area': i.area})) AS i\n"
            f"{textwrap.indent(self._ok_rows(), '  ')})\n"
            "GROUP BY i.name ORDER BY objects DESC, i.name"
        )

    def crowding(self, most_objects: int) -> Answer:
        """How many images have how many objects, in steps."""
        step = max(1, -(-(most_objects + 1) // _BINS))
        return self.ask(
            f"SELECT len(instances) // {step} * {step} AS objects, count(*) AS images\n"
            f"{self._ok_rows()} AND instances IS NOT NULL\nGROUP BY 1 ORDER BY 1"
        )

    def confidence(self, least: float, most: float) -> tuple[Answer, float]:
        """How many images have which mean confidence, in steps of the second value."""
        step = next(step for step in (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025) if (most - least) / step <= _BINS)
        answer = self.ask(
            f"SELECT floor(mean_confidence / {step}) * {step} AS confidence, count(*) AS images\n"
            f"{self._ok_rows()} AND mean_confidence IS NOT NULL\nGROUP BY 1 ORDER BY 1"
        )
        return answer, step

    def errors(self) -> Answer:
        """Failed images by kind, the most frequent first, each with one of its messages."""
        return self.ask(
            "SELECT error_kind, count(*) AS images, min(error_message) AS for_example\n"
            f"{self._asked.rows} AND status = 'error'\nGROUP BY error_kind ORDER BY images DESC, error_kind"
        )

    def formats(self) -> Answer:
        """Images by file format."""
        return self.ask(
            "SELECT image_format, count(*) AS images, sum(image_bytes)::BIGINT AS bytes\n"
            f"{self._asked.rows} AND image_format IS NOT NULL\nGROUP BY image_format ORDER BY images DESC"
        )

    def course(self, run_ids: Sequence[str]) -> Answer:
        """Mean, and 10th and 90th percentile, of every measure in each of these runs of the same version and settings,
        the oldest first."""
        listed = ", ".join(sql_text(run_id) for run_id in sorted(run_ids))
        figures = ",\n".join(
            f"  avg({name}) AS {name}, quantile_cont({name}, 0.1) AS {name}_p10, "
            f"quantile_cont({name}, 0.9) AS {name}_p90"
            for name in MEASURES
        )
        return self.ask(
            f"SELECT run_id, count(*) AS images,\n{figures}\nFROM segments\n"
            f"WHERE model = {sql_text(self._asked.model)} AND version = {sql_text(self._asked.version)}\n"
            f"  AND run_id IN ({listed}) AND status = 'ok'\nGROUP BY run_id ORDER BY run_id"
        )

    def random_images(self, limit: int) -> Answer:
        """The same sample every time."""
        return self.ask(f"SELECT image_uri\n{self._ok_rows()}\nORDER BY md5(image_uri) LIMIT {limit}")

    def uncertain_images(self, limit: int) -> Answer:
        """Those of the lowest mean confidence."""
        return self.ask(
            f"SELECT image_uri, mean_confidence\n{self._ok_rows()} AND mean_confidence IS NOT NULL\n"
            f"ORDER BY mean_confidence, image_uri LIMIT {limit}"
        )

    def rare_images(self, rarest: Sequence[str]) -> Answer:
        """For each of these classes the two images that have most of it. Reads `classes`."""
        listed = ", ".join(sql_text(name) for name in rarest)
        return self.ask(
            "SELECT image_uri, name, fraction\nFROM (SELECT image_uri, unnest(classes, recursive := true)\n"
            f"{textwrap.indent(self._ok_rows(), '  ')})\nWHERE name IN ({listed})\n"
            "QUALIFY row_number() OVER (PARTITION BY name ORDER BY fraction DESC, image_uri) <= 2\n"
            "ORDER BY name, fraction DESC, image_uri"
        )

    def failed_images(self, limit: int) -> Answer:
        """Of every kind of error in turn."""
        return self.ask(
            f"SELECT image_uri, error_kind, error_message, attempt\n{self._asked.rows} AND status = 'error'\n"
            "ORDER BY row_number() OVER (PARTITION BY error_kind ORDER BY md5(image_uri)), error_kind, image_uri\n"
            f"LIMIT {limit}"
        )

    def masks(self, uris: Sequence[str]) -> list[dict[str, Any]]:
        """The rows of these images, masks and objects too."""
        if not uris:
            return []
        listed = ", ".join(sql_text(uri) for uri in sorted(set(uris)))
        return self.ask(
            "SELECT image_uri, image_etag, width, height, task, mean_confidence, mean_entropy, foreground_fraction,\n"
            f"  classes, mask.bytes AS mask, instances\n{self._ok_rows()} AND image_uri IN ({listed})"
        ).records()

    def _ok_rows(self) -> str:
        return f"{self._asked.rows} AND status = 'ok'"
