from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pipeline.errors import UsageError
from pipeline.learning.scores import score
from pipeline.learning.slices import MAX_SLICES, slices_of

sys.path.insert(0, str(Path(__file__).parent))
from drawn_evaluations import instance_rows, semantic_rows, table_of


def test_values_are_pieces_and_their_scores_those_of_a_condition() -> None:
    table = table_of(instance_rows(0.7))
    day, night = slices_of(table, "split_part(image_uri, '/', 4)", resamples=20)
    assert (day.value, day.images, night.value, night.images) == ("day", 8, "night", 4)
    assert night.scores == score(table, where="image_uri LIKE '%/night/%'", resamples=20)


def test_numbers_are_cut_at_their_quartiles() -> None:
    rows = semantic_rows(0.2)
    rows[3]["brightness"] = None
    rows[4]["brightness"] = float("nan")
    pieces = slices_of(table_of(rows), "brightness", resamples=0)
    assert [one.images for one in pieces] == [3, 2, 2, 3, 2]
    assert [one.value for one in pieces][-1] == "null"
    assert pieces[0].value.startswith("0 to ")
    assert pieces[3].value.endswith(" to 0.11")
    assert sum(one.images for one in pieces) == len(rows)


def test_few_numbers_are_values_in_their_order() -> None:
    rows = [row | {"width": (100, 20, 3)[index % 3]} for index, row in enumerate(semantic_rows(0.2))]
    assert [one.value for one in slices_of(table_of(rows), "width", resamples=0)] == ["3", "20", "100"]
    sizes = slices_of(table_of(rows), "size", resamples=0)
    assert [one.value for one in sizes] == ["72", "480", "2400"]


def test_fractions_are_short() -> None:
    rows = [row | {"brightness": 0.32514744997024536} for row in semantic_rows(0.2, images=3)]
    assert [one.value for one in slices_of(table_of(rows), "brightness", resamples=0)] == ["0.325147"]


def test_failures_are_counted_and_a_piece_of_them_has_no_scores() -> None:
    rows = semantic_rows(0.2, images=4)
    rows += [{"image_uri": "z", "status": "error", "error_kind": "corrupt"}]
    pieces = slices_of(table_of(rows), "status", resamples=0)
    assert [(one.value, one.images, one.failed) for one in pieces] == [("error", 0, 1), ("ok", 4, 0)]
    assert pieces[0].scores is None


def test_the_largest_of_too_many() -> None:
    rows = semantic_rows(0.2, images=40)
    for index, row in enumerate(rows):
        row["image_name"] = f"folder-{min(index, 30):02d}/image.png"
    pieces = slices_of(table_of(rows), "prefix", resamples=0)
    assert len(pieces) == MAX_SLICES
    assert pieces[-1].value == "folder-30"
    assert pieces[-1].images == 10


@pytest.mark.parametrize("by", ["nothing", "count(*)", "unnest([1, 2])", "read_text('/etc/hostname')"])
def test_what_is_no_value_of_an_image_is_refused(by: str) -> None:
    with pytest.raises(UsageError, match="the slice"):
        slices_of(table_of(semantic_rows(0.2, images=3)), by)
