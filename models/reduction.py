"""From logits to maps and figures, on whatever device they are. Owns: what is computed per pixel and per image.
Must not know: networks, uploads, post-processing of instances.

All arithmetic is per pixel, and sums are taken over integers: an image's results are bit-identical whatever its
neighbours and its slot.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from models.card import ArgmaxPostprocessing, Card, Postprocessing, WatershedPostprocessing
from models.postprocessing import threshold_level

#: Probabilities and entropies are summed in units of 1 / QUANTUM.
QUANTUM = 65535
#: Bytes of logits that are brought to the size of their image at once; several times as much is in use meanwhile.
_BAND_BYTES = 32 << 20


def reduce_logits(
    logits_NCHW: torch.Tensor, ids_C: torch.Tensor, card: Card, postprocessing: Postprocessing, sizes_N2: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Pixel maps [N, H, W] and sums [N, ...] per image, with no synchronisation.

    `sizes_N2` int32: height and width of the part that counts, on the device. `ids_C` uint8: class ids by class.
    `class_ids` uint8; for the watershed also `interior` and `foreground`, probabilities as uint8. `pixels` int64
    [N, C]; `confidence` int64 [N, C] and `entropy` int64 [N]: sums over pixels, in units of 1 / QUANTUM; `broken` bool
    [N]: some logit that counts is NaN or infinite.
    """
    _, channels, height, width = logits_NCHW.shape
    log_probabilities = logits_NCHW.log_softmax(dim=1)
    probabilities = log_probabilities.exp()
    entropy_NHW = (probabilities * log_probabilities).sum(dim=1).neg_().div_(math.log(max(channels, 2)))
    maps: dict[str, torch.Tensor] = {}
    if isinstance(postprocessing, ArgmaxPostprocessing):
        winner_NHW, index_NHW = probabilities.max(dim=1)
    elif isinstance(postprocessing, WatershedPostprocessing):
        maps["foreground"] = _to_uint8(probabilities[:, 1] + probabilities[:, 2])
        maps["interior"] = _to_uint8(probabilities[:, 1])
        inside = maps["foreground"] >= threshold_level(postprocessing.foreground_threshold)
        foreground_index = [info.id for info in card.classes].index(card.foreground_id)
        index_NHW = (inside if foreground_index == 1 else ~inside).long()
        background = probabilities[:, 0]
        winner_NHW = torch.where(inside, 1 - background, background)
    else:
        raise ValueError(f"postprocessing {postprocessing.kind!r} takes no logits of pixels")
    maps["class_ids"] = ids_C[index_NHW]
    rows = torch.arange(height, device=logits_NCHW.device, dtype=torch.int32).view(1, -1, 1)
    columns = torch.arange(width, device=logits_NCHW.device, dtype=torch.int32).view(1, 1, -1)
    valid_NHW = (rows < sizes_N2[:, 0].view(-1, 1, 1)) & (columns < sizes_N2[:, 1].view(-1, 1, 1))
    # Any NaN or infinity among a pixel's logits makes its entropy NaN: p log p is 0 * -inf, or NaN already.
    maps["broken"] = (entropy_NHW.isnan() & valid_NHW).any(dim=2).any(dim=1)
    winner = _quantised(winner_NHW, valid_NHW)
    small_index_NHW = index_NHW.to(torch.uint8)
    pixels, confidence = [], []
    for index in range(len(card.classes)):
        of_class = (small_index_NHW == index) & valid_NHW
        pixels.append(of_class.sum(dim=(1, 2)))
        confidence.append((winner * of_class).sum(dim=(1, 2)))
    maps["pixels"] = torch.stack(pixels, dim=1)
    maps["confidence"] = torch.stack(confidence, dim=1)
    maps["entropy"] = _quantised(entropy_NHW, valid_NHW).sum(dim=(1, 2))
    return maps


def reduce_resampled(
    logits_CHW: torch.Tensor,
    ids_C: torch.Tensor,
    card: Card,
    postprocessing: Postprocessing,
    *,
    height: int,
    width: int,
) -> dict[str, torch.Tensor]:
    """As `reduce_logits` for one image, of which `logits_CHW` (a window is fine) are the logits at another size.

    They are brought to `height` by `width` first, bilinearly (align_corners=False, no antialiasing), in bands of rows,
    so that memory does not grow with classes times pixels. Maps are [height, width], sums without the first axis.
    """
    parts = []
    for band_CHW in resampled_bands(logits_CHW, height, width):
        size = torch.full((1, 2), max(height, width), dtype=torch.int32, device=logits_CHW.device)
        parts.append(reduce_logits(band_CHW[None], ids_C, card, postprocessing, size))
    whole: dict[str, torch.Tensor] = {}
    for name in parts[0]:
        values = [part[name][0] for part in parts]
        if values[0].dim() == 2:
            whole[name] = torch.cat(values)
        else:
            stacked = torch.stack(values)
            whole[name] = stacked.any(dim=0) if stacked.dtype == torch.bool else stacked.sum(dim=0)
    return whole


def resampled_bands(logits_CHW: torch.Tensor, height: int, width: int) -> Iterator[torch.Tensor]:
    """Bands of rows, top to bottom, of `logits_CHW` resampled to `height` by `width`: float32 [C, rows, width].

    Together they are `torch.nn.functional.interpolate(mode="bilinear", align_corners=False)`.
    """
    channels, source_height, source_width = logits_CHW.shape
    rows = max(1, _BAND_BYTES // (4 * channels * width))
    if (source_height, source_width) == (height, width):
        for first in range(0, height, rows):
            yield logits_CHW[:, first : first + rows].float()
        return
    for first in range(0, height, rows):
        last = min(height, first + rows)
        upper, lower, to_lower = _neighbours(source_height, height, first, last, logits_CHW.device)
        # The source rows of this band, known without asking the device; one to spare on either side.
        top = max(0, int(first * source_height / height) - 2)
        bottom = min(source_height, int(last * source_height / height) + 3)
        window = logits_CHW[:, top:bottom].float()
        wide = torch.nn.functional.interpolate(
            window[None], size=(bottom - top, width), mode="bilinear", align_corners=False
        )[0]
        yield torch.lerp(wide.index_select(1, upper - top), wide.index_select(1, lower - top), to_lower.view(1, -1, 1))


def _neighbours(
    source: int, target: int, first: int, last: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For the target positions first .. last - 1: the two source positions, and the weight of the second."""
    centers = torch.arange(first, last, dtype=torch.float32, device=device) + 0.5
    position = (centers * (source / target) - 0.5).clamp_(0, source - 1)
    low = position.floor().long()
    return low, (low + 1).clamp_(max=source - 1), position - low


def _to_uint8(probability: torch.Tensor) -> torch.Tensor:
    return probability.nan_to_num(0.0).mul_(255).round_().clamp_(0, 255).to(torch.uint8)


def _quantised(values: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """float [N, H, W] in 0..1 to int32 multiples of 1 / QUANTUM; 0 where not valid or NaN."""
    return values.nan_to_num(0.0).clamp(0, 1).mul_(QUANTUM).round_().to(torch.int32).mul_(valid)
