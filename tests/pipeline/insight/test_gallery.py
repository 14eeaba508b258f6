"""Pictures fit into their budget, their layers lie where the masks are, and trouble becomes words."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from handmade import make_row, touch_later
from PIL import Image

from models.masks import encode_mask_png, encode_rle
from pipeline.insight.gallery import GalleryConfig, Picture, make_pictures
from pipeline.storage import normalize_uri, open_storage

RED, GREEN = (220, 30, 30), (30, 200, 30)


def pixels_of(data_url: str, mode: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data_url.partition(",")[2]))).convert(mode))


def row_of(path: Path, pixels: np.ndarray, **facts: Any) -> dict[str, Any]:
    Image.fromarray(pixels).save(path)
    uri = normalize_uri(str(path))
    height, width = pixels.shape[:2]
    row = make_row(uri, open_storage(uri).get(uri).etag, height=height, width=width, task="semantic", classes=[])
    return row | {"instances": None} | facts


def only(rows: list[dict[str, Any]], **config: Any) -> Picture:
    (picture,) = make_pictures(rows, GalleryConfig(**config)).values()
    return picture


GREY = np.full((40, 60, 3), 140, np.uint8)


def test_layers_of_classes(tmp_path: Path) -> None:
    ids = np.zeros((40, 60), np.uint8)
    ids[:, 20:] = 1
    ids[20:, 40:] = 2
    classes = [
        {"class_id": 1, "name": "road", "mean_confidence": 0.91234},
        {"class_id": 2, "name": "car", "mean_confidence": None},
    ]
    mask = encode_mask_png(ids, [(0, 0, 0), RED, GREEN])
    picture = only([row_of(tmp_path / "a.png", GREY, mask=mask, classes=classes)])
    assert pixels_of(picture.image, "RGB").shape == (40, 60, 3) and (picture.width, picture.height) == (60, 40)
    overlay = pixels_of(picture.overlay, "RGBA")
    assert not overlay[:, :20, 3].any(), "black is left clear"
    assert tuple(overlay[10, 30, :3]) == RED and 0 < overlay[10, 30, 3] < 200
    assert tuple(overlay[30, 50]) == (*GREEN, overlay[30, 50, 3]) and tuple(overlay[30, 40]) == (*GREEN, 255)
    labels = pixels_of(picture.labels, "RGB").astype(int)
    assert labels.shape == (20, 30, 3) and not labels[..., 1:].any()
    assert [picture.names[labels[y, x, 0] - 1] for y, x in ((5, 15), (15, 25))] == [("road", 0.912), ("car", None)]
    assert not labels[:, :10].any()


def test_layers_of_objects_however_many(tmp_path: Path) -> None:
    """More than a palette of 256 has, and more than one byte of labels."""
    instances = []
    for index in range(300):
        mask = np.zeros((60, 80), bool)
        y, x = 3 * (index // 20), 4 * (index % 20)
        mask[y : y + 3, x : x + 4] = True
        instances.append({"name": f"n{index}", "score": index / 300, "rle": encode_rle(mask)})
    grey = np.full((60, 80, 3), 140, np.uint8)
    for count in (300, 40):
        picture = only([row_of(tmp_path / f"{count}.png", grey, task="instance", instances=instances[:count])])
        assert len(picture.names) == count
        labels = pixels_of(picture.labels, "RGB").astype(int)
        label = labels[..., 0] + 256 * labels[..., 1]
        last = count - 1
        at = (3 * (last // 20) + 2) // 2, (4 * (last % 20) + 2) // 2
        assert picture.names[label[at] - 1] == (f"n{last}", round(last / 300, 3))
        overlay = pixels_of(picture.overlay, "RGBA")
        assert len(np.unique(overlay[..., :3][overlay[..., 3] > 0], axis=0)) > 0.9 * count


def test_no_objects_need_no_layers(tmp_path: Path) -> None:
    picture = only([row_of(tmp_path / "a.png", GREY, task="instance", instances=[])])
    assert picture.image and not picture.overlay and not picture.labels and picture.names == []


def test_edges_shrink_until_all_fit(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    mask = encode_mask_png(random.integers(0, 3, (300, 400)).astype(np.uint8), [(0, 0, 0), RED, GREEN])
    rows = [
        row_of(tmp_path / f"{index}.png", random.integers(0, 256, (300, 400, 3)).astype(np.uint8), mask=mask)
        for index in range(6)
    ]
    whole = make_pictures(rows, GalleryConfig())
    assert all(pixels_of(one.image, "RGB").shape == (300, 400, 3) for one in whole.values())
    small = make_pictures(rows, GalleryConfig(total_bytes=150_000))
    total = sum(one.size_bytes for one in small.values())
    assert 60_000 < total <= 150_000 < sum(one.size_bytes for one in whole.values())
    assert len({pixels_of(one.image, "RGB").shape for one in small.values()}) == 1


def test_trouble_is_told_and_costs_only_its_own_picture(tmp_path: Path) -> None:
    mask = encode_mask_png(np.ones((40, 60), np.uint8), [(0, 0, 0), RED])
    rows = [row_of(tmp_path / f"{name}.png", GREY, mask=mask) for name in ("fine", "gone", "replaced", "large", "odd")]
    (tmp_path / "gone.png").unlink()
    touch_later(tmp_path / "replaced.png")
    rows[3] |= {"width": 9000, "height": 9000}
    rows[4] |= {"mask": b"no png"}
    found = make_pictures(rows, GalleryConfig())
    assert [one.trouble for one in found.values()] == [
        "",
        "the image cannot be shown now (missing)",
        "the image was replaced since",
        "81 megapixels are too many to draw here",
        "the image cannot be drawn (UnidentifiedImageError)",
    ]
    assert [bool(one.image) for one in found.values()] == [True, False, False, False, False]


def test_a_source_that_hangs_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    from pipeline.insight import gallery

    release = threading.Event()
    monkeypatch.setattr(gallery, "original_pixels", lambda *_, **__: release.wait(20))
    rows = [row_of(tmp_path / f"{index}.png", GREY) for index in range(12)]
    try:
        found = make_pictures(rows, GalleryConfig(timeout_s=0.2))
        assert {one.trouble for one in found.values()} == {"it was not there after 0.2 s"}
    finally:
        release.set()


def test_a_dark_image_is_brightened_and_that_is_told(tmp_path: Path) -> None:
    mask = encode_mask_png(np.ones((40, 60), np.uint8), [(0, 0, 0), RED])
    assert not only([row_of(tmp_path / "a.png", GREY, mask=mask)]).is_brightened
    dark = np.random.default_rng(0).integers(0, 30, (40, 60, 3)).astype(np.uint8)
    assert only([row_of(tmp_path / "b.png", dark, mask=mask)]).is_brightened
