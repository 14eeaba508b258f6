from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from pipeline.errors import UsageError
from pipeline.learning.labels.place import Place
from pipeline.learning.labels.splits import Entry, Splitting, choose_splits, draw_splits


def test_groups_are_never_divided_and_later_images_move_nobody() -> None:
    entries = [Entry(f"{index}.png", group=f"scene-{index // 5}") for index in range(1000)]
    first, grown = (draw_splits(part, Splitting(seed=3)) for part in (entries[:500], entries))
    assert set(first["train"]) < set(grown["train"])
    assert set(first["val"]) < set(grown["val"])
    assert len(grown["train"]) + len(grown["val"]) == 1000
    assert 130 < len(grown["val"]) < 270
    split_of = {name: split for split, names in grown.items() for name in names}
    for index in range(0, 1000, 5):
        assert len({split_of[f"{index + offset}.png"] for offset in range(5)}) == 1
    assert draw_splits(entries, Splitting(seed=4)) != grown


def test_a_pattern_makes_groups_of_names() -> None:
    entries = [Entry(f"clip{index // 10}_{index}.png") for index in range(200)]
    names = draw_splits(entries, Splitting(group_pattern=r"^(clip\d+)_"))
    clips = {split: {name.split("_")[0] for name in found} for split, found in names.items()}
    assert clips["val"]
    assert not clips["train"] & clips["val"]


def test_settings_that_make_no_sense() -> None:
    with pytest.raises(ValidationError, match="sum to 1"):
        Splitting(fractions={"train": 0.5, "val": 0.2})
    with pytest.raises(ValidationError, match="not a regular expression"):
        Splitting(group_pattern="(")


def test_a_splits_file_must_be_lists_of_names(tmp_path: Path) -> None:
    (tmp_path / "splits.json").write_text('{"train": "a.png"}')
    with pytest.raises(UsageError, match=r"splits\.json must be"):
        choose_splits(Place(tmp_path), [Entry("a.png")], None)
    (tmp_path / "splits.json").unlink()
    assert choose_splits(Place(tmp_path), [Entry("a.png")], None, own={"x": ("a.png",)}) == {"x": ("a.png",)}
