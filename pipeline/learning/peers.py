"""The workers that train together, as one of them sees it. Owns: what they tell each other. Must not know: networks,
data, who started them.

Outside a process group of `torch.distributed` there is one, and nothing is sent.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed


class Peers:
    """Every call is made by all workers, in the same order."""

    def __init__(self, device: str) -> None:
        together = distributed.is_available() and distributed.is_initialized()
        self.rank = distributed.get_rank() if together else 0
        self.world = distributed.get_world_size() if together else 1
        self.device = device

    @property
    def first(self) -> bool:
        """Whether this one measures, writes and speaks."""
        return self.rank == 0

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Over the workers, element by element; float32 or float64, on `device`."""
        if self.world > 1:
            distributed.all_reduce(values)
            values /= self.world
        return values

    def agreed(self, number: float) -> float:
        """The number of the first worker."""
        if self.world == 1:
            return number
        told = torch.tensor(number, dtype=torch.float64, device=self.device)
        distributed.broadcast(told, src=0)
        return float(told)

    def gathered(self, value: Any) -> list[Any]:
        """The value of each, by rank. For errors: it is slow."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        distributed.all_gather_object(values, value)
        return values
