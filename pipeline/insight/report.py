"""A run as one HTML file that people look at. Owns: what is on the page, in which order, and that it fits into 5 MB.
Must not know: how figures are counted, how charts and pictures are drawn, when a report is made.

The page holds everything that it shows: no request leaves it, its Content-Security-Policy forbids any, and the one
script that may run is named there by its digest. Whatever comes from the corpus is escaped by Jinja or by Vega.
"""

from __future__ import annotations

import base64
import datetime as dt
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup
from pydantic import BaseModel, ConfigDict, Field

from pipeline.config import DriftConfig
from pipeline.errors import StorageError, UsageError
from pipeline.insight import cards, facts
from pipeline.insight.cards import Card, count_text, visible
from pipeline.insight.drift import DriftReport, drift_seen_by
from pipeline.insight.gallery import GalleryConfig, Picture, make_pictures
from pipeline.insight.questions import Answer, Asked, Questions, choose_run
from pipeline.storage import join_uri, normalize_uri, open_storage, uri_name
from pipeline.table.catalog import open_table


class ReportConfig(BaseModel):
    """What a report shows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    random_images: int = Field(12, ge=0, le=60, description="Pictures of a random sample, the same in every call.")
    uncertain_images: int = Field(12, ge=0, le=60, description="Pictures of the least confident.")
    rare_images: int = Field(12, ge=0, le=60, description="Pictures of the classes that the fewest images have.")
    failed_images: int = Field(24, ge=0, le=200, description="Failed images that are named with their reasons.")
    gallery: GalleryConfig = GalleryConfig()
    drift: DriftConfig = DriftConfig()
    dest_profile: str | None = Field(None, description="AWS profile for the table.")


class Report(NamedTuple):
    """A finished page, and what it is about."""

    run_id: str
    html: str
    drift: DriftReport | None

    @property
    def size_bytes(self) -> int:
        """Of the file."""
        return len(self.html.encode())


class _Tile(NamedTuple):
    key: str
    name: str
    uri: str
    caption: str
    picture: Picture | None
    is_first: bool


class _Section(NamedTuple):
    key: str
    title: str
    note: str
    sql: str
    tiles: list[_Tile]


def make_report(dest: str, run_id: str | None = None, config: ReportConfig | None = None) -> Report:
    """The page about a run of DEST; default: the newest finished one that has rows. Changes nothing.

    Pictures are fetched from where the images lie; one that cannot be had is a tile that says why. Below 5 MB with the
    default config, however many images there are; memory does not grow with them. Raises UsageError where there is no
    such run, StorageError or InfrastructureError where the table cannot be read.
    """
    config = config or ReportConfig()
    dest = normalize_uri(dest)
    storage = open_storage(dest, profile=config.dest_profile)
    connection = open_table(storage, dest, temp_path=os.environ.get("TMPDIR", "/tmp"))
    try:
        asked = choose_run(connection, dest, run_id)
        record = _record(storage, dest, asked)
        page = _Page(Questions(connection, dest, asked), asked, record, config)
        drift = drift_seen_by(connection, dest, asked.run_id, config.drift) if asked.state == "done" else None
        return Report(asked.run_id, page.render(dest, drift), drift)
    finally:
        connection.close()


def write_report(
    dest: str, run_id: str | None = None, *, out: str | Path = "report.html", config: ReportConfig | None = None
) -> Report:
    """As `make_report`, and writes the page to `out`, a path or URL, replacing what is there.

    Raises besides UsageError where a local `out` cannot be written.
    """
    report = make_report(dest, run_id, config)
    uri = normalize_uri(str(out))
    try:
        open_storage(uri).put(uri, report.html.encode())
    except StorageError as error:
        if "://" in str(out):
            raise
        raise UsageError(f"{out} cannot be written: {error}") from error
    return report


def _record(storage: Any, dest: str, asked: Asked) -> dict[str, Any]:
    """`run.json`, or of an open run its plan alone, in the same shape."""
    name = "plan.json" if asked.state == "open" else "run.json"
    body: dict[str, Any] = json.loads(storage.get(join_uri(dest, "runs", asked.run_id, name)).data)
    return {"plan": body} if asked.state == "open" else body


class _Page:
    """What the template is given."""

    def __init__(self, questions: Questions, asked: Asked, record: Mapping[str, Any], config: ReportConfig) -> None:
        self._questions = questions
        self._asked = asked
        self._record = record
        self._plan: Mapping[str, Any] = record["plan"]
        self._config = config
        self._totals = questions.totals()
        classes = self._plan["card"].get("classes", [])
        self._colors = {one["name"]: cards.color_text(one["color"]) for one in classes if any(one["color"])}

    def render(self, dest: str, drift: DriftReport | None) -> str:
        """The whole file."""
        totals = self._totals
        charts: list[Card] = []
        limit: tuple[str, str] | None = None
        if totals["images"]:
            charts += cards.pace(self._questions, totals)
            limit = facts.bound(self._record) or cards.bottleneck(totals, self._record.get("model_busy_fraction"))
        charts += cards.history(self._questions)
        if totals["ok"]:
            charts += cards.classes(self._questions, self._colors, totals["ok"])
            charts += cards.objects(self._questions, self._colors, totals)
            charts += cards.confidence(self._questions, totals)
        charts += cards.errors(self._questions)
        script = _page_file("report.js")
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        sections = self._sections()
        return _template().render(
            run=self._asked, dest=visible(dest), totals=totals, plan=self._plan, record=self._record,
            script=Markup(script), script_digest=digest, style=Markup(_page_file("report.css")),
            figures=facts.headline(totals, self._record, limit),
            limits=facts.limits(self._record), limits_note=facts.limits_note(self._record),
            facts=facts.facts(totals, self._record, self._questions.formats()), charts=charts,
            sections=sections, pictures=_for_script(sections),
            drift=drift, drift_cards=cards.drift(self._questions, drift) if drift else [],
            classes=[one | {"css": cards.color_text(one["color"])} for one in self._plan["card"].get("classes", [])],
            card_json=json.dumps(self._plan["card"], indent=1, ensure_ascii=False),
            settings_json=json.dumps(_settings(self._plan), indent=1, ensure_ascii=False),
            made_at=dt.datetime.now(dt.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        )  # fmt: skip

    def _sections(self) -> list[_Section]:
        config, ask = self._config, self._questions
        if not self._totals["images"]:
            return []
        chosen: list[tuple[str, str, str, Answer]] = []
        having: dict[str, int] = {}
        rarest: list[str] = []
        if self._totals["ok"]:
            having = {one["name"]: one["images"] for one in ask.classes().records()}
            rarest = sorted(having, key=lambda name: (having[name], name))[: config.rare_images // 2]
            chosen += [
                ("random", "A random sample", "The same images in every report of this run.",
                 ask.random_images(config.random_images)),
                ("uncertain", "The least certain", "Lowest mean confidence first: the ones to look at, or to label.",
                 ask.uncertain_images(config.uncertain_images)),
            ]  # fmt: skip
            if rarest and len(having) > 2:
                note = "The classes that the fewest images have, and the images that have most of each."
                chosen.append(("rare", "The rarest classes", note, ask.rare_images(rarest)))
        rows = {row["image_uri"]: row for row in ask.masks([row[0] for *_, answer in chosen for row in answer.rows])}
        pictures = make_pictures(list(rows.values()), config.gallery)
        numbers = {uri: index for index, uri in enumerate(rows)}
        seen: set[str] = set()
        sections = []
        for key, title, note, answer in chosen:
            tiles = []
            found = answer.records()
            if key == "rare":
                found.sort(key=lambda one: rarest.index(one["name"]))
            for one in found:
                uri = one["image_uri"]
                caption = _caption(rows[uri], self._plan["card"])
                if key == "rare":
                    caption = (
                        f"{visible(one['name'])} {one['fraction']:.1%}, in {count_text(having[one['name']], 'image')}"
                    )
                name, is_first = visible(uri_name(uri)), uri not in seen
                tiles.append(_Tile(f"p{numbers[uri]}", name, visible(uri), caption, pictures[uri], is_first))
                seen.add(uri)
            sections.append(_Section(key, title, note, answer.sql, tiles))
        if self._totals["errors"]:
            answer = ask.failed_images(config.failed_images)
            tiles = [
                _Tile("", visible(uri_name(one["image_uri"])), visible(one["image_uri"]),
                      f"{one['error_kind']}: {visible(one['error_message'] or 'no message')}", None, True)
                for one in answer.records()
            ]  # fmt: skip
            note = (
                f"{len(tiles):,} of {count_text(self._totals['errors'], 'image')} that failed, of every kind in turn."
            )
            sections.append(_Section("failed", "What failed, and why", note, answer.sql, tiles))
        return sections


def _caption(row: Mapping[str, Any], card: Mapping[str, Any]) -> str:
    number = len(row["instances"] or [])
    has_background = card.get("background_id") is not None and row["foreground_fraction"] is not None
    parts = [
        count_text(number, "object") if row["task"] == "instance" else "",
        f"confidence {row['mean_confidence']:.3f}" if row["mean_confidence"] is not None else "",
        f"{row['foreground_fraction']:.0%} foreground" if has_background else "",
    ]
    return " · ".join(filter(None, parts))


def _for_script(sections: Sequence[_Section]) -> dict[str, Any]:
    """What the page's script knows of each picture: what is under a pointer, and where the label map lies."""
    return {
        tile.key: {"labels": tile.picture.labels, "names": tile.picture.names}
        for section in sections for tile in section.tiles
        if tile.is_first and tile.picture and tile.picture.labels
    }  # fmt: skip


def _settings(plan: Mapping[str, Any]) -> dict[str, Any]:
    return {"settings": plan["settings"], "command": plan["command"]}


def _page_file(name: str) -> str:
    return resources.files("pipeline.insight").joinpath("page", name).read_text()


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_page_file("report.html.j2"))
