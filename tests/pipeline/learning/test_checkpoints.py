from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.errors import InfrastructureError
from pipeline.learning.checkpoints import CheckpointFolder, Progress


def state(number: float) -> dict[str, torch.Tensor]:
    return {"model/weight": torch.full((2,), number)}


def test_a_damaged_checkpoint_can_be_left_out_with_all_that_the_one_before_needs(tmp_path: Path) -> None:
    folder = CheckpointFolder(str(tmp_path))
    for step, best in ((1, 1), (2, 1), (3, 3)):
        if best == step:
            folder.save_best(step, state(step))
        folder.save(Progress(step=step, best_step=best), state(step))
    (tmp_path / "checkpoint-00000003.safetensors").write_bytes(b"damaged")
    with pytest.raises(InfrastructureError, match="delete it to go on from the one before"):
        folder.latest()
    (tmp_path / "checkpoint-00000003.safetensors").unlink()
    found = folder.latest()
    assert found is not None and found.progress.best_step == 1
    assert folder.best(1)["model/weight"].tolist() == [1, 1]


def test_two_checkpoints_and_what_they_name_are_kept(tmp_path: Path) -> None:
    folder = CheckpointFolder(str(tmp_path))
    for step in range(1, 6):
        folder.save_best(step, state(step))
        folder.save(Progress(step=step, best_step=step), state(step))
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [
        f"{kind}-0000000{step}.safetensors" for kind in ("best", "checkpoint") for step in (4, 5)
    ]
    folder.finish({"version": "abc"})
    assert folder.outcome() == {"version": "abc"}
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_checkpoint_is_a_safetensors_file_whatever_is_in_it(tmp_path: Path) -> None:
    tensors = {
        "channels_last": torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last),
        "half": torch.randn(3).to(torch.bfloat16), "number": torch.tensor(7), "none": torch.zeros(0, 2),
        "yes": torch.tensor([True, False, True]), "byte": torch.tensor([1, 2, 3], dtype=torch.uint8),
        "part": torch.randn(6, 6)[::2, 1:], "wide": torch.randn(5, dtype=torch.float64),
        "weight": torch.nn.Parameter(torch.randn(2)),
    }  # fmt: skip
    folder = CheckpointFolder(str(tmp_path))
    folder.save(Progress(step=3), tensors)
    read = load_file(tmp_path / "checkpoint-00000003.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    found = folder.latest()
    assert found is not None and found.progress.step == 3
