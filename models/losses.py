"""Training losses on logits. Owns: their formulas. Must not know: data, optimisers, files, how many workers there are.

All take logits [N, C, H, W] of any float type and compute in float32; targets int64 [N, H, W] are channel indices, or
`IGNORED`. Where a loss is a ratio of sums over the batch, the sums go through `total` first, which by default leaves
them: with one that adds up over workers, and is differentiable, every worker gets the loss of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

#: In targets: not to be counted.
IGNORED = 255

Total = Callable[[torch.Tensor], torch.Tensor]


def _itself(sums: torch.Tensor) -> torch.Tensor:
    return sums


def cross_entropy(
    logits_NCHW: torch.Tensor,
    targets_NHW: torch.Tensor,
    weights_NHW: torch.Tensor | None = None,
    *,
    class_weights_C: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    total: Total = _itself,
) -> torch.Tensor:
    """Mean cross-entropy, each pixel weighted by `weights_NHW` and by the weight of its class; 0 where nothing counts.

    A pixel's target is 1 - s + s / C for its class and s / C for the others, s being `label_smoothing` (Szegedy et al.
    2016).
    """
    losses_NHW = functional.cross_entropy(
        logits_NCHW.float(),
        targets_NHW,
        reduction="none",
        ignore_index=IGNORED,
        label_smoothing=label_smoothing,
    )
    return _mean(losses_NHW, _pixel_weights(targets_NHW, weights_NHW, class_weights_C), total)


def focal(
    logits_NCHW: torch.Tensor,
    targets_NHW: torch.Tensor,
    weights_NHW: torch.Tensor | None = None,
    *,
    gamma: float = 2.0,
    class_weights_C: torch.Tensor | None = None,
    total: Total = _itself,
) -> torch.Tensor:
    """Mean of -(1 - p) ** gamma log p, p being the probability of the pixel's class; weighted as `cross_entropy`, which
    it is for gamma 0. (Lin et al., Focal Loss for Dense Object Detection, 2017, equation 5, over a softmax.)
    """
    losses_NHW = functional.cross_entropy(logits_NCHW.float(), targets_NHW, reduction="none", ignore_index=IGNORED)
    # The gradient of x ** gamma at 0 is infinite for gamma below 1.
    doubts_NHW = (1 - torch.exp(-losses_NHW)).clamp_min(1e-6)
    return _mean(doubts_NHW**gamma * losses_NHW, _pixel_weights(targets_NHW, weights_NHW, class_weights_C), total)


def dice(logits_NCHW: torch.Tensor, targets_NHW: torch.Tensor, *, total: Total = _itself) -> torch.Tensor:
    """Soft Dice: 1 - (2 |p t| + 1) / (|p| + |t| + 1), pooled over the batch, averaged over the channels that occur in
    the targets. (Milletari et al., V-Net, 2016, with |p| instead of |p|^2.)
    """
    valid_NHW = targets_NHW != IGNORED
    channels = logits_NCHW.shape[1]
    indices_NHW = targets_NHW.where(valid_NHW, torch.zeros_like(targets_NHW))
    probabilities_NCHW = logits_NCHW.float().softmax(dim=1) * valid_NHW.unsqueeze(1)
    right_NHW = probabilities_NCHW.gather(1, indices_NHW.unsqueeze(1)).squeeze(1)
    flat_indices = indices_NHW.flatten()
    zeros_C = right_NHW.new_zeros(channels)
    overlap_C = zeros_C.scatter_add(0, flat_indices, right_NHW.flatten())
    truth_C = zeros_C.scatter_add(0, flat_indices, valid_NHW.flatten().float())
    overlap_C, truth_C, predicted_C = total(torch.stack([overlap_C, truth_C, probabilities_NCHW.sum(dim=(0, 2, 3))]))
    occurs_C = truth_C > 0
    losses_C = (1 - (2 * overlap_C + 1) / (predicted_C + truth_C + 1)) * occurs_C
    return losses_C.sum() / occurs_C.sum().clamp_min(1)


def lovasz(logits_NCHW: torch.Tensor, targets_NHW: torch.Tensor, *, total: Total = _itself) -> torch.Tensor:
    """Lovász-Softmax of each image over the classes that it shows, averaged over the images with anything that counts:
    the convex extension of 1 - IoU. (Berman et al., The Lovász-Softmax loss, 2018, equations 8 to 12.)
    """
    probabilities_NCHW = logits_NCHW.float().softmax(dim=1)
    images = [_lovasz_image(*pair) for pair in zip(probabilities_NCHW, targets_NHW, strict=True)]
    shown = [loss for loss in images if loss is not None]
    # An image without truth still belongs to the graph.
    loss = torch.stack(shown).sum() if shown else probabilities_NCHW.sum() * 0
    summed, count = total(torch.stack([loss, loss.new_tensor(float(len(shown)))]))
    return summed / count.clamp_min(1)


def _lovasz_image(probabilities_CHW: torch.Tensor, targets_HW: torch.Tensor) -> torch.Tensor | None:
    valid_HW = targets_HW != IGNORED
    targets_P = targets_HW[valid_HW]
    classes = targets_P.unique()
    if not len(classes):
        return None
    probabilities_KP = probabilities_CHW[classes][:, valid_HW]
    truth_KP = (targets_P == classes[:, None]).to(probabilities_KP.dtype)
    errors_KP, order_KP = (truth_KP - probabilities_KP).abs().sort(dim=1, descending=True)
    sorted_KP = truth_KP.gather(1, order_KP)
    pixels_K1 = sorted_KP.sum(dim=1, keepdim=True)
    # 1 - IoU of calling the first p pixels wrong, and what each of them adds.
    jaccard_KP = 1 - (pixels_K1 - sorted_KP.cumsum(1)) / (pixels_K1 + (1 - sorted_KP).cumsum(1))
    steps_KP = torch.diff(jaccard_KP, dim=1, prepend=jaccard_KP.new_zeros(len(classes), 1))
    return (errors_KP * steps_KP).sum(dim=1).mean()


def _pixel_weights(
    targets_NHW: torch.Tensor, weights_NHW: torch.Tensor | None, class_weights_C: torch.Tensor | None
) -> torch.Tensor:
    valid_NHW = targets_NHW != IGNORED
    product_NHW = valid_NHW.float() if weights_NHW is None else weights_NHW * valid_NHW
    if class_weights_C is None:
        return product_NHW
    indices_NHW = targets_NHW.where(valid_NHW, torch.zeros_like(targets_NHW))
    return product_NHW * class_weights_C.to(product_NHW)[indices_NHW]


def _mean(losses_NHW: torch.Tensor, weights_NHW: torch.Tensor, total: Total) -> torch.Tensor:
    weighted, weight = total(torch.stack([(losses_NHW * weights_NHW).sum(), weights_NHW.sum()]))
    return weighted / weight.where(weight > 0, torch.ones_like(weight))
