"""The page: what is on it, whatever things are called."""

from __future__ import annotations

import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import pipeline
from pipeline.engine import placement
from pipeline.engine.crew import InlineCrew
from pipeline.errors import UsageError
from pipeline.learning.assessment import Assessment, EvaluateConfig
from pipeline.learning.evaluation_page import visible, write_page

sys.path.insert(0, str(Path(__file__).parent))
from tiny_nuclei import write_dataset

HOSTILE = '"><script>alert(1)<x>'


class Seen(HTMLParser):
    """Tags, text and attributes of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.values: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.values += [value or "" for _, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "LocalCrew", InlineCrew)
    monkeypatch.setattr(placement, "gpu_count", lambda: 0)


def evaluated(folder: Path, model: Path, **settings: Any) -> tuple[EvaluateConfig, Assessment]:
    config = EvaluateConfig(
        dataset=str(folder), model=str(model), dest=str(folder / "dest"), split="all", resamples=20, **settings
    )
    return config, pipeline.evaluate(config)


def test_names_are_text(tmp_path: Path, instance_model: Path) -> None:
    folder = write_dataset(tmp_path / "discs", images=3, size=48)
    content = json.loads((folder / "annotations.json").read_text())
    content["categories"].append({"id": 2, "name": HOSTILE})
    for entry in content["images"]:
        name = f"{HOSTILE}\u202e\x1b{entry['file_name']}"
        (folder / "images" / entry["file_name"]).rename(folder / "images" / name)
        entry["file_name"] = name
    (folder / "annotations.json").write_text(json.dumps(content))
    (folder / "splits.json").unlink()
    config, found = evaluated(folder, instance_model, renamed={"object": "disc"}, slices=("image_name",))
    seen = Seen(Path(write_page(config, found)[0].removeprefix("file://")).read_text())
    assert "script" not in seen.tags
    assert "x" not in seen.tags
    assert seen.text.count(f"{HOSTILE}\\u202e\\x1bdisc-") == 6  # a row and a caption each
    assert HOSTILE in seen.text.partition("By class")[0]  # left out of the means
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in seen.values
    assert seen.tags.count("img") == 6
    assert not any(re.match(r"https?:|//", value) for value in seen.values)


def test_classes_confusion_and_the_worst_first(tmp_path: Path, semantic_model: Path) -> None:
    folder = tmp_path / "squares"
    for index, share in enumerate((0, 16, 32)):
        ids = np.zeros((32, 32), np.uint8)
        ids[:share] = 1
        for name, array in (("images", np.full((32, 32, 3), 99, np.uint8)), ("masks", ids)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(folder / name / f"{index}.png")
    (folder / "classes.json").write_text(json.dumps(["background", "object"]))
    config, found = evaluated(folder, semantic_model)
    out = tmp_path / "mine.html"
    uris = write_page(config, found, out)
    assert [Path(uri.removeprefix("file://")).read_text() for uri in uris] == [out.read_text()] * 2
    seen = Seen(out.read_text())
    assert found.scores is not None
    assert f"{found.scores.miou:.4f}" in seen.text
    scores = [float(text) for text in re.findall(r"(\d\.\d{4}) · \d\.png", seen.text)]
    assert scores == sorted(scores)
    assert len(scores) == 3
    pixels = [
        int(number.replace(",", "")) for value in seen.values for number in re.findall(r": ([\d,]+) pixels", value)
    ]
    assert sum(pixels) == 3 * 32 * 32


def test_an_image_that_is_gone_says_so(tmp_path: Path, instance_model: Path) -> None:
    folder = write_dataset(tmp_path / "discs", images=3, size=48)
    model = Path(shutil.copy(instance_model, tmp_path / "model.safetensors"))
    config, found = evaluated(folder, model, renamed={"object": "disc"})
    # The page is of the model that was evaluated, whatever its name means by now.
    model.unlink()
    (folder / "images" / "disc-1.png").unlink()
    page = Path(write_page(config, found)[0].removeprefix("file://")).read_text()
    assert page.count("it cannot be shown now") == 1
    assert page.count("data:image/jpeg") == 4


def test_what_cannot_be_written_is_refused(tmp_path: Path, instance_model: Path) -> None:
    folder = write_dataset(tmp_path / "discs", images=3, size=48)
    config, found = evaluated(folder, instance_model, renamed={"object": "disc"})
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        write_page(config, found, tmp_path / "file" / "page.html")
    with pytest.raises(UsageError, match="not finished"):
        write_page(config, found.model_copy(update={"scores": None}))


def test_visible() -> None:
    assert visible("a\u202eb\x1b[2J c\udc80") == "a\\u202eb\\x1b[2J c\\udc80"
