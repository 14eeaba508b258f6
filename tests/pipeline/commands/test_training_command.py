"""`maskmill labels check` and `maskmill train` as a person and as a script meet them."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import pytest
import torch
from command_line import Maskmill
from PIL import Image

import pipeline
from pipeline.learning.dataset import Dataset
from pipeline.learning.initialization import begin
from pipeline.storage import local_path

sys.path.insert(0, str(Path(__file__).parents[1] / "learning"))
sys.path.insert(0, str(Path(__file__).parents[1] / "learning" / "labels"))
from small_datasets import SIZE, write_cityscapes, write_mask_folder, write_voc
from tiny_nuclei import write_dataset
from tiny_training import TINY, equal, tiny, weights

#: What the data sets here are trained with: as TINY.
OPTIONS = (
    "--name", "discs", "--arch", "unet", "--arg", "encoder_depth=3", "--arg", "decoder_channels=[16,8,8]",
    "--set", "augmentation.crop_px=32", "--batch-size", "2", "--precision", "fp32", "--cpu", "--threads", "1",
    "--seed", "1", "--json",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _threads_as_they_were() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def train(maskmill: Maskmill, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`train(DATASET, *more options)` into the registry `models`; gives the object that it prints."""

    def run(dataset: Path, *options: str) -> dict[str, Any]:
        said = maskmill("train", dataset, "--registry", tmp_path / "models", *OPTIONS, *options)
        assert said.status == 0, said.err
        assert said.err == ""
        outcome: dict[str, Any] = json.loads(said.out)
        return outcome

    return run


@pytest.fixture(scope="module")
def discs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "discs", images=4, size=48)


# ── labels check ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_whole_data_set_is_status_0(maskmill: Maskmill, tmp_path: Path) -> None:
    folder = write_mask_folder(tmp_path)
    said = maskmill("labels", "check", folder)
    assert (said.status, said.err) == (0, "")
    lines = said.out.splitlines()
    assert lines[0] == f"{folder} (masks): 4 images; train 2, val 2"
    assert lines[-1] == "0 errors, 0 warnings"
    assert [line.split()[0] for line in lines[2:6]] == ["class", "ground", "cart", "tree"]


def test_a_broken_data_set_is_status_1_and_all_is_said(maskmill: Maskmill, tmp_path: Path) -> None:
    folder = write_mask_folder(tmp_path)
    (folder / "masks" / "1.png").unlink()
    Image.new("L", (SIZE[1], SIZE[0]), 9).save(folder / "masks" / "2.png")
    said = maskmill("labels", "check", folder)
    assert said.status == 1
    assert "error   missing_label: 1.png:" in said.out
    assert "error   unknown_class: 2.png: id 9" in said.out
    assert said.out.endswith("2 errors, 0 warnings\n")
    told = maskmill("labels", "check", folder, "--json")
    assert told.status == 1
    report = json.loads(told.out)
    assert [(one["kind"], one["severity"], one["name"]) for one in report["problems"]] == [
        ("missing_label", "error", "1.png"), ("unknown_class", "error", "2.png"),
    ]  # fmt: skip
    assert [one["name"] for one in report["classes"]] == ["ground", "cart", "tree"]


def test_no_data_set_is_status_2(maskmill: Maskmill, tmp_path: Path) -> None:
    said = maskmill("labels", "check", tmp_path / "nothing")
    assert said.status == 2
    assert said.out == ""
    assert "is not a data set" in said.err


@pytest.mark.parametrize(
    ("spoilt", "found"),
    [
        ("masks/1.png", "missing_label: 1.png"),
        ("images/1.png", "missing_image: 1.png"),
        ("classes.json", "unknown_class: 1.png"),
    ],
)
def test_training_refuses_with_that_report(maskmill: Maskmill, tmp_path: Path, spoilt: str, found: str) -> None:
    folder = write_mask_folder(tmp_path / "data")
    if spoilt == "classes.json":
        (folder / spoilt).write_text('["ground", "a", "b", "cart"]')
    else:
        (folder / spoilt).unlink()
    command = ["train", folder, "--registry", tmp_path / "models", "--steps", "1", *OPTIONS]
    said = maskmill(*command)
    assert said.status == 2
    assert said.out == ""
    assert f"error   {found}" in said.err
    assert "are broken (" in said.err
    assert not (tmp_path / "models").exists()


