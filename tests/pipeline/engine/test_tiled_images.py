"""Large images through the stream with real networks: tiles of many images in one batch, one row each."""

from __future__ import annotations

import copy
import functools
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tifffile
import torch
from PIL import Image
from small_detector import SIDE_PX, detector_card, disc_detector, draw_discs
from small_networks import distinct_network, small_card

from models import segmenter as segmenter_module
from models.architectures import build, card_for, untrained_card
from models.card import Card, Preprocessing, TilePolicy
from models.file import load_module
from models.masks import decode_mask_png, decode_rle
from models.overrides import with_settings
from models.segmenter import Segmenter
from pipeline.engine.messages import StreamConfig
from pipeline.engine.stream import Stream
from pipeline.storage import open_storage
from pipeline.table.schema import WORK

NUCLEI = Path(__file__).parents[3] / "examples" / "nuclei"
ZOO = Path(__file__).parents[3] / "models" / "zoo" / "nuclei-unet.safetensors"
#: Those of more than 768 pixels a side.
LARGEST = sorted(
    (path for path in NUCLEI.glob("*.png") if max(Image.open(path).size) > 768), key=lambda path: Image.open(path).size
)
TILES = TilePolicy(tile_px=64, overlap_px=16)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(card: Card, *, seed: int = 0) -> Segmenter:
    torch.manual_seed(seed)
    return Segmenter(build(card), card, device="cpu", precision="fp32")


