"""The layer that other tests rely on really disturbs what it says, over every store, and the same for a seed."""

from __future__ import annotations

import contextlib

import pytest
from chaos.faulty_storage import Call, Fault, Once, Seeded, Stage
from chaos.killed_calls import BEFORE, Place
from chaos.segment_scene import FIRST_NIGHT, SECOND_NIGHT, SegmentScene, show
from dying_storage import KilledError
from harness import write_tiny_model

from pipeline.errors import MaskmillError, StorageError
from pipeline.storage import open_storage

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


def disturbed(place: Place, scene: SegmentScene, seed: int, folder: str) -> list[tuple[Call, Fault]]:
    """The command, given again until it is done, while one call in forty is struck."""
    script = Seeded(seed, 1 / 40, FAULTS)
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
    scene.act(calm)
    wanted = scene.end(calm)
    for seed in seeds:
        folder = place.copy(f"seed-{seed}")
        try:
            struck = disturbed(place, scene, seed, folder)
            assert struck
            scene.act(folder)  # an image that could not be read is planned again
            assert scene.end(folder) == wanted
        except BaseException as error:
            error.add_note(f"seed {seed}, in {folder}")
            raise
        place.drop(folder)


def test_a_run_among_faults_of_a_seed(empty_memory: str, model: str) -> None:
    check_seeds(Place(empty_memory), model, range(7, 9))


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
