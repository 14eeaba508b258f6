"""A report in a real browser: what is hostile stays text, and what is promised to the eye and the hand is there.

The pictures it takes stay in `test-artifacts/`. Skipped where there is no Chromium: escaping is tested in test_report
without one, too.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pictured_table import HOSTILE, PicturedTable

from pipeline.insight.report import write_report

playwright_api = pytest.importorskip("playwright.sync_api")

KEPT = Path(__file__).resolve().parents[3] / "test-artifacts"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium: Playwright's own, or the system's."""
    with playwright_api.sync_playwright() as playwright:
        own = Path(playwright.chromium.executable_path)
        path = str(own) if own.exists() else next(filter(None, map(shutil.which, BROWSERS)), None)
        if path is None:
            pytest.skip("no Chromium: `playwright install chromium`, or your system's package, brings one")
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def report_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = PicturedTable(tmp_path_factory.mktemp("browser"))
    for sure in (0.9, 0.9, 0.6):
        place.night(60, 3, sure=sure)
    place.night(5, 3, task="instance", model_name="tiny-instance")
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report(place.dest, out=path, run_id=max(place.table.ledger.entries()[:3]).run_id)
    return path


class Shown:
    """A page, what it asked of the network, and what it complained of."""

    def __init__(self, browser: Any, path: Path, **options: Any) -> None:
        self.page = browser.new_page(**options)
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(path.as_uri())
        self.page.wait_for_load_state("load")


@pytest.fixture
def shown(browser: Any, report_path: Path) -> Iterator[Shown]:
    one = Shown(browser, report_path, viewport={"width": 1280, "height": 900})
    yield one
    one.page.close()


def test_a_hostile_name_is_text_and_nothing_leaves_the_page(shown: Shown, report_path: Path) -> None:
    page = shown.page
    assert page.title().startswith("tiny-semantic · ")
    failed = page.locator("#failed .name").all_inner_texts()
    assert len(failed) == 3 and all(HOSTILE.rpartition("/")[2] in name for name in failed)
    assert page.locator("#ran").get_by_text(f"bus {HOSTILE}", exact=True).count() >= 1, "a class of that name"
    assert page.locator("img[src=x]").count() == 0
    assert page.evaluate("document.scripts.length") == 2
    assert [url for url in shown.requests if not url.startswith(("data:", report_path.as_uri()))] == []
    assert shown.complaints == []
    KEPT.mkdir(exist_ok=True)
    page.screenshot(path=KEPT / "report-hostile-names.png", full_page=True)
    assert (KEPT / "report-hostile-names.png").stat().st_size > 50_000


def test_every_picture_and_mask_is_drawn(shown: Shown) -> None:
    page = shown.page
    page.wait_for_function("[...document.querySelectorAll('.tiles img')].every(image => image.complete)")
    widths = page.eval_on_selector_all(".tiles img", "all => all.map(image => image.naturalWidth)")
    assert len(widths) > 40 and min(widths) >= 32


def test_pointing_at_a_mask_names_its_class_and_score(shown: Shown) -> None:
    page = shown.page
    tile = page.locator("button.picture").first
    tile.scroll_into_view_if_needed()
    page.wait_for_timeout(100)
    box = tile.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] * 0.95)  # starts loading the label map
    page.wait_for_timeout(200)
    page.mouse.move(box["x"] + box["width"] * 0.9, box["y"] + box["height"] * 0.95)
    assert page.inner_text("#tip") == "road · 0.75"
    page.mouse.move(box["x"] + box["width"] * 0.3, box["y"] + box["height"] * 0.72)
    assert page.inner_text("#tip") == "car · 0.75"
    page.mouse.move(box["x"] + box["width"] * 0.9, box["y"] + box["height"] * 0.3)
    assert page.is_hidden("#tip"), "background is left clear"


def test_pointing_at_a_bar_tells_its_figure(shown: Shown) -> None:
    bar = shown.page.locator("#chart-coverage [role=graphics-symbol][aria-roledescription=bar]").first
    bar.scroll_into_view_if_needed()
    bar.hover()
    assert shown.page.inner_text("#tip").startswith("background: ")