def smooth(height: int, width: int, *, bands: int = 3, seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 255, (height // 8 + 2, width // 8 + 2, bands)).astype(np.uint8)
    parts = [np.array(Image.fromarray(coarse[..., i]).resize((width, height))) for i in range(bands)]
    return np.dstack(parts)


def rows_of(model: Any, paths: list[Path], **config: Any) -> dict[str, dict[str, Any]]:
    uris = [f"file://{path}" for path in paths]
    columns = {
        "uri": uris,
        "etag": ["e"] * len(uris),
        "size_bytes": [path.stat().st_size for path in paths],
        "modified": [None] * len(uris),
        "attempt": [1] * len(uris),
    }
    stream = Stream(
        model, fetch=open_storage("file:///").get, config=StreamConfig(**config), stamp={"task": model.card.task}
    )
    rows: list[dict[str, Any]] = []
    try:
        stream.submit(pa.table(columns, schema=WORK), rows.extend).result(timeout=120)
    finally:
        stream.close()
    assert len(rows) == len(paths)
    return {Path(row["image_uri"]).name: row for row in rows}


@pytest.fixture
def corpus(tmp_path: Path) -> list[Path]:
    """Images of one tile and of many, PNG and TIFF."""
    paths = []
    for index, (height, width) in enumerate([(150, 200), (60, 60), (64, 64), (65, 30), (40, 300), (129, 129)]):
        path = tmp_path / (f"{index}.png" if index % 2 else f"{index}.tif")
        pixels = smooth(height, width, seed=index)
        if index % 2:
            Image.fromarray(pixels).save(path)
        else:
            tifffile.imwrite(path, pixels, tile=(32, 32), photometric="rgb")
        paths.append(path)
    return paths


CARDS = {
    "semantic": untrained_card("tiny", class_names=("a", "b", "c", "d")).model_copy(update={"size_policy": TILES}),
    "instance": untrained_card("tiny", task="instance").model_copy(update={"size_policy": TILES}),
}


def test_a_line_that_padding_would_make_a_plane_is_too_large(tmp_path: Path) -> None:
    Image.fromarray(smooth(1, 3000)).save(tmp_path / "line.png")
    Image.fromarray(smooth(60, 60)).save(tmp_path / "square.png")
    paths = [tmp_path / "line.png", tmp_path / "square.png"]
    rows = rows_of(tiny(CARDS["semantic"]), paths, max_pixels=3600)
    assert rows["line.png"]["error_kind"] == "too_large" and "for the network" in rows["line.png"]["error_message"]
    assert rows["square.png"]["status"] == "ok"
    assert rows_of(tiny(CARDS["semantic"]), paths)["line.png"]["status"] == "ok"


def test_floats_in_tiles_are_the_picture_that_they_are_whole(tmp_path: Path) -> None:
    """Each tile alone has another range than all of them."""
    gray = smooth(150, 200, bands=1)[:, :, 0]
    gray[0, 0], gray[-1, -1] = 0, 255
    tifffile.imwrite(tmp_path / "bytes.tif", gray, tile=(32, 32), photometric="minisblack")
    floats = (gray / 255).astype(np.float32)
    tifffile.imwrite(tmp_path / "floats.tif", floats, tile=(32, 32), photometric="minisblack")
    tifffile.imwrite(tmp_path / "signed.tif", floats * 2 - 1, tile=(32, 32), photometric="minisblack")
    rows = rows_of(tiny(CARDS["semantic"]), [tmp_path / f"{name}.tif" for name in ("bytes", "floats", "signed")])
    assert rows["floats.tif"]["mask_crc32"] == rows["bytes.tif"]["mask_crc32"] is not None
    assert rows["floats.tif"]["brightness"] == rows["bytes.tif"]["brightness"]
    assert rows["signed.tif"]["error_kind"] == "unsupported"


@pytest.mark.parametrize("task", ["semantic", "instance"])
def test_batches_budgets_and_neighbours_change_no_bit(corpus: list[Path], task: str) -> None:
    model = tiny(CARDS[task])
    alone = {path.name: rows_of(model, [path], batch_size=4, threads=1)[path.name] for path in corpus}
    together = rows_of(model, corpus[::-1], batch_size=4, threads=3, memory_bytes=3 * 4 * 64 * 64 * 3)
    for path in corpus:
        one, other = alone[path.name], together[path.name]
        assert one["status"] == "ok", one["error_message"]
        assert one["mask"] == other["mask"] and one["mask_crc32"] == other["mask_crc32"]
        assert one["classes"] == other["classes"] and one.get("instances") == other.get("instances")
        height, width = decode_mask_png(one["mask"]["bytes"]).shape
        assert (one["height"], one["width"]) == (height, width)
        assert sum(entry["pixels"] for entry in one["classes"]) == height * width
        assert one["mean_confidence"] == other["mean_confidence"] and one["brightness"] == other["brightness"]


def test_an_image_that_fits_is_answered_as_without_tiles(corpus: list[Path]) -> None:
    tiled = rows_of(tiny(CARDS["semantic"]), corpus)
    whole = rows_of(tiny(untrained_card("tiny", class_names=("a", "b", "c", "d"))), corpus)
    assert tiled["2.tif"]["mask"] == whole["2.tif"]["mask"], "64×64 is one tile"
    assert tiled["0.tif"]["mask"] != whole["0.tif"]["mask"], "150×200 is many"


def test_tiling_begins_above_a_number_of_pixels(corpus: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    card = untrained_card("tiny").model_copy(update={"tile_above_pixels": 10_000})
    model = tiny(card)
    asked: list[int] = []
    tiles = segmenter_module.TileGrid

    def noted(height: int, width: int, **rest: Any) -> Any:
        asked.append(height * width)
        return tiles(height, width, **rest)

    monkeypatch.setattr(segmenter_module, "TileGrid", noted)
    assert all(row["status"] == "ok" for row in rows_of(model, corpus).values())
    assert sorted(asked) == [40 * 300, 129 * 129, 150 * 200]


@pytest.mark.parametrize("size", [(2**31 - 1, 2**31 - 1), (1, 2**31 - 1), (2**31 - 1, 1)])
def test_nothing_is_made_in_a_size_that_a_header_only_claims(tmp_path: Path, size: tuple[int, int]) -> None:
    """A hundred bytes that say they are billions of pixels: one row, and no grid of millions of tiles."""
    chunks = {b"IHDR": struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0), b"IDAT": zlib.compress(b"x"), b"IEND": b""}
    liar = tmp_path / "liar.png"
    with liar.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for name, body in chunks.items():
            file.write(struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)))
    row = rows_of(tiny(CARDS["instance"]), [liar])["liar.png"]
    assert (row["status"], row["error_kind"]) == ("error", "too_large"), row["error_message"]


def nuclei_model(**settings: Any) -> Segmenter:
    card, module = load_module(ZOO.read_bytes())
    return Segmenter(module, with_settings(card, settings), device="cpu", precision="fp32")


def label_image(row: dict[str, Any]) -> np.ndarray:
    return decode_mask_png(row["mask"]["bytes"]) > 0


