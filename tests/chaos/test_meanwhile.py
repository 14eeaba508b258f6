"""A driver that stands still before one of its storage calls, each in turn, while others work on the same table; then
it wakes up and goes on."""

from __future__ import annotations

import contextlib
import datetime as dt
import time
from collections.abc import Callable
from typing import Any, Literal

import pytest
from chaos.faulty_storage import Once, Stage
from chaos.killed_calls import BEFORE, Place
from chaos.segment_scene import FIRST_NIGHT, SECOND_NIGHT, Row, SegmentScene, show, terminal_rows
from harness import write_tiny_model

import pipeline
from pipeline.errors import HeldError, InfrastructureError, MaskmillError

#: What is asked of a file at once before it is opened.
_WITH_OPENING = ("file_glob", "file_exists", "file_size", "file_modified")
#: What the others do, given the scene and the folder; and which night's images there are then.
Others = Callable[[SegmentScene, str], Literal["first", "second"]]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.safetensors"))


def _act(scene: SegmentScene, folder: str) -> None:
    """The command, again where a sentence says so: a run that was given up meanwhile is planned anew, and a heartbeat
    that was on its way when its driver came to stand still is waited out."""
    for _ in range(3):
        with contextlib.suppress(InfrastructureError, HeldError):
            scene.act(folder)
            return
        time.sleep(0.5)
    scene.act(folder)


def take_over(scene: SegmentScene, folder: str) -> Literal["first"]:
    """The same command on another host, which outlives the lease and ends the run."""
    _act(scene, folder)
    return "first"


def take_over_and_replan(scene: SegmentScene, folder: str) -> Literal["second"]:
    """And the next night, for which images were replaced, added and taken away."""
    _act(scene, folder)
    show(f"{folder}/photos", SECOND_NIGHT)
    _act(scene, folder)
    return "second"


def abandon_and_replan(scene: SegmentScene, folder: str) -> Literal["first"]:
    """Somebody gives up what is open, and the same command plans again."""
    with contextlib.suppress(MaskmillError):  # there may be no table yet
        for run in pipeline.list_runs(f"{folder}/dest"):
            if run["state"] == "open":
                pipeline.abandon_run(f"{folder}/dest", run["run_id"])
    _act(scene, folder)
    return "first"


def overlap(scene: SegmentScene, folder: str) -> Literal["first"]:
    """An ad hoc run over half of the images, of which it does what no open run holds."""
    _act(scene.of(f"{folder}/photos/[a-c]*.*"), folder)
    return "first"


def standing_still_everywhere(place: Place, model: str, others: Others, *, first: int = 0, every: int = 1) -> int:
    """The driver stands still before each `every`-th call from `first` on. Gives at how many it did."""
    source = f"{place.uri}/{BEFORE}/photos"
    show(source, FIRST_NIGHT)
    scene = SegmentScene(source, model)
    answers = _calm_answers(place, model)
    calm = place.copy("calm")
    with Stage(places={"HERE": calm}).set() as stage:
        scene.of(f"{calm}/photos").act(calm)
    calls = [call for call in stage.calls if call.method not in _WITH_OPENING][first::every]
    for number, call in enumerate(calls):
        folder = place.copy(f"still-{number}")
        here = scene.of(f"{folder}/photos")
        shown: list[str] = []

        def meanwhile(here: SegmentScene = here, folder: str = folder, shown: list[str] = shown) -> None:
            shown.append(others(here, folder))

        script = Once(call, meanwhile)
        try:
            with Stage(script, places={"HERE": folder}).set(), contextlib.suppress(MaskmillError):
                here.act(folder)
            assert script.struck
            here.look(folder)
            _act(here, folder)
            here.end(folder)
            assert [_answer(row) for row in _newest(f"{folder}/dest")] == answers[shown[0]]
            outcome: Any = here.act(folder)
            assert outcome.planned == 0
        except BaseException as error:
            error.add_note(f"stood still before call {number} of {len(calls)}: {call}, in {folder}")
            raise
        place.drop(folder)
    return len(calls)


def _calm_answers(place: Place, model: str) -> dict[str, list[Row]]:
    """By night, what undisturbed runs say of its images, wherever they lie."""
    if model in _ANSWERS:
        return _ANSWERS[model]
    found = _ANSWERS.setdefault(model, {})
    for night, corpus in (("first", FIRST_NIGHT), ("second", SECOND_NIGHT)):
        show(f"{place.uri}/calm-{night}/photos", corpus)
        SegmentScene(f"{place.uri}/calm-{night}/photos", model).act(f"{place.uri}/calm-{night}")
        found[night] = [_answer(row) for row in terminal_rows(f"{place.uri}/calm-{night}/dest")]
    return found


_ANSWERS: dict[str, dict[str, list[Row]]] = {}


def _answer(row: Row) -> Row:
    """Without the etag, which is another for each copy."""
    return row._replace(image_etag="")


def _newest(dest: str) -> list[Row]:
    """What the view `images` shows."""
    shown = dict(pipeline.connect(dest).sql("SELECT image_uri, image_etag FROM images").fetchall())
    by_name = {(uri.rpartition("/")[2], etag) for uri, etag in shown.items()}
    return [row for row in terminal_rows(dest) if (row.name, row.image_etag) in by_name]


@pytest.mark.parametrize(
    "others", [take_over_and_replan, abandon_and_replan, overlap], ids=lambda others: others.__name__
)
def test_at_one_call(empty_memory: str, model: str, others: Others) -> None:
    """Another one each day, in the middle of the work."""
    first = 20 + dt.datetime.now(dt.UTC).date().toordinal() % 40
    assert standing_still_everywhere(Place(empty_memory), model, others, first=first, every=1000) == 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "others", [take_over, take_over_and_replan, abandon_and_replan, overlap], ids=lambda others: others.__name__
)
def test_at_every_call(place: Place, model: str, others: Others) -> None:
    print(f"\nstood still before each of {standing_still_everywhere(place, model, others)} calls")
