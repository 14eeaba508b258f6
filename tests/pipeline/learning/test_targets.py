from __future__ import annotations

import numpy as np
import pytest
import torch

from models.losses import IGNORED
from pipeline.learning.targets import boundary_targets, detection_targets, object_layers


@pytest.fixture
def labels() -> np.ndarray:
    labels = np.zeros((64, 64), dtype=np.int32)
    labels[10:20, 10:20] = 1
    labels[10:20, 20:30] = 2
    labels[40:50, 40:60] = 3
    return labels


def test_boundaries(labels: np.ndarray) -> None:
    channels, emphasis = boundary_targets(labels)
    assert np.array_equal(channels > 0, labels > 0)
    assert channels[15, 10] == channels[15, 19] == channels[15, 18] == 2
    assert channels[15, 11] == channels[15, 17] == 1
    assert channels[45, 40] == 2
    assert channels[45, 41] == 1
    assert (emphasis[15, 18:22] == 2).all()
    assert emphasis[15, 10] == emphasis[15, 9] == 1
    assert emphasis[15, 5] == emphasis[45, 50] == 0
    assert not (emphasis[38:52, 38:62] == 2).any()


def test_what_is_not_known_has_no_channel(labels: np.ndarray) -> None:
    labels[0:5, 0:5] = -1
    channels, _ = boundary_targets(labels)
    assert (channels[0:5, 0:5] == IGNORED).all()
    assert (channels == IGNORED).sum() == 25


def test_objects_that_overlap_are_told_apart() -> None:
    masks = [np.zeros((10, 12), dtype=bool) for _ in range(3)]
    masks[0][2:8, 2:8] = True
    masks[1][4:6, 4:12] = True
    masks[2][0:2, 0:12] = True
    layers = object_layers(masks, (10, 12))
    assert len(layers) == 2
    targets = detection_targets(torch.from_numpy(layers), (7, 8, 9), torch.zeros(10, 12, dtype=torch.bool))
    found = {int(label): mask.numpy() > 0 for label, mask in zip(targets["labels"], targets["masks"], strict=True)}
    assert all(np.array_equal(found[channel], mask) for channel, mask in zip((7, 8, 9), masks, strict=True))
    boxes = {int(label): box.tolist() for label, box in zip(targets["labels"], targets["boxes"], strict=True)}
    assert boxes == {7: [2, 2, 8, 8], 8: [4, 4, 12, 6], 9: [0, 0, 12, 2]}
    assert not targets["ignored"].any()


def test_slivers_of_objects_are_ignored() -> None:
    layers = np.zeros((1, 8, 8), dtype=np.int32)
    layers[0, 0, 0:3] = 1
    layers[0, 4:8, 4:8] = 2
    ignored = torch.zeros(8, 8, dtype=torch.bool)
    ignored[7, 0] = True
    targets = detection_targets(torch.from_numpy(layers), (1, 1), ignored)
    assert targets["boxes"].tolist() == [[4, 4, 8, 8]]
    assert targets["ignored"].sum() == 4
    assert targets["ignored"][0, :3].all()


def test_nothing_there() -> None:
    targets = detection_targets(torch.from_numpy(object_layers([], (8, 9))), (), torch.zeros(8, 9, dtype=torch.bool))
    shapes = {name: tuple(tensor.shape) for name, tensor in targets.items()}
    assert shapes == {"boxes": (0, 4), "labels": (0,), "masks": (0, 8, 9), "ignored": (8, 9)}
