"""Every command over a file system that writes in place, whose line breaks at every write: the same command again ends
as if it had never broken.
"""

from __future__ import annotations

import datetime as dt
import shutil
import sys
from pathlib import Path
from typing import Any

import fsspec
import pytest
from chaos.faulty_storage import Once
from chaos.killed_calls import Scene
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
from chaos.segment_scene import FIRST_NIGHT, SECOND_NIGHT, SegmentScene, show
from chaos.torn_files import KINDS, Break, torn_line
from dying_storage import KilledError
from harness import write_tiny_model

from pipeline.errors import MaskmillError
from pipeline.storage import file_uri

sys.path.insert(0, str(Path(__file__).parents[1] / "pipeline" / "learning"))
from tiny_nuclei import write_dataset

# A heartbeat dies with all that its process does.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")

#: Where no file can be moved, as in most object stores, objects are whole or not there: only the answer can be lost.
BREAKS: list[tuple[str, Break]] = [
    ("moves", "half"), ("moves", "whole"), ("moves", "kill"), ("cannot move", "whole"),
]  # fmt: skip
COMMANDS = [
    "segment", "the night after", "train", "push", "promote", "rollback", "prune", "forget", "export", "evaluate",
]  # fmt: skip


class Torn:
    """A command, on copies of what is there before it, over `torn://`."""

    def __init__(self, command: str, folder: Path, models: list[str], discs: str) -> None:
        self.folder = folder
        self.scene: Scene
        source, before = file_uri(str(folder / "photos")), self._uri("before")
        (folder / "before").mkdir()
        show(source, FIRST_NIGHT)
        if command in ("segment", "the night after"):
            self.scene = SegmentScene(source, models[0])
        elif command == "train":
            self.scene = TrainScene(discs)
        elif command in ("push", "promote", "rollback"):
            kind = {"push": PushScene, "promote": PromoteScene, "rollback": RollbackScene}[command]
            self.scene = kind(models)
            self.scene.begin(before)  # type: ignore[attr-defined]
        elif command == "evaluate":
            self.scene = EvaluateScene(discs, models[2])
        else:
            at = self._uri("table") if command == "export" else before
            for model in models[:2]:
                SegmentScene(source, model).act(at)
            self.scene = {"prune": PruneScene, "forget": ForgetScene}.get(command, lambda: ExportScene(f"{at}/dest"))()
        if command == "the night after":
            self.scene.act(before)
            show(source, SECOND_NIGHT)

    def _uri(self, name: str) -> str:
        return f"torn://{self.folder / name}"

    def strike(self, how: Break, *, kind: str, first: int = 0, every: int = 1) -> int:
        """Breaks the line at each write, on a copy for each. How many there were."""
        with torn_line(kind, self._copy("calm")) as line:
            self.scene.act(self._uri("calm"))
        wanted = self.scene.end(self._uri("calm"))
        chosen = line.calls[first::every]
        for number, call in enumerate(chosen):
            name = f"{how}-{number}"
            breaks = Once(call, how)  # type: ignore[arg-type]
            try:
                with torn_line(kind, self._copy(name), breaks) as line:  # type: ignore[arg-type]
                    try:
                        self.scene.act(self._uri(name))
                    except KilledError:
                        assert line.killed
                    except MaskmillError:  # or what DuckDB made of a kill
                        pass
                assert breaks.struck
                self.scene.look(self._uri(name))
                self.scene.act(self._uri(name))
                assert self.scene.end(self._uri(name)) == wanted
            except BaseException as error:
                error.add_note(f"{how} at write {number} of {len(chosen)}: {call}, in {name}")
                raise
            shutil.rmtree(self.folder / name)
        return len(chosen)

    def _copy(self, name: str) -> str:
        return str(shutil.copytree(self.folder / "before", self.folder / name))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two versions of a semantic model, and one of instances."""
    folder = tmp_path_factory.mktemp("models")
    street = [str(write_tiny_model(folder / f"{seed}.safetensors", name="street", seed=seed)) for seed in range(2)]
    return [*street, str(write_tiny_model(folder / "discs.safetensors", task="instance"))]


@pytest.fixture(scope="session")
def discs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A labelled data set."""
    return str(write_dataset(tmp_path_factory.mktemp("data") / "discs", images=6, size=48))


@pytest.mark.parametrize(("kind", "how"), BREAKS)
def test_a_write_of_a_night(tmp_path: Path, models: list[str], kind: str, how: Break) -> None:
    """What the test below does at every write: at another one each day."""
    today = dt.datetime.now(dt.UTC).date().toordinal()
    print(f"\nday {today}")
    with torn_line(kind, str(tmp_path)):
        torn = Torn("the night after", tmp_path, models, "")
        assert torn.strike(how, kind=kind, first=today % 7, every=7)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("broken", BREAKS, ids=", ".join)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_write(tmp_path: Path, models: list[str], discs: str, command: str, broken: tuple[str, Break]) -> None:
    kind, how = broken
    with torn_line(kind, str(tmp_path)):
        struck = Torn(command, tmp_path, models, discs).strike(how, kind=kind)
    print(f"\n{command}, {kind}, {how}: {struck} writes")
    assert struck


def test_both_kinds_are_what_they_say(tmp_path: Path) -> None:
    for kind in KINDS:
        with torn_line(kind, str(tmp_path)):
            files: Any = fsspec.filesystem("torn")
            files.pipe_file(f"{tmp_path}/a", b"1")
            files.mv(f"{tmp_path}/a", f"{tmp_path}/b")
            assert files.cat_file(f"{tmp_path}/b") == b"1"
