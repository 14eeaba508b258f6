from __future__ import annotations

import pytest

from models.palettes import distinct_color, voc_color


def test_the_voc_colours() -> None:
    # The devkit's colour map, as published: aeroplane, bicycle, bird, chair, person, tv/monitor, and the border's.
    published = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 3: (128, 128, 0), 9: (192, 0, 0), 15: (192, 128, 128),
                 20: (0, 64, 128), 255: (224, 224, 192)}  # fmt: skip
    assert {index: voc_color(index) for index in published} == published
    assert len({voc_color(index) for index in range(256)}) == 256
    with pytest.raises(ValueError, match="256"):
        voc_color(256)


def test_classes_without_colours_get_different_ones() -> None:
    assert len({distinct_color(index) for index in range(12)}) == 12