def test_a_split_without_images_is_told_before_any_work(maskmill: Maskmill, tmp_path: Path, discs: Path) -> None:
    folder = shutil.copytree(discs, tmp_path / "data")
    names = json.loads((folder / "splits.json").read_text())
    (folder / "splits.json").write_text(json.dumps(names | {"val": []}))
    said = maskmill("train", folder, "--registry", tmp_path / "models", "--steps", "1", *OPTIONS)
    assert said.status == 2
    assert "split 'val' of" in said.err and "has no images: name another, or measure nothing" in said.err
    assert not (tmp_path / "models").exists()
    assert maskmill("labels", "check", folder).status == 1
    measured_nowhere = ("--val-split", "", "--steps", "1", *OPTIONS)
    assert maskmill("train", folder, "--registry", tmp_path / "models", *measured_nowhere).status == 0


# ── train ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_sum_of_losses(train: Callable[..., dict[str, Any]], discs: Path) -> None:
    terms = [{"kind": "lovasz"}, {"kind": "focal", "weight": 0.5, "gamma": 1.5}, {"kind": "dice", "weight": 2}]
    outcome = train(discs, "--steps", "1", "--val-split", "", "--set", f"loss.terms={json.dumps(terms)}")
    trace = f"{local_path(outcome['folder'])}/trace/*.parquet"
    (row,) = duckdb.sql(f"SELECT loss, loss_lovasz, loss_focal, loss_dice FROM '{trace}'").fetchall()
    assert row[0] == pytest.approx(sum(row[1:]), rel=1e-5)
    assert min(row) > 0


def test_a_frozen_backbone_stays_as_it_is(train: Callable[..., dict[str, Any]], discs: Path, tmp_path: Path) -> None:
    """Always, or for so many epochs (of one step)."""
    first = begin(tiny(discs, tmp_path), Dataset(discs, "train")).weights
    learnt = {}
    for freeze, epochs in (("backbone", "2"), ("1", "1"), ("1", "2")):
        options = ("--epoch-images", "2", "--val-split", "", "--ema-decay", "0")
        outcome = train(discs, "--freeze", freeze, "--epochs", epochs, *options)
        assert outcome["steps"] == int(epochs)
        now = weights(outcome["uri"])
        changed = {name.partition(".")[0] for name in now if not torch.equal(now[name], first[name])}
        learnt[freeze, epochs] = changed
    assert learnt["backbone", "2"] == learnt["1", "1"] == {"decoder", "segmentation_head"}
    assert learnt["1", "2"] == {"encoder", "decoder", "segmentation_head"}


def test_patience_stops_early(train: Callable[..., dict[str, Any]], discs: Path) -> None:
    outcome = train(discs, "--epochs", "9", "--patience", "1", "--learning-rate", "1e-9")
    assert outcome["epochs"] < 5


def test_options_and_a_recipe_ask_for_the_same(
    train: Callable[..., dict[str, Any]], discs: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(TINY | {"steps": 50, "val_split": None}))
    told = train(discs, "--steps", "1", "--val-split", "")
    again = train(discs, "--recipe", str(recipe), "--steps", "1")
    assert (again["state"], again["version"]) == ("already", told["version"])
    assert equal(weights(again["uri"]), weights(told["uri"]))


def test_a_preview_that_cannot_be_written_is_a_sentence(maskmill: Maskmill, discs: Path, tmp_path: Path) -> None:
    command = ("train", discs, *OPTIONS[:-1], "--preview")
    said = maskmill(*command, tmp_path / "seen.png")
    assert (said.status, said.err) == (0, "") and Image.open(tmp_path / "seen.png").format == "PNG"
    for path, why in (("/proc/p.png", "No such file or directory"), (tmp_path, "Is a directory")):
        said = maskmill(*command, path)
        assert (said.status, said.err) == (2, f"error: --preview {path} cannot be written: {why}\n")


