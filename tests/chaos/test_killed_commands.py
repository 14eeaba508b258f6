"""What else changes a store, killed or failed at every one of its storage calls: the same command ends the same."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from chaos.faulty_storage import Call, Fault
from chaos.killed_calls import BEFORE, Place, Scene, disturbed_everywhere, stalled_everywhere
from chaos.other_scenes import (
    EvaluateScene,
    ExportScene,
    ForgetScene,
    PromoteScene,
    PruneScene,
    PushScene,
    RollbackScene,
    TrainScene,
)
from chaos.segment_scene import FIRST_NIGHT, SegmentScene, show
from harness import write_tiny_model

from pipeline.insight.export.shape import Kind

sys.path.insert(0, str(Path(__file__).parents[1] / "pipeline" / "learning"))
from tiny_nuclei import write_dataset

# A heartbeat dies with all that its process does.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
]


@pytest.fixture(scope="session")
def street(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Files of two versions of a model."""
    folder = tmp_path_factory.mktemp("street")
    return [str(write_tiny_model(folder / f"{seed}.safetensors", name="street", seed=seed)) for seed in range(2)]


@pytest.fixture(scope="session")
def discs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A labelled data set on this disk."""
    return str(write_dataset(tmp_path_factory.mktemp("data") / "discs", images=6, size=48))


def training(place: Place, street: list[str], discs: str) -> Scene:
    return TrainScene(discs)


def pushing(place: Place, street: list[str], discs: str) -> Scene:
    scene = PushScene(street)
    scene.begin(f"{place.uri}/{BEFORE}")
    return scene


def pushing_quietly(place: Place, street: list[str], discs: str) -> Scene:
    """Without an alias: nothing but the history tells that it came."""
    scene = PushScene(street, alias=None)
    scene.begin(f"{place.uri}/{BEFORE}")
    return scene


def promoting(place: Place, street: list[str], discs: str) -> Scene:
    scene = PromoteScene(street)
    scene.begin(f"{place.uri}/{BEFORE}")
    return scene


def rolling_back(place: Place, street: list[str], discs: str) -> Scene:
    scene = RollbackScene(street)
    scene.begin(f"{place.uri}/{BEFORE}")
    return scene


def pruning(place: Place, street: list[str], discs: str) -> Scene:
    _two_versions(place, street, BEFORE)
    return PruneScene()


def forgetting(place: Place, street: list[str], discs: str) -> Scene:
    _two_versions(place, street, BEFORE)
    return ForgetScene()


def exporting(place: Place, street: list[str], discs: str) -> Scene:
    _two_versions(place, street, "table")
    return ExportScene(f"{place.uri}/table/dest")


def evaluating(place: Place, street: list[str], discs: str) -> Scene:
    model = str(write_tiny_model(Path(street[0]).with_name("discs.safetensors"), task="instance"))
    return EvaluateScene(discs, model)


def _two_versions(place: Place, street: list[str], name: str) -> None:
    source = f"{place.uri}/photos"
    show(source, FIRST_NIGHT)
    for path in street:
        SegmentScene(source, path).act(f"{place.uri}/{name}")


COMMANDS = pytest.mark.parametrize(
    "command",
    [training, pushing, pushing_quietly, promoting, rolling_back, pruning, forgetting, exporting, evaluating],
    ids=lambda command: command.__name__,
)
Command = Callable[[Place, list[str], str], Any]


@COMMANDS
def test_killed_at_every_call(place: Place, street: list[str], discs: str, command: Command) -> None:
    tally = disturbed_everywhere(command(place, street, discs), place)
    print(f"\nkilled: {tally}")
    assert tally.struck > 3 and not tally.unreached


@pytest.mark.parametrize("fault", ["fail", "deny", "tear", "lose", "deaf"])
@COMMANDS
def test_every_call_fails_once(place: Place, street: list[str], discs: str, command: Command, fault: Fault) -> None:
    def lasts(call: Call) -> bool:
        """What an image was denied to is done without it: an export counts it, and has it in `skipped.jsonl`."""
        return fault == "deny" and command is exporting and "/photos/" in call.name

    scene = command(place, street, discs)
    tally = disturbed_everywhere(scene, place, fault=fault, only=lambda call: not lasts(call))
    print(f"\n{fault}: {tally}")
    assert tally.struck > 3 and not tally.unreached


@pytest.mark.parametrize("fault", ["kill", "fail", "tear", "lose"])
@pytest.mark.parametrize("format_", sorted(set(get_args(Kind)) - {"png"}))
def test_exports_of_every_other_format(place: Place, street: list[str], format_: str, fault: Fault) -> None:
    _two_versions(place, street, "table")
    tally = disturbed_everywhere(ExportScene(f"{place.uri}/table/dest", format_), place, fault=fault)
    print(f"\n{format_}, {fault}: {tally}")
    assert tally.struck > 20 and not tally.unreached


@COMMANDS
def test_every_call_stalls(place: Place, street: list[str], discs: str, command: Command) -> None:
    stalled = stalled_everywhere(command(place, street, discs), place)
    print(f"\nstalled: {stalled} calls")
    assert stalled > 3