def compare_tiles(
    paths: list[Path],
    settings: dict[str, Any],
    offset: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
    *,
    slack: int = 0,
) -> None:
    """The shipped model: whole, in tiles, and in tiles that lie otherwise, at multiples of the stride as tiles do."""
    whole = rows_of(nuclei_model(tile_above_pixels=None), paths)
    tiled = rows_of(nuclei_model(**settings), paths)
    grid = segmenter_module.TileGrid
    monkeypatch.setattr(segmenter_module, "TileGrid", functools.partial(grid, offset=offset))
    shifted = rows_of(nuclei_model(**settings), paths)
    for name, row in tiled.items():
        sure = {one[name]["mean_entropy"] for one in (whole, tiled, shifted)}
        assert len(sure) > 1, "it was in tiles"
        assert np.mean(label_image(row) != label_image(shifted[name])) < 0.005, name
        assert np.mean(label_image(row) != label_image(whole[name])) < 0.005, name
        counts = [len(one[name]["instances"]) for one in (whole, tiled, shifted)]
        assert counts[0] > 20 and max(counts) - min(counts) <= slack, (name, counts)


def test_small_tiles_find_nearly_the_objects_of_the_whole_image(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """They see 64 pixels around: less than the network would look at."""
    image = Image.open(LARGEST[-1]).convert("RGB").crop((0, 0, 616, 372))
    image.save(tmp_path / "large.png")
    policy = {"size_policy": {"kind": "tile", "tile_px": 256, "overlap_px": 128}}
    compare_tiles([tmp_path / "large.png"], policy, (32, 64), monkeypatch, slack=1)


@pytest.mark.timeout(600)
def test_default_tiles_find_the_objects_of_the_whole_image(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """1272 × 330: no side of it is a multiple of the stride."""
    (wide,) = [path for path in LARGEST if max(Image.open(path).size) > 1024]
    Image.open(wide).convert("RGB").crop((0, 0, 1272, 330)).save(tmp_path / "wide.png")
    compare_tiles([tmp_path / "wide.png"], {"tile_above_pixels": 300_000}, (0, 192), monkeypatch)


@pytest.mark.slow
def test_shifting_the_grid_hardly_matters_on_the_largest_shipped_images(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = {"size_policy": {"kind": "tile", "tile_px": 768, "overlap_px": 256}}
    compare_tiles(LARGEST, policy, (96, 160), monkeypatch)


def test_a_damaged_tile_is_one_error_row_and_costs_no_neighbour(corpus: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "damaged.tif"
    tifffile.imwrite(path, smooth(200, 200), tile=(32, 32), photometric="rgb", compression="zlib")
    data = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as file:
        offset = file.pages.first.dataoffsets[30]
    data[offset : offset + 8] = b"\x00" * 8
    path.write_bytes(data)
    rows = rows_of(tiny(CARDS["semantic"]), [*corpus, path], threads=2)
    assert rows.pop("damaged.tif")["error_kind"] == "corrupt"
    assert {row["status"] for row in rows.values()} == {"ok"}


def test_a_tile_that_the_device_does_not_hold(corpus: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(CARDS["semantic"])
    submit = model.submit

    def full(images_NHWC: Any, sizes_N2: Any, *rest: Any, tiles: bool) -> Any:
        if tiles:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return submit(images_NHWC, sizes_N2, *rest, tiles=tiles)

    monkeypatch.setattr(model, "submit", full)
    rows = rows_of(model, corpus)
    kinds = {name: row["error_kind"] if row["status"] == "error" else "ok" for name, row in rows.items()}
    assert kinds == {
        "0.tif": "out_of_memory", "1.png": "ok", "2.tif": "ok", "3.png": "out_of_memory", "4.tif": "out_of_memory",
        "5.png": "out_of_memory",
    }  # fmt: skip


@pytest.mark.parametrize("last", ["whole.tif", "damaged.tif"])
def test_tiles_are_counted_while_their_image_is_under_way(tmp_path: Path, last: str) -> None:
    path = tmp_path / last
    tifffile.imwrite(path, smooth(200, 200), tile=(32, 32), photometric="rgb", compression="zlib")
    if last == "damaged.tif":
        data = bytearray(path.read_bytes())
        with tifffile.TiffFile(path) as file:
            offset = file.pages.first.dataoffsets[-1]
        data[offset : offset + 8] = b"\x00" * 8
        path.write_bytes(data)
    model = tiny(CARDS["semantic"])
    columns = {
        "uri": [f"file://{path}"],
        "etag": ["e"],
        "size_bytes": [path.stat().st_size],
        "modified": [None],
        "attempt": [1],
    }
    stream = Stream(model, fetch=open_storage("file:///").get, config=StreamConfig(batch_size=1), stamp={})
    seen = []
    submit = model.submit

    def noted(*args: Any, **options: Any) -> Any:
        seen.append(stream.counts())
        return submit(*args, **options)

    model.submit = noted  # type: ignore[method-assign]
    try:
        stream.submit(pa.table(columns, schema=WORK), lambda rows: None).result(timeout=60)
        after = stream.counts()
    finally:
        stream.close()
    assert (after.rows, after.tiles, after.tiles_done) == (1, 0, 0)
    if last == "whole.tif":
        assert {counts.tiles for counts in seen} == {len(seen)} == {36}
        assert [counts.tiles_done for counts in seen] == sorted(counts.tiles_done for counts in seen)
        assert 0 < seen[-1].tiles_done < 36
    else:
        assert after.errors == 1


def test_only_what_is_read_by_window_may_be_larger_than_memory(corpus: list[Path]) -> None:
    rows = rows_of(tiny(CARDS["semantic"]), corpus, max_pixels=16_000)
    kinds = {name: row["error_kind"] if row["status"] == "error" else "ok" for name, row in rows.items()}
    assert kinds["5.png"] == "too_large" and kinds["0.tif"] == "ok"
    rows = rows_of(tiny(CARDS["semantic"]), corpus, max_pixels=1_000, max_tiled_pixels=20_000)
    assert rows["0.tif"]["error_kind"] == "too_large" and "20000" in rows["0.tif"]["error_message"]


@pytest.mark.parametrize("policy", [None, TILES])
def test_bands_of_sixteen_bits(tmp_path: Path, policy: TilePolicy | None) -> None:
    """Five bands of which the network takes three, in an order of its own."""
    preprocessing = Preprocessing(bands=(4, 0, 2), dtype="uint16", value_range=(0, 10_000), normalization="per_image")
    fields: dict[str, Any] = {"preprocessing": preprocessing}
    if policy is not None:
        fields["size_policy"] = policy
    card = card_for("bands", "unet", {"encoder_depth": 3, "decoder_channels": [8, 8, 8]}, **fields)
    samples = smooth(100, 130, bands=5).astype(np.uint16) * 39
    tifffile.imwrite(tmp_path / "five.tif", samples, photometric="minisblack", planarconfig="contig")
    Image.fromarray(smooth(50, 50)).save(tmp_path / "eight.png")
    rows = rows_of(tiny(card), [tmp_path / "five.tif", tmp_path / "eight.png"])
    assert rows["five.tif"]["status"] == "ok", rows["five.tif"]["error_message"]
    assert rows["five.tif"]["brightness"] == pytest.approx(samples[..., [4, 0, 2]].mean() / 10_000, abs=0.02)
    assert rows["eight.png"]["error_kind"] == "unsupported" and "bands" in rows["eight.png"]["error_message"]


@pytest.mark.parametrize("settings", [
    {"augmentation": {"flips": ["horizontal"]}},
    {"crf": {"window_px": 3, "iterations": 1}},
    {"cleanup": {"min_region_area_px": 40}},
])  # fmt: skip
def test_what_comes_after_the_network_changes_the_mask_and_only_it(
    corpus: list[Path], settings: dict[str, Any]
) -> None:
    make: Callable[[Card], Segmenter] = tiny
    plain = rows_of(make(CARDS["semantic"]), corpus)
    changed = rows_of(make(with_settings(CARDS["semantic"], settings)), corpus)
    assert any(plain[name]["mask"] != changed[name]["mask"] for name in plain)
    for name in plain:
        assert changed[name]["status"] == "ok"
        assert changed[name]["brightness"] == plain[name]["brightness"]
        assert (
            sum(one["pixels"] for one in changed[name]["classes"]) == changed[name]["width"] * changed[name]["height"]
        )


def disc_model(**settings: Any) -> Segmenter:
    card = with_settings(detector_card(), settings)
    return Segmenter(copy.deepcopy(disc_detector()), card, device="cpu", precision="fp32")


def agree_on_discs(rows: list[dict[str, Any]], masks: list[np.ndarray]) -> None:
    """Each disc is found once, and all of it."""
    for row in rows:
        assert row["status"] == "ok", row["error_message"]
        found = [decode_rle(one["rle"]) for one in row["instances"]]
        assert len(found) == len(masks)
        for mask in masks:
            overlaps = [np.count_nonzero(one & mask) / np.count_nonzero(one | mask) for one in found]
            assert max(overlaps) > 0.75
    pictures = [decode_mask_png(row["mask"]["bytes"]) for row in rows]
    for picture in pictures[1:]:
        assert np.mean(picture != pictures[0]) < 0.005


@pytest.mark.parametrize("tile_px", [96, 128])
def test_objects_are_found_whole_in_tiles_wherever_these_lie(
    tile_px: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a strip as high as the network looks, so that whole and in tiles it is looked at in one scale."""
    pixels, masks = draw_discs(SIDE_PX, 500, 18, seed=1)
    Image.fromarray(pixels).save(tmp_path / "strip.png")
    whole = rows_of(disc_model(), [tmp_path / "strip.png"])["strip.png"]
    policy = {"size_policy": {"kind": "tile", "tile_px": tile_px, "overlap_px": 40}}
    tiled = rows_of(disc_model(**policy), [tmp_path / "strip.png"], batch_size=2)["strip.png"]
    grid = segmenter_module.TileGrid
    monkeypatch.setattr(segmenter_module, "TileGrid", functools.partial(grid, offset=(0, 23)))
    shifted = rows_of(disc_model(**policy), [tmp_path / "strip.png"])["strip.png"]
    assert len({row["mean_confidence"] for row in (whole, tiled, shifted)}) == 3, "they were in other tiles"
    agree_on_discs([whole, tiled, shifted], masks)


def test_a_field_of_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Corners, where four tiles see one object; `top_k` is of the image."""
    pixels, masks = draw_discs(300, 260, 30, seed=2)
    tifffile.imwrite(tmp_path / "field.tif", pixels, tile=(32, 32), photometric="rgb")
    policy = {"size_policy": {"kind": "tile", "tile_px": SIDE_PX, "overlap_px": 40}}
    model = disc_model(**policy)
    tiled = rows_of(model, [tmp_path / "field.tif"], batch_size=4)["field.tif"]
    best = rows_of(disc_model(**policy, postprocessing={"top_k": 7}), [tmp_path / "field.tif"])["field.tif"]
    assert best["instances"] == tiled["instances"][:7]
    grid = segmenter_module.TileGrid
    monkeypatch.setattr(segmenter_module, "TileGrid", functools.partial(grid, offset=(31, 17)))
    shifted = rows_of(model, [tmp_path / "field.tif"])["field.tif"]
    agree_on_discs([tiled, shifted], masks)


def test_detectors_take_what_fits_into_a_tile_as_it_is(tmp_path: Path) -> None:
    """Padded to a tile it would be another image."""
    pixels, _ = draw_discs(80, 96, 6, seed=3)
    Image.fromarray(pixels).save(tmp_path / "small.png")
    policy = {"size_policy": {"kind": "tile", "tile_px": 96, "overlap_px": 40}}
    rows = [rows_of(model, [tmp_path / "small.png"])["small.png"] for model in (disc_model(), disc_model(**policy))]
    assert len(rows[0]["instances"]) == 6
    assert rows[0]["instances"] == rows[1]["instances"] and rows[0]["mask_crc32"] == rows[1]["mask_crc32"]


def test_detections_in_tiles(tmp_path: Path) -> None:
    """Mask R-CNN with weights that find much: objects of all tiles, each inside the image, one class map over them."""
    card = with_settings(
        small_card("maskrcnn_mobilenet_v3_large_fpn"),
        {"size_policy": {"kind": "tile", "tile_px": 96, "overlap_px": 32}, "postprocessing": {"top_k": 8}},
    )
    model = Segmenter(distinct_network(card), card, device="cpu", precision="fp32")
    for index, size in enumerate([(100, 150), (64, 96)]):
        Image.fromarray(smooth(*size, seed=index)).save(tmp_path / f"{index}.png")
    rows = rows_of(model, [tmp_path / "0.png", tmp_path / "1.png"])
    large, small = rows["0.png"], rows["1.png"]
    assert large["status"] == small["status"] == "ok", large["error_message"]
    assert len(large["instances"]) == 8, "top_k of all tiles together"
    assert 0 < len(small["instances"]) <= 8
    scores = [one["score"] for one in large["instances"]]
    assert scores == sorted(scores, reverse=True)
    mask = decode_mask_png(large["mask"]["bytes"])
    covered = np.zeros(mask.shape, bool)
    for one in large["instances"]:
        assert one["rle"]["size"] == [100, 150]
        covered |= decode_rle(one["rle"])
    assert np.array_equal(mask > 0, covered)
    assert sum(entry["pixels"] for entry in large["classes"]) == mask.size
