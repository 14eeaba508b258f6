from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from models.augmented import average_probabilities, scaled_px
from models.probabilities import pixel_softmax
from models.refinement import AugmentationSettings

ALL_FLIPS = AugmentationSettings(flips=("horizontal", "vertical", "both"))


def pointwise(inputs_NCHW: torch.Tensor) -> torch.Tensor:
    """Equivariant: each pixel's logits depend on that pixel only."""
    weights = torch.tensor([[1.0, -2.0, 0.5], [0.3, 1.0, -1.0]]).to(inputs_NCHW)
    return torch.einsum("oc,nchw->nohw", weights, inputs_NCHW)


def leaning(inputs_NCHW: torch.Tensor) -> torch.Tensor:
    """Not equivariant: each pixel sees its right and lower neighbours, and the borders of the canvas."""
    kernel = torch.arange(2 * 3 * 9, dtype=torch.float32).view(2, 3, 3, 3).sin()
    kernel[..., 0, :] = 0
    return functional.conv2d(inputs_NCHW, kernel, padding=1)


def pictures(count: int = 2, height: int = 16, width: int = 24) -> torch.Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_flips_change_nothing_for_an_equivariant_network(layout: torch.memory_format) -> None:
    inputs = pictures().contiguous(memory_format=layout)
    averaged = average_probabilities(pointwise, inputs, ALL_FLIPS, canvas_multiple=8)
    assert averaged.dtype == torch.float32
    torch.testing.assert_close(averaged, pointwise(inputs).softmax(dim=1), rtol=0, atol=1e-6)


def test_scales_change_nothing_where_there_is_nothing_to_resample() -> None:
    inputs = torch.ones(1, 3, 16, 16) * torch.tensor([0.2, -1.0, 0.7]).view(1, 3, 1, 1)
    settings = AugmentationSettings(flips=("both",), scales=(0.5, 1.0, 1.7))
    averaged = average_probabilities(pointwise, inputs, settings, canvas_multiple=8)
    torch.testing.assert_close(averaged, pointwise(inputs).softmax(dim=1), rtol=0, atol=1e-6)


def test_no_view_but_the_image_itself_is_softmax() -> None:
    inputs = pictures()
    assert torch.equal(
        average_probabilities(leaning, inputs, AugmentationSettings(), canvas_multiple=8),
        pixel_softmax(leaning(inputs)),
    )


def test_it_is_the_average_computed_by_hand() -> None:
    inputs = pictures()
    settings = AugmentationSettings(flips=("horizontal", "vertical"), scales=(1.0, 1.5))
    averaged = average_probabilities(leaning, inputs, settings, canvas_multiple=8)
    parts = []
    for size in ((16, 24), (24, 40)):  # 24 * 1.5 = 36, of which 40 is the nearest multiple of 8 (halves go up).
        for dims in ((), (3,), (2,)):
            view = functional.interpolate(inputs.flip(dims), size, mode="bilinear", align_corners=False)
            logits = functional.interpolate(leaning(view), (16, 24), mode="bilinear", align_corners=False)
            parts.append(logits.softmax(dim=1).flip(dims))
    torch.testing.assert_close(averaged, torch.stack(parts).mean(dim=0), rtol=0, atol=1e-6)
    assert not torch.allclose(averaged, parts[0], atol=1e-2)


@pytest.mark.parametrize("flip", ["horizontal", "vertical", "both"])
def test_a_padded_image_is_flipped_within_its_canvas(flip: str) -> None:
    """As if the flipped image itself had been padded by repeating its last row and column."""
    dims = {"horizontal": (3,), "vertical": (2,), "both": (2, 3)}[flip]
    height, width = 11, 19
    content = pictures(1, height, width)

    def padded(image: torch.Tensor) -> torch.Tensor:
        return functional.pad(image, (0, 24 - width, 0, 16 - height), mode="replicate")

    inputs = torch.cat([pictures(1), padded(content), pictures(1)])
    sizes = torch.tensor([[16, 24], [height, width], [0, 0]])
    settings = AugmentationSettings.model_validate({"flips": (flip,)})
    averaged = average_probabilities(leaning, inputs, settings, canvas_multiple=8, sizes_N2=sizes)
    valid = (..., slice(height), slice(width))
    turned = leaning(padded(content.flip(dims))).softmax(dim=1)[valid].flip(dims)
    expected = (leaning(padded(content)).softmax(dim=1)[valid] + turned) / 2
    torch.testing.assert_close(averaged[1:2][valid], expected, rtol=0, atol=1e-6)
    alone = average_probabilities(leaning, inputs[:1], settings, canvas_multiple=8)
    torch.testing.assert_close(averaged[:1], alone, rtol=0, atol=1e-6)


def test_equal_inputs_give_equal_results_and_stay_as_they_are() -> None:
    inputs = pictures()
    before = inputs.clone()
    settings = AugmentationSettings(flips=("horizontal",), scales=(0.75, 1.0))
    first, second = (average_probabilities(leaning, inputs, settings, canvas_multiple=8) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(inputs, before)
    torch.testing.assert_close(first.sum(dim=1), torch.ones(2, 16, 24))


def test_the_network_meets_only_sizes_and_layouts_it_can_take() -> None:
    seen: list[tuple[int, ...]] = []

    def recorded(network: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        def run(inputs_NCHW: torch.Tensor) -> torch.Tensor:
            assert inputs_NCHW.is_contiguous(memory_format=torch.channels_last)
            assert inputs_NCHW.dtype == torch.bfloat16
            seen.append(tuple(inputs_NCHW.shape[2:]))
            return network(inputs_NCHW)

        return run

    settings = AugmentationSettings(flips=("vertical",), scales=(0.25, 1.3))
    inputs = pictures(2, 32, 64).bfloat16().contiguous(memory_format=torch.channels_last)
    averaged = average_probabilities(recorded(pointwise), inputs, settings, canvas_multiple=32)
    assert seen == [(32, 32), (32, 32), (32, 96), (32, 96)]
    assert averaged.dtype == torch.float32 and averaged.shape == (2, 2, 32, 64)


@pytest.mark.parametrize(
    ("side_px", "scale", "expected"),
    [(64, 0.5, 32), (64, 0.125, 32), (96, 1.5, 160), (96, 1.2, 128), (96, 1.0, 96), (64, 1.25, 96)],
)
def test_scaled_sides(side_px: int, scale: float, expected: int) -> None:
    assert scaled_px(side_px, scale, 32) == expected
