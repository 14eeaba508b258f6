"""The layer that other tests rely on really disturbs what it says, over every store, and the same for a seed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
from chaos.faulty_storage import Call, Fault, Once, Seeded, Stage, State
from chaos.killed_calls import BEFORE, Place
from chaos.segment_scene import FIRST_NIGHT, SECOND_NIGHT, SegmentScene, show
from chaos.watched_clients import nothing_passes_by
from dying_storage import KilledError
from harness import write_tiny_model

from pipeline.errors import MaskmillError, StorageError
from pipeline.storage import Storage, open_storage
from pipeline.storage.bucket import BucketStorage
from pipeline.storage.disk import DiskStorage
from pipeline.storage.remote import RemoteStorage

FAULTS: tuple[Fault, ...] = ("fail", "deny", "stall", "tear", "lose", "deaf")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.safetensors"))


@pytest.mark.parametrize(("fault", "kind"), [("fail", "fetch_failed"), ("deny", "denied"), ("tear", "fetch_failed")])
def test_a_call_that_is_not_done(place: Place, fault: Fault, kind: str) -> None:
    uri = f"{place.uri}/x"
    with Stage(Once(Call("put_new", "HERE/x", 1), fault), places={"HERE": place.uri}).set():
        storage = open_storage(place.uri)
        with pytest.raises(StorageError) as caught:
            storage.put_new(uri, b"data")
        assert caught.value.kind == kind
        assert not storage.exists(uri)
        assert storage.put_new(uri, b"other") and storage.get(uri).data == b"other"


def test_a_call_whose_answer_is_lost(place: Place) -> None:
    for name, fault in (("lost", "lose"), ("deaf", "deaf")):
        uri = f"{place.uri}/{name}"
        with Stage(Once(Call("put_new", f"HERE/{name}", 1), fault), places={"HERE": place.uri}).set():  # type: ignore[arg-type]
            storage = open_storage(place.uri)
            if fault == "lose":
                with pytest.raises(StorageError, match="on purpose"):
                    storage.put_new(uri, b"data")
            else:
                assert storage.put_new(uri, b"data") is False
            assert storage.get(uri).data == b"data"


def test_a_torn_listing_and_a_torn_file(place: Place) -> None:
    for name in "abcd":
        open_storage(place.uri).put(f"{place.uri}/{BEFORE}/{name}", b"1")
    with Stage(Once(Call("list", "HERE", 1), "tear"), places={"HERE": f"{place.uri}/{BEFORE}"}).set():
        seen = []
        with pytest.raises(StorageError, match="on purpose"):
            for batch in open_storage(place.uri).list(f"{place.uri}/{BEFORE}"):
                seen += batch["uri"].to_pylist()
        assert len(seen) == 2
    with Stage(Once(Call("put", "HERE/t", 1), "tear"), places={"HERE": place.uri}, tears_show=True).set():
        storage = open_storage(place.uri)
        with pytest.raises(StorageError, match="on purpose"):
            storage.put(f"{place.uri}/t", b"data")
        assert storage.get(f"{place.uri}/t").data == b"da"


def test_after_a_kill_nothing_is_done(place: Place) -> None:
    with Stage(Once(Call("put", "HERE/b", 1), "kill"), places={"HERE": place.uri}).set() as stage:
        storage = open_storage(place.uri)
        storage.put(f"{place.uri}/a", b"1")
        for _ in range(2):
            with pytest.raises(KilledError):
                storage.put(f"{place.uri}/b", b"1")
        with pytest.raises(KilledError):
            storage.get(f"{place.uri}/a")
        assert [str(call) for call in stage.calls] == ["put HERE/a #1", "put HERE/b #1"]
    assert open_storage(place.uri).exists(f"{place.uri}/a") and not open_storage(place.uri).exists(f"{place.uri}/b")


def _all_reads(storage: Storage) -> None:
    files = storage.filesystem()
    if files is not None:
        name = f"{storage.root}/x"
        assert files.glob(name) and files.exists(name) and files.open(name).read()


def test_what_is_left_is_told_by_its_changes(place: Place) -> None:
    def left(name: str, call: Call, fault: Fault) -> State | None:
        uri = f"{place.uri}/{name}"
        with Stage(Once(call, fault), places={"HERE": uri}).set() as stage:
            storage = open_storage(uri)
            storage.put(f"{uri}/a", b"1")
            for step in (
                lambda: storage.get(f"{uri}/a"),
                lambda: storage.exists(f"{uri}/a"),
                lambda: storage.put(f"{uri}/b", b"2"),
                lambda: storage.delete(f"{uri}/a"),
            ):
                try:
                    step()
                except StorageError:
                    if call.method == "exists":  # which is not minded
                        continue
                    storage.delete(f"{uri}/c")
                    break
                except KilledError:
                    break
        return stage.left

    get, exists, put = Call("get", "HERE/a", 1), Call("exists", "HERE/a", 1), Call("put", "HERE/b", 1)
    assert left("1", get, "kill") == left("2", exists, "kill") == left("3", put, "kill") == ("put HERE/a", "")
    assert left("4", get, "fail") == left("5", put, "deny") == ("delete HERE/c", "put HERE/a", "")
    assert left("6", put, "tear") == ("delete HERE/c", "put HERE/a", "put HERE/b #1")
    assert left("7", Call("delete", "HERE/a", 1), "kill") == ("put HERE/a", "put HERE/b", "")
    assert left("8", exists, "fail") is None  # and what was put afterwards may tell of it
    assert left("9", put, "lose") is None


#: A call of each method of `Storage`, on a store that holds `x`.
CALLS: dict[str, Callable[[Storage], object]] = {
    "get": lambda storage: storage.get(f"{storage.root}/x"),
    "head": lambda storage: storage.head(f"{storage.root}/x"),
    "exists": lambda storage: storage.exists(f"{storage.root}/x"),
    "list": lambda storage: list(storage.list(storage.root)),
    "put_new": lambda storage: storage.put_new(f"{storage.root}/new", b"1"),
    "put": lambda storage: storage.put(f"{storage.root}/y", b"1"),
    "put_stream": lambda storage: storage.put_stream(f"{storage.root}/z", lambda: [b"1"]),
    "replace": lambda storage: storage.replace(f"{storage.root}/x", b"2", etag=storage.get(f"{storage.root}/x").etag),
    "delete": lambda storage: storage.delete(f"{storage.root}/y"),
    "check_create_only": lambda storage: storage.check_create_only(),
    "filesystem": _all_reads,
}
NO_CALLS = {"root", "create_only_is_atomic"}


def check_all_calls_are_known(place: Place) -> None:
    """Each method of `Storage` is a call of the layer; no store has more of them; none does anything on the way."""
    names = {name for name in {*vars(Storage), *Storage.__annotations__} if not name.startswith("_")}
    assert names - NO_CALLS == set(CALLS), "a method of Storage that is not in CALLS"
    for kind in (DiskStorage, BucketStorage, RemoteStorage):
        more = {name for name in dir(kind) if not name.startswith("_")} - names
        assert not more, f"{kind.__name__} has what Storage has not"
    for name, call in CALLS.items():
        open_storage(place.uri).put(f"{place.uri}/x", b"data")
        with Stage(places={"HERE": place.uri}).set() as stage, nothing_passes_by():
            call(open_storage(place.uri))
        kinds = {one.method for one in stage.calls}
        on_disk = place.scheme == "file"  # which DuckDB reads by itself
        assert any(kind.startswith("file_") for kind in kinds) or on_disk if name == "filesystem" else name in kinds


def test_all_calls_of_a_store_are_known(place: Place) -> None:
    check_all_calls_are_known(place)


def test_a_new_call_cannot_be_forgotten(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = {"file": DiskStorage, "s3": BucketStorage, "memory": RemoteStorage}[place.scheme]
    monkeypatch.setattr(kind, "append", lambda self, uri, data: None, raising=False)
    with pytest.raises(AssertionError, match="has what Storage has not"):
        check_all_calls_are_known(place)
    monkeypatch.setattr(Storage, "append", kind.append, raising=False)  # type: ignore[attr-defined]
    with pytest.raises(AssertionError, match="not in CALLS"):
        check_all_calls_are_known(place)
    monkeypatch.setitem(CALLS, "append", lambda storage: storage.append(f"{storage.root}/x", b"3"))
    with (
        Stage().set(),
        pytest.raises(AttributeError, match="'FaultyStorage' object has no attribute 'append'"),
    ):
        CALLS["append"](open_storage(place.uri))


def test_what_passes_by_is_noticed(place: Place) -> None:
    """A store that was opened without the layer, or before it; a client that is used by itself."""
    before = open_storage(place.uri)
    before.put(f"{place.uri}/x", b"data")
    kind = {"file": DiskStorage, "s3": BucketStorage, "memory": RemoteStorage}[place.scheme]
    options = {"profile": None, "timeout_s": 9.0} if place.scheme == "s3" else {}
    with pytest.raises(AssertionError, match=f"{kind.__name__}.__init__"), Stage().set(), nothing_passes_by():
        kind(place.uri, **options)
    for call in CALLS.values():
        before.put(f"{place.uri}/x", b"data")
        with pytest.raises(AssertionError, match="not seen by the layer"), Stage().set(), nothing_passes_by():
            call(before)


def disturbed(scene: SegmentScene, script: Seeded, folder: str) -> list[tuple[Call, Fault]]:
    """The command, given again until it is done, while calls are struck."""
    with Stage(script, places={"HERE": folder}).set():
        for _ in range(60):
            with contextlib.suppress(MaskmillError):
                scene.act(folder)
                break
        else:
            raise AssertionError("sixty times the command did not come to its end")
    return script.struck


def check_seeds(place: Place, model: str, seeds: range) -> None:
    show(f"{place.uri}/photos", FIRST_NIGHT)
    scene = SegmentScene(f"{place.uri}/photos", model)
    scene.act(f"{place.uri}/{BEFORE}")
    show(scene.source, SECOND_NIGHT)
    calm = place.copy("calm")
    with Stage(places={"HERE": calm}).set() as stage:
        scene.act(calm)
    wanted = scene.end(calm)
    struck: list[tuple[Call, Fault]] = []
    for seed in seeds:
        folder = place.copy(f"seed-{seed}")
        try:
            # About three of the calls that a command makes where nobody disturbs it.
            struck += disturbed(scene, Seeded(seed, 3 / len(stage.calls), FAULTS), folder)
            scene.act(folder)  # an image that could not be read is planned again
            assert scene.end(folder) == wanted
        except BaseException as error:
            error.add_note(f"seed {seed}, in {folder}")
            raise
        place.drop(folder)
    print(f"\n{len(struck)} calls struck under {len(seeds)} seeds, of about {len(stage.calls)} each")
    assert len(struck) >= len(seeds)


def test_a_run_among_faults_of_a_seed(empty_memory: str, model: str) -> None:
    check_seeds(Place(empty_memory), model, range(7, 8))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_runs_among_faults_of_many_seeds(place: Place, model: str) -> None:
    check_seeds(place, model, range(60))


def test_a_seed_says_which_calls(empty_memory: str) -> None:
    place = Place(empty_memory)

    def told(seed: int) -> list[tuple[Call, Fault]]:
        script = Seeded(seed, 0.3, FAULTS)
        with Stage(script, places={"HERE": place.uri}).set():
            for number in range(40):
                with contextlib.suppress(StorageError):
                    open_storage(place.uri).put(f"{place.uri}/{number}", b"1")
        return script.struck

    assert told(1) == told(1) != told(2)
    assert 4 < len(told(1)) < 25
