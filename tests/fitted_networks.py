"""Networks that have decided: random weights, then tens of steps on drawn shapes. Published networks are like that, and
those of random weights are not, whose classes any rounding tips over.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn import functional

from models.architectures import build
from models.card import Card
from models.preprocessing import IMAGENET_MEAN, IMAGENET_STD

#: Colours of the classes, 0 the background.
_COLORS = np.array([(60, 60, 60), (200, 70, 60), (60, 190, 80), (80, 90, 220)], np.float64)


def draw_shapes(height: int, width: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [height, width, 3] with grain, and the class of each pixel, int64: a disc, a box and a stripe, each of its
    colour, wherever they come to lie.
    """
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    truth = np.zeros((height, width), np.int64)
    side = min(height, width)
    for kind in random.permutation(3):
        y, x = random.uniform(0.15, 0.85, 2) * (height, width)
        size = random.uniform(0.15, 0.3) * side
        shapes = (
            np.hypot(rows - y, columns - x) < size,
            (abs(rows - y) < size) & (abs(columns - x) < size),
            abs((rows - y) + (columns - x)) < size / 2,
        )
        truth[shapes[kind]] = kind + 1
    pixels = _COLORS[truth] + random.normal(0, 12, (height, width, 3))
    return np.clip(pixels, 0, 255).astype(np.uint8), truth


def fitted_network(
    card: Card, *, steps: int = 40, batch: int = 4, side_px: int = 64, learning_rate: float = 1e-3, seed: int = 0
) -> Any:
    """The card's network in eval mode, after `steps` of AdamW on shapes. Takes pixels normalised as ImageNet's."""
    torch.manual_seed(seed)
    network: Any = build(card).train()
    for part in network.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    optimizer = torch.optim.AdamW(network.parameters(), learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    for step in range(steps):
        inputs, truth = _batch(step, batch, side_px)
        answer = network(inputs)
        loss = functional.cross_entropy(answer["out"] if isinstance(answer, dict) else answer, truth)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    # Statistics of what the network is now: while it learned, it was another at each step.
    for part in network.modules():
        if isinstance(part, torch.nn.modules.batchnorm._BatchNorm):
            part.reset_running_stats()
            part.momentum = None
    with torch.no_grad():
        for step in range(4):
            network(_batch(step, 8, side_px)[0])
    return network.eval()


def _batch(step: int, size: int, side_px: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised pictures, and the class of each pixel."""
    drawn = [draw_shapes(side_px, side_px, seed=1000 + step * size + index) for index in range(size)]
    mean, std = (torch.tensor(numbers).view(1, 3, 1, 1) for numbers in (IMAGENET_MEAN, IMAGENET_STD))
    inputs = torch.from_numpy(np.stack([pixels for pixels, _ in drawn])).permute(0, 3, 1, 2).float() / 255
    return (inputs - mean) / std, torch.from_numpy(np.stack([classes for _, classes in drawn]))
