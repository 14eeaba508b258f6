from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import UsageError
from pipeline.learning.dataset import Dataset

sys.path.insert(0, str(Path(__file__).parent))
from tiny_nuclei import write_dataset, write_json


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "discs")


def test_reads_a_split(folder: Path) -> None:
    dataset = Dataset(folder, "train")
    assert [item.name for item in dataset.items] == ["disc-0.png", "disc-1.png", "disc-2.png", "disc-3.png"]
    assert [item.stratum for item in dataset.items] == ["dark", "light", "light", "dark"]
    assert dataset.class_names == ("background", "disc")
    item = dataset.items[1]
    pixels, labels, class_ids = dataset.image(item), dataset.instance_labels(item), dataset.class_ids(item)
    assert pixels.shape == (64, 64, 3)
    assert labels.dtype == np.int32
    assert np.unique(labels).tolist() == [0, 1, 2, 3, 4]
    assert np.array_equal(class_ids, (labels > 0).astype(np.uint8))
    assert pixels[labels > 0].min() > pixels[labels == 0].max()


def test_alpha_is_dropped(folder: Path) -> None:
    path = folder / "images" / "disc-1.png"
    with Image.open(path) as image:
        image.convert("RGBA").save(path)
    dataset = Dataset(folder, "train")
    assert dataset.image(dataset.items[1]).shape == (64, 64, 3)


def test_polygons_and_plain_run_lengths(folder: Path) -> None:
    annotations = json.loads((folder / "annotations.json").read_text())
    annotations["annotations"] = [
        {
            "id": 1,
            "image_id": 0,
            "category_id": 1,
            "segmentation": [[10, 20, 30, 20, 30, 40, 10, 40], [50, 50, 60, 50, 60, 60, 50, 60]],
        },
        {"id": 2, "image_id": 0, "category_id": 1, "segmentation": {"size": [64, 64], "counts": [0, 5, 64 * 64 - 5]}},
    ]
    write_json(folder / "annotations.json", annotations)
    dataset = Dataset(folder, "train")
    labels = dataset.instance_labels(dataset.items[0])
    assert labels[30, 20] == labels[55, 55] == 1
    assert labels[30, 45] == 0
    assert np.argwhere(labels == 2).tolist() == [[row, 0] for row in range(5)]


def test_digest_sees_pixels_and_annotations(folder: Path) -> None:
    first = Dataset(folder, "train").digest()
    assert first == Dataset(folder, "train").digest()
    assert first != Dataset(folder, "val").digest()
    annotations = json.loads((folder / "annotations.json").read_text())
    removed = annotations["annotations"].pop(0)
    write_json(folder / "annotations.json", annotations)
    second = Dataset(folder, "train").digest()
    annotations["annotations"].insert(0, removed)
    write_json(folder / "annotations.json", annotations)
    Image.new("RGB", (64, 64)).save(folder / "images" / "disc-0.png")
    assert len({first, second, Dataset(folder, "train").digest()}) == 3


def test_says_what_is_wrong_with_a_folder(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is not a data set: it has no annotations\.json"):
        Dataset(tmp_path, "train")
    with pytest.raises(UsageError, match="has no split 'test': it has train, val"):
        Dataset(folder, "test")
    write_json(folder / "splits.json", {"train": ["gone.png"]})
    with pytest.raises(UsageError, match=r"names 'gone\.png'"):
        Dataset(folder, "train")
    (folder / "splits.json").write_text("{")
    with pytest.raises(UsageError, match="not valid JSON"):
        Dataset(folder, "train")


def test_sizes_must_agree(folder: Path) -> None:
    Image.new("RGB", (64, 32)).save(folder / "images" / "disc-0.png")
    dataset = Dataset(folder, "train")
    with pytest.raises(UsageError, match=r"disc-0\.png .* annotated as 64 x 64"):
        dataset.image(dataset.items[0])
    annotations = json.loads((folder / "annotations.json").read_text())
    annotations["annotations"][4]["segmentation"] = {"size": [8, 8], "counts": [0, 64]}
    write_json(folder / "annotations.json", annotations)
    dataset = Dataset(folder, "train")
    with pytest.raises(UsageError, match=r"of disc-1\.png has size \[8, 8\]"):
        dataset.instance_labels(dataset.items[1])
