"""A disk that is really full: a file system of a few pages in memory, which this machine's administrator may mount."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from chaos.segment_scene import FIRST_NIGHT, SegmentScene, show
from harness import write_tiny_model

from pipeline.errors import InfrastructureError
from pipeline.storage import file_uri

_ROOM_KIB = 64 << 10


class Disk:
    """A file system of `kib` KiB at `path`."""

    def __init__(self, path: Path, kib: int) -> None:
        self.path = path
        self._call("mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(path))

    def grow(self) -> None:
        self._call("mount", "-o", f"remount,size={_ROOM_KIB}k", str(self.path))

    def take_away(self) -> None:
        if os.path.ismount(self.path):
            self._call("umount", "--lazy", str(self.path))

    def _call(self, *command: str) -> None:
        subprocess.run(command, check=True, capture_output=True)


@pytest.fixture
def disk_of(tmp_path: Path) -> Iterator[Callable[[int], Disk]]:
    """`disk_of(KIB)`: a new one, which goes at the end. Skips where nobody may mount."""
    with ExitStack() as stack:

        def make(kib: int) -> Disk:
            folder = Path(tempfile.mkdtemp(dir=tmp_path))
            try:
                disk = Disk(folder, kib)
            except (OSError, subprocess.CalledProcessError) as error:
                pytest.skip(f"no file system can be mounted here: {error}")
            stack.callback(disk.take_away)
            return disk

        yield make


@contextmanager
def scratch_on(path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setenv("TMPDIR", str(path))
        patch.setattr(tempfile, "tempdir", None)
        yield


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> SegmentScene:
    folder = tmp_path_factory.mktemp("corpus")
    show(file_uri(str(folder / "photos")), FIRST_NIGHT)
    return SegmentScene(
        file_uri(str(folder / "photos")), str(write_tiny_model(folder / "tiny.safetensors")), shard_size=1
    )


@pytest.fixture(scope="module")
def calm(scene: SegmentScene, tmp_path_factory: pytest.TempPathFactory) -> object:
    folder = file_uri(str(tmp_path_factory.mktemp("calm")))
    scene.act(folder)
    return scene.end(folder)


def test_dest_is_full_wherever_it_runs_out(scene: SegmentScene, calm: object, disk_of: Callable[[int], Disk]) -> None:
    """With a page more each time, until all of it has room."""
    refused = 0
    for kib in range(4, 4096, 24):
        disk = disk_of(kib)
        folder = file_uri(str(disk.path))
        try:
            scene.act(folder)
        except InfrastructureError as error:
            assert "the disk is full; free some space and run the same command again" in str(error)
            refused += 1
        else:
            break
        assert not [path for path in disk.path.rglob("_tmp/*") if path.is_file()], "half a file takes up room"
        scene.look(folder)
        disk.grow()
        scene.act(folder)
        assert scene.end(folder) == calm
        disk.take_away()
    assert refused >= 3


def test_scratch_is_full(
    scene: SegmentScene, calm: object, disk_of: Callable[[int], Disk], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = 0
    for number, kib in enumerate(range(4, 4096, 8)):
        disk, folder = disk_of(kib), file_uri(str(tmp_path / f"dest-{number}"))
        with scratch_on(disk.path, monkeypatch):
            try:
                scene.act(folder)
            except InfrastructureError as error:
                assert f"the temporary folder {disk.path} is full" in str(error)
                refused += 1
            else:
                break
            disk.grow()
            scene.act(folder)
        assert scene.end(folder) == calm
        disk.take_away()
    assert refused >= 2
