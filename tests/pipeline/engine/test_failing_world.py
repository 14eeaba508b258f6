"""`segment` from end to end while the world around it fails."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from handmade import part_paths, rows_of
from run_bench import Bench, names

from pipeline.errors import InfrastructureError

pytestmark = pytest.mark.usefixtures("workers_in_this_process")


def test_a_full_disk_stops_the_run_and_the_same_command_goes_on(
    bench: Bench, image_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = image_folder(9)
    write = os.write

    def full(descriptor: int, data: bytes) -> int:
        if part_paths(bench.dest) and os.readlink(f"/proc/self/fd/{descriptor}").startswith(f"{bench.dest}/_tmp/"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data)

    with monkeypatch.context() as broken:
        broken.setattr(os, "write", full)
        with pytest.raises(InfrastructureError, match=r"(?i)no space|disk is full"):
            bench.segment(photos, shard_size=1)
    committed = len(rows_of(bench.dest))
    assert 1 <= committed < 9
    assert not list((bench.dest / "_tmp").glob("*")), "what was half written is still there"
    assert bench.segment(photos, shard_size=1).ok == 9
    assert bench.done == names(photos)


def test_a_denied_image_is_a_row_and_is_tried_again(
    bench: Bench, image_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tests may run as root, whom no permission binds: the refusal comes from `os.open`, as the kernel would say it."""
    photos = image_folder(3)
    closed, opened = str(photos / "0001.png"), os.open

    def refuse(path: Any, *rest: Any, **named: Any) -> int:
        if str(path) == closed:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return opened(path, *rest, **named)

    with monkeypatch.context() as broken:
        broken.setattr(os, "open", refuse)
        for _ in range(5):  # more often than other failures of the world are tried
            outcome = bench.segment(photos)
            assert outcome.errors_by_kind == {"denied": 1}
    assert bench.segment(photos).ok == 1
    attempts = [row["attempt"] for row in rows_of(bench.dest) if row["image_uri"].endswith("0001.png")]
    assert sorted(attempts) == [1, 2, 3, 4, 5, 6]


def test_a_run_that_nobody_touched_for_a_day_is_abandoned_by_the_next_planner(
    bench: Bench, image_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = image_folder(6)
    dead = bench.interrupted(photos, after_parts=1, shard_size=1).run_id
    outcome = bench.segment(f"{photos}/*.png", shard_size=1)
    assert outcome.held > 0, "a run that is dead for a minute is left alone"
    today_s = time.time()
    monkeypatch.setattr(time, "time", lambda: today_s + 25 * 3600)
    outcome = bench.segment(f"{photos}/*.png", shard_size=1)
    assert outcome.held == 0
    assert f"abandoned run {dead}" in bench.texts("note")
    bench.segment(photos)
    assert bench.done == names(photos)


class ClosedDoors:
    """Refuses to open images that `closed` names, as the kernel would refuse whoever may not read them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, closed: Callable[[str], bool]) -> None:
        self.tried: dict[str, int] = {}
        opened = os.open

        def refuse(path: Any, *rest: Any, **named: Any) -> int:
            place = Path(str(path))
            if place.suffix in (".png", ".jpg") and closed(place.stem):
                self.tried[place.stem] = self.tried.get(place.stem, 0) + 1
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
            return opened(path, *rest, **named)

        monkeypatch.setattr(os, "open", refuse)


def test_a_world_that_fails_stops_the_run_and_none_of_its_shards_is_committed(
    bench: Bench, tmp_path: Path, image_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards of 20 are far smaller than what the breaker looks at; the first five are fine."""
    photos = tmp_path / "many"
    photos.mkdir()
    one = (image_folder(2) / "0001.png").read_bytes()
    for i in range(1300):
        (photos / f"{i:04d}.png").write_bytes(one)
    with monkeypatch.context() as broken:
        ClosedDoors(broken, lambda stem: stem >= "0100")
        with pytest.raises(InfrastructureError, match="more than half of the last images failed"):
            bench.segment(photos, shard_size=20)
    rows = rows_of(bench.dest)
    assert len(rows) == 100 and {row["status"] for row in rows} == {"ok"}
    assert bench.segment(photos, shard_size=20).ok == 1300
    assert bench.done == names(photos)


def test_a_manifest_of_mostly_missing_images_is_done_to_its_end(
    bench: Bench, image_folder: Callable[..., Path]
) -> None:
    photos = image_folder(2)
    manifest = photos.parent / "old.txt"
    gone = "\n".join(f"{photos}/gone-{i}.jpg" for i in range(1500))
    manifest.write_text(f"{photos}/0000.jpg\n{gone}\n{photos}/zz.png\n")
    (photos / "0001.png").rename(photos / "zz.png")
    outcome = bench.segment(manifest, shard_size=100)
    assert (outcome.state, outcome.ok, outcome.errors_by_kind) == ("done", 2, {"missing": 1500})


class Guard(SimpleHTTPRequestHandler):
    """Serves a folder to whoever shows the signature that is valid now."""

    valid = ""

    def send_head(self) -> Any:
        if f"X-Amz-Signature={self.valid}" not in self.path:
            self.send_error(403)
            return None
        return super().send_head()

    def log_message(self, *_: Any) -> None:
        pass


def test_signed_addresses_read_images_and_never_reach_dest(bench: Bench, image_folder: Callable[..., Path]) -> None:
    photos = image_folder(4)
    manifest = photos.parent / "signed.txt"

    def sign(secret: str) -> None:
        guard.valid = secret
        signature = f"X-Amz-Credential=AKIA&X-Amz-Expires=60&X-Amz-Signature={secret}"
        manifest.write_text("".join(f"{base}/{name}?{signature}\n" for name in [*names(photos), names(photos)[0]]))

    guard = type("GuardOfThis", (Guard,), {})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(guard, directory=str(photos))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}"
        try:
            sign("SECRET-of-today")
            stopped = bench.interrupted(manifest, after_parts=1, shard_size=1)
            sign("SECRET-of-tomorrow")
            outcome = bench.segment(manifest, shard_size=1)
            assert outcome.runs == [stopped.run_id] and outcome.errors == 0 and outcome.duplicates == 1
            sign("SECRET-of-the-day-after")
            assert bench.segment(manifest).run_id is None
            guard.valid = "SECRET-of-others"
            assert bench.segment(manifest, force=True).errors_by_kind == {"denied": 4}
        finally:
            server.shutdown()
    assert {row["image_uri"] for row in rows_of(bench.dest)} == {f"{base}/{name}" for name in names(photos)}
    for path in bench.dest.rglob("*"):
        assert not path.is_file() or b"SECRET" not in path.read_bytes()
    for path in (*part_paths(bench.dest), *bench.dest.glob("runs/*/manifest.parquet")):  # pages are compressed
        assert "SECRET" not in str(pq.read_table(path, partitioning=None).to_pylist())
    assert "SECRET" not in str(bench.told)


def test_shards_that_fail_in_a_world_that_mostly_works_are_tried_twice_and_recorded(
    bench: Bench, image_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = image_folder(30)
    with monkeypatch.context() as broken:
        doors = ClosedDoors(broken, lambda stem: "0010" <= stem < "0018" or stem == "0020")
        outcome = bench.segment(photos, shard_size=10, max_error_rate=1.0)
    assert outcome.errors_by_kind == {"denied": 9} and outcome.ok == 21
    assert sorted(Path(row["image_uri"]).name for row in rows_of(bench.dest)) == sorted(names(photos))
    assert {doors.tried[f"{i:04d}"] for i in range(10, 18)} == {2} and doors.tried["0020"] == 1
