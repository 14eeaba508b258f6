from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from pycocotools import mask as coco_mask

from models import masks
from models.masks import (
    decode_mask_png,
    decode_rle,
    encode_label_rles,
    encode_mask_png,
    encode_rle,
    mask_crc32,
)

PALETTE = ((0, 0, 0), (255, 0, 0), (0, 255, 0))
SHAPES = st.tuples(st.integers(1, 20), st.integers(1, 20))
MASKS = SHAPES.flatmap(lambda shape: arrays(np.uint8, shape, elements=st.integers(0, 255)))
LABELS = SHAPES.flatmap(lambda shape: arrays(np.int32, shape, elements=st.integers(0, 4)))


@given(MASKS)
@settings(max_examples=60, deadline=None)
def test_png_round_trip(class_ids: np.ndarray) -> None:
    assert np.array_equal(decode_mask_png(encode_mask_png(class_ids, PALETTE)), class_ids)


def test_png_is_a_palette_image_for_every_reader() -> None:
    class_ids = np.array([[0, 1, 2], [2, 1, 7]], dtype=np.uint8)
    data = encode_mask_png(class_ids, PALETTE)
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == "P"
        image.verify()
    with Image.open(io.BytesIO(data)) as image:
        rgb = np.asarray(image.convert("RGB"))
    assert rgb[0, 1].tolist() == [255, 0, 0]
    assert rgb[1, 0].tolist() == [0, 255, 0]
    assert rgb[1, 2].tolist() == [128, 128, 128]
    assert encode_mask_png(class_ids, PALETTE) == data


@pytest.mark.parametrize(
    "wrong",
    [np.zeros((2, 2), dtype=np.int32), np.zeros((2, 2, 3), dtype=np.uint8), np.zeros((0, 2), dtype=np.uint8)],
)
def test_png_refuses_what_is_no_mask(wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match="a mask is"):
        encode_mask_png(wrong, PALETTE)


def test_decode_refuses_colour_images() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2)).save(buffer, "PNG")
    with pytest.raises(ValueError, match="mode RGB"):
        decode_mask_png(buffer.getvalue())
    with pytest.raises(OSError, match="7 bytes of no image"):
        decode_mask_png(b"nothing")
    whole = encode_mask_png(np.zeros((8, 8), np.uint8), PALETTE)
    ends_well = whole.index(b"IDAT") + 15  # all pixels are there, and what should be the rest of the chunk is not
    # Found by fuzzing: Pillow calls a chunk that it cannot read a mistake of syntax.
    with pytest.raises(OSError, match="bytes of a damaged image"):
        decode_mask_png(whole[:ends_well] + b"\xff" * 96)


@given(LABELS)
@settings(max_examples=100, deadline=None)
def test_label_rles_are_those_of_pycocotools(labels: np.ndarray) -> None:
    rles = encode_label_rles(labels, 4)
    assert rles == [encode_rle(labels == label) for label in range(1, 5)]
    for label, rle in enumerate(rles, start=1):
        assert np.array_equal(decode_rle(rle), labels == label)
        assert int(coco_mask.area(rle)) == np.count_nonzero(labels == label)


def test_no_labels() -> None:
    assert encode_label_rles(np.zeros((3, 4), dtype=np.int32), 0) == []


def test_decode_rle_takes_text_counts() -> None:
    mask = np.eye(5, dtype=bool)
    rle = encode_rle(mask)
    assert np.array_equal(decode_rle({"size": [5, 5], "counts": rle["counts"].decode()}), mask)


def test_crc_sees_pixels_and_instances() -> None:
    class_ids = np.arange(12, dtype=np.uint8).reshape(3, 4)
    rles = encode_label_rles(class_ids.astype(np.int32), 2)
    values = {
        mask_crc32(class_ids),
        mask_crc32(class_ids[::-1]),
        mask_crc32(class_ids, rles),
        mask_crc32(class_ids, rles[::-1]),
    }
    assert len(values) == 4
    assert all(0 <= value < 2**32 for value in values)
    as_text = [{"size": tuple(rle["size"]), "counts": rle["counts"].decode()} for rle in rles]
    assert mask_crc32(class_ids, as_text) == mask_crc32(class_ids, rles)
    assert mask_crc32(np.asfortranarray(class_ids)) == mask_crc32(class_ids)


@pytest.mark.parametrize("band_px", [1, 37, 200, 4000])
def test_png_written_in_bands_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch, band_px: int) -> None:
    """Blobs that cross band borders straight and by a corner only."""
    random = np.random.default_rng(5)
    fine = random.integers(0, 4, (61, 37)).astype(np.uint8)
    coarse = np.kron(random.integers(0, 3, (9, 6)), np.ones((7, 7))).astype(np.uint8)[:61, :37]
    corner = np.zeros((61, 37), np.uint8)
    corner[np.arange(37), np.arange(37)] = 7
    for mask in (fine, coarse, corner, np.full((61, 37), 255, np.uint8)):
        with monkeypatch.context() as patch:
            png = masks.encode_mask_png(mask, PALETTE)
            patch.setattr(masks, "_BAND_PX", band_px)
            assert np.array_equal(decode_mask_png(masks.encode_mask_png(mask, PALETTE)), decode_mask_png(png))
            assert masks.encode_mask_png(mask, PALETTE) == png
