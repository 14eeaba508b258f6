from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from small_networks import make_image, small_card
from torchvision.transforms.v2 import functional as v2

from models.card import Card
from models.fitting import Fit, fit_size, lies_as_it_is, place, resize


def card_of(policy: Any, **fields: Any) -> Card:
    return small_card("unet", size_policy=policy, **fields)


@pytest.mark.parametrize(
    ("policy", "size", "fit"),
    [
        ("native", (5, 17), (5, 17, 8, 24)),
        ({"kind": "resize", "short_side_px": 20}, (100, 150), (20, 30, 24, 32)),
        ({"kind": "resize", "short_side_px": 20}, (151, 100), (30, 20, 32, 24)),
        ({"kind": "resize", "short_side_px": 20, "long_side_px": 25}, (100, 150), (16, 25, 16, 32)),
        ({"kind": "resize", "short_side_px": 20, "long_side_px": 25}, (1, 9000), (1, 25, 8, 32)),
        ({"kind": "resize", "short_side_px": 20}, (3, 3), (20, 20, 24, 24)),
        ({"kind": "letterbox", "height_px": 16, "width_px": 32}, (100, 100), (16, 16, 16, 32)),
        ({"kind": "letterbox", "height_px": 16, "width_px": 32}, (1, 1000), (1, 32, 16, 32)),
        ({"kind": "tile", "tile_px": 64}, (64, 3), (64, 3, 64, 64)),
    ],
)
def test_sizes(policy: Any, size: tuple[int, int], fit: tuple[int, ...]) -> None:
    assert fit_size(card_of(policy), *size) == Fit(*fit)


@pytest.mark.parametrize(("height", "width"), [(480, 640), (333, 1000), (1000, 333), (37, 53), (521, 520), (7, 300)])
@pytest.mark.parametrize("long_side_px", [None, 700])
def test_resized_sizes_are_torchvisions(height: int, width: int, long_side_px: int | None) -> None:
    fit = fit_size(card_of({"kind": "resize", "short_side_px": 520, "long_side_px": long_side_px}), height, width)
    image = torch.empty(1, height, width, device="meta")
    assert (fit.height, fit.width) == v2.resize(image, [520], max_size=long_side_px).shape[1:]


def test_what_a_policy_cannot_serve() -> None:
    with pytest.raises(ValueError, match=r"would become 180000 long at a short side of 20: give .* a long_side_px"):
        fit_size(card_of({"kind": "resize", "short_side_px": 20}), 1, 9000)
    with pytest.raises(ValueError, match="more than one tile of 64: cut the image into tiles first"):
        fit_size(card_of({"kind": "tile", "tile_px": 64}), 65, 3)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("size", [(20, 30), (90, 41), (40, 61)])
def test_resizing_is_torchvisions(dtype: str, size: tuple[int, int]) -> None:
    pixels = make_image(40, 61, seed=1, dtype=dtype)
    image_CHW = torch.from_numpy(pixels.astype(np.float32) if dtype == "uint16" else pixels).permute(2, 0, 1)
    expected = v2.resize(image_CHW, list(size), antialias=True).permute(1, 2, 0).numpy()
    result = resize(pixels, *size)
    assert result.dtype == pixels.dtype
    if dtype == "uint8":
        # Where the processor lacks AVX2 torchvision computes in float32 first.
        assert np.abs(result.astype(int) - expected).max() <= 1
    else:
        assert np.allclose(result, expected, atol=0.51 if dtype == "uint16" else 1e-6)


def test_the_edge_is_repeated_over_the_rest() -> None:
    pixels = make_image(5, 7, seed=1)
    out = np.full((8, 8, 3), 99, np.uint8)
    assert place(card_of("native"), pixels, out) == (5, 7)
    assert np.array_equal(out, np.pad(pixels, ((0, 3), (0, 1), (0, 0)), mode="edge"))
    there = np.full((8, 8, 3), 99, np.uint8)
    there[:5, :7] = pixels
    place(card_of("native"), there[:5, :7], there)
    assert np.array_equal(there, out)


def test_what_may_be_decoded_in_place() -> None:
    assert lies_as_it_is(card_of("native"))
    assert lies_as_it_is(card_of({"kind": "tile", "tile_px": 64}))
    assert not lies_as_it_is(card_of({"kind": "resize", "short_side_px": 20}))
    assert not lies_as_it_is(card_of("native", preprocessing={"bands": [2, 1, 0]}))
    assert not lies_as_it_is(card_of("native", preprocessing={"dtype": "uint16"}))


def test_a_canvas_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the canvas must be uint8 \(8, 8, 3\), got uint8 \(8, 16, 3\)"):
        place(card_of("native"), make_image(5, 7, seed=1), np.zeros((8, 16, 3), np.uint8))


def test_pixels_that_may_not_be_written_are_resized_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    pixels = make_image(20, 30, 1)
    pixels.setflags(write=False)
    assert resize(pixels, 10, 15).shape == (10, 15, 3)
    assert not recwarn.list
