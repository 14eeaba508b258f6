"""From logits to probabilities. Owns: a softmax over channels whose bits depend on the pixel alone. Must not know:
cards, devices, what the channels mean.
"""

from __future__ import annotations

import torch


def pixel_softmax(logits_NCHW: torch.Tensor) -> torch.Tensor:
    """softmax over the channels of each pixel: float32 [N, C, H, W], in the logits' layout.

    Equal logits give equal bits in every slot of a batch, in every place of a map and in maps of every size. torch's
    own `softmax(dim=1)` does not promise that: on a CPU with several threads, the last pixels of each thread's part
    take another way when H * W is no multiple of the vector's length, and differ in the last digit.
    """
    logits_NCHW = logits_NCHW.float()
    powers = (logits_NCHW - logits_NCHW.amax(dim=1, keepdim=True)).exp_()
    # One addition after the other: torch adds a dimension up in an order of its own choice.
    total = powers[:, 0:1].clone()
    for channel in range(1, powers.shape[1]):
        total.add_(powers[:, channel : channel + 1])
    return powers.div_(total)
