"""A report says what the table says, escapes what the corpus says, and asks nothing of the network."""

from __future__ import annotations

import base64
import hashlib
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from handmade import make_row
from pictured_table import PicturedTable

from pipeline.errors import UsageError
from pipeline.insight.report import Report, ReportConfig, make_report, write_report
from pipeline.storage import open_storage
from pipeline.table.catalog import connect


class Page(HTMLParser):
    """A page as a browser's parser sees it: elements with their attributes, and the text outside scripts."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._raw = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._raw = tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._raw = False

    def handle_data(self, data: str) -> None:
        if not self._raw:
            self.text += data + " "

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> PicturedTable:
    made = PicturedTable(tmp_path_factory.mktemp("report"))
    made.night(60, 3)
    made.night(60, 3, sure=0.6)
    return made


@pytest.fixture(scope="module")
def report(place: PicturedTable) -> Report:
    return make_report(place.dest)


@pytest.fixture(scope="module")
def page(report: Report) -> Page:
    return Page(report.html)


def test_it_is_about_the_newest_run_and_says_what_ran(place: PicturedTable, report: Report, page: Page) -> None:
    [(newest,)] = connect(place.dest).sql("SELECT max(run_id) FROM runs").fetchall()
    assert report.run_id == newest and newest in page.text
    assert "<dt>images</dt><dd>63</dd>" in report.html and "<dt>errors</dt><dd>3</dd>" in report.html
    for words in ("0123456789ab", "60 PNG", "val fp32 miou 0.613", "Steps of", "x86_64 on", "5e771465d1e5", "fetch"):
        assert words in page.text, words
    assert "bf16 miou" not in page.text, "the figures are those of the run's precision"


def test_every_chart_is_there_and_in_words_too(page: Page) -> None:
    figures = [attributes["id"] for attributes in page.all("figure") if attributes.get("id")]
    assert figures == [
        f"chart-{name}"
        for name in ("pace", "stages", "history", "coverage", "presence", "confidence", "errors")
    ]  # fmt: skip
    drawings = [attributes for attributes in page.all("div") if attributes.get("role") == "img"]
    assert len(drawings) >= 10 and all(len(str(one["aria-label"])) > 20 for one in drawings)


def test_the_sql_runs_as_it_stands(place: PicturedTable, report: Report) -> None:
    found = re.findall(r"<pre tabindex=\"0\"><code>(.*?)</code></pre>", report.html, re.DOTALL)
    connection = connect(place.dest)
    answers = [connection.sql(unescape(sql)).fetchall() for sql in found]
    assert len(answers) >= 12 and all(answers)


def test_pictures_carry_masks_and_what_cannot_be_shown_says_why(page: Page) -> None:
    tiles = [one for one in page.all("button") if one.get("class") == "picture"]
    assert len(tiles) > 20
    photos = [one for one in page.all("img") if one.get("class") == "photo" and one.get("src")]
    assert all(str(one["src"]).startswith("data:image/webp;base64,") and one["alt"] for one in photos)
    masks = [one for one in page.all("img") if one.get("class") == "mask" and one.get("src")]
    assert len(masks) == len(photos) and all(str(one["src"]).startswith("data:image/png;base64,") for one in masks)
    assert len(photos) == len({one["data-picture"] for one in tiles}), "each picture is in the file once"


def test_an_image_that_is_gone_is_a_tile_that_says_so(tmp_path: Path) -> None:
    place = PicturedTable(tmp_path)
    place.night(4, 0)
    html = make_report(place.dest).html
    assert "the image cannot be shown now (missing)" in html and "What failed" not in html


def test_the_rarest_classes_and_the_least_certain_come_first(place: PicturedTable, report: Report) -> None:
    rare = report.html[report.html.index('id="rare"') : report.html.index('id="failed"')]
    first = Page(rare).all("button")[0]
    assert "bus" in str(first["data-caption"]) and "in 2 images" in str(first["data-caption"])
    uncertain = Page(report.html[report.html.index('id="uncertain"') : report.html.index('id="rare"')]).all("button")
    [(least,)] = connect(place.dest).sql(
        f"SELECT parse_filename(image_uri) FROM segments WHERE run_id = '{report.run_id}' AND status = 'ok' "
        "ORDER BY mean_confidence LIMIT 1"
    ).fetchall()  # fmt: skip
    assert str(uncertain[0]["data-name"]) == least


def test_what_the_corpus_says_is_text_and_never_markup(page: Page) -> None:
    assert page.text.count("<script>document.title='owned'") > 10, "the name is shown, as text"
    assert len(page.all("script")) == 2  # data for the page's own script, and that script
    assert not [one for one in page.all("img") if not str(one.get("src", "data:")).startswith("data:")]
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)


def test_what_cannot_be_seen_is_shown(tmp_path: Path) -> None:
    place = PicturedTable(tmp_path)
    place.table.run(make_row("file:///photos/a\u202egnp.exe\x1b.jpg", "e", "corrupt"))
    html = make_report(place.dest).html
    assert r"a\u202egnp.exe\x1b.jpg" in html and "\u202e" not in html and "\x1b" not in html


def test_nothing_comes_from_outside_and_only_our_script_may_run(report: Report, page: Page) -> None:
    for tag, attributes in page.elements:
        for name in ("src", "href", "action", "data", "srcset", "xlink:href"):
            value = str(attributes.get(name) or "data:")
            assert value.startswith(("data:", "#")), (tag, name, value)
    assert "@import" not in report.html and "url(http" not in report.html
    script = report.html[report.html.rindex("<script>") + 8 : report.html.rindex("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [one["content"] for one in page.all("meta") if one.get("http-equiv") == "Content-Security-Policy"]
    assert f"script-src 'sha256-{digest}'" in str(policy) and "default-src 'none'" in str(policy)


def test_ids_are_unique_and_labels_lead_somewhere(page: Page) -> None:
    ids = [str(attributes["id"]) for _, attributes in page.elements if attributes.get("id")]
    assert len(ids) == len(set(ids))
    for _, attributes in page.elements:
        if label := attributes.get("aria-labelledby"):
            assert label in ids
        if str(attributes.get("href", "")).startswith("#"):
            assert str(attributes["href"])[1:] in ids


def test_drift_is_shown_with_its_limits(report: Report, page: Page) -> None:
    assert report.drift is not None and report.drift.drifted
    assert "This run is unlike the 1 before it" in page.text and "mean_confidence" in page.text
    assert re.search(r"0\.92\d? → 0\.62\d?: drifted", page.text)


def test_objects_are_counted_and_named(tmp_path: Path) -> None:
    place = PicturedTable(tmp_path)
    run_id = place.night(4, 0, task="instance")
    page = Page(make_report(place.dest, run_id).html)
    assert {"chart-objects", "chart-crowding"} <= {str(one.get("id")) for one in page.all("figure")}
    assert "2 objects · confidence" in page.text


def test_a_run_that_is_open_or_empty_or_all_errors_has_a_page_too(tmp_path: Path) -> None:
    place = PicturedTable(tmp_path)
    failed = place.night(0, 2)
    html = make_report(place.dest, failed).html
    assert "2 of 2 images that failed" in html and 'id="random"' not in html
    empty = place.table.run().run_id
    assert "This run has no rows to chart" in make_report(place.dest, empty).html
    still = place.night(3, 1, state="open")
    assert "This run is open" in make_report(place.dest, still).html
    assert make_report(place.dest).run_id == failed, "by default the newest that is done and has rows"
    with pytest.raises(UsageError, match="no run '20200101T000000Z-000000'"):
        make_report(place.dest, "20200101T000000Z-000000")


def test_it_is_written_where_it_is_wanted(place: PicturedTable, tmp_path: Path) -> None:
    config = ReportConfig(random_images=0, uncertain_images=1, rare_images=0, failed_images=1)
    out = tmp_path / "new folder" / "my report.html"
    report = write_report(place.dest, out=out, config=config)
    assert out.read_text() == report.html and report.size_bytes < 400_000
    (tmp_path / "taken").mkdir()
    with pytest.raises(UsageError, match="cannot be written"):
        write_report(place.dest, out=tmp_path / "taken", config=config)


@pytest.mark.s3
def test_table_pictures_and_page_may_lie_in_object_storage(s3_bucket: str, tmp_path: Path) -> None:
    place = PicturedTable(tmp_path, dest=f"{s3_bucket}/table")
    place.night(3, 1)
    report = write_report(place.dest, out=f"{s3_bucket}/pages/report.html")
    stored = open_storage(s3_bucket).get(f"{s3_bucket}/pages/report.html").data
    assert stored.decode() == report.html