def test_backbone_weights_are_no_address(maskmill: Maskmill, discs: Path, tmp_path: Path) -> None:
    address = "http://me:Sup3rS3cretThing@127.0.0.1:1/r.pth"
    command = ("train", discs, "--registry", tmp_path / "models", "--steps", "1", *OPTIONS)
    for option in (("--backbone-weights", address), ("--set", f"backbone_weights={address}")):
        said = maskmill(*command, *option)
        assert said.status == 2 and "backbone_weights is an address: give" in said.err and said.err.count("\n") == 1
        assert "Sup3rS3cretThing" not in said.out + said.err


@pytest.mark.parametrize(("write", "classes"), [(write_voc, 21), (write_cityscapes, 19)])
def test_published_layouts(
    maskmill: Maskmill,
    train: Callable[..., dict[str, Any]],
    tmp_path: Path,
    write: Callable[[Path], Path],
    classes: int,
) -> None:
    folder = write(tmp_path / "data")
    said = maskmill("labels", "check", folder)
    assert said.status == 0, said.out
    outcome = train(folder, "--steps", "1", "--task", "semantic")
    assert outcome["metrics"]["val"]["fp32"].keys() >= {"mean_iou"}
    assert weights(outcome["uri"])["segmentation_head.0.bias"].shape == (classes,)


def test_the_masks_of_a_model_teach_another(  # noqa: PLR0917 - fixtures
    maskmill: Maskmill, train: Callable[..., dict[str, Any]], tmp_path: Path, image_folder: Callable[..., Path],
    semantic_model: Path, instance_model: Path,
) -> None:  # fmt: skip
    photos, dest = image_folder(6), tmp_path / "dest"
    settings: dict[str, Any] = {"precision": "fp32", "threads": 1, "report": False}
    for model in (semantic_model, instance_model):
        pipeline.segment(source=str(photos), dest=str(dest), model=str(model), **settings)
    names = [f"file://{path}" for path in sorted(photos.iterdir())]
    (dest / "splits.json").write_text(json.dumps({"train": names[:4], "val": names[4:]}))
    said = maskmill("labels", "check", dest)
    assert said.status == 2
    assert "holds masks of tiny-instance, tiny-semantic: name one" in said.err
    teacher = ("--labels-of", "tiny-semantic")
    said = maskmill("labels", "check", dest, *teacher, "--json")
    assert said.status == 0, said.out
    report = json.loads(said.out)
    assert (report["layout"], report["images_by_split"]) == ("segments", {"train": 4, "val": 2})
    outcome = train(dest, "--steps", "1", *teacher)
    assert outcome["metrics"]["val"]["fp32"].keys() >= {"mean_iou"}


def test_splits_are_drawn_on_demand(maskmill: Maskmill, tmp_path: Path) -> None:
    folder = write_mask_folder(tmp_path, count=4)

    def splits(*options: str) -> dict[str, int]:
        said = maskmill("labels", "check", folder, "--json", "--layout", "masks", *options)
        assert said.status == 0, said.out
        counts: dict[str, int] = json.loads(said.out)["images_by_split"]
        return counts

    assert splits() == {"train": 2, "val": 2}
    halves = ("--draw-splits", "fractions.a=0.5", "--draw-splits", "fractions.b=0.5", "--draw-splits", "seed=3")
    assert splits(*halves).keys() == {"a", "b"}
    one_group = splits(*halves, "--draw-splits", "group_pattern=png")
    assert sorted(one_group.values()) == [0, 4]
    for wrong, words in (
        ("fractions.a=0.5", "fractions must be at least 0 and sum to 1"),
        ("group_pattern=(", "is not a regular expression"),
        ("seed", "is not KEY=VALUE"),
    ):
        said = maskmill("labels", "check", folder, "--draw-splits", wrong)
        assert said.status == 2
        assert words in said.err
