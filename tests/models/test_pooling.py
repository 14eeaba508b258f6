"""Pooling of regions, against torchvision's."""

from __future__ import annotations

import pytest
import torch
from torchvision.ops import MultiScaleRoIAlign

from models.pooling import RegionMaps

pytestmark = pytest.mark.usefixtures("one_thread")

FINEST = [(50, 60), (1, 1), (3, 40)]


def maps_of(height: int, width: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Of two images and three levels, the second half as fine as the first, and one that no pooler names."""
    torch.manual_seed(0)
    sizes = {"0": (height, width), "1": (-(-height // 2), -(-width // 2)), "2": (-(-height // 4), -(-width // 4))}
    maps = {name: torch.randn(2, 6, *size).to(dtype) for name, size in sizes.items()}
    return maps | {"pool": torch.full((2, 6, 1, 1), torch.nan)}


def boxes_of(count: int, height: int, width: int) -> torch.Tensor:
    """Of all sizes and levels, in the image, at its edges, and beyond."""
    torch.manual_seed(count)
    corners = torch.rand(count, 2, 2) * torch.tensor([width, height]) * 1.2 - torch.tensor([width, height]) * 0.1
    low, high = corners.amin(dim=1), corners.amax(dim=1)
    boxes = torch.cat([low, low + (high - low) * torch.rand(count, 1) ** 3 + 0.01], dim=1)
    odd = [[0, 0, width, height], [0, 0, 0.01, 0.01], [width - 0.01, height - 0.01, width, height]]
    far = [[-width, -height, 3 * width, 3 * height], [2 * width, 0, 3 * width, 9], [-900, -900, -800, -800]]
    return torch.cat([boxes, torch.tensor(odd + far, dtype=torch.float32)])


@pytest.mark.parametrize("size", FINEST)
@pytest.mark.parametrize(
    ("output_size", "samples", "names"), [(7, 2, "012"), (14, 2, "012"), ((3, 5), 1, "12"), (4, 3, "1")]
)
def test_as_torchvisions(size: tuple[int, int], output_size: int, samples: int, names: str) -> None:
    height, width = size[0] * 4, size[1] * 4
    boxes = [boxes_of(90, height, width), boxes_of(40, height, width)]
    sizes = [(height, width), (height - 1, width)]
    maps = maps_of(*size)
    pooler = MultiScaleRoIAlign(list(names), output_size, samples)
    expected = pooler(maps, boxes, sizes)
    found = RegionMaps(maps, sizes).pool(pooler, boxes)
    assert found.shape == expected.shape and found.dtype == torch.float32
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert (found - expected).abs().max() < 1e-5
    assert (expected.abs() > 0.1).any()


def test_maps_in_bf16_are_widened() -> None:
    pooler = MultiScaleRoIAlign(["0", "1", "2"], 7, 2)
    boxes, sizes = [boxes_of(50, 200, 240), boxes_of(0, 200, 240)], [(200, 240)] * 2
    maps = maps_of(50, 60, torch.bfloat16)
    expected = pooler({name: level.float() for name, level in maps.items()}, boxes, sizes)
    assert (RegionMaps(maps, sizes).pool(pooler, boxes) - expected).abs().max() < 1e-5


def test_other_sizes_do_not_matter_afterwards() -> None:
    pooler = MultiScaleRoIAlign(["0", "1", "2"], 7, 2)
    boxes, sizes = [boxes_of(50, 200, 240)] * 2, [(200, 240)] * 2
    first = RegionMaps(maps_of(50, 60), sizes).pool(pooler, boxes)
    RegionMaps(maps_of(90, 30), [(720, 240)] * 2).pool(pooler, boxes)
    assert torch.equal(RegionMaps(maps_of(50, 60), sizes).pool(pooler, boxes), first)


@pytest.mark.parametrize("samples", [2, 0])
def test_of_no_boxes_there_is_nothing(samples: int) -> None:
    pooler = MultiScaleRoIAlign(["0", "1", "2"], 7, samples)
    nothing = torch.zeros(0, 4)
    assert RegionMaps(maps_of(50, 60), [(200, 240)] * 2).pool(pooler, [nothing, nothing]).shape == (0, 6, 7, 7)


def test_as_many_samples_as_torchvision_chooses() -> None:
    pooler = MultiScaleRoIAlign(["0", "1", "2"], 7, 0)
    boxes, sizes = [boxes_of(50, 200, 240)] * 2, [(200, 240)] * 2
    assert torch.equal(RegionMaps(maps_of(50, 60), sizes).pool(pooler, boxes), pooler(maps_of(50, 60), boxes, sizes))


def test_boxes_that_are_not_finite_spoil_no_other() -> None:
    pooler = MultiScaleRoIAlign(["0", "1", "2"], 7, 2)
    boxes = boxes_of(50, 200, 240)
    sizes = [(200, 240)] * 2
    expected = RegionMaps(maps_of(50, 60), sizes).pool(pooler, [boxes, boxes])
    broken = boxes.clone()
    broken[3, 2], broken[5] = torch.inf, torch.nan
    found = RegionMaps(maps_of(50, 60), sizes).pool(pooler, [broken, boxes])
    whole = [index for index in range(2 * len(boxes)) if index not in (3, 5)]
    assert torch.equal(found[whole], expected[whole])
