"""Every layout through the one interface."""

from __future__ import annotations

import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

import pipeline
from models.masks import decode_rle
from pipeline.engine import placement
from pipeline.engine.crew import InlineCrew
from pipeline.errors import UsageError
from pipeline.learning.dataset import IGNORE_ID, Dataset, Splitting
from pipeline.storage import open_storage

sys.path.insert(0, str(Path(__file__).parent))
from small_datasets import (
    SIZE,
    picture,
    save_json,
    squares,
    write_cityscapes,
    write_coco,
    write_mask_folder,
    write_published_coco,
    write_voc,
)


def test_a_folder_of_masks(tmp_path: Path) -> None:
    dataset = Dataset(write_mask_folder(tmp_path), "train")
    assert dataset.class_names == ("ground", "cart", "tree")
    assert [item[:3] for item in dataset.items] == [("0.png", *SIZE), ("1.png", *SIZE)]
    item = dataset.items[1]
    class_ids = dataset.class_ids(item)
    assert np.array_equal(dataset.image(item), picture(1))
    assert class_ids.dtype == np.uint8
    assert np.array_equal(class_ids == 1, squares(1)[0])
    assert np.array_equal(class_ids == 2, squares(1)[1])
    assert np.array_equal(dataset.ignored(item), class_ids == IGNORE_ID)
    assert dataset.ignored(item).sum() == 2 * SIZE[0]
    assert dataset.background_id is None
    with pytest.raises(UsageError, match="classes only"):
        dataset.instance_labels(item)
    with pytest.raises(UsageError, match="classes only"):
        dataset.objects(item)


def test_ids_that_are_no_class_are_refused(tmp_path: Path) -> None:
    folder = write_mask_folder(tmp_path)
    Image.fromarray(np.full(SIZE, 4, dtype=np.uint8)).save(folder / "masks" / "0.png")
    dataset = Dataset(folder, "train")
    with pytest.raises(UsageError, match=r"label of 0\.png has ids that are no class: \[4\]"):
        dataset.class_ids(dataset.items[0])


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([], "1 to 255 classes"),
        (["a", "a"], "different ids and names"),
        ([{"name": "a"}], "needs an id and a name"),
        ({"classes": [{"id": 255, "name": "a"}]}, "both a class and the ignore_index"),
        ({"classes": ["a"], "background_id": 3}, "background_id 3 is not among"),
    ],
)
def test_class_lists_that_are_none(tmp_path: Path, classes: object, message: str) -> None:
    folder = write_mask_folder(tmp_path)
    save_json(folder / "classes.json", classes)
    with pytest.raises(UsageError, match=message):
        Dataset(folder)


def test_class_names_alone_and_background_by_name(tmp_path: Path) -> None:
    folder = write_mask_folder(tmp_path)
    save_json(folder / "classes.json", [*"ab", "background", *"cdefg"])
    dataset = Dataset(folder, "val")
    assert dataset.background_id == 2
    assert set(np.unique(dataset.class_ids(dataset.items[0]))) == {0, 3, 7, IGNORE_ID}


def test_a_colour_mask_is_no_mask(tmp_path: Path) -> None:
    folder = write_mask_folder(tmp_path)
    Image.fromarray(picture(0)).save(folder / "masks" / "0.png")
    dataset = Dataset(folder, "train")
    with pytest.raises(UsageError, match=r"label 0\.png has mode RGB"):
        dataset.class_ids(dataset.items[0])


