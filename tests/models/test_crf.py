from __future__ import annotations

import numpy as np
import pytest
import torch

from models.crf import refine
from models.probabilities import pixel_softmax
from models.refinement import CrfSettings

SETTINGS = CrfSettings(
    iterations=3,
    window_px=5,
    bilateral_weight=4.0,
    bilateral_sigma_px=2.5,
    bilateral_sigma_levels=40.0,
    smoothness_weight=1.5,
    smoothness_sigma_px=1.2,
)
NO_WEIGHT = CrfSettings(bilateral_weight=0, smoothness_weight=0)


def softmax(logits: np.ndarray) -> np.ndarray:
    grown = np.exp(logits - logits.max(axis=0))
    return grown / grown.sum(axis=0)


def mean_field(logits_CHW: np.ndarray, image_HWC: np.ndarray, settings: CrfSettings) -> np.ndarray:
    """The formula of the docstring as matrices over all pairs of pixels, with the compatibility written out."""
    channels, height, width = logits_CHW.shape
    rows, columns = (axis.ravel() for axis in np.mgrid[:height, :width])
    colors = image_HWC.reshape(-1, 3).astype(np.float64)
    dy, dx = rows[:, None] - rows, columns[:, None] - columns
    seen = np.maximum(abs(dy), abs(dx)) <= settings.window_px // 2
    squared_px = dy**2 + dx**2
    squared_levels = ((colors[:, None] - colors) ** 2).sum(-1)
    kernels = (
        (
            settings.bilateral_weight,
            -squared_px / (2 * settings.bilateral_sigma_px**2)
            - squared_levels / (2 * settings.bilateral_sigma_levels**2),
        ),
        (settings.smoothness_weight, -squared_px / (2 * settings.smoothness_sigma_px**2)),
    )
    pairwise = np.zeros(seen.shape)
    for weight, exponent in kernels:
        kernel = np.where(seen, np.exp(exponent), 0)
        norm = np.sqrt(kernel.sum(axis=1))
        pairwise += weight * kernel / norm[:, None] / norm
    np.fill_diagonal(pairwise, 0)
    compatibility = 1 - np.eye(channels)
    unary = -np.log(softmax(logits_CHW.astype(np.float64).reshape(channels, -1)))
    beliefs = softmax(-unary)
    for _ in range(settings.iterations):
        beliefs = softmax(-unary - compatibility @ (beliefs @ pairwise.T))
    return beliefs.reshape(logits_CHW.shape)


def inputs(count: int, channels: int, height: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, channels, height, width, generator=generator) * 2
    images = torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8, generator=generator)
    return logits, images


@pytest.mark.parametrize(("height", "width"), [(7, 9), (1, 6), (5, 2), (1, 1)])
@pytest.mark.parametrize("change", [{}, {"bilateral_weight": 0}, {"smoothness_weight": 0}, {"window_px": 3}])
def test_it_is_the_mean_field_of_its_formula(height: int, width: int, change: dict[str, float]) -> None:
    settings = SETTINGS.model_copy(update=change)
    logits, images = inputs(2, 4, height, width)
    refined = refine(logits, images, settings)
    assert refined.dtype == torch.float32 and refined.shape == logits.shape
    for index in range(2):
        expected = mean_field(logits[index].numpy(), images[index].numpy(), settings)
        np.testing.assert_allclose(refined[index].numpy(), expected, atol=1e-5)
    if height * width > 1:
        assert (refined - logits.softmax(1)).abs().max() > 1e-2


def test_without_weights_it_is_softmax() -> None:
    logits, images = inputs(2, 3, 11, 13)
    assert torch.equal(refine(logits, images, NO_WEIGHT), pixel_softmax(logits))


@pytest.mark.parametrize("rows_per_chunk", [1, 2, 5])
def test_chunks_do_not_change_the_result(rows_per_chunk: int) -> None:
    logits, images = inputs(2, 3, 17, 19)
    whole = refine(logits, images, SETTINGS, rows_per_chunk=17)
    assert torch.equal(refine(logits, images, SETTINGS, rows_per_chunk=rows_per_chunk), whole)


@pytest.mark.parametrize("width", [24, 37])
def test_a_slot_does_not_matter(width: int) -> None:
    logits, images = inputs(1, 3, 20, width)
    refined = refine(logits.expand(5, -1, -1, -1).contiguous(), images.expand(5, -1, -1, -1), SETTINGS)
    assert all(torch.equal(refined[0], refined[slot]) for slot in range(1, 5))


