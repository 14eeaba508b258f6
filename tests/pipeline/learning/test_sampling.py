from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path

import pytest
import torch

from pipeline.learning.augmentation import AugmentationConfig, make_example
from pipeline.learning.dataset import Dataset
from pipeline.learning.sampling import Sampler, sampling_chances, stream

sys.path.insert(0, str(Path(__file__).parent))
from tiny_nuclei import write_dataset


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return Dataset(write_dataset(tmp_path / "discs", images=7), "train")


def test_small_strata_are_not_drowned(dataset: Dataset) -> None:
    alike = sampling_chances(dataset, 0.0)
    as_they_come = sampling_chances(dataset, 1.0)
    strata = [item.stratum for item in dataset.items]
    assert sum(chance for chance, stratum in zip(alike, strata, strict=True) if stratum == "dark") == pytest.approx(0.5)
    assert as_they_come == pytest.approx([0.2] * 5)


def test_a_step_depends_on_the_seed_and_its_number_only(dataset: Dataset) -> None:
    examples = [make_example(item.name, dataset.image(item), dataset.instance_labels(item)) for item in dataset.items]
    sampler = Sampler(
        examples=examples,
        chances=sampling_chances(dataset, 0.5),
        task="instance",
        augmentation=AugmentationConfig(crop_px=32),
        std_floor=1.0,
        batch_size=3,
        seed=7,
    )
    streamed = list(islice(stream(sampler), 6))
    for step in (5, 0, 3):
        batch = sampler.batch(step)
        assert batch.names == streamed[step].names
        assert torch.equal(batch.inputs, streamed[step].inputs)
        assert torch.equal(batch.targets, streamed[step].targets)
    assert streamed[0].inputs.shape == (3, 3, 32, 32)
    assert streamed[0].inputs.is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(streamed[0].inputs, streamed[1].inputs)
    assert not torch.equal(sampler._replace(seed=8).batch(0).inputs, streamed[0].inputs)