def test_coco_with_crowds(tmp_path: Path) -> None:
    dataset = Dataset(write_coco(tmp_path))
    assert dataset.class_names == ("background", "dog", "sheep")
    item = dataset.items[2]
    crowd, dog = dataset.objects(item)
    assert (crowd.class_id, crowd.is_crowd) == (2, True)
    assert (dog.class_id, dog.is_crowd, dog.area) == (1, False, 36.5)
    assert np.array_equal(decode_rle(dog.rle), squares(2)[0])
    around = decode_rle(crowd.rle)
    assert np.array_equal(dataset.instance_labels(item), squares(2)[0].astype(np.int32))
    # The object wins over the crowd, though the crowd overlaps it.
    assert (around & squares(2)[0]).any()
    assert np.array_equal(dataset.ignored(item), around & ~squares(2)[0])
    assert np.array_equal(dataset.class_ids(item) == IGNORE_ID, dataset.ignored(item))
    assert np.array_equal(dataset.class_ids(item) == 1, squares(2)[0])


def test_coco_as_it_is_published(tmp_path: Path) -> None:
    train, val = (Dataset(write_published_coco(tmp_path / split), split) for split in ("train2017", "val2017"))
    assert [item.name for item in train.items] == ["0.png", "1.png", "2.png"]
    assert np.array_equal(val.image(val.items[0]), picture(3))


def test_voc(tmp_path: Path) -> None:
    dataset = Dataset(write_voc(tmp_path), "train")
    assert sorted(dataset.source.splits) == ["train", "val"]
    assert [item.name for item in dataset.items] == ["2007_0.jpg", "2007_1.jpg", "2007_2.jpg"]
    item = dataset.items[1]
    assert dataset.image(item).shape == (*SIZE, 3)
    bird, person = dataset.objects(item)
    assert (dataset.class_names[bird.class_id], dataset.class_names[person.class_id]) == ("bird", "person")
    assert np.array_equal(decode_rle(person.rle), squares(1)[1])
    assert person.area == squares(1)[1].sum()
    assert np.array_equal(dataset.class_ids(item) == 15, squares(1)[1])
    assert dataset.ignored(item).sum() == 2 * SIZE[0]
    without_objects = Dataset(tmp_path, "val")
    with pytest.raises(UsageError, match="classes only"):
        without_objects.objects(without_objects.items[0])


def test_cityscapes(tmp_path: Path) -> None:
    dataset = Dataset(write_cityscapes(tmp_path), "train")
    assert [item.stratum for item in dataset.items] == ["bonn", "ulm"]
    item = dataset.items[1]
    assert item.name == "train/ulm/ulm_000000_000010_leftImg8bit.png"
    assert np.array_equal(dataset.image(item), picture(0))
    names = {dataset.class_names[one.class_id]: one for one in dataset.objects(item)}
    assert names["person"].is_crowd
    assert not names["car"].is_crowd
    assert np.array_equal(decode_rle(names["car"].rle), squares(0)[0])
    class_ids = dataset.class_ids(item)
    assert np.array_equal(class_ids == dataset.class_names.index("person"), squares(0)[1])
    assert (class_ids == IGNORE_ID).sum() == 2 * SIZE[0]
    # Persons who run together are of a known class, but no object to be found.
    assert np.array_equal(dataset.ignored(item), (class_ids == IGNORE_ID) | squares(0)[1])


@pytest.mark.parametrize("task", ["semantic", "instance"])
def test_the_masks_of_a_run(
    tmp_path: Path,
    image_folder: Callable[..., Path],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    task: str,
) -> None:
    monkeypatch.setattr(placement, "LocalCrew", InlineCrew)
    monkeypatch.setattr(placement, "gpu_count", lambda: 0)
    model = request.getfixturevalue(f"{task}_model")
    photos, dest = image_folder(12), tmp_path / "dest"
    pipeline.segment(source=str(photos), dest=str(dest), model=str(model), precision="fp32", threads=1)
    dataset = Dataset(dest)
    assert dataset.class_names == ("background", "object")
    assert dataset.background_id == 0
    rows = {
        row[0]: row[1:]
        for row in pipeline.connect(str(dest)).sql("SELECT image_uri, width, height, instances FROM images").fetchall()
    }
    assert len(dataset) == 12
    for item in dataset.items:
        width, height, instances = rows[item.name]
        assert dataset.image(item).shape == (height, width, 3)
        assert dataset.class_ids(item).shape == (height, width)
        assert dataset.has_objects == (task == "instance")
        if task == "instance":
            assert [one.area for one in dataset.objects(item)] == [one["area"] for one in instances]
            assert dataset.instance_labels(item).max(initial=0) == len(instances)
    assert len(Dataset(dest, "train")) + len(Dataset(dest, "val")) == 12
    with pytest.raises(UsageError, match=f"holds masks of tiny-{task}: name one"):
        Dataset(dest, model="other")
    assert dataset.digest() == Dataset(dest).digest()
    changed = Path(dataset.items[0].name.removeprefix("file://"))
    Image.fromarray(picture(7)).save(changed)
    with pytest.raises(UsageError, match="has changed since its mask was made"):
        dataset.image(dataset.items[0])


