"""`segment`, killed or failed at every one of its storage calls: the same command ends with the same table."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pytest
from chaos.faulty_storage import Fault
from chaos.killed_calls import BEFORE, Place, disturbed_everywhere, stalled_everywhere
from chaos.segment_scene import FIRST_NIGHT, SECOND_NIGHT, SegmentScene, show
from harness import write_tiny_model

# A heartbeat dies with all that its process does.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.safetensors"))


def first_night(place: Place, model: str) -> SegmentScene:
    show(f"{place.uri}/photos", FIRST_NIGHT)
    return SegmentScene(f"{place.uri}/photos", model)


def second_night(place: Place, model: str) -> SegmentScene:
    scene = first_night(place, model)
    scene.act(f"{place.uri}/{BEFORE}")
    show(scene.source, SECOND_NIGHT)
    return scene


NIGHTS = pytest.mark.parametrize("night", [first_night, second_night])


def test_a_few_calls_of_the_second_night(empty_memory: str, model: str) -> None:
    """What the tests below do at every call: at other ones each day."""
    today = dt.datetime.now(dt.UTC).date().toordinal()
    print(f"\nday {today}")
    place = Place(empty_memory)
    scene = second_night(place, model)
    for fault in ("kill", "lose"):
        tally = disturbed_everywhere(scene, place, fault=fault, first=today % 41, every=41)
        assert tally.struck >= 4 and not tally.unreached


@pytest.mark.slow
@pytest.mark.timeout(1800)
@NIGHTS
def test_killed_at_every_call(place: Place, model: str, night: Any) -> None:
    tally = disturbed_everywhere(night(place, model), place)
    print(f"\nkilled: {tally}")
    assert tally.struck > 30 and not tally.unreached


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("fault", ["fail", "deny", "tear", "lose", "deaf"])
@NIGHTS
def test_every_call_fails_once(place: Place, model: str, night: Any, fault: Fault) -> None:
    tally = disturbed_everywhere(night(place, model), place, fault=fault)
    print(f"\n{fault}: {tally}")
    assert tally.struck > 30 and not tally.unreached


@pytest.mark.slow
@NIGHTS
def test_every_call_stalls(place: Place, model: str, night: Any) -> None:
    stalled = stalled_everywhere(night(place, model), place)
    print(f"\nstalled: {stalled} calls")
    assert stalled > 30
