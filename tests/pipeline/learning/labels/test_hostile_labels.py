"""Labels that were made to do harm, or by a fuzzer: each is a sentence, and takes no memory to speak of."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from small_datasets import coco_content, write_coco, write_voc

from pipeline.errors import UsageError
from pipeline.learning.labels.place import decode_ids, id_size
from pipeline.learning.labels.source import open_labels
from pipeline.learning.labels.truth import LabelError


def with_segmentation(folder: Path, segmentation: Any) -> Any:
    """Labels of the one image of a data set whose first annotation is like that."""
    write_coco(folder, count=1)
    body = coco_content(range(1))
    body["annotations"][0]["segmentation"] = segmentation
    (folder / "annotations.json").write_text(json.dumps(body))
    source = open_labels(folder)
    return source.labels(source.item(source.entries["0.png"]))


@pytest.mark.parametrize(
    "polygon",
    [
        [0, 0, 1e9, 0, 1e9, 1e9], [0, 0, math.nan, 0, 5, 5], [0, 0, math.inf, 0, 5, 5], [-1e9, 0, 5, 5],
        [1, 2, 3], [1, 2], [], ["a", "b", "c", "d"], [[1, 2], [3, 4]], {"size": [1, 1], "counts": [1]}, None,
    ],
)  # fmt: skip
def test_a_polygon_that_would_end_the_process_is_a_sentence(tmp_path: Path, polygon: Any) -> None:
    with pytest.raises(LabelError, match=r"annotation 1 of 0\.png has no segmentation that can be read"):
        with_segmentation(tmp_path, [polygon])


def test_polygons_may_stick_out_of_their_image(tmp_path: Path) -> None:
    (first, _) = with_segmentation(tmp_path, [[-3.5, -2, 9, 0, 9.25, 400]]).objects
    assert first.rle["size"] == coco_content(range(1))["annotations"][0]["segmentation"]["size"]


def test_no_segmentation_is_an_empty_object(tmp_path: Path) -> None:
    labels = with_segmentation(tmp_path, [])
    assert labels.objects[0].class_id == 2 and np.count_nonzero(labels.class_ids() == 2) == 0


@pytest.mark.parametrize("area", [10**400, math.inf, math.nan, "5", [], -1e300])
def test_an_area_that_is_none_is_a_sentence(tmp_path: Path, area: Any) -> None:
    """Found by fuzzing: a number of four hundred digits."""
    write_coco(tmp_path, count=1)
    body = coco_content(range(1))
    body["annotations"][0]["area"] = area
    (tmp_path / "annotations.json").write_text(json.dumps(body))
    source = open_labels(tmp_path)
    with pytest.raises(LabelError, match=r"annotation 1 of 0\.png has the area"):
        source.labels(source.item(source.entries["0.png"]))


@pytest.mark.parametrize(("height", "width"), [(0, 5), (-1, 5), (2**31, 2**31), (2**20, 2**20), (True, 2**40)])
def test_a_size_beyond_all_measure_is_a_sentence(tmp_path: Path, height: int, width: int) -> None:
    write_coco(tmp_path, count=1)
    body = coco_content(range(1))
    body["images"][0] |= {"height": height, "width": width}
    (tmp_path / "annotations.json").write_text(json.dumps(body))
    with pytest.raises(UsageError, match=r"says that '0\.png' is"):
        open_labels(tmp_path)


@pytest.mark.parametrize("name", ["annotations.json", "classes.json"])
@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        "1" * 5000,
        "",
        "null",
        "[]",
        "{}",
        "3",
        '"x"',
        '{"images": 1, "annotations": 2, "categories": 3, "classes": 4}',
        '{"images": [null], "annotations": [], "categories": [], "classes": [null]}',
        '{"classes": [{"id": 1e400, "name": "a"}]}',
        '{"classes": ["a"], "background_id": []}',
        '{"classes": ["a"], "ignore_index": "x"}',
    ],
)
def test_json_of_another_kind_is_a_sentence(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError):
        open_labels(tmp_path)


def encoded(pixels: np.ndarray, name: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, name)
    return buffer.getvalue()


def test_half_a_character_is_a_sentence_and_two_halves_are_one(tmp_path: Path) -> None:
    """Found by fuzzing: a name that no file can have, and no digest is of."""
    write_coco(tmp_path, count=1)
    text = (tmp_path / "annotations.json").read_text()
    for half in (r"\ud83d", r"\uDE00", r"\ude00\ud83d"):
        (tmp_path / "annotations.json").write_text(text.replace("0.png", f"{half}.png"))
        with pytest.raises(UsageError, match="not valid JSON"):
            open_labels(tmp_path)
    (tmp_path / "annotations.json").write_text(text.replace("0.png", r"\ud83d\ude00.png"))
    assert list(open_labels(tmp_path).entries) == ["😀.png"]


def test_a_label_image_that_would_unfold_beyond_all_measure_is_a_sentence() -> None:
    from awkward_corpus import bomb

    for read in (decode_ids, id_size):
        with pytest.raises(LabelError, match=r"label a\.png cannot be read"):
            read(bomb(), "a.png")


def test_ids_beyond_sixteen_bits_are_a_sentence() -> None:
    """A table of all ids in between would take 8 GB."""
    assert decode_ids(encoded(np.array([[0, 65535]], np.int32), "TIFF"), "a").tolist() == [[0, 65535]]
    for wrong in (-1, 2**31 - 1):
        with pytest.raises(LabelError, match="must be 0 to 65535"):
            decode_ids(encoded(np.array([[0, wrong]], np.int32), "TIFF"), "a")


def test_postscript_is_run_by_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow would hand it to Ghostscript, where there is one."""
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: pytest.fail("Ghostscript was called"))
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", "gs")
    eps = (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%BeginProlog\n%%EndProlog\nshowpage\n%%EOF\n"
    )
    with Image.open(io.BytesIO(eps)) as image:
        assert image.format == "EPS"
    for read in (decode_ids, id_size):
        with pytest.raises(LabelError):
            read(eps, "a.png")


def test_a_split_that_is_no_text_is_a_sentence(tmp_path: Path) -> None:
    """Found by fuzzing."""
    write_voc(tmp_path)
    (tmp_path / "ImageSets" / "Segmentation" / "train.txt").write_bytes(b"a\n\x89PNG")
    with pytest.raises(UsageError, match=r"train\.txt is not a text in UTF-8"):
        open_labels(tmp_path)
