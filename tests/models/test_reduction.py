from __future__ import annotations

import numpy as np
import pytest
import torch
from small_networks import small_card
from torch.nn.functional import interpolate

from models.card import ArgmaxPostprocessing
from models.reduction import reduce_logits, reduce_resampled, resampled_bands


@pytest.mark.parametrize(
    ("source", "target"),
    [((33, 47), (120, 90)), ((20, 30), (20, 30)), ((64, 64), (7, 5)), ((5, 1), (9, 1)), ((1, 1), (3, 4))],
)
@pytest.mark.parametrize("band_bytes", [1, 5000, 1 << 30])
def test_bands_together_are_an_interpolation(
    source: tuple[int, int], target: tuple[int, int], band_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.reduction._BAND_BYTES", band_bytes)
    logits_CHW = torch.randn(4, *source, generator=torch.Generator().manual_seed(1))
    result = torch.cat(list(resampled_bands(logits_CHW, *target)), dim=1)
    expected = interpolate(logits_CHW[None], size=target, mode="bilinear", align_corners=False)[0]
    assert torch.allclose(result, expected, atol=2e-5)


def test_figures_of_bands_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    card, ids = small_card("unet"), torch.arange(4, dtype=torch.uint8)
    logits_CHW = torch.randn(4, 12, 16, generator=torch.Generator().manual_seed(1)) * 4
    settings = ArgmaxPostprocessing()
    whole = reduce_logits(logits_CHW[None], ids, card, settings, torch.tensor([[12, 16]], dtype=torch.int32))
    monkeypatch.setattr("models.reduction._BAND_BYTES", 1000)
    banded = reduce_resampled(logits_CHW, ids, card, settings, height=12, width=16)
    assert whole.keys() == banded.keys()
    for name, value in banded.items():
        assert torch.equal(value, whole[name][0]), name
    assert banded["pixels"].sum() == 12 * 16
    logits_CHW[2, 11, 3] = np.inf
    assert reduce_resampled(logits_CHW, ids, card, settings, height=12, width=16)["broken"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_only_what_counts_can_be_broken(value: float) -> None:
    logits_NCHW = torch.zeros(2, 4, 6, 6)
    logits_NCHW[0, 1, 5, 5] = value
    logits_NCHW[1, 1, 2, 2] = value
    sizes = torch.tensor([[5, 6], [3, 3]], dtype=torch.int32)
    card, ids = small_card("unet"), torch.arange(4, dtype=torch.uint8)
    maps = reduce_logits(logits_NCHW, ids, card, ArgmaxPostprocessing(), sizes)
    assert maps["broken"].tolist() == [False, True]


def test_certain_pixels_are_not_broken() -> None:
    logits_NCHW = torch.zeros(1, 4, 1, 1)
    logits_NCHW[0, 2] = 3e38
    card, ids = small_card("unet"), torch.arange(4, dtype=torch.uint8)
    maps = reduce_logits(logits_NCHW, ids, card, ArgmaxPostprocessing(), torch.ones(1, 2, dtype=torch.int32))
    assert maps["broken"].tolist() == [False]
    assert maps["confidence"][0, 2] == 65535
