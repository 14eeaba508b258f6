"""A command disturbed at every one of its storage calls. Owns: counting the calls of an undisturbed command, and, for
each, a copy of what was there before, the command killed or failing at that call, and the same command again. Must not
know: which command it is.

Where other processes see the store, a kill is a real SIGKILL to a process of its own. It is forked by a server that has
imported everything and run nothing, so it costs a third of a second less than one that starts.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import fsspec
from chaos.faulty_storage import CHANGES, Call, Fault, Once, Stage
from dying_storage import KilledError

from pipeline.errors import MaskmillError
from pipeline.storage import local_path

_CHILD_LIMIT_S = 120.0
#: The folder that is copied: what is there before the command.
BEFORE = "before"


class Scene(Protocol):
    """A command, on what lies below a folder. Pickles."""

    def act(self, folder_uri: str) -> object:
        """The command. Safe to repeat: that is what is tested."""
        ...

    def look(self, folder_uri: str) -> object:
        """Asserts what must hold at any time, and gives what readers see that must not depend on the disturbance."""
        ...

    def end(self, folder_uri: str) -> object:
        """Asserts what must hold once the command has ended, and gives all that must be as after an undisturbed one."""
        ...


class Place:
    """Where copies of a scene's beginning lie: below `uri`, on disk, in this process's memory, or in a bucket."""

    def __init__(self, uri: str, client: Any = None) -> None:
        self.uri = uri
        self.scheme = uri.partition(":")[0]
        self._client = client
        if self.scheme == "file":
            Path(local_path(f"{uri}/{BEFORE}")).mkdir()

    def copy(self, name: str) -> str:
        """A copy of the folder `BEFORE`, times of change included where etags hang on them."""
        to = f"{self.uri}/{name}"
        if self.scheme == "file":
            shutil.copytree(local_path(f"{self.uri}/{BEFORE}"), local_path(to), dirs_exist_ok=True)
        elif self.scheme == "memory":
            store = fsspec.filesystem("memory").store
            prefix = f"{self.uri}/{BEFORE}/".removeprefix("memory:/")
            for path in [path for path in store if path.startswith(prefix)]:
                store[to.removeprefix("memory:/") + "/" + path.removeprefix(prefix)] = store[path]
        else:
            bucket, _, base = self.uri.removeprefix("s3://").partition("/")
            prefix = f"{base}/{BEFORE}/".lstrip("/")
            for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
                for one in page.get("Contents", ()):
                    key = f"{base}/{name}/".lstrip("/") + one["Key"].removeprefix(prefix)
                    self._client.copy_object(Bucket=bucket, Key=key, CopySource={"Bucket": bucket, "Key": one["Key"]})
        return to

    def drop(self, uri: str) -> None:
        """Takes a copy away, so that many of them need no room."""
        if self.scheme == "file":
            shutil.rmtree(local_path(uri), ignore_errors=True)
        elif self.scheme == "memory":
            store = fsspec.filesystem("memory").store
            for path in [path for path in store if path.startswith(uri.removeprefix("memory:/") + "/")]:
                del store[path]


class Tally(NamedTuple):
    """What an enumeration came to. `unreached`: calls that did not come again, as where threads race."""

    calls: int
    changes: int
    struck: int
    unreached: list[Call]
    seconds: float

    def __str__(self) -> str:
        told = f"{self.struck} of {self.calls} calls disturbed ({self.changes} of them changes) in {self.seconds:.0f} s"
        return told + (f"; not reached: {', '.join(map(str, self.unreached))}" if self.unreached else "")


def recorded(scene: Scene, place: Place) -> tuple[list[Call], object]:
    """The calls of an undisturbed command on a copy of `BEFORE`, and the end that it comes to."""
    folder = place.copy("calm")
    with Stage(places={"HERE": folder}).set() as stage:
        scene.act(folder)
    return list(stage.calls), scene.end(folder)


def disturbed_everywhere(
    scene: Scene, place: Place, *, fault: Fault = "kill",
    only: Callable[[Call], bool] = lambda call: True, every: int = 1, first: int = 0,
) -> Tally:  # fmt: skip
    """For each call of the undisturbed command (of those that `only` names, each `every`-th from `first` on): a copy,
    the command with `fault` at that call, a look, the same command until it ends, and the same end.
    """
    began_s = time.monotonic()
    calls, wanted = recorded(scene, place)
    chosen = [call for call in calls if only(call)][first::every]
    unreached, struck = [], 0
    for number, call in enumerate(chosen):
        folder = place.copy(f"{fault}-{number}")
        try:
            if strike(scene, place, folder, call, fault):
                struck += 1
            else:
                unreached.append(call)
            assert_recovers(scene, folder, wanted)
        except BaseException as error:
            error.add_note(f"{fault} at call {number} of {len(chosen)}: {call}, in {folder}")
            raise
        place.drop(folder)
    changes = sum(call.method in CHANGES for call in chosen)
    return Tally(len(chosen), changes, struck, unreached, time.monotonic() - began_s)


def stalled_everywhere(scene: Scene, place: Place) -> int:
    """The command with all of its calls late: the same end at once. At how many calls."""
    _, wanted = recorded(scene, place)
    folder = place.copy("stalled")
    with Stage(lambda call: "stall", places={"HERE": folder}).set() as stage:
        scene.act(folder)
    assert scene.end(folder) == wanted
    return len(stage.calls)


def assert_recovers(scene: Scene, folder: str, wanted: object) -> None:
    """The same command, as often as a sentence says that it is to be given again, comes to the end that is wanted."""
    scene.look(folder)
    scene.act(folder)
    assert scene.end(folder) == wanted


def strike(scene: Scene, place: Place, folder: str, call: Call, fault: Fault) -> bool:
    """The command on `folder` with this fault at this call. Whether the call came. A failure that is no sentence of
    ours fails."""
    if fault == "kill" and place.scheme != "memory":
        return _killed_for_real(scene, folder, call)
    script = Once(call, fault)
    with Stage(script, places={"HERE": folder}).set() as stage:
        try:
            scene.act(folder)
        except KilledError:
            assert stage.killed
        except MaskmillError:  # or what DuckDB made of a kill
            assert script.struck
    return script.struck


def _killed_for_real(scene: Scene, folder: str, call: Call) -> bool:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["chaos.killed_calls", "pipeline.engine.run", "models.segmenter", "harness"])
    child = context.Process(target=_act_and_die, args=(scene, folder, call, dict(os.environ)))
    child.start()
    child.join(_CHILD_LIMIT_S)
    if child.is_alive():
        child.kill()
        child.join()
        raise AssertionError("neither killed nor at its end")
    assert child.exitcode in (0, -signal.SIGKILL), f"exit status {child.exitcode}"
    return child.exitcode != 0


def _act_and_die(scene: Scene, folder: str, call: Call, environment: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    with Stage(Once(call, "kill"), places={"HERE": folder}, really=True).set():
        scene.act(folder)
    os._exit(0)
