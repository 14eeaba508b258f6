"""Training losses on logits. Owns: their formulas. Must not know: data, optimisers, files."""

from __future__ import annotations

import torch
from torch.nn import functional


def cross_entropy_dice(
    logits_NCHW: torch.Tensor,
    targets_NHW: torch.Tensor,
    weights_NHW: torch.Tensor,
    *,
    ignore_index: int = 255,
) -> torch.Tensor:
    """Weighted cross-entropy plus soft Dice loss, a scalar in float32.

    `targets_NHW` int64 channel indices, or `ignore_index`; `weights_NHW` float32, for the cross-entropy only.
    Dice is 1 - 2 |p t| / (|p| + |t|), pooled over the batch, averaged over the channels that occur in the
    targets (Milletari et al., V-Net, 2016, with |p| instead of |p|^2).
    """
    logits_NCHW = logits_NCHW.float()
    valid_NHW = targets_NHW != ignore_index
    weights_NHW = weights_NHW * valid_NHW
    losses_NHW = functional.cross_entropy(logits_NCHW, targets_NHW, reduction="none", ignore_index=ignore_index)
    cross_entropy = (losses_NHW * weights_NHW).sum() / weights_NHW.sum().clamp_min(1.0)
    channels = logits_NCHW.shape[1]
    indices_NHW = targets_NHW.where(valid_NHW, torch.zeros_like(targets_NHW))
    truth_NCHW = functional.one_hot(indices_NHW, channels).movedim(-1, 1) * valid_NHW.unsqueeze(1)
    probabilities_NCHW = logits_NCHW.softmax(dim=1) * valid_NHW.unsqueeze(1)
    overlap = (probabilities_NCHW * truth_NCHW).sum(dim=(0, 2, 3))
    truth = truth_NCHW.sum(dim=(0, 2, 3))
    total = probabilities_NCHW.sum(dim=(0, 2, 3)) + truth
    occurs = truth > 0
    dice = (1 - (2 * overlap + 1) / (total + 1)) * occurs
    return cross_entropy + dice.sum() / occurs.sum().clamp_min(1)
