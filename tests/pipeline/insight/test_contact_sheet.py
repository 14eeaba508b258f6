"""A sheet shows every row that counts, says what is wrong with those that cannot be shown, and never fails for one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from handmade import CREATED_AT, make_image, make_list, make_part, make_plan, make_row, touch_later
from PIL import Image

from models.masks import encode_mask_png, encode_rle
from pipeline.engine.ledger import Ledger, RunRecord
from pipeline.errors import UsageError
from pipeline.insight.contact_sheet import SheetConfig, draw_contact_sheet, plain_text
from pipeline.storage import local_path, normalize_uri, open_storage

SMALL = SheetConfig(columns=3, tile_px=96)
TILE_GREY = (54, 57, 66)
PAINT = (255, 0, 255)


def write_run(ledger: Ledger, rows: list[dict[str, Any]]) -> None:
    """Leaves in DEST what a finished run with these rows leaves."""
    plan = make_plan(ledger.dest, planned=len(rows), shard_size=len(rows))
    assert ledger.freeze(plan, make_list([row["image_uri"] for row in rows]))
    ledger.storage.put_new(plan.part_uri(0), make_part(rows))
    record: dict[str, Any] = {
        "state": "done", "closed_at": CREATED_AT, "plan": plan, "ok": len(rows), "errors": 0, "errors_by_kind": {},
        "parts": 1, "parts_bytes": 1, "instances": 0, "megapixels": 1.0, "stage_ms": {}, "seconds": 1.0,
        "images_per_s": 1.0, "megapixels_per_s": 1.0, "model_busy_fraction": 0.5, "workers": [],
    }  # fmt: skip
    ledger.close(RunRecord(**record))


@pytest.fixture
def write_table(ledger: Ledger) -> Callable[[list[dict[str, Any]]], str]:
    """A DEST on disk that holds these rows; gives its path."""

    def write(rows: list[dict[str, Any]]) -> str:
        write_run(ledger, rows)
        return local_path(ledger.dest)

    return write


def ok_row(path: Path, *, mask: np.ndarray | None = None, **changes: Any) -> dict[str, Any]:
    """The row of a file on disk as it is now; class 1 is painted in PAINT."""
    uri = normalize_uri(str(path))
    width, height = Image.open(path).size
    ids = np.zeros((height, width), np.uint8) if mask is None else mask
    png = encode_mask_png(ids, [(0, 0, 0), PAINT])
    facts: dict[str, Any] = {"width": width, "height": height, "mean_confidence": 0.9, "foreground_fraction": 0.2}
    etag = open_storage(uri).get(uri).etag
    return make_row(uri, etag, **facts, mask={"bytes": png, "path": None}, **changes)


def tile(sheet: Path, index: int, config: SheetConfig = SMALL) -> np.ndarray:
    """The picture of tile `index`, without its caption."""
    pixels = np.asarray(Image.open(sheet).convert("RGB"))
    x = 12 + index % config.columns * (config.tile_px + 12)
    y = 52 + 12 + index // config.columns * (config.tile_px + 40 + 12)
    return pixels[y : y + config.tile_px, x : x + config.tile_px]


def has(pixels: np.ndarray, color: tuple[int, int, int]) -> bool:
    return bool((pixels == color).all(axis=-1).any())


def test_masks_are_drawn_where_they_are(write_table: Callable[..., str], tmp_path: Path) -> None:
    mask = np.zeros((48, 48), np.uint8)
    mask[:, 24:] = 1
    one = np.zeros((48, 48), bool)
    one[24:] = True
    instance = {
        "class_id": 1,
        "name": "x",
        "score": 1.0,
        "bbox": [0.0, 24, 48, 24],
        "area": 1152,
        "rle": encode_rle(one),
    }
    rows = [
        ok_row(make_image(tmp_path / "a.png", 1, width=48, height=48), mask=mask),
        ok_row(make_image(tmp_path / "b.png", 2, width=48, height=48), task="instance", instances=[instance]),
        ok_row(make_image(tmp_path / "c.png", 2, width=48, height=48), task="instance", instances=[]),
    ]
    sheet = tmp_path / "sheet.png"
    assert draw_contact_sheet(write_table(rows), sheet, SMALL) == 3
    semantic = tile(sheet, 0)
    assert has(semantic[:, 48:], PAINT) and not has(semantic[:, :47], PAINT)
    with_instance, without = tile(sheet, 1).astype(int), tile(sheet, 2).astype(int)
    assert (with_instance[:47] == without[:47]).all()
    assert (with_instance[49:] != without[49:]).any(axis=-1).all()


def test_what_cannot_be_shown_is_a_grey_tile(write_table: Callable[..., str], tmp_path: Path) -> None:
    gone, replaced, fine = (make_image(tmp_path / f"{name}.png", 1) for name in ("b-gone", "c-replaced", "d-fine"))
    broken = normalize_uri(str(tmp_path / "a-broken.jpg"))
    rows = [make_row(broken, "e", "truncated"), ok_row(gone), ok_row(replaced), ok_row(fine)]
    dest = write_table(rows)
    gone.unlink()
    touch_later(replaced)
    sheet = tmp_path / "sheet.png"
    assert draw_contact_sheet(dest, sheet, SMALL) == 4
    assert [has(tile(sheet, index), TILE_GREY) for index in range(4)] == [True, True, True, False]


def test_the_limit_takes_the_same_sample_every_time(write_table: Callable[..., str], tmp_path: Path) -> None:
    rows = [ok_row(make_image(tmp_path / f"{index}.png", index)) for index in range(9)]
    dest = write_table(rows)
    config = SheetConfig(columns=3, tile_px=96, limit=4)
    assert draw_contact_sheet(dest, tmp_path / "one.png", config) == 4
    assert draw_contact_sheet(dest, tmp_path / "two.png", config) == 4
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_odd_shapes_and_names_fit_their_tiles(write_table: Callable[..., str], tmp_path: Path) -> None:
    names = ["a" * 120 + ".png", "b 中文 \x1b[31m\n[bold].png", "c%20'#?.png"]
    sizes = [(1, 1), (700, 2), (2, 300)]
    rows = [
        ok_row(make_image(tmp_path / name, 1, width=width, height=height))
        for name, (width, height) in zip(names, sizes, strict=True)
    ]
    sheet = tmp_path / "sheet.png"
    assert draw_contact_sheet(write_table(rows), sheet, SMALL) == 3
    assert Image.open(sheet).size == (3 * (96 + 12) + 12, 52 + 12 + 96 + 40 + 12)


def test_a_long_name_keeps_its_end(write_table: Callable[..., str], tmp_path: Path) -> None:
    paths = [make_image(tmp_path / ("a" * 120 + f"{end}.png"), 1) for end in ("W", "i")]
    sheet = tmp_path / "sheet.png"
    draw_contact_sheet(write_table([ok_row(path) for path in paths]), sheet, SMALL)
    captions = np.asarray(Image.open(sheet))[52 + 12 + 96 + 4 : 52 + 12 + 96 + 20]
    assert (captions[:, 12 : 12 + 96] != captions[:, 120 : 120 + 96]).any()


def test_text_from_a_corpus_is_escaped() -> None:
    assert plain_text("a\x1b[31m\n中é") == "a\\x1b[31m\\n\\u4e2dé"


def test_a_table_without_finished_rows_is_a_usage_error(write_table: Callable[..., str], tmp_path: Path) -> None:
    dest = write_table([ok_row(make_image(tmp_path / "a.png", 1))])
    with pytest.raises(UsageError, match="'other'"):
        draw_contact_sheet(dest, tmp_path / "sheet.png", SheetConfig(model="other"))
    assert not (tmp_path / "sheet.png").exists()


def test_an_unwritable_place_is_a_usage_error_and_leaves_nothing(
    write_table: Callable[..., str], tmp_path: Path
) -> None:
    dest = write_table([ok_row(make_image(tmp_path / "a.png", 1))])
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match="cannot be written"):
        draw_contact_sheet(dest, tmp_path / "file" / "sheet.png", SMALL)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UsageError, match="cannot be written"):
        draw_contact_sheet(dest, tmp_path / "folder.png", SMALL)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("tmp")]


def test_an_address_is_no_place_for_it(
    write_table: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder named `s3:` was made."""
    dest = write_table([ok_row(make_image(tmp_path / "a.png", 1))])
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UsageError, match=r"'s3://…' is an address"):
        draw_contact_sheet(dest, "s3://bucket/sheet.png", SMALL)
    assert not list((tmp_path / "here").iterdir())
    assert draw_contact_sheet(dest, (tmp_path / "sheet.png").as_uri(), SMALL) == 1
    assert (tmp_path / "sheet.png").exists()


@pytest.mark.s3
def test_images_and_table_may_lie_in_object_storage(s3_bucket: str, tmp_path: Path) -> None:
    dest, uri = f"{s3_bucket}/table", f"{s3_bucket}/photos/a b#%20.png"
    storage = open_storage(dest)
    storage.put(uri, make_image(tmp_path / "a.png", 1, width=48, height=48).read_bytes())
    mask = encode_mask_png(np.eye(48, dtype=np.uint8), [(0, 0, 0), PAINT])
    facts: dict[str, Any] = {"width": 48, "height": 48, "mask": {"bytes": mask, "path": None}}
    write_run(Ledger(storage, dest), [make_row(uri, storage.get(uri).etag, **facts)])
    sheet = tmp_path / "sheet.png"
    assert draw_contact_sheet(dest, sheet, SMALL) == 1
    assert has(tile(sheet, 0), PAINT)
