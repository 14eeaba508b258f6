"""SQL functions over masks, against NumPy and pycocotools."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
from handmade import make_row
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from tables import Table

from models.masks import encode_mask_png, encode_rle
from pipeline.storage import normalize_uri
from pipeline.table.catalog import connect
from pipeline.table.functions import FUNCTIONS, decode_rle, rle_iou

PALETTE = [(0, 0, 0), (255, 0, 0), (0, 255, 0)]
RLE = 'STRUCT("size" INTEGER[], counts BLOB)'


def class_ids(seed: int, shape: tuple[int, int] = (5, 7)) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 3, shape).astype(np.uint8)


def blob(seed: int, shape: tuple[int, int] = (5, 7)) -> bytes:
    return encode_mask_png(class_ids(seed, shape), PALETTE)


@pytest.fixture
def ask(tmp_path: Path) -> Any:
    """`ask(sql, *parameters)` on a connection of a table whose one image has mask 0 and an instance."""
    rle = encode_rle(class_ids(0) == 1)
    instance = {"class_id": 1, "name": "cell", "score": 0.5, "bbox": [0, 0, 1, 1], "area": 3, "rle": rle}
    table = Table(normalize_uri(str(tmp_path / "dest")))
    table.run(make_row("a", "e1", mask={"bytes": blob(0), "path": None}, instances=[instance]), make_row("b", "e1"))
    connection = connect(table.dest)
    return lambda sql, *parameters: connection.execute(sql, list(parameters)).fetchall()


def test_a_mask_of_the_table_decodes(ask: Any) -> None:
    rows = ask("SELECT m.width, m.height, m.class_ids FROM (SELECT decode_mask(mask.bytes) AS m FROM images)")
    assert sorted(rows, key=str) == sorted([(7, 5, class_ids(0).tobytes()), (None, None, None)], key=str)


def test_an_instance_of_the_table_decodes(ask: Any) -> None:
    inside = class_ids(0) == 1
    ys, xs = np.nonzero(inside)
    box = [xs.min(), ys.min(), xs.max() - xs.min() + 1, ys.max() - ys.min() + 1]
    (row,) = ask("SELECT d.* FROM (SELECT decode_rle(rle) AS d FROM instances)")
    assert row == (7, 5, int(inside.sum()), [float(edge) for edge in box], inside.astype(np.uint8).tobytes())


def test_iou_of_masks(ask: Any) -> None:
    one, other = class_ids(1), class_ids(2)
    each = {
        index: ((one == index) & (other == index)).sum() / ((one == index) | (other == index)).sum()
        for index in range(3)
    }
    ((mean, same, first, absent),) = ask(
        "SELECT mask_iou($1, $2), mask_iou($1, $1), class_iou($1, $2, 1), class_iou($1, $2, 9)", blob(1), blob(2)
    )
    assert (mean, same, first, absent) == (pytest.approx(np.mean(list(each.values()))), 1.0, each[1], None)


def test_iou_of_objects(ask: Any) -> None:
    one, other = (encode_rle(class_ids(seed) == 1) for seed in (3, 4))
    expected = coco_mask.iou([one], [other], [0])[0][0]
    sql = f"SELECT rle_iou($1::{RLE}, $2::{RLE}), rle_iou($1::{RLE}, $1::{RLE})"
    assert ask(sql, one, other) == [(pytest.approx(expected), 1.0)]


def test_null_gives_null(ask: Any) -> None:
    for one in FUNCTIONS:
        arguments = ", ".join(f"NULL::{kind}" for kind in one.takes)
        assert ask(f"SELECT {one.name}({arguments})") == [(None,)], one.name


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ("decode_mask('abc'::BLOB)", "not a mask of Maskmill's: 3 bytes of no image;"),
        ("mask_iou($1, $2)", "different sizes"),
        (f"decode_rle({{'size': [5, 7], 'counts': 'zz'::BLOB}}::{RLE})", "no run lengths"),
        (f"decode_rle({{'size': [5], 'counts': '0'::BLOB}}::{RLE})", "no run lengths"),
    ],
)
def test_what_cannot_be_answered_says_why(ask: Any, call: str, says: str) -> None:
    with pytest.raises(duckdb.Error, match=says):
        ask(f"SELECT {call}", *([blob(0), blob(0, (6, 7))] if "$" in call else []))


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 1 << 30))
def test_run_lengths_of_any_mask_decode(height: int, width: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    inside = random.random((height, width)) < random.random()
    found = decode_rle(encode_rle(inside))
    assert found["area"] == inside.sum()
    assert found["pixels"] == inside.astype(np.uint8).tobytes()


@given(st.binary(max_size=12))
def test_no_bytes_are_run_lengths_by_accident(counts: bytes) -> None:
    """pycocotools itself answers from memory it never wrote."""
    try:
        found = decode_rle({"size": [3, 4], "counts": counts})
    except ValueError:
        return
    assert rle_iou({"size": [3, 4], "counts": counts}, encode_rle(np.ones((3, 4), bool))) == found["area"] / 12


def test_a_connection_left_open_says_nothing_at_the_end(tmp_path: Path) -> None:
    table = Table(normalize_uri(str(tmp_path / "dest")))
    table.run(make_row("a", "e1"))
    script = (
        f"import pipeline; c = pipeline.connect({table.dest!r}); print(c.sql('SELECT decode_mask(NULL)').fetchall())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == ("[(None,)]", "")
