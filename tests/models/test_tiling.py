from __future__ import annotations

import itertools
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from handmade import picture
from hypothesis import given, settings
from hypothesis import strategies as st

from models.architectures import untrained_card
from models.card import Card, ClassInfo
from models.tiling import Band, Summary, TileBlender, TileGrid, Window


def card_of(channels: int) -> Card:
    classes = tuple(ClassInfo(id=2 * i, name=f"class {i}", color=(i, i, i)) for i in range(channels))
    return untrained_card("tiled", task="semantic").model_copy(update={"classes": classes, "background_id": None})


INSTANCES = untrained_card("tiled", task="instance")


def random_tiles(grid: TileGrid, channels: int, dtype: torch.dtype = torch.float16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    tiles = []
    for window in grid.windows():
        logits = torch.randn((channels, window.height, window.width), generator=generator) * 2
        probabilities = logits.softmax(dim=0)
        tiles.append((probabilities * 255).round().to(dtype) if dtype == torch.uint8 else probabilities.to(dtype))
    return tiles


def blend(
    grid: TileGrid, card: Card, tiles: list[torch.Tensor], order: list[int] | None = None
) -> tuple[list[Band], Summary]:
    blender = TileBlender(grid, card)
    windows = grid.windows()
    bands = [band for i in order or range(len(grid)) for band in blender.add(windows[i], tiles[i])]
    return bands, blender.summary()


def mosaic(bands: list[Band], field: str = "class_ids") -> np.ndarray:
    return np.concatenate([getattr(band, field) for band in bands])


@settings(max_examples=80, deadline=None)
@given(data=st.data(), height=st.integers(1, 90), width=st.integers(1, 90), tile_px=st.integers(1, 40))
def test_every_pixel_lies_in_a_window_and_windows_overlap(
    data: st.DataObject, height: int, width: int, tile_px: int
) -> None:
    overlap_px = data.draw(st.integers(0, tile_px - 1))
    multiple = data.draw(st.integers(1, 9))
    step = tile_px - overlap_px
    step -= step % multiple if step >= multiple else 0
    offset = (data.draw(st.integers(0, step - 1)), data.draw(st.integers(0, step - 1)))
    grid = TileGrid(height, width, tile_px=tile_px, overlap_px=overlap_px, multiple=multiple, offset=offset)
    covered = np.zeros((height, width), int)
    windows = grid.windows()
    for window in windows:
        assert 1 <= window.height <= min(tile_px, height) and 1 <= window.width <= min(tile_px, width)
        assert window.y + window.height == min(window.y + tile_px, height)
        assert window.x + window.width == min(window.x + tile_px, width)
        covered[window.y : window.y + window.height, window.x : window.x + window.width] += 1
    assert covered.min() >= 1
    assert len(windows) == len(grid) and windows == sorted(windows)
    for starts in (grid.rows.starts, grid.columns.starts):
        assert all(after - before <= step for before, after in itertools.pairwise(starts))


def test_windows_are_where_one_expects_them() -> None:
    grid = TileGrid(100, 230, tile_px=100, overlap_px=20)
    assert grid.windows() == [
        Window(0, 0, 0, 0, 100, 100),
        Window(0, 1, 0, 80, 100, 100),
        Window(0, 2, 0, 130, 100, 100),
    ]
    shifted = TileGrid(100, 230, tile_px=100, overlap_px=20, offset=(0, 30))
    assert [window.x for window in shifted.windows()] == [0, 30, 110, 130]
    assert TileGrid(7, 9, tile_px=100, overlap_px=20).windows() == [Window(0, 0, 0, 0, 7, 9)]


def test_tiles_begin_at_multiples_and_end_with_the_padded_image() -> None:
    grid = TileGrid(96, 230, tile_px=96, overlap_px=20, multiple=16)
    assert [(window.x, window.width) for window in grid.windows()] == [(0, 96), (64, 96), (128, 96), (144, 86)]
    assert 144 + 96 == 240, "230 padded to a multiple of 16"
    too_fine = TileGrid(32, 70, tile_px=32, overlap_px=20, multiple=16)
    assert [window.x for window in too_fine.windows()] == [0, 12, 24, 36, 38]


@pytest.mark.parametrize(
    "wrong", [{"tile_px": 8, "overlap_px": 8}, {"height": 0}, {"offset": (6, 0)}, {"offset": (0, -1)}]
)
def test_impossible_grids_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="must be"):
        TileGrid(**({"height": 20, "width": 20, "tile_px": 8, "overlap_px": 2} | wrong))


def test_weights_add_up_to_one_and_fall_off_from_the_centre() -> None:
    grid = TileGrid(100, 100, tile_px=40, overlap_px=12)
    for axis in (grid.rows, grid.columns):
        for weights, over in zip(axis.weights, axis.tiles_over, strict=True):
            assert weights.shape[0] == len(over)
            assert np.allclose(weights.sum(axis=0), 1, atol=1e-6)
        first_over_two = next(weights for weights in axis.weights if len(weights) == 2)
        assert (np.diff(first_over_two[0]) < 0).all() and (np.diff(first_over_two[1]) > 0).all()


