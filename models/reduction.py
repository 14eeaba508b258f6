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
#: Bytes of logits that are brought to the size of their image at once; several times as much is in use meanwhile. A GPU
#: is kept busy by more.
_BAND_BYTES = {"cpu": 32 << 20, "cuda": 512 << 20}
#: Bytes of logits that are reduced at once: what a core's cache holds, and what keeps a GPU busy.
_PART_BYTES = {"cpu": 384 << 10, "cuda": 512 << 20}


def reduce_logits(
    logits_NCHW: torch.Tensor, ids_C: torch.Tensor, card: Card, postprocessing: Postprocessing, sizes_N2: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Pixel maps [N, H, W] and sums [N, ...] per image, with no synchronisation.

    `sizes_N2` int32: height and width of the part that counts, on the device. `ids_C` uint8: class ids by class.
    `class_ids` uint8; for the watershed also `interior` and `foreground`, probabilities as uint8. `pixels` int64
    [N, C]; `confidence` int64 [N, C] and `entropy` int64 [N]: sums over pixels, in units of 1 / QUANTUM; `broken` bool
    [N]: some logit that counts is NaN or infinite.
    """
    count, _, height, width = logits_NCHW.shape
    device = logits_NCHW.device
    rows = torch.arange(height, device=device, dtype=torch.int32).view(1, -1, 1)
    columns = torch.arange(width, device=device, dtype=torch.int32).view(1, 1, -1)
    valid_NHW = (rows < sizes_N2[:, 0].view(-1, 1, 1)) & (columns < sizes_N2[:, 1].view(-1, 1, 1))
    maps = {
        name: torch.empty((count, height, width), dtype=torch.uint8, device=device) for name in _maps_of(postprocessing)
    }
    # By column: threads of a GPU that add to one class do not wait for each other.
    by_column = (count, len(card.classes), width)
    pixels_NCW = torch.zeros(by_column, dtype=torch.int64, device=device)
    confidence_NCW = torch.zeros(by_column, dtype=torch.int64, device=device)
    entropy_N = torch.zeros(count, dtype=torch.int64, device=device)
    broken_N = torch.zeros(count, dtype=torch.bool, device=device)
    for images, some_rows in _parts(logits_NCHW):
        valid = valid_NHW[images, some_rows]
        found = _reduce_pixels(logits_NCHW[images, :, some_rows], ids_C, card, postprocessing)
        for name, part in maps.items():
            part[images, some_rows] = found[name]
        pixels_NCW[images].scatter_add_(1, found["index"], valid.long())
        confidence_NCW[images].scatter_add_(1, found["index"], _quantised(found["winner"], valid))
        entropy_N[images] += _quantised(found["entropy"], valid).sum(dim=(1, 2))
        # Any NaN or infinity among a pixel's logits makes its entropy NaN: 0 * infinity, or NaN already.
        broken_N[images] |= (found["entropy"].isnan() & valid).any(dim=2).any(dim=1)
    return maps | {
        "broken": broken_N,
        "pixels": pixels_NCW.sum(dim=2),
        "confidence": confidence_NCW.sum(dim=2),
        "entropy": entropy_N,
    }


def _maps_of(postprocessing: Postprocessing) -> tuple[str, ...]:
    if isinstance(postprocessing, ArgmaxPostprocessing):
        return ("class_ids",)
    if isinstance(postprocessing, WatershedPostprocessing):
        return ("class_ids", "foreground", "interior")
    raise ValueError(f"postprocessing {postprocessing.kind!r} takes no logits of pixels")


def _parts(logits_NCHW: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    """Images and rows: several whole images, or a piece of one."""
    count, channels, height, width = logits_NCHW.shape
    row_bytes = 4 * channels * width
    part_bytes = _PART_BYTES["cpu" if logits_NCHW.is_cpu else "cuda"]
    images, rows = max(1, part_bytes // (row_bytes * height)), max(1, part_bytes // row_bytes)
    for first in range(0, count, images):
        for top in range(0, height, rows):
            yield slice(first, first + images), slice(top, top + rows)


def _reduce_pixels(
    logits_NCHW: torch.Tensor, ids_C: torch.Tensor, card: Card, postprocessing: Postprocessing
) -> dict[str, torch.Tensor]:
    """[N, H, W] each: the maps, and `index` int64 of the class, `winner` its probability, `entropy` over its maximum.

    With x the logits, m their maximum, d = x - m and S the sum of exp(d): the best class has the probability 1 / S, and
    the entropy is log S - sum(exp(d) d) / S. Fewer passes over [N, C, H, W], which are what costs, than by softmax.
    """
    channels = logits_NCHW.shape[1]
    best_N1HW, best_index_N1HW = logits_NCHW.max(dim=1, keepdim=True)
    below = logits_NCHW - best_N1HW
    powers = below.exp()
    total = _channel_sum(powers)
    scale = total.reciprocal()
    found: dict[str, torch.Tensor] = {}
    if isinstance(postprocessing, WatershedPostprocessing):
        background, interior, boundary = (powers[:, channel] * scale for channel in range(3))
        found["foreground"] = _to_uint8(interior + boundary)
        found["interior"] = _to_uint8(interior)
        inside = found["foreground"] >= threshold_level(postprocessing.foreground_threshold)
        foreground_index = [info.id for info in card.classes].index(card.foreground_id)
        found["index"] = (inside if foreground_index == 1 else ~inside).long()
        found["winner"] = torch.where(inside, 1 - background, background)
    else:
        found["index"] = best_index_N1HW[:, 0]
        found["winner"] = scale
    found["class_ids"] = ids_C[found["index"]]
    found["entropy"] = (total.log() - _channel_sum(below.mul_(powers)) * scale).div_(math.log(max(channels, 2)))
    return found


def _channel_sum(values_NCHW: torch.Tensor) -> torch.Tensor:
    """[N, H, W], whose bits depend on the pixel alone.

    Where a pixel's channels lie side by side torch adds them up pixel by pixel. Else it takes vectors of pixels, and at
    the end of a map another order: one addition after the other has no such end.
    """
    channels = values_NCHW.shape[1]
    if not values_NCHW.is_cpu or (values_NCHW.stride(1) == 1 and channels > 1):
        return values_NCHW.sum(dim=1)
    total = values_NCHW[:, 0].clone()
    for channel in range(1, channels):
        total.add_(values_NCHW[:, channel])
    return total


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
    band_bytes = _BAND_BYTES["cpu" if logits_CHW.is_cpu else "cuda"]
    rows = max(1, band_bytes // (4 * channels * width))
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
    """float [N, H, W] in 0..1 to int64 multiples of 1 / QUANTUM; 0 where not valid or NaN."""
    return values.nan_to_num(0.0).clamp_(0, 1).mul_(QUANTUM).round_().long().mul_(valid)
