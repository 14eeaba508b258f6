"""What a detector's heads see of each region: its part of the feature maps, brought to one size. Owns: RoIAlign on a
CPU. Must not know: networks but for torchvision's pooler, proposals, heads.

RoIAlign (He et al., Mask R-CNN, 2017) with a fixed number of samples is a weighted sum of pixels of the map, and its
weights do not depend on the channel. So it is one `embedding_bag` over maps whose channels lie together, which is how
convolutions in channels_last leave them: a quarter of the time of torchvision's kernel for CPUs, which goes through
each channel by itself and needs the maps turned round before and its answer after.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from torchvision.ops.poolers import _setup_scales


class RegionMaps:
    """The feature maps of some images, of which regions can be taken."""

    def __init__(self, features: dict[str, torch.Tensor], sizes: list[tuple[int, int]]) -> None:
        """`features`: floating [N, C, h, w] of each level; `sizes` (height, width) of the images in pixels."""
        on_cpu = next(iter(features.values())).is_cpu
        self._features = features if on_cpu else {name: level.float() for name, level in features.items()}
        self._sizes = sizes
        self._pixels_PC: dict[tuple[str, ...], torch.Tensor] = {}

    def pool(self, pooler: Any, boxes: list[torch.Tensor]) -> torch.Tensor:
        """What torchvision's MultiScaleRoIAlign `pooler` gives for float32 maps, but for rounding: float32
        [R, C, S, S], on a CPU in channels_last. `boxes` of each image: float32 [r, 4], in pixels. Boxes that are not
        finite give numbers without meaning.
        """
        names = tuple(name for name in pooler.featmap_names if name in self._features)
        levels = [self._features[name] for name in names]
        if not levels[0].is_cpu or pooler.sampling_ratio < 1:
            # The pooler keeps what it derives from the first sizes that it sees.
            pooler.scales = pooler.map_levels = None
            pooled: torch.Tensor = pooler({name: self._features[name].float() for name in names}, boxes, self._sizes)
            return pooled
        if names not in self._pixels_PC:
            rows = [level.permute(0, 2, 3, 1).reshape(-1, level.shape[1]) for level in levels]
            self._pixels_PC[names] = torch.cat(rows).float()
        scales, mapper = _setup_scales(levels, self._sizes, pooler.canonical_scale, pooler.canonical_level)
        regions_R4 = torch.cat(boxes)
        level_R = torch.zeros(len(regions_R4), dtype=torch.int64)
        if len(levels) > 1:
            level_R = mapper(boxes).clamp(0, len(levels) - 1)
        image_R = torch.repeat_interleave(torch.tensor([len(one) for one in boxes]))
        heights, widths = (torch.tensor([level.shape[axis] for level in levels]) for axis in (2, 3))
        areas = heights * widths
        firsts = (areas.cumsum(0) - areas) * len(levels[0])
        first_R = firsts[level_R] + image_R * areas[level_R]
        scaled_R4 = regions_R4 * torch.tensor(scales, dtype=torch.float32)[level_R, None]

        samples, (height, width) = pooler.sampling_ratio, pooler.output_size
        row_RBT, row_share_RBT = _taps(scaled_R4[:, 1], scaled_R4[:, 3], heights[level_R], height, samples)
        column_RBT, column_share_RBT = _taps(scaled_R4[:, 0], scaled_R4[:, 2], widths[level_R], width, samples)
        row_RBT = row_RBT * widths[level_R, None, None] + first_R[:, None, None]
        taps = row_RBT[:, :, None, :, None] + column_RBT[:, None, :, None, :]
        shares = row_share_RBT[:, :, None, :, None] * column_share_RBT[:, None, :, None, :]
        bags = (len(regions_R4) * height * width, (2 * samples) ** 2)
        sums = functional.embedding_bag(
            taps.reshape(bags), self._pixels_PC[names], per_sample_weights=shares.reshape(bags), mode="sum"
        )
        return sums.view(len(regions_R4), height, width, levels[0].shape[1]).permute(0, 3, 1, 2)


def _taps(
    start_R: torch.Tensor, end_R: torch.Tensor, extent_R: torch.Tensor, bins: int, samples: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Along one axis: which pixels each bin looks at, int64 [R, bins, 2 · samples], and the share of each in it."""
    # In the order of torchvision's own sums: where a map is steep, the last bit of a place shows.
    bin_R = (end_R - start_R).clamp_min(1) / bins
    firsts = start_R[:, None] + torch.arange(bins) * bin_R[:, None]
    at = firsts[..., None] + (torch.arange(samples) + 0.5) * bin_R[:, None, None] / samples
    at = at.reshape(len(start_R), bins * samples).nan_to_num()
    last = extent_R[:, None] - 1
    inside = (at >= -1) & (at <= last + 1)
    at = at.clamp_min(0)
    low = torch.minimum(at, last).long()
    high = torch.minimum(low + 1, last)
    upper = torch.where(low < last, at - low, 0)
    taps = torch.stack([low, high], dim=-1)
    shares = torch.stack([1 - upper, upper], dim=-1) * inside[..., None] / samples
    return taps.reshape(len(at), bins, 2 * samples), shares.reshape(len(at), bins, 2 * samples)