@pytest.mark.parametrize("multiple", [1, 8])
def test_spans_lie_under_exactly_their_tiles(multiple: int) -> None:
    axis = TileGrid(333, 1, tile_px=40, overlap_px=30, multiple=multiple, offset=(7, 0)).rows
    for span, over in enumerate(axis.tiles_over):
        begin, end = axis.edges[span : span + 2]
        inside = [
            i for i, ends in enumerate(zip(axis.starts, axis.ends, strict=True)) if ends[0] <= begin and end <= ends[1]
        ]
        assert list(over) == inside
        assert all(span in axis.spans_under(tile) for tile in inside)
    assert sum(len(over) for over in axis.tiles_over) == sum(len(axis.spans_under(t)) for t in range(len(axis.starts)))


def test_a_long_axis_takes_time_by_its_length_and_no_more() -> None:
    """Hours, were every tile compared with every span."""
    rows = TileGrid(100_000_000, 1, tile_px=512, overlap_px=128).rows
    assert len(rows.tiles_over) == len(rows.weights) == len(rows.edges) - 1
    last = len(rows.starts) - 1
    assert rows.spans_under(last)[-1] == len(rows.tiles_over) - 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.uint8])
@pytest.mark.parametrize("task", ["semantic", "instance"])
def test_the_order_of_tiles_changes_no_bit(dtype: torch.dtype, task: str) -> None:
    grid = TileGrid(75, 90, tile_px=32, overlap_px=10, offset=(5, 3))
    card = card_of(5) if task == "semantic" else INSTANCES
    tiles = random_tiles(grid, card.network_channels, dtype)
    bands, summary = blend(grid, card, tiles)
    for seed in range(6):
        order = list(range(len(grid)))
        random.Random(seed).shuffle(order)
        other, other_summary = blend(grid, card, tiles, order)
        assert [band.y for band in other] == [band.y for band in bands]
        for field in ("class_ids",) if task == "semantic" else ("class_ids", "interior", "foreground"):
            assert np.array_equal(mosaic(other, field), mosaic(bands, field))
        assert other_summary.pixels.tolist() == summary.pixels.tolist()
        assert other_summary.confidence.tobytes() == summary.confidence.tobytes()
        assert other_summary[2:] == summary[2:]


def test_tiles_from_several_threads_change_no_bit() -> None:
    grid = TileGrid(200, 150, tile_px=48, overlap_px=16)
    tiles = random_tiles(grid, 4)
    expected, summary = blend(grid, card_of(4), tiles)
    for _ in range(5):
        blender = TileBlender(grid, card_of(4))
        image = np.zeros((200, 150), np.uint8)
        lock = threading.Lock()

        def add(index: int, blender=blender, image=image, lock=lock) -> None:
            for band in blender.add(grid.windows()[index], tiles[index]):
                with lock:
                    image[band.y : band.y + len(band.class_ids)] = band.class_ids

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(add, range(len(grid))))
        assert np.array_equal(image, mosaic(expected))
        assert blender.summary().mean_entropy == summary.mean_entropy


def test_blending_is_the_weighted_mean() -> None:
    grid = TileGrid(50, 44, tile_px=24, overlap_px=9)
    tiles = random_tiles(grid, 3, torch.float32)
    line = np.exp(-0.5 * ((np.arange(24) - 11.5) / 3) ** 2)

    def along(start: int, size: int) -> np.ndarray:
        """Weights fall off towards other tiles only, not towards the image's edge."""
        weights = line.copy()
        if start == 0:
            weights[:12] = line.max()
        if start + 24 == size:
            weights[12:] = line.max()
        return weights

    total, weight = np.zeros((3, 50, 44)), np.zeros((50, 44))
    for window, tile in zip(grid.windows(), tiles, strict=True):
        place = np.s_[window.y : window.y + 24, window.x : window.x + 24]
        weights = np.outer(along(window.y, 50), along(window.x, 44))
        total[(slice(None), *place)] += tile.numpy() * weights
        weight[place] += weights
    mean = total / weight
    bands, summary = blend(grid, card_of(3), tiles)
    clear = np.sort(mean, axis=0)
    decided = clear[-1] - clear[-2] > 1e-5
    assert decided.mean() > 0.99
    assert np.array_equal(mosaic(bands)[decided], 2 * mean.argmax(axis=0)[decided])
    assert summary.mean_confidence == pytest.approx(mean.max(axis=0).mean(), abs=1e-5)
    entropy = -(mean * np.log(mean)).sum(axis=0).mean() / np.log(3)
    assert summary.mean_entropy == pytest.approx(entropy, abs=1e-5)
    for index in range(3):
        mine = mean.argmax(axis=0) == index
        assert summary.pixels[index] == pytest.approx(mine.sum(), abs=2)
        assert summary.confidence[index] == pytest.approx(mean[index][mine].mean(), abs=1e-4)


