"""`maskmill export` as a person meets it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from pictured_table import PicturedTable

from pipeline import cli


def said(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["maskmill", "export", *map(str, arguments)])
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main()
    heard = capfd.readouterr()
    return int(ended.value.code or 0), heard.out, heard.err


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    PicturedTable(tmp_path).night(4, 3)
    monkeypatch.chdir(tmp_path)
    status, out, err = said(monkeypatch, capfd, "dest", "--format", "png", "--out", "[b] it's", "--images")
    assert (status, out, err) == (0, "[b] it's has 3 images, 3 masks, left out: 2 error, 1 gone\n", "")
    assert len(list(Path("[b] it's", "masks").iterdir())) == len(list(Path("[b] it's", "images").iterdir())) == 3
    status, out, _ = said(monkeypatch, capfd, "dest", "--format", "png", "--out", "[b] it's", "--images")
    assert status == 0 and out.startswith("nothing to do: [b] it's has 3 images")
    asked = (
        "dest",
        "--format",
        "coco",
        "--out",
        "two",
        "--where",
        "image_uri LIKE '%0-003%' OR image_uri LIKE '%-002%'",
    )
    status, out, _ = said(monkeypatch, capfd, *asked, "--json")
    body = json.loads(out)
    assert (status, body["images"], body["skipped"], body["was_there"]) == (0, 2, {}, False)
    assert body["out"] == f"file://{tmp_path}/two"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--where", "nonsense = 1"), "nonsense"),
        (("--where", "true; true"), "without a semicolon"),
        (("--format", "voc"), "--format is 'voc'"),
        (("dest2",), "unexpected extra argument"),
    ],
)
def test_wrong_usage_is_one_sentence(
    arguments: tuple[str, ...], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    PicturedTable(tmp_path).night(1, 0)
    monkeypatch.chdir(tmp_path)
    status, out, err = said(monkeypatch, capfd, "dest", "--format", "png", "--out", "new", *arguments)
    assert (status, out) == (2, "") and err.startswith("error: ") and words in err
    assert not Path("new").exists()


def test_a_table_that_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    status, _, err = said(monkeypatch, capfd, tmp_path, "--format", "png", "--out", tmp_path / "new")
    assert status == 2 and "holds no Maskmill table" in err
