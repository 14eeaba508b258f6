"""Test-time augmentation: one network seen as the average of itself over flipped and scaled views of its input.
Owns: making the views, taking their answers back, the average. Must not know: cards, devices, what the network is.

For networks that put out logits for each pixel, so for semantic models and for instances found by watershed, which
split the averaged probabilities. Not for Mask R-CNN and other detectors: their answers are lists of objects, and two
lists have no average.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from models.probabilities import pixel_softmax
from models.refinement import AugmentationSettings, Flip


def average_probabilities(
    network: Callable[[torch.Tensor], torch.Tensor],
    inputs_NCHW: torch.Tensor,
    settings: AugmentationSettings,
    *,
    canvas_multiple: int,
    sizes_N2: torch.Tensor | None = None,
) -> torch.Tensor:
    """Probabilities float32 [N, C, H, W]: the mean over `settings.views` of softmax(logits of the view, taken back).

    `network` maps float [N, 3, h, w] to logits [N, C, h, w] for every h and w that are multiples of `canvas_multiple`.
    `inputs_NCHW` float [N, 3, H, W], normalised. `sizes_N2`: height and width of each image's valid part, at the top
    left, the rest of the canvas repeating its last row and column; None means that all is valid. Flips turn the valid
    part and repeat its new edges, so that a view is what the flipped image would be on this canvas.

    A scaled view has H and W times the scale, each rounded to the nearest multiple, at least one; it is resampled
    bilinearly (align_corners=False, no antialiasing), and so are its logits on the way back. Outside the valid part
    the answer means nothing. Each image depends on itself only, as far as the network keeps to that; views are
    summed in their order, so equal inputs give equal results. One view is in memory at a time, beside the sum.
    """
    height, width = inputs_NCHW.shape[2:]
    if sizes_N2 is None:
        sizes_N2 = torch.tensor([[height, width]], device=inputs_NCHW.device).expand(len(inputs_NCHW), 2)
    total: torch.Tensor | None = None
    for scale, flip in settings.views:
        view = _flipped(inputs_NCHW, flip, sizes_N2)
        view = _resized(view, scaled_px(height, scale, canvas_multiple), scaled_px(width, scale, canvas_multiple))
        logits_NCHW = _resized(network(view).float(), height, width)
        probabilities = _flipped(pixel_softmax(logits_NCHW), flip, sizes_N2)
        total = probabilities if total is None else total.add_(probabilities)
    assert total is not None  # There is always a scale.
    return total.div_(len(settings.views))


def scaled_px(side_px: int, scale: float, canvas_multiple: int) -> int:
    """The side of a scaled view: `side_px` times `scale`, rounded to the nearest multiple (halves up), at least one."""
    return max(1, int(side_px * scale / canvas_multiple + 0.5)) * canvas_multiple


def _flipped(maps_NCHW: torch.Tensor, flip: Flip | None, sizes_N2: torch.Tensor) -> torch.Tensor:
    """Its own inverse on the valid part."""
    if flip in ("vertical", "both"):
        maps_NCHW = _reversed(maps_NCHW, 2, sizes_N2[:, 0])
    if flip in ("horizontal", "both"):
        maps_NCHW = _reversed(maps_NCHW, 3, sizes_N2[:, 1])
    return maps_NCHW


def _reversed(maps_NCHW: torch.Tensor, dim: int, valid_N: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(maps_NCHW.shape[dim], device=maps_NCHW.device)
    # Beyond the valid part the index is 0, which by then is the last valid position: the edge repeated.
    sources = (valid_N.to(positions.device).long().view(-1, 1) - 1 - positions).clamp_min_(0)
    shape = [len(maps_NCHW), 1, 1, 1]
    shape[dim] = -1
    turned = maps_NCHW.gather(dim, sources.view(shape).expand_as(maps_NCHW))
    return turned.contiguous(memory_format=_layout(maps_NCHW))


def _resized(maps_NCHW: torch.Tensor, height: int, width: int) -> torch.Tensor:
    if tuple(maps_NCHW.shape[2:]) == (height, width):
        return maps_NCHW
    resized = torch.nn.functional.interpolate(maps_NCHW, (height, width), mode="bilinear", align_corners=False)
    return resized.contiguous(memory_format=_layout(maps_NCHW))


def _layout(maps_NCHW: torch.Tensor) -> torch.memory_format:
    last = maps_NCHW.is_contiguous(memory_format=torch.channels_last) and not maps_NCHW.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format
