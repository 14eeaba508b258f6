"""Batches to the device and answers back, beside the batch that is being computed. Owns: streams, pinned memory, the
event after which an answer may be read. Must not know: networks, cards, what the arrays mean.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

#: Maps and figures: each with a first axis of slots, or slot by slot.
Results = dict[str, torch.Tensor] | list[dict[str, torch.Tensor] | None]


class Pending:
    """A submitted batch. Only `Segmenter.finish` looks inside."""

    __slots__ = ("event", "image_sizes_N2", "results")

    def __init__(
        self,
        results: Results,
        event: torch.cuda.Event | None,
        image_sizes_N2: NDArray[np.int32],
    ) -> None:
        self.results = results
        self.event = event
        self.image_sizes_N2 = image_sizes_N2


class Transfer:
    """The two ways of one device. On a CPU nothing moves. For one thread."""

    def __init__(self, device: str) -> None:
        on_cuda = torch.device(device).type == "cuda"
        self.device = device
        self._uploads = torch.cuda.Stream(device) if on_cuda else None
        self._downloads = torch.cuda.Stream(device) if on_cuda else None

    def upload(self, *arrays: NDArray[Any]) -> list[torch.Tensor]:
        """`arrays` on the device, before what the current stream does next; they may be reused at once. On a CPU the
        tensors are the arrays themselves.
        """
        tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
        if self._uploads is None:
            return tensors
        # Pinned memory is torch's own copy, which its allocator keeps until the transfer is done. On a stream of its
        # own the transfer does not wait for the batch before, which the current stream is still computing.
        with torch.cuda.stream(self._uploads):
            moved = [tensor.pin_memory().to(self.device, non_blocking=True) for tensor in tensors]
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._uploads)
        for tensor in moved:
            tensor.record_stream(current)
        return moved

    def download(self, results: Results) -> tuple[Results, torch.cuda.Event | None]:
        """Copies under way into pinned memory, and the event after which to read them; on a CPU `results`, and None."""
        downloads = self._downloads
        if downloads is None:
            return results, None

        def copied(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            copies = {}
            for name, tensor in tensors.items():
                pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                copies[name] = pinned.copy_(tensor, non_blocking=True)
                # Its memory must not go to the next batch before it has been read.
                tensor.record_stream(downloads)
            return copies

        downloads.wait_stream(torch.cuda.current_stream(self.device))
        # Blocking: a thread that waits leaves its core to those that decode.
        event = torch.cuda.Event(blocking=True)
        with torch.cuda.stream(downloads):
            if isinstance(results, list):
                fetched: Results = [None if result is None else copied(result) for result in results]
            else:
                fetched = copied(results)
            event.record(downloads)
        return fetched, event


def arrays_of(results: Results, slot: int) -> dict[str, NDArray[Any]] | None:
    """What came back for one slot; None where it was empty."""
    if isinstance(results, list):
        result = results[slot]
        return None if result is None else {name: tensor.numpy() for name, tensor in result.items()}
    return {name: tensor.numpy()[slot] for name, tensor in results.items()}
