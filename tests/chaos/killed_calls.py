"""A command disturbed at every one of its storage calls. Owns: counting the calls of an undisturbed command, and, for
each, a copy of what was there before, the command killed or failing at that call, and the same command again. Must not
know: which command it is.

Between two changes of a store there are many calls that only read. Whichever of them is struck, what is left is the
same, but for ids and times: by the changes that were made until then (`Stage.left`). The command is struck at each
call, and given again once for everything that can be left; and each time where anything was written after the fault.

Where other processes see the store, a kill is a real SIGKILL to a process of its own. It is forked by a server that has
imported everything and run nothing, so it costs a third of a second less than one that starts.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import fsspec
from chaos.faulty_storage import CHANGES, Call, Fault, Once, Stage, State, lasting
from chaos.watched_clients import nothing_passes_by
from dying_storage import KilledError

from pipeline.errors import MaskmillError
from pipeline.storage import local_path

_CHILD_LIMIT_S = 120.0
#: What the commands import, most of them when they need it.
_IMPORTED = [
    "chaos.killed_calls", "chaos.segment_scene", "chaos.other_scenes", "pipeline.engine.run", "pipeline.table.forget",
    "pipeline.table.prune", "pipeline.insight.export", "pipeline.learning.evaluation", "pipeline.storage.bucket",
    "models.segmenter", "segmentation_models_pytorch",
]  # fmt: skip
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
            for bucket, base, rest in self._keys(BEFORE):
                source = {"Bucket": bucket, "Key": f"{base}{BEFORE}/{rest}"}
                self._client.copy_object(Bucket=bucket, Key=f"{base}{name}/{rest}", CopySource=source)
        return to

    def drop(self, uri: str) -> None:
        """Takes a copy away, so that many of them need no room, and no time where a server looks through all it has."""
        if self.scheme == "file":
            shutil.rmtree(local_path(uri), ignore_errors=True)
        elif self.scheme == "memory":
            store = fsspec.filesystem("memory").store
            for path in [path for path in store if path.startswith(uri.removeprefix("memory:/") + "/")]:
                del store[path]
        else:
            name = uri.removeprefix(f"{self.uri}/")
            keys = list(self._keys(name))
            for some in (keys[first : first + 1000] for first in range(0, len(keys), 1000)):
                gone = [{"Key": f"{base}{name}/{rest}"} for _, base, rest in some]
                self._client.delete_objects(Bucket=some[0][0], Delete={"Objects": gone})

    def names(self, uri: str) -> list[str]:
        """Of all files in a copy, below it."""
        if self.scheme == "file":
            root = Path(local_path(uri))
            return [str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()]
        if self.scheme == "memory":
            prefix = uri.removeprefix("memory:/") + "/"
            return [path.removeprefix(prefix) for path in fsspec.filesystem("memory").store if path.startswith(prefix)]
        return [rest for _, _, rest in self._keys(uri.removeprefix(f"{self.uri}/"))]

    def _keys(self, name: str) -> Iterator[tuple[str, str, str]]:
        """Of all objects below the folder `name`: the bucket, the key of this place with its slash, the rest."""
        bucket, _, base = self.uri.removeprefix("s3://").partition("/")
        base = f"{base}/".lstrip("/")
        prefix = f"{base}{name}/"
        for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            for one in page.get("Contents", ()):
                yield bucket, base, one["Key"].removeprefix(prefix)


class Tally(NamedTuple):
    """What an enumeration came to. `recovered`: how often the command was given again, once for everything that can be
    left. `unreached`: calls that did not come again, as where threads race."""

    calls: int
    changes: int
    struck: int
    recovered: int
    unreached: list[Call]
    seconds: float

    def __str__(self) -> str:
        told = f"{self.struck} of {self.calls} calls disturbed ({self.changes} of them changes), "
        told += f"{self.recovered} times given again, in {self.seconds:.0f} s"
        return told + (f"; not reached: {', '.join(map(str, self.unreached))}" if self.unreached else "")


def recorded(scene: Scene, place: Place) -> tuple[list[Call], object]:
    """The calls of an undisturbed command on a copy of `BEFORE`, and the end that it comes to. Fails where it did
    anything with a store that is none of these calls.
    """
    folder = place.copy("calm")
    with Stage(places={"HERE": folder}).set() as stage, nothing_passes_by():
        scene.act(folder)
    return list(stage.calls), scene.end(folder)


def disturbed_everywhere(
    scene: Scene, place: Place, *, fault: Fault = "kill",
    only: Callable[[Call], bool] = lambda call: True, every: int = 1, first: int = 0,
) -> Tally:  # fmt: skip
    """For each call of the undisturbed command (of those that `only` names, each `every`-th from `first` on): a copy,
    the command with `fault` at that call, and, unless the same was left before, a look, the same command until it ends,
    and the same end.
    """
    began_s = time.monotonic()
    calls, wanted = recorded(scene, place)
    chosen = [call for call in calls if only(call)][first::every]
    unreached: list[Call] = []
    seen: dict[State, list[str]] = {}
    recovered = 0
    for number, call in enumerate(chosen):
        folder = place.copy(f"{fault}-{number}")
        try:
            came, left = strike(scene, place, folder, call, fault)
            if not came:
                unreached.append(call)
            # A heartbeat that dies while it writes leaves half a lease there: of time, not of the command.
            there = sorted(lasting(name) for name in place.names(folder) if "_tmp/" not in name)
            if left is not None and left in seen:
                assert there == seen[left], "the same changes have left other files"
            else:
                assert_recovers(scene, folder, wanted)
                recovered += 1
            if left is not None:
                seen[left] = there
        except BaseException as error:
            error.add_note(f"{fault} at call {number} of {len(chosen)}: {call}, in {folder}")
            raise
        place.drop(folder)
    changes = sum(call.method in CHANGES for call in chosen)
    struck = len(chosen) - len(unreached)
    return Tally(len(chosen), changes, struck, recovered, unreached, time.monotonic() - began_s)


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


def strike(scene: Scene, place: Place, folder: str, call: Call, fault: Fault) -> tuple[bool, State | None]:
    """The command on `folder` with this fault at this call. Whether the call came, and what is left, where that is
    known. A failure that is no sentence of ours fails."""
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
    return script.struck, stage.left


def _killed_for_real(scene: Scene, folder: str, call: Call) -> tuple[bool, State | None]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    heard, told = context.Pipe(duplex=False)
    child = context.Process(target=_act_and_die, args=(scene, folder, call, dict(os.environ), told))
    child.start()
    told.close()
    child.join(_CHILD_LIMIT_S)
    if child.is_alive():
        child.kill()
        child.join()
        raise AssertionError("neither killed nor at its end")
    assert child.exitcode in (0, -signal.SIGKILL), f"exit status {child.exitcode}"
    with heard:
        return child.exitcode != 0, heard.recv() if child.exitcode else None


def _act_and_die(scene: Scene, folder: str, call: Call, environment: Mapping[str, str], told: Connection) -> None:
    os.environ.clear()
    os.environ.update(environment)
    with Stage(Once(call, "kill"), places={"HERE": folder}, last_words=told.send).set():
        scene.act(folder)
    os._exit(0)