def test_masks_are_turned_off_and_made_fainter(shown: Shown) -> None:
    page = shown.page
    mask = page.locator(".tiles .mask").first
    assert mask.is_visible()
    page.keyboard.press("m")
    assert mask.is_hidden() and not page.is_checked("#masks")
    page.check("#masks")
    assert mask.is_visible()
    page.locator("#opacity").fill("40")
    assert mask.evaluate("image => getComputedStyle(image).opacity") == "0.4"


def test_the_viewer_by_keyboard_alone(shown: Shown) -> None:
    page = shown.page
    tile = page.locator("button.picture").nth(2)
    tile.focus()
    page.keyboard.press("Enter")
    assert page.is_visible("#viewer") and page.inner_text("#viewer-name") == tile.get_attribute("data-name")
    assert "road 0.75" in page.inner_text("#viewer-names")
    page.wait_for_timeout(100)
    before = page.locator("#big").bounding_box()["width"]
    page.keyboard.press("+")
    assert page.locator("#big").bounding_box()["width"] > 1.5 * before
    page.keyboard.press("-")
    page.keyboard.press("ArrowRight")
    following = page.locator("button.picture").nth(3)
    assert page.inner_text("#viewer-name") == following.get_attribute("data-name")
    page.keyboard.press("Escape")
    assert page.is_hidden("#viewer")
    assert following.evaluate("tile => tile === document.activeElement"), "focus returns to the picture"


def _luminance(css: str) -> float:
    """Relative luminance of an `rgb(...)`: WCAG 2.2, definition of relative luminance."""
    channels = [int(part) / 255 for part in css[css.index("(") + 1 : -1].split(",")[:3]]
    linear = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_in_light_and_dark(browser: Any, report_path: Path, scheme: str) -> None:
    page = Shown(browser, report_path, viewport={"width": 1280, "height": 900}, color_scheme=scheme).page
    pairs = page.evaluate(
        """() => [...document.querySelectorAll("h1,h2,h3,p,dt,dd,td,th,summary,nav a,svg text,li,label")]
        .filter(one => one.textContent.trim() && one.getClientRects().length).map(one => {
          const svg = one.namespaceURI.endsWith("svg"), style = getComputedStyle(one);
          let below = one, back = "rgba(0, 0, 0, 0)";
          while (below && back.endsWith(", 0)")) {
            back = getComputedStyle(below).backgroundColor;
            below = below.parentElement;
          }
          return [svg ? style.fill : style.color, back, one.textContent.trim().slice(0, 30)];
        })"""
    )
    assert len(pairs) > 100
    for ink, paper, text in pairs:
        light, dark = sorted((_luminance(ink), _luminance(paper)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (scheme, text, ink, paper)  # WCAG 2.2, 1.4.3, level AA
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (_luminance(background) > 0.5) == (scheme == "light")
    page.click("#theme")
    assert (_luminance(page.evaluate("getComputedStyle(document.body).backgroundColor")) > 0.5) == (scheme == "dark")
    page.close()


def test_it_fits_a_phone(browser: Any, report_path: Path) -> None:
    phone = Shown(browser, report_path, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True).page
    assert phone.evaluate("document.documentElement.scrollWidth") <= 360
    smallest = phone.eval_on_selector_all(
        "svg.chart text",
        "all => Math.min(...all.filter(one => one.textContent).map(one => one.getBoundingClientRect().height))",
    )
    assert smallest >= 9, "px of the smallest label"
    phone.locator("button.picture").first.tap()
    assert phone.is_visible("#viewer")
    phone.wait_for_timeout(200)
    box = phone.locator("#big").bounding_box()
    phone.touchscreen.tap(box["x"] + box["width"] * 0.3, box["y"] + box["height"] * 0.72)
    assert phone.inner_text("#tip") == "car · 0.75", "there is no hovering with a finger"
    phone.tap("#close")
    assert phone.is_hidden("#tip")
    phone.locator("#chart-coverage [role=graphics-symbol][aria-roledescription=bar]").first.tap()
    assert phone.inner_text("#tip").startswith("background: ")
    KEPT.mkdir(exist_ok=True)
    phone.screenshot(path=KEPT / "report-phone.png")
    phone.close()
