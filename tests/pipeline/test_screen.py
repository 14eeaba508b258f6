"""What people see while a run goes on."""

from __future__ import annotations

import pytest

from pipeline import screen
from pipeline.engine.fleet import FleetProgress
from pipeline.engine.outcome import Event


@pytest.mark.parametrize(
    ("tiles", "shown"), [((529, 120), "0/2 images, 120/529 tiles, "), ((0, 0), "0/2 images, 0.0/s")]
)
def test_tiles_of_a_huge_image_are_told_where_there_is_one(
    tiles: tuple[int, int], shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(screen, "_LINE_EVERY_S", 0.0)
    display = screen.Screen(quiet=False)
    display.listen(Event("progress", progress=FleetProgress(0, 0, 1, 0.0, 0.0, *tiles), total=2))
    display.close()
    assert shown in capsys.readouterr().err
