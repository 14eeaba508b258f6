"""An evaluation from a labelled data set to scores: what it counts, what it does not do twice, what it survives."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from handmade import make_model, part_paths, rows_of
from PIL import Image

import pipeline
from models.masks import decode_mask_png, decode_rle
from pipeline.engine import placement
from pipeline.engine.crew import InlineCrew
from pipeline.errors import UsageError
from pipeline.learning.assessment import Assessment, EvaluateConfig, default_dest, open_split
from pipeline.learning.comparison import compare
from pipeline.learning.dataset import Dataset
from pipeline.registry import resolve
from pipeline.storage.blob import ObjectInfo, failed
from pipeline.storage.disk import DiskStorage
from pipeline.table.evaluations import read_evaluations

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "labels"))
from small_datasets import write_voc
from tiny_nuclei import write_dataset

Run = Callable[..., Assessment]


@pytest.fixture
def discs(tmp_path: Path) -> Path:
    """Six images with objects, of which two are `val`."""
    return write_dataset(tmp_path / "discs", size=48)


@pytest.fixture
def squares(tmp_path: Path) -> Path:
    """Four images with class masks, in folders; classes background, object, and a third that never occurs."""
    folder = tmp_path / "squares"
    for index in range(4):
        where = "day" if index % 2 else "night"
        pixels = np.full((32, 40 + 8 * (index % 2), 3), 20 + 40 * index, np.uint8)
        ids = np.zeros(pixels.shape[:2], np.uint8)
        pixels[8:20, 8:24], ids[8:20, 8:24] = 220, 1
        ids[0] = 255
        for name, array in (("images", pixels), ("masks", ids)):
            path = folder / name / where / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path)
    (folder / "classes.json").write_text(json.dumps(["background", "object", "nowhere"]))
    return folder


@pytest.fixture
def evaluate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`pipeline.evaluate` into `tmp_path / "dest"`, workers in this process, every image."""
    monkeypatch.setattr(placement, "LocalCrew", InlineCrew)
    monkeypatch.setattr(placement, "gpu_count", lambda: 0)
    monkeypatch.delenv("MASKMILL_REGISTRY", raising=False)

    def run(dataset: Path | str, model: Path | str, **settings: Any) -> Assessment:
        usual: dict[str, Any] = {"dest": str(tmp_path / "dest"), "split": "all", "resamples": 20, "precision": "fp32"}
        found: Assessment = pipeline.evaluate(dataset=str(dataset), model=str(model), **usual | settings)
        return found

    return run


def files_of(dest: Path) -> dict[str, int]:
    """Names and times of all that an evaluation must never touch again."""
    kept = [path for path in dest.rglob("*.parquet") if "_tmp" not in path.parts]
    return {str(path.relative_to(dest)): path.stat().st_mtime_ns for path in kept}


def test_scores_are_those_of_the_masks_in_the_table(
    evaluate: Run, squares: Path, semantic_model: Path, tmp_path: Path
) -> None:
    found = evaluate(squares, semantic_model)
    assert found.state == "done"
    assert found.scores is not None
    dataset = Dataset(squares)
    predicted, actual = [], []
    for row, item in zip(rows_of(tmp_path / "dest"), sorted(dataset.items), strict=True):
        assert row["image_uri"] == dataset.source.image_uri(item.name)
        known = dataset.class_ids(item) != 255
        predicted.append(decode_mask_png(row["mask"]["bytes"])[known])
        actual.append(dataset.class_ids(item)[known])
    ours, theirs = np.concatenate(predicted), np.concatenate(actual)
    assert found.scores.images == 4
    assert found.scores.pixel_accuracy == np.mean(ours == theirs)
    iou = ((ours == 1) & (theirs == 1)).sum() / ((ours == 1) | (theirs == 1)).sum()
    assert found.scores.iou_per_class["object"] == pytest.approx(iou, abs=1e-12)
    assert found.scores.left_out == ("nowhere",)
    assert found.only_in_dataset == ("nowhere",)
    assert (found.scores.ap, found.scores.pq) == (None, None)
    assert found.scores.intervals["miou"].low <= found.scores.miou <= found.scores.intervals["miou"].high  # type: ignore[operator]


