from __future__ import annotations

from pathlib import Path

import pytest
import torch

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