def test_one_tile_is_the_untiled_answer() -> None:
    from models.architectures import build
    from models.preprocessing import image_statistics
    from models.segmenter import Segmenter

    pixels = np.array(picture(3, width=64, height=64))
    statistics = np.array([image_statistics(pixels)], np.float32)
    for task in ("semantic", "instance"):
        torch.manual_seed(0)
        card = untrained_card("whole", task=task)
        module = build(card)
        probabilities: list[torch.Tensor] = []
        module.register_forward_hook(lambda *call, into=probabilities: into.append(call[2][0].float().softmax(dim=0)))
        segmenter = Segmenter(module, card, device="cpu", precision="fp32")
        (whole,) = segmenter.finish(segmenter.submit(pixels[None], np.array([[64, 64]], np.int32), statistics))
        blender = TileBlender(TileGrid(64, 64, tile_px=64, overlap_px=8), card)
        (band,) = blender.add(Window(0, 0, 0, 0, 64, 64), probabilities[0])
        summary = blender.summary()
        assert np.array_equal(band.class_ids, whole.class_ids)
        assert summary.pixels.tolist() == whole.pixels.tolist()
        assert np.allclose(summary.confidence, whole.confidence, atol=1e-6, equal_nan=True)
        assert summary.mean_confidence == pytest.approx(whole.mean_confidence, abs=1e-6)
        assert summary.mean_entropy == pytest.approx(whole.mean_entropy, abs=1e-5)
        if whole.instance_evidence is not None:
            assert np.abs(band.foreground.astype(int) - whole.instance_evidence["foreground"]).max() <= 1
            assert np.abs(band.interior.astype(int) - whole.instance_evidence["interior"]).max() <= 1


def test_bands_come_as_soon_as_they_can() -> None:
    grid = TileGrid(100, 60, tile_px=40, overlap_px=10)
    tiles = random_tiles(grid, 2)
    blender = TileBlender(grid, card_of(2))
    done = 0
    for window, tile in zip(grid.windows(), tiles, strict=True):
        bands = blender.add(window, tile)
        assert not bands or window.column == len(grid.columns.starts) - 1
        for band in bands:
            assert band.y == done
            done += len(band.class_ids)
        if bands:
            later = window.row + 1
            assert done == (grid.rows.starts[later] if later < len(grid.rows.starts) else 100)
    assert done == 100


def test_nan_is_seen_and_wrong_tiles_are_refused() -> None:
    grid = TileGrid(30, 30, tile_px=20, overlap_px=4)
    tiles = random_tiles(grid, 3)
    tiles[2][:, 5, 5] = float("nan")
    _, summary = blend(grid, card_of(3), tiles)
    assert np.isnan(summary.mean_confidence) and np.isnan(summary.mean_entropy)
    blender = TileBlender(grid, card_of(3))
    first = grid.windows()[0]
    with pytest.raises(ValueError, match="probabilities must be"):
        blender.add(first, tiles[0][:2])
    with pytest.raises(ValueError, match="probabilities must be"):
        blender.add(first, tiles[0].double())
    blender.add(first, tiles[0])
    with pytest.raises(ValueError, match="has come before"):
        blender.add(first, tiles[0])
    with pytest.raises(ValueError, match="3 of 4 tiles are missing"):
        blender.summary()


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    """A convolutional network with smooth random weights: sees 13 pixels around each."""
    torch.manual_seed(1)
    layers: list[torch.nn.Module] = []
    for inputs, outputs in ((3, 8), (8, 8), (8, 4)):
        layers += [torch.nn.Conv2d(inputs, outputs, 5, padding=2, padding_mode="replicate"), torch.nn.Tanh()]
    return torch.nn.Sequential(*layers).eval()


def segment(network: torch.nn.Module, image: torch.Tensor, grid: TileGrid) -> np.ndarray:
    blender = TileBlender(grid, card_of(4))
    bands: list[Band] = []
    with torch.inference_mode():
        for window in grid.windows():
            crop = image[:, window.y : window.y + window.height, window.x : window.x + window.width]
            bands += blender.add(window, (network(crop[None])[0] * 4).softmax(dim=0).half())
    return mosaic(bands)


def test_a_shifted_grid_hardly_changes_the_answer(network: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn((1, 3, 30, 36), generator=generator)
    image = torch.nn.functional.interpolate(noise, size=(300, 360), mode="bicubic")[0]
    whole = segment(network, image, TileGrid(300, 360, tile_px=360, overlap_px=0))
    assert len(np.unique(whole)) == 4
    plain = segment(network, image, TileGrid(300, 360, tile_px=96, overlap_px=32))
    assert (plain != whole).mean() < 0.005
    for offset in ((17, 40), (32, 32), (63, 1)):
        shifted = segment(network, image, TileGrid(300, 360, tile_px=96, overlap_px=32, offset=offset))
        assert (shifted != plain).mean() < 0.005
    bare = segment(network, image, TileGrid(300, 360, tile_px=96, overlap_px=0))
    assert (bare != whole).mean() > 2 * (plain != whole).mean()