def test_neither_neighbours_nor_what_lies_outside_an_image_matter() -> None:
    logits, images = inputs(3, 3, 16, 24)
    sizes = torch.tensor([[16, 24], [10, 13], [0, 0]])
    together = refine(logits, images, SETTINGS, sizes_N2=sizes)
    changed_logits, changed_images = logits.clone(), images.clone()
    changed_logits[0], changed_images[0] = inputs(1, 3, 16, 24, seed=1)[0][0], 7
    changed_logits[1, :, 10:], changed_images[1, 10:] = torch.nan, 3
    changed_logits[1, :, :, 13:], changed_images[1, :, 13:] = torch.inf, 250
    again = refine(changed_logits, changed_images, SETTINGS, sizes_N2=sizes)
    assert torch.equal(together[1, :, :10, :13], again[1, :, :10, :13])
    assert torch.equal(together[:1], refine(logits[:1], images[:1], SETTINGS))
    expected = mean_field(logits[1, :, :10, :13].numpy(), images[1, :10, :13].numpy(), SETTINGS)
    np.testing.assert_allclose(together[1, :, :10, :13].numpy(), expected, atol=1e-5)
    assert torch.equal(together[2], pixel_softmax(logits)[2])


def test_nan_of_the_network_is_not_hidden() -> None:
    logits, images = inputs(2, 3, 12, 12)
    logits[0, 1, 3, 4] = torch.nan
    refined = refine(logits, images, SETTINGS)
    assert refined[0, :, 3, 4].isnan().all()
    assert refined[1].isfinite().all()


def test_probabilities_of_zero_and_half_precision_are_taken() -> None:
    logits, images = inputs(1, 3, 8, 8)
    probabilities = logits.softmax(dim=1)
    np.testing.assert_allclose(
        refine(probabilities.log(), images, SETTINGS).numpy(), refine(logits, images, SETTINGS).numpy(), atol=1e-5
    )
    probabilities[:, 0] = 0
    refined = refine(probabilities.log(), images, SETTINGS)
    assert refined.isfinite().all() and (refined[:, 0] == 0).all()
    half = logits.bfloat16()
    assert torch.equal(refine(half, images, SETTINGS), refine(half.float(), images, SETTINGS))


def test_layout_in_memory_does_not_matter() -> None:
    logits, images = inputs(2, 3, 9, 14)
    last = logits.contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(
        refine(last, images, SETTINGS).numpy(), refine(logits, images, SETTINGS).numpy(), atol=1e-6
    )


def test_a_noisy_answer_follows_the_picture() -> None:
    rows, columns = np.mgrid[:48, :64]
    truth = (rows - 22) ** 2 + (columns - 30) ** 2 < 15**2
    random = np.random.default_rng(0)
    image = np.where(truth[..., None], (200, 60, 60), (60, 70, 160)) + random.normal(0, 6, (48, 64, 3))
    # The network sees the disk a little off its place, and unsure.
    seen = (rows - 24) ** 2 + (columns - 33) ** 2 < 15**2
    evidence = np.where(seen, 1.0, -1.0) + random.normal(0, 1.2, truth.shape)
    logits = torch.tensor(np.stack([-evidence, evidence])[None] / 2)
    images = torch.tensor(image.clip(0, 255).astype(np.uint8)[None])

    def iou(probabilities: torch.Tensor) -> float:
        found = probabilities[0].argmax(dim=0).numpy() == 1
        return float((found & truth).sum() / (found | truth).sum())

    before, after = iou(logits), iou(refine(logits, images, CrfSettings()))
    assert before < 0.7
    assert after > 0.95
    # It is the colours that did it: smoothing alone keeps the disk where the network saw it.
    assert iou(refine(logits, images, CrfSettings(bilateral_weight=0, smoothness_weight=13))) < 0.85


def test_unfitting_inputs_are_named() -> None:
    logits, images = inputs(2, 3, 8, 8)
    with pytest.raises(ValueError, match="images must be uint8"):
        refine(logits, images[:, :7], SETTINGS)
    with pytest.raises(ValueError, match="images must be uint8"):
        refine(logits, images.float(), SETTINGS)
    with pytest.raises(ValueError, match=r"logits must be float \[N, C, H, W\]"):
        refine(logits[0], images, SETTINGS)
    with pytest.raises(ValueError, match="sizes of shape"):
        refine(logits, images, SETTINGS, sizes_N2=torch.tensor([[8, 8]]))


@pytest.mark.gpu
def test_a_gpu_agrees() -> None:
    logits, images = inputs(2, 5, 40, 50)
    on_gpu = refine(logits.cuda(), images.cuda(), SETTINGS)
    assert torch.equal(on_gpu, refine(logits.cuda(), images.cuda(), SETTINGS))
    np.testing.assert_allclose(on_gpu.cpu().numpy(), refine(logits, images, SETTINGS).numpy(), atol=1e-5)
