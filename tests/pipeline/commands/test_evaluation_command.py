"""`maskmill evaluate` as a person and as a script meet it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from command_line import Maskmill

import pipeline

sys.path.insert(0, str(Path(__file__).parents[1] / "learning"))
from tiny_nuclei import write_dataset


def test_a_table_a_page_and_one_object(maskmill: Maskmill, tmp_path: Path, instance_model: Path) -> None:
    folder = write_dataset(tmp_path / "discs", images=4, size=48)
    registry = tmp_path / "models"
    pipeline.push_model(str(instance_model), str(registry))
    command = ["evaluate", folder, "--model", "tiny-instance@challenger", "--registry", registry]
    command += ["--out", tmp_path / "dest", "--resamples", "20"]
    command += ["--map", "object=disc", "--slice", "stratum"]
    said = maskmill(*command, "--page", tmp_path / "page.html")
    assert said.status == 0
    assert "on val of file://" in said.out
    assert "by stratum" in said.out
    for words in ("mIoU", "AP75", "PQ", "95% interval"):
        assert words in said.out
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    again = maskmill(*command, "--json", "--no-page")
    assert again.status == 0
    body = json.loads(again.out)
    wanted = {
        "images", "miou", "iou_per_class", "dice_per_class", "pixel_accuracy", "ap", "ap50", "ap75", "pq", "intervals",
        "state", "dataset", "split", "model_version", "evaluation_id", "slices", "pages", "segmented",
    }  # fmt: skip
    assert body.keys() >= wanted
    assert body["images"] == 2
    assert body["intervals"]["miou"].keys() == {"low", "high"}
    assert (body["pages"], body["segmented"]["runs"]) == ([], [])
    assert f"mIoU                    {body['miou']:.4f}" in said.out
    some = maskmill(*command, "--where", "stratum = 'dark'", "--no-page")
    assert "Only images for which stratum = 'dark'." in some.out
    assert ": 1 image\n" in some.out


def test_statuses(maskmill: Maskmill, tmp_path: Path, semantic_model: Path) -> None:
    folder = write_dataset(tmp_path / "discs", images=4, size=48)
    (folder / "images" / "disc-3.png").write_bytes(b"")
    command = ["evaluate", folder, "--model", semantic_model, "--out", tmp_path / "dest", "--no-page"]
    said = maskmill(*command)
    assert said.status == 2
    assert "--map MODEL_CLASS=DATASET_CLASS" in said.err
    assert maskmill(*command, "--map", "object").status == 2
    assert maskmill(*command, "--split", "none").status == 2
    said = maskmill(*command, "--map", "object=disc", "--resamples", "0")
    assert said.status == 3
    assert "1 image failed, and no score speaks of it: 1 empty" in said.out
    said = maskmill(*command, "--map", "object=disc", "--resamples", "0", "--max-error-rate", "0.5", "--json")
    assert said.status == 0
    body = json.loads(said.out)
    assert (body["images"], body["failed"], body["ap"], body["pq"], body["intervals"]) == (1, 1, None, None, {})