@pytest.mark.parametrize("write", [write_mask_folder, write_coco, write_voc, write_cityscapes])
def test_anywhere_that_fsspec_reaches(tmp_path: Path, memory_folder: str, write: Callable[[Path], Path]) -> None:
    folder = write(tmp_path / "data")
    files = fsspec.filesystem("memory")
    for path in folder.rglob("*"):
        if path.is_file():
            files.pipe_file(f"/place/data/{path.relative_to(folder)}", path.read_bytes())
    local, remote = Dataset(folder, "train"), Dataset(f"{memory_folder}/data", "train")
    shutil.rmtree(folder)
    assert remote.items == local.items
    again = pickle.loads(pickle.dumps(remote))
    assert remote.digest() == again.digest()
    assert again.image(again.items[0]).shape == (*SIZE, 3)
    assert again.class_ids(again.items[0]).shape == SIZE


@pytest.mark.s3
def test_in_a_bucket(tmp_path: Path, s3_bucket: str) -> None:
    folder = write_mask_folder(tmp_path)
    storage = open_storage(s3_bucket)
    for path in folder.rglob("*"):
        if path.is_file():
            storage.put(f"{s3_bucket}/data/{path.relative_to(folder)}", path.read_bytes())
    local, remote = Dataset(folder, "val"), Dataset(f"{s3_bucket}/data", "val")
    assert remote.items == local.items
    assert remote.digest() == local.digest()
    assert np.array_equal(remote.class_ids(remote.items[0]), local.class_ids(local.items[0]))


def test_digest_sees_images_and_labels(tmp_path: Path) -> None:
    folder = write_mask_folder(tmp_path)
    digests = [Dataset(folder, "train").digest(), Dataset(folder, "val").digest()]
    Image.fromarray(picture(5)).save(folder / "images" / "0.png")
    digests.append(Dataset(folder, "train").digest())
    Image.fromarray(np.zeros(SIZE, dtype=np.uint8)).save(folder / "masks" / "0.png")
    digests.append(Dataset(folder, "train").digest())
    assert len(set(digests)) == 4


def test_two_splits_share_what_was_opened(tmp_path: Path) -> None:
    folder = write_mask_folder(tmp_path)
    train = Dataset(folder, "train")
    assert Dataset(train.source, "val").source is train.source
    assert [item.name for item in Dataset(train.source).items] == ["0.png", "1.png", "2.png", "3.png"]


def test_layouts_can_be_named(tmp_path: Path) -> None:
    folder = write_mask_folder(write_coco(tmp_path))
    assert Dataset(folder, layout="masks").class_names == ("ground", "cart", "tree")
    assert Dataset(folder).class_names == ("background", "dog", "sheep")
    with pytest.raises(UsageError, match="no layout 'yolo': give one of coco, masks"):
        Dataset(folder, layout="yolo")  # type: ignore[arg-type]


def test_drawn_splits_win_over_written_ones_where_asked_for(tmp_path: Path) -> None:
    folder = write_mask_folder(tmp_path, count=4)
    drawn = Splitting(seed=1, fractions={"all": 1.0})
    assert len(Dataset(folder, "all", splitting=drawn)) == 4
