"""A local disk: what it does beside the contract."""

from __future__ import annotations

import errno
import os
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from stores import kind_of, listed

from pipeline.errors import StorageError
from pipeline.storage import Storage, join_uri, open_storage


class TestDisk:
    @pytest.fixture
    def disk(self, tmp_path: Path) -> Storage:
        return open_storage(f"file://{tmp_path}")

    def test_the_etag_is_size_and_time(self, disk: Storage, tmp_path: Path) -> None:
        path = tmp_path / "x"
        path.write_bytes(b"abc")
        os.utime(path, ns=(0, 1_234_567_890_123_456_789))
        blob = disk.get(f"file://{path}")
        assert blob.etag == "3-1234567890123456789"
        assert blob.modified == datetime(2009, 2, 13, 23, 31, 30, 123456, tzinfo=UTC)

    def test_of_many_who_replace_one_file_one_wins(self, disk: Storage, tmp_path: Path) -> None:
        path = tmp_path / "x"
        path.write_bytes(b"-1")
        for _ in range(20):
            etag = disk.get(f"file://{path}").etag
            with ThreadPoolExecutor(8) as pool:
                won = list(
                    pool.map(lambda one: disk.replace(f"file://{path}", str(one).encode(), etag=etag), range(10, 18))  # noqa: B023
                )
            assert sum(won) == 1 and path.read_bytes() == str(won.index(True) + 10).encode()

    @pytest.mark.parametrize("finest_ns", [1, 4_000_000, 2_000_000_000])
    def test_no_etag_comes_twice_within_a_tick_of_the_clock(
        self, disk: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finest_ns: int
    ) -> None:
        """The file system's clock stands still, and its times are no finer than `finest_ns`."""
        utime, write = os.utime, disk._write_temporary  # type: ignore[attr-defined]

        def coarse(path: str, ns: tuple[int, int]) -> None:
            utime(path, ns=(ns[0], ns[1] // finest_ns * finest_ns))

        def stamped(path: str, chunks: Any) -> str:
            temporary: str = write(path, chunks)
            coarse(temporary, (0, 1_234_567_890_000_000_000))
            return temporary

        monkeypatch.setattr("os.utime", coarse)
        monkeypatch.setattr(disk, "_write_temporary", stamped)
        uri = f"file://{tmp_path}/x"
        disk.put(uri, b"0")
        etags = [disk.head(uri).etag]
        for one in range(1, 5):
            assert disk.replace(uri, str(one).encode(), etag=etags[-1])
            assert not disk.replace(uri, b"9", etag=etags[-1])
            etags.append(disk.head(uri).etag)
        assert len(set(etags)) == 5 and disk.get(uri).data == b"4"

    def test_a_file_that_changes_while_it_is_read_is_read_again(
        self, disk: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "x"
        path.write_bytes(b"old" * 100)
        read = os.read
        changes = iter([b"new" * 200])

        def read_while_changing(descriptor: int, size: int) -> bytes:
            data = read(descriptor, size)
            if (content := next(changes, None)) is not None:
                path.write_bytes(content)
            return data

        monkeypatch.setattr("os.read", read_while_changing)
        blob = disk.get(f"file://{path}")
        assert blob.data == b"new" * 200
        assert blob.etag == disk.head(f"file://{path}").etag

    def test_a_file_that_never_rests_fails(
        self, disk: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "x"
        path.write_bytes(b"x")
        read = os.read

        def read_while_growing(descriptor: int, size: int) -> bytes:
            data = read(descriptor, size)
            with path.open("ab") as file:
                file.write(b"x")
            return data

        monkeypatch.setattr("os.read", read_while_growing)
        assert kind_of(lambda: disk.get(f"file://{path}")) == "fetch_failed"

    def test_short_reads_are_continued(self, disk: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "x"
        path.write_bytes(bytes(range(256)))
        read = os.read
        monkeypatch.setattr("os.read", lambda descriptor, size: read(descriptor, min(size, 100)))
        assert disk.get(f"file://{path}").data == bytes(range(256))

    @pytest.mark.parametrize(
        ("code", "kind", "word"),
        [
            (errno.EACCES, "denied", "permission"),
            (errno.EPERM, "denied", "permission"),
            (errno.ELOOP, "missing", "symbolic links"),
            (errno.EMFILE, "fetch_failed", "open files"),
            (errno.EIO, "fetch_failed", "error"),
        ],
    )
    def test_errors_of_the_system(
        self, disk: Storage, monkeypatch: pytest.MonkeyPatch, code: int, kind: str, word: str
    ) -> None:
        def fail(*_: object) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr("os.open", fail)
        with pytest.raises(StorageError, match=word) as caught:
            disk.get("file:///x")
        assert caught.value.kind == kind

    def test_things_that_are_no_files(self, disk: Storage, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        os.symlink(tmp_path / "loop", tmp_path / "loop")
        for name in ("pipe", "loop", "nul\x00", "x" * 300):
            assert kind_of(lambda name=name: disk.get(f"file://{tmp_path}/{name}")) == "missing"
            assert not disk.exists(f"file://{tmp_path}/{name}")
        assert listed(disk, disk.root) == {}

    def test_links_are_followed_and_cycles_end(self, disk: Storage, tmp_path: Path) -> None:
        (tmp_path / "real").mkdir()
        (tmp_path / "real" / "x.jpg").write_bytes(b"x")
        os.symlink(tmp_path / "real", tmp_path / "alias")
        os.symlink(tmp_path / "real" / "x.jpg", tmp_path / "link.jpg")
        os.symlink(tmp_path, tmp_path / "real" / "back")
        os.symlink(tmp_path / "nowhere", tmp_path / "dangling.jpg")
        found = {uri.removeprefix(disk.root) for uri in listed(disk, disk.root)}
        assert found == {"/real/x.jpg", "/alias/x.jpg", "/link.jpg"}

    def test_names_that_are_not_unicode(self, disk: Storage, tmp_path: Path) -> None:
        folder = os.fsencode(tmp_path) + b"/caf\xe9"
        os.mkdir(folder)
        with open(folder + b"/im\xff.jpg", "wb") as file:
            file.write(b"data")
        (uri,) = listed(disk, disk.root)
        assert uri == f"{disk.root}/caf\uefe9/im\uefff.jpg"
        assert disk.get(uri).data == b"data"
        assert disk.head(uri).size_bytes == 4
        assert kind_of(lambda: disk.get(f"{disk.root}/caf\uefe9/other\uefff.jpg")) == "missing"

    def test_names_that_differ_in_their_odd_bytes_only(self, disk: Storage, tmp_path: Path) -> None:
        names = [b"\xe9.jpg", b"\xe8.jpg", b"\xff\xfe.jpg", "\ufffd.jpg".encode(), "\uef80.jpg".encode(), b"\x80.jpg"]
        for name in names:
            with open(os.fsencode(tmp_path) + b"/" + name, "wb") as file:
                file.write(name)
        rows = listed(disk, disk.root)
        assert len(rows) == len(names)
        assert {disk.get(uri).data for uri in rows} == set(names)
        for uri, row in rows.items():
            uri.encode()
            assert disk.head(uri).etag == disk.get(uri).etag == row["etag"]
        for uri in list(rows):
            disk.put(uri, b"replaced")
            disk.delete(uri)
        assert os.listdir(tmp_path) == ["_tmp"]

    def test_folders_are_read_side_by_side_where_the_disk_is_slow(
        self, disk: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for n in range(40):
            (tmp_path / f"{n}").mkdir()
            (tmp_path / f"{n}" / "x").write_bytes(b"")
        scandir = os.scandir
        busy, most = [0], [0]

        def slow(path: str) -> Any:
            busy[0] += 1
            most[0] = max(most[0], busy[0])
            time.sleep(0.02)
            busy[0] -= 1
            return scandir(path)

        monkeypatch.setattr("os.scandir", slow)
        assert len(listed(disk, disk.root, parallel=4)) == 40
        assert most == [4]
        most[0] = 0
        assert len(listed(disk, disk.root, parallel=1)) == 40
        assert most == [1]

    def test_missing_and_unreadable_folders(
        self, disk: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").write_bytes(b"")
        assert kind_of(lambda: list(disk.list(f"file://{tmp_path}/none"))) == "missing"
        assert kind_of(lambda: list(disk.list(f"file://{tmp_path}/file"))) == "missing"
        (tmp_path / "shut").mkdir()
        scandir = os.scandir

        def refuse(path: str) -> object:
            if path.endswith("shut"):
                raise PermissionError(errno.EACCES, "denied", path)
            return scandir(path)

        monkeypatch.setattr("os.scandir", refuse)
        assert kind_of(lambda: list(disk.list(disk.root))) == "denied"

    def test_files_that_vanish_while_listing_are_left_out(
        self, disk: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for n in range(5):
            (tmp_path / f"folder{n}").mkdir()
            (tmp_path / f"folder{n}" / "x").write_bytes(b"")
        scandir = os.scandir

        def vanish(path: str) -> object:
            if path.endswith("folder2"):
                (tmp_path / "folder2" / "x").unlink()
                (tmp_path / "folder2").rmdir()
            return scandir(path)

        monkeypatch.setattr("os.scandir", vanish)
        assert len(listed(disk, disk.root)) == 4

    def test_many_files_come_in_batches(self, disk: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("pipeline.storage.disk._ROWS_PER_BATCH", 10)
        for n in range(25):
            (tmp_path / f"{n}").write_bytes(b"")
        assert [batch.num_rows for batch in disk.list(disk.root)] == [10, 10, 5]

    @pytest.mark.parametrize("call", ["put", "put_new"])
    @pytest.mark.parametrize(
        ("function", "code", "kind_and_sentence"),
        [
            ("write", errno.ENOSPC, ("fetch_failed", "disk is full")),
            ("fsync", errno.EDQUOT, ("fetch_failed", "quota")),
            ("open", errno.EROFS, ("denied", "read-only")),
            ("open", errno.EACCES, ("denied", "permission denied")),
        ],
    )
    def test_a_failed_write_says_why_and_leaves_nothing(
        self, disk: Storage, call: str, function: str, code: int, kind_and_sentence: tuple[str, str]
    ) -> None:
        kind, sentence = kind_and_sentence
        uri = join_uri(disk.root, "part")
        disk.put(uri, b"")
        disk.delete(uri)

        def fail(*_: object) -> None:
            raise OSError(code, os.strerror(code))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(f"os.{function}", fail)
            with pytest.raises(StorageError, match=sentence) as caught:
                getattr(disk, call)(uri, b"data")
        assert caught.value.kind == kind
        assert repr(uri) in str(caught.value)
        assert listed(disk, disk.root) == {}

    def test_a_file_where_a_folder_should_be(self, disk: Storage, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"")
        with pytest.raises(StorageError, match="not a folder"):
            disk.put_new(f"file://{tmp_path}/file/part", b"")

    def test_temporary_files_lie_under_the_root(
        self, disk: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen = []
        link = os.link
        monkeypatch.setattr("os.link", lambda source, target: (seen.append(source), link(source, target)))
        assert disk.put_new(join_uri(disk.root, "a", "b", "part"), b"data")
        assert [os.path.dirname(path) for path in seen] == [f"{tmp_path}/_tmp"]
        assert os.listdir(tmp_path / "_tmp") == []

    def test_a_file_system_without_hard_links(self, disk: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object) -> None:
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr("os.link", fail)
        assert disk.check_create_only() is False
        assert disk.create_only_is_atomic is False
        assert disk.put_new(join_uri(disk.root, "part"), b"one")
        assert not disk.put_new(join_uri(disk.root, "part"), b"two")
        assert disk.get(join_uri(disk.root, "part")).data == b"one"
        assert pickle.loads(pickle.dumps(disk)).create_only_is_atomic is False

    def test_leavings_of_killed_processes_are_swept(self, disk: Storage, tmp_path: Path) -> None:
        (tmp_path / "_tmp").mkdir()
        for name in ("old", "young"):
            (tmp_path / "_tmp" / name).write_bytes(b"half")
        os.utime(tmp_path / "_tmp" / "old", (0, 0))
        disk.check_create_only()
        assert os.listdir(tmp_path / "_tmp") == ["young"]

    def test_writing_outside_the_root(self, disk: Storage, tmp_path_factory: pytest.TempPathFactory) -> None:
        elsewhere = tmp_path_factory.mktemp("elsewhere")
        assert disk.put_new(f"file://{elsewhere}/x", b"x")
        assert disk.get(f"file://{elsewhere}/x").data == b"x"

    def test_duckdb_needs_no_filesystem(self, disk: Storage) -> None:
        assert disk.filesystem() is None
