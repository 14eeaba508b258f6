from __future__ import annotations

import pytest
import torch

from models.probabilities import pixel_softmax


def logits(count: int, channels: int, height: int, width: int) -> torch.Tensor:
    return torch.randn(count, channels, height, width, generator=torch.Generator().manual_seed(0)) * 4


@pytest.mark.parametrize("channels", [1, 2, 11, 150])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_it_is_softmax(channels: int, layout: torch.memory_format) -> None:
    given = logits(2, channels, 5, 7).contiguous(memory_format=layout)
    before = given.clone()
    torch.testing.assert_close(pixel_softmax(given), given.double().softmax(dim=1).float(), rtol=5e-6, atol=1e-7)
    assert torch.equal(given, before)
    assert pixel_softmax(given.bfloat16()).dtype == torch.float32


def test_neither_slot_nor_place_nor_size_shows_in_the_bits() -> None:
    given = logits(1, 11, 45, 61)
    alone = pixel_softmax(given)
    in_batch = pixel_softmax(given.expand(7, -1, -1, -1).contiguous())
    assert all(torch.equal(alone[0], slot) for slot in in_batch)
    rows = [pixel_softmax(given[:, :, row : row + 4]) for row in range(0, 45, 4)]
    assert torch.equal(torch.cat(rows, dim=2), alone)


def test_extremes() -> None:
    given = torch.tensor([[1e4, -1e4, 0.0], [-torch.inf, 0.0, 0.0], [torch.nan, 1.0, 2.0]]).view(3, 3, 1, 1)
    found = pixel_softmax(given).view(3, 3)
    assert found[0].tolist() == [1, 0, 0]
    assert found[1].tolist() == [0, 0.5, 0.5]
    assert found[2].isnan().all()
