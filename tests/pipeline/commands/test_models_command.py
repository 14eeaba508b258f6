"""`maskmill models` as a person and as a script meet it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from command_line import Maskmill
from handmade import CREATED_AT
from harness import write_images, write_tiny_model

from models.file import model_version
from pipeline.table.evaluations import evaluation_folder

sys.path.insert(0, str(Path(__file__).parents[1] / "learning"))
from drawn_evaluations import semantic_rows, table_of


@pytest.fixture(autouse=True)
def a_wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("files")
    return [write_tiny_model(folder / f"{seed}.safetensors", name="street", seed=seed) for seed in range(2)]


def test_a_model_s_way_to_champion_and_back(
    maskmill: Maskmill, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = (model_version(path.read_bytes()) for path in files)
    shelf = tmp_path / "models"
    said = maskmill("models", "push", files[0])
    assert (said.status, said.out) == (2, "") and "give --registry URL, or set MASKMILL_REGISTRY" in said.err
    said = maskmill("models", "push", files[0], "--registry", shelf)
    assert (said.status, said.err) == (0, "") and said.out.startswith(f"street@{old} (challenger): file://")
    monkeypatch.setenv("MASKMILL_REGISTRY", str(shelf))
    assert maskmill("models", "promote", "street").out == f"street@{old} is the champion now: street had no champion\n"
    assert ", there already: " in maskmill("models", "push", files[0]).out
    assert json.loads(maskmill("models", "push", files[1], "--json").out)["aliases"] == ["challenger"]
    listed = json.loads(maskmill("models", "list", "--json").out)
    assert {(line["name"], line["version"]): line["aliases"] for line in listed if line["name"] == "street"} == {
        ("street", old): ["champion"], ("street", new): ["challenger"],
    }  # fmt: skip
    assert json.loads(maskmill("models", "show", "street@challenger").out)["version"] == new
    said = maskmill("models", "promote", "street")
    assert (said.status, said.out) == (2, "") and "give --dataset D" in said.err
    dest = tmp_path / "evaluated"
    for version, error in ((old, 0.2), (new, 0.3)):
        rows = [
            row | {"model_version": version, "evaluation_id": "abc", "evaluated_at": CREATED_AT}
            for row in semantic_rows(error)
        ]
        folder = dest / evaluation_folder("street", version, "abc")
        folder.mkdir(parents=True)
        pq.write_table(table_of(rows), folder / "x.parquet")
    said = maskmill("models", "promote", "street", "--evaluations", dest)
    assert said.status == 5
    assert said.out.startswith(f"street@{new} is not promoted: miou 0.") and "\ndog " in said.out
    said = maskmill("models", "promote", "street", "--evaluations", dest, "--json", "--force", "--reason", "licence")
    assert said.status == 0
    body = json.loads(said.out)
    assert (body["state"], body["champion"], body["forced"]) == ("promoted", new, True)
    assert body["comparison"]["images"] == 12
    assert maskmill("models", "promote", f"street@{new}").out.startswith(f"street@{new} stays the champion: ")
    assert maskmill("models", "rollback", "street", "--reason", "[red]night[/red]\x1b[2J").out == (
        f"street@{old} is the champion again, instead of {new}\n"
    )
    assert "nothing to go back to" in maskmill("models", "rollback", "street").err
    assert maskmill("models", "alias", f"street@{new}", "canary").out == f"canary is {new}\n"
    assert maskmill("models", "alias", "street@canary", "canary").out == "canary is street@canary already\n"
    told = json.loads(maskmill("models", "history", "street", "--json").out)
    assert [entry["action"] for entry in told] == ["push", "promote", "push", "keep", "promote", "rollback", "alias"]
    assert told[3]["decision"]["comparison"]["images"] == 12
    shown = maskmill("models", "history", "street").out
    assert "95.0% is asked for" in shown and "[red]night[/red]\\x1b[2J" in shown and "\x1b" not in shown
    assert maskmill("models", "history", "nuclei-unet").out.count("\n") == 1


def test_segment_takes_the_champion_of_a_registry(maskmill: Maskmill, files: list[Path], tmp_path: Path) -> None:
    shelf, out = tmp_path / "models", tmp_path / "out"
    for path in files:
        maskmill("models", "push", path, "--registry", shelf)
    first = model_version(files[0].read_bytes())
    maskmill("models", "promote", f"street@{first}", "--registry", shelf)
    images = write_images(tmp_path / "images", 2)
    common = ("segment", images, out, "--model", "street@champion", "--engine", "local", "--json")
    said = maskmill(*common, "--registry", shelf)
    assert said.status == 0, said.err
    assert json.loads(said.out)["model_version"] == first
    said = maskmill(*common)
    assert said.status == 2 and "no model is called 'street'" in said.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("promote", "street@"), "is neither a model name"),
        (("promote", "nobody"), "no model is called 'nobody'"),
        (("promote", "street", "--confidence", "2"), "--confidence is 2.0"),
        (("promote", "street", "--metric", "f2"), "--metric is 'f2'"),
        (("rollback", "street@champion"), "give street, not street@champion"),
        (("history", "nobody"), "no model is called 'nobody'"),
        (("alias", "street@challenger", "champion"), "given by a promotion"),
        (("alias", "street@challenger", "Top!"), "'Top!' is no alias"),
        (("push", "nothing.safetensors"), "cannot be read"),
    ],
)
def test_wrong_usage_is_one_sentence(
    maskmill: Maskmill, files: list[Path], tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    maskmill("models", "push", files[0], "--registry", tmp_path / "models")
    said = maskmill("models", *arguments, "--registry", tmp_path / "models")
    assert (said.status, said.out) == (2, "")
    assert words in said.err and said.err.count("\n") == 1
