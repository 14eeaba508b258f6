"""The order of work on a GPU's streams, told to stand-ins for torch's: that nothing is read before it is there, and no
memory given away before it has been read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from models.transfer import Transfer, arrays_of


class Log(list[str]):
    """What was asked of the streams, in order. `now`: the stream that is current."""

    now = "compute"

    def stream(self, name: str) -> Any:
        log = self

        class Stream:
            def __str__(self) -> str:
                return name

            def wait_stream(self, other: Any) -> None:
                log.append(f"{name} waits for {other}")

        return Stream()


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    log = Log()
    made: list[str] = []

    def new_stream(device: str) -> Any:
        made.append("uploads" if not made else "downloads")
        return log.stream(made[-1])

    @contextlib.contextmanager
    def entered(stream: Any) -> Iterator[None]:
        before, log.now = log.now, str(stream)
        yield
        log.now = before

    class Event:
        def __init__(self, *, blocking: bool) -> None:
            assert blocking

        def record(self, stream: Any) -> None:
            log.append(f"event on {stream}")

    def copied(name: str, function: Any) -> Any:
        def call(tensor: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
            log.append(f"{name} on {log.now}")
            answer: torch.Tensor = function(tensor, *args, **options)
            return answer

        return call

    empty = torch.empty

    def pinned(*args: Any, pin_memory: bool, **options: Any) -> torch.Tensor:
        assert pin_memory
        return empty(*args, **options)

    monkeypatch.setattr(torch.cuda, "Stream", new_stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: log.stream("compute"))
    monkeypatch.setattr(torch, "empty", pinned)
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    monkeypatch.setattr(torch.Tensor, "to", copied("brought", torch.Tensor.to))
    monkeypatch.setattr(torch.Tensor, "copy_", copied("fetched", torch.Tensor.copy_))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: log.append(f"kept for {stream}"))
    return log


def test_a_batch_is_brought_beside_the_one_that_is_computed(log: Log) -> None:
    transfer = Transfer("cuda")
    transfer.device = "cpu"
    images, sizes = np.arange(6, dtype=np.uint8), np.arange(2, dtype=np.int32)
    moved = transfer.upload(images, sizes)
    images[:] = 0
    assert [one.tolist() for one in moved] == [[0, 1, 2, 3, 4, 5], [0, 1]], "the caller's memory is free at once"
    assert log == ["brought on uploads"] * 2 + ["compute waits for uploads"] + ["kept for compute"] * 2


@pytest.mark.parametrize("by_slot", [False, True])
def test_answers_are_fetched_when_they_are_computed_and_told_when_they_are_there(log: Log, by_slot: bool) -> None:
    transfer = Transfer("cuda")
    one = {"class_ids": torch.ones(1, 2), "pixels": torch.ones(1)}
    results, event = transfer.download([one, None] if by_slot else one)
    assert event is not None
    copies = ["fetched on downloads", "kept for downloads"] * 2
    assert log == ["downloads waits for compute", *copies, "event on downloads"]
    found = arrays_of(results, 0)
    assert found is not None and found["class_ids"].tolist() == ([[1, 1]] if by_slot else [1, 1])
    assert not by_slot or arrays_of(results, 1) is None


def test_on_a_cpu_nothing_moves() -> None:
    transfer = Transfer("cpu")
    images = np.arange(6, dtype=np.uint8)
    (tensor,) = transfer.upload(images)
    assert np.shares_memory(tensor.numpy(), images)
    results: dict[str, torch.Tensor] = {"class_ids": torch.ones(1, 2)}
    assert transfer.download(results) == (results, None)