def test_objects(evaluate: Run, discs: Path, instance_model: Path, tmp_path: Path) -> None:
    found = evaluate(discs, instance_model, split="val", renamed={"object": "disc"})
    assert found.scores is not None
    assert found.scores.images == 2
    rows = rows_of(tmp_path / "dest")
    table = read_evaluations(str(tmp_path / "dest"), model_version=found.model_version)
    assert sum(len(row["instances"]) for row in rows) == sum(map(len, table["detections"].to_pylist()))
    assert sum(one["all"] for row in table["objects"].to_pylist() for one in row) == 8
    assert found.scores.ap is not None
    assert found.scores.pq is not None
    assert {row["image_name"] for row in table.to_pylist()} == {"disc-4.png", "disc-5.png"}
    assert {row["split"] for row in table.to_pylist()} == {"val"}


def test_an_image_that_could_not_be_looked_at_before(
    evaluate: Run, squares: Path, semantic_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planned without an etag and read with one, it is done: the next time it is asked by the one that it has."""
    head, struck = DiskStorage.head, []

    def once_unable(self: DiskStorage, uri: str) -> ObjectInfo:
        if uri.endswith("images/night/0.png") and not struck:
            struck.append(uri)
            raise failed("look at", uri, "the disk is away for a moment", kind="fetch_failed")
        return head(self, uri)

    monkeypatch.setattr(DiskStorage, "head", once_unable)
    first = evaluate(squares, semantic_model)
    again = evaluate(squares, semantic_model)
    assert struck and first.state == again.state == "done"
    assert first.scores == again.scores
    assert [row["listed_etag"] or "" for row in rows_of(tmp_path / "dest")].count("") == 1


def test_a_model_that_says_the_truth(evaluate: Run, discs: Path, instance_model: Path, tmp_path: Path) -> None:
    """Its own masks as labels: every score is 1."""
    pipeline.segment(
        source=str(discs / "images"), dest=str(tmp_path / "teacher"), model=str(instance_model), engine="local",
        precision="fp32",
    )  # fmt: skip
    assert any(decode_rle(one["rle"]).any() for row in rows_of(tmp_path / "teacher") for one in row["instances"])
    found = evaluate(tmp_path / "teacher", instance_model)
    assert found.scores is not None
    assert found.scores.images == 6
    assert found.scores.miou == found.scores.pixel_accuracy == found.scores.pq == 1.0
    assert found.scores.ap == pytest.approx(1.0, abs=1e-9)


def test_the_same_call_again_only_scores(evaluate: Run, squares: Path, semantic_model: Path, tmp_path: Path) -> None:
    first = evaluate(squares, semantic_model, shard_size=2)
    before = files_of(tmp_path / "dest")
    assert sum(name.startswith("evaluations") for name in before) == 2
    again = evaluate(squares, semantic_model, shard_size=2)
    assert files_of(tmp_path / "dest") == before
    assert again.segmented.runs == []
    assert again.scores == first.scores
    assert again.evaluation_id == first.evaluation_id


def test_what_was_interrupted_goes_on(evaluate: Run, squares: Path, semantic_model: Path, tmp_path: Path) -> None:
    evaluate(squares, semantic_model, shard_size=1)
    parts = len(part_paths(tmp_path / "dest"))
    assert parts == 4

    def counted() -> int:
        return len([name for name in files_of(tmp_path / "dest") if name.startswith("evaluations")])

    had = counted()
    settings = {"renamed": {"object": "nowhere"}}
    stopped = evaluate(squares, semantic_model, should_stop=lambda: counted() >= had + 2, **settings)
    assert stopped.state == "interrupted"
    assert stopped.scores is None
    assert counted() == had + 2
    before = files_of(tmp_path / "dest")
    done = evaluate(squares, semantic_model, **settings)
    assert done.scores is not None
    assert done.scores.images == 4
    assert done.evaluation_id == stopped.evaluation_id
    assert files_of(tmp_path / "dest").items() >= before.items()
    assert counted() == had + parts


def test_other_labels_are_another_evaluation_of_the_same_masks(
    evaluate: Run, squares: Path, semantic_model: Path, tmp_path: Path
) -> None:
    first = evaluate(squares, semantic_model)
    masks = {name: at for name, at in files_of(tmp_path / "dest").items() if name.startswith("segments")}
    path = squares / "masks" / "day" / "1.png"
    Image.fromarray(np.ones_like(np.array(Image.open(path)))).save(path)
    second = evaluate(squares, semantic_model)
    assert second.evaluation_id != first.evaluation_id
    assert second.scores != first.scores
    assert {name: at for name, at in files_of(tmp_path / "dest").items() if name.startswith("segments")} == masks
    newest = read_evaluations(str(tmp_path / "dest"), model_version=second.model_version)
    assert set(newest["evaluation_id"].to_pylist()) == {second.evaluation_id}
    older = read_evaluations(
        str(tmp_path / "dest"), model_version=first.model_version, evaluation_id=first.evaluation_id
    )
    assert older.num_rows == 4
    with pytest.raises(UsageError, match="holds no evaluation of model version 000000000000"):
        read_evaluations(str(tmp_path / "dest"), model_version="000000000000")


def test_an_image_that_changed_is_segmented_again(
    evaluate: Run, squares: Path, semantic_model: Path, tmp_path: Path
) -> None:
    first = evaluate(squares, semantic_model)
    path = squares / "images" / "day" / "1.png"
    Image.fromarray(255 - np.array(Image.open(path))).save(path)
    second = evaluate(squares, semantic_model)
    assert second.segmented.planned == 1
    assert second.evaluation_id != first.evaluation_id
    assert second.scores is not None
    assert second.scores.images == 4


def test_what_cannot_be_measured_is_a_row(evaluate: Run, squares: Path, semantic_model: Path, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(squares / "masks" / "day" / "1.png")
    (squares / "images" / "night" / "0.png").write_bytes(b"no image")
    found = evaluate(squares, semantic_model)
    assert found.failed_by_kind == {"bad_label": 1, "not_an_image": 1}
    assert found.error_rate == 0.5
    assert found.scores is not None
    assert (found.scores.images, found.scores.failed) == (2, 2)
    rows = read_evaluations(str(tmp_path / "dest"), model_version=found.model_version).to_pylist()
    assert ["(9, 9)" in row["error_message"] for row in rows if row["error_kind"] == "bad_label"] == [True]


def test_pieces(evaluate: Run, squares: Path, semantic_model: Path) -> None:
    found = evaluate(squares, semantic_model, slices=("prefix", "size", "brightness > 0.3"))
    assert [(one.value, one.images) for one in found.slices["prefix"]] == [("day", 2), ("night", 2)]
    assert [one.value for one in found.slices["size"]] == ["1280", "1536"]
    whole = evaluate(squares, semantic_model, where="image_name LIKE 'day/%'")
    assert found.slices["prefix"][0].scores == whole.scores
    with pytest.raises(UsageError, match="the slice 'nonsense' cannot be evaluated"):
        evaluate(squares, semantic_model, slices=("nonsense",))
    with pytest.raises(UsageError, match="cannot be evaluated"):
        evaluate(squares, semantic_model, slices=("(SELECT 1 FROM read_csv('/etc/passwd'))",))


def test_a_condition_holds_for_slices_and_failures_too(evaluate: Run, squares: Path, semantic_model: Path) -> None:
    (squares / "images" / "night" / "0.png").write_bytes(b"no image")
    found = evaluate(squares, semantic_model, where="image_name LIKE 'day/%'", slices=("prefix",))
    assert [(one.value, one.images, one.failed) for one in found.slices["prefix"]] == [("day", 2, 0)]
    assert found.failed_by_kind == {}
    assert found.error_rate == 0
    found = evaluate(squares, semantic_model, where="image_name LIKE 'night/%'")
    assert (found.failed_by_kind, found.error_rate) == ({"not_an_image": 1}, 0.5)


def test_objects_that_nobody_told_apart_leave_the_scores_of_the_others(
    evaluate: Run, instance_model: Path, tmp_path: Path
) -> None:
    found = evaluate(write_voc(tmp_path / "voc"), instance_model, renamed={"object": "bird"})
    assert found.failed_by_kind == {"bad_label": 1}
    assert found.scores is not None
    assert (found.scores.images, found.scores.pq is None) == (3, False)


def test_what_is_refused_before_any_work(evaluate: Run, discs: Path, instance_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--map MODEL_CLASS=DATASET_CLASS"):
        evaluate(discs, instance_model)
    with pytest.raises(UsageError, match="'wheel' is no class of the data set: it has background, disc"):
        evaluate(discs, instance_model, renamed={"object": "wheel"})
    with pytest.raises(UsageError, match="no split 'test': it has train, val"):
        evaluate(discs, instance_model, split="test", renamed={"object": "disc"})
    with pytest.raises(UsageError, match="--set: "):
        evaluate(discs, instance_model, settings={"size_policy": {"kind": "no"}})
    assert not (tmp_path / "dest").exists()


def test_two_models_are_compared_on_what_they_left_in_one_dest(
    evaluate: Run, squares: Path, semantic_model: Path, other_semantic_model: Path, tmp_path: Path
) -> None:
    dest = str(tmp_path / "dest")
    one, other = (evaluate(squares, model) for model in (semantic_model, other_semantic_model))
    tables = [read_evaluations(dest, model_version=each.model_version) for each in (one, other)]
    found = compare(*tables, resamples=20)
    assert one.scores is not None
    assert other.scores is not None
    assert (found.baseline, found.candidate) == (one.scores.miou, other.scores.miou)


def test_splits_are_drawn_on_demand(squares: Path) -> None:
    def names(split: str, **settings: Any) -> set[str]:
        config = EvaluateConfig(dataset=str(squares), model="any", split=split, **settings)
        return {item.name for item in open_split(config).items}

    everything = names("all")
    halves = {"seed": 2, "fractions": {"one": 0.5, "two": 0.5}, "group_pattern": "^[a-z]+"}
    one, two = names("one", splitting=halves), names("two", splitting=halves)
    assert one | two == everything
    # By folder: a day is never divided.
    assert {name.partition("/")[0] for name in one} | {name.partition("/")[0] for name in two} == {"day", "night"}
    assert not {name.partition("/")[0] for name in one} & {name.partition("/")[0] for name in two}
    with pytest.raises(UsageError, match="has no split 'val': it has one, two"):
        names("val", splitting=halves)


def test_where_evaluations_lie(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = resolve(str(make_model(tmp_path / "m.safetensors", "semantic")))
    monkeypatch.setenv("MASKMILL_REGISTRY", "s3://models/shelf")
    assert default_dest(model) == f"s3://models/shelf/_evaluations/tiny-semantic/{model.version}"
    monkeypatch.delenv("MASKMILL_REGISTRY")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert default_dest(model) == f"file://{tmp_path}/cache/maskmill/evaluations/tiny-semantic/{model.version}"
    assert EvaluateConfig(dataset="x", model="y").split == "val"


@pytest.mark.s3
def test_on_s3(evaluate: Run, squares: Path, semantic_model: Path, s3_bucket: str, s3_client: Any) -> None:
    bucket = s3_bucket.removeprefix("s3://")
    for path in squares.rglob("*.*"):
        s3_client.put_object(Bucket=bucket, Key=f"data/{path.relative_to(squares)}", Body=path.read_bytes())
    there = evaluate(f"{s3_bucket}/data", semantic_model, dest=f"{s3_bucket}/dest")
    here = evaluate(squares, semantic_model)
    assert there.scores == here.scores
    again = evaluate(f"{s3_bucket}/data", semantic_model, dest=f"{s3_bucket}/dest")
    assert again.segmented.runs == []
    assert again.evaluation_id == there.evaluation_id
