"""Which images a training step sees, and its batch of crops, prepared ahead in a thread.
Owns: the drawing of images and the order of batches. Must not know: networks, optimisers, files.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.learning.augmentation import AugmentationConfig, Example, random_crop
from pipeline.learning.dataset import Dataset

#: Steps that are prepared ahead of the device.
_PREFETCH_STEPS = 4


class Batch(NamedTuple):
    """One step's worth of crops, on the CPU."""

    #: float32 [N, 3, H, W], channels_last.
    inputs: torch.Tensor
    #: int64 [N, H, W].
    targets: torch.Tensor
    #: float32 [N, H, W].
    weights: torch.Tensor
    names: list[str]


class Sampler(NamedTuple):
    """Makes the batch of any step from the seed and the step's number alone."""

    examples: list[Example]
    #: float64 [examples], summing to 1.
    chances: NDArray[np.float64]
    task: Literal["semantic", "instance"]
    augmentation: AugmentationConfig
    std_floor: float
    batch_size: int
    seed: int

    def batch(self, step: int) -> Batch:
        random = np.random.default_rng([self.seed, step])
        chosen = random.choice(len(self.examples), size=self.batch_size, p=self.chances)
        crops = [
            random_crop(self.examples[index], self.task, self.augmentation, std_floor=self.std_floor, random=random)
            for index in chosen
        ]
        return Batch(
            inputs=torch.from_numpy(np.stack([crop.inputs for crop in crops])).permute(0, 3, 1, 2),
            targets=torch.from_numpy(np.stack([crop.targets for crop in crops])),
            weights=torch.from_numpy(np.stack([crop.weights for crop in crops])),
            names=[self.examples[index].name for index in chosen],
        )


def sampling_chances(dataset: Dataset, stratum_power: float) -> NDArray[np.float64]:
    """float64 [images], summing to 1: a stratum of n images gets a share in proportion to n ** stratum_power."""
    strata = [item.stratum for item in dataset.items]
    sizes = np.array([strata.count(stratum) for stratum in strata], dtype=np.float64)
    chances = sizes ** (stratum_power - 1)
    return chances / chances.sum()


def stream(sampler: Sampler) -> Iterator[Batch]:
    """The batches of steps 0, 1, 2 ... without end. Preparing ahead changes nothing: no step depends on
    another.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="crops") as pool:
        ahead = [pool.submit(sampler.batch, step) for step in range(_PREFETCH_STEPS)]
        step = _PREFETCH_STEPS
        try:
            while True:
                batch = ahead.pop(0).result()
                ahead.append(pool.submit(sampler.batch, step))
                step += 1
                yield batch
        finally:
            for future in ahead:
                future.cancel()
