"""The history as files: what is read of it, and what is made of damage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import fsspec
import pytest

from models.file import model_version
from pipeline.errors import ModelError
from pipeline.registry import model_history, push_model, resolve
from pipeline.registry.changes import change_champion
from pipeline.registry.history import Entry, State, append, entry_numbers, read_state
from pipeline.storage import normalize_uri, open_storage


def test_only_numbered_files_are_entries() -> None:
    names = [
        "00000002.json",
        "00000001.json",
        "1.json",
        "00000003.json~",
        "notes.txt",
        "000000004.json",
        "0000000x.json",
    ]
    assert entry_numbers(names) == [1, 2]


def test_one_of_two_entries_of_a_number_is_kept(tmp_path: Path) -> None:
    folder = normalize_uri(str(tmp_path))
    storage = open_storage(folder)
    state = State(0, {"canary": "a" * 12}, ())
    first, second = (state.followed_by("alias", text * 12, champion_before=None, reason=text) for text in "bc")
    assert append(storage, folder, first) is True
    assert append(storage, folder, second) is False
    # An answer that was lost on its way is asked for again.
    assert append(storage, folder, first) is True
    (path,) = tmp_path.glob("_history/*")
    assert (path.name, Entry.model_validate_json(path.read_bytes())) == ("00000001.json", first)
    assert read_state(storage, folder, [1], None) == State(1, {"canary": "a" * 12}, ())


def test_a_newer_release_may_say_more(tmp_path: Path) -> None:
    folder = normalize_uri(str(tmp_path))
    storage = open_storage(folder)
    entry = State(0, {}, ()).followed_by("push", "a" * 12, champion_before=None)
    body = entry.model_dump(mode="json") | {"mood": "good"}
    storage.put_new(f"{folder}/_history/00000001.json", json.dumps(body).encode())
    assert read_state(storage, folder, [1], None) == State(1, {}, ())
    storage.put_new(f"{folder}/_history/00000002.json", json.dumps(body | {"format": 2, "number": 2}).encode())
    with pytest.raises(ModelError, match="of a newer release"):
        read_state(storage, folder, [1, 2], None)


@pytest.fixture
def told(registry: Path, street: list[Path]) -> Path:
    """A registry whose `street` has three entries; the folder of its history."""
    first, second = (model_version(path.read_bytes()) for path in street[:2])
    for path in street[:2]:
        push_model(path, str(registry))
    change_champion(str(registry), "street", first, "promote", instead_of=None)
    assert resolve("street", registry=str(registry)).version == first
    assert resolve("street@challenger", registry=str(registry)).version == second
    return registry / "street" / "_history"


@pytest.mark.parametrize("damage", [b"", b"{", b"null", b'{"number": 3}', b"\xff\xfe", None])
def test_a_damaged_newest_entry_is_named_and_never_guessed(told: Path, registry: Path, damage: bytes | None) -> None:
    newest = told / "00000003.json"
    whole = newest.read_bytes()
    newest.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    for reference in ("street", "street@champion", "street@challenger"):
        with pytest.raises(ModelError, match=r"00000003\.json is damaged.*entry before it"):
            resolve(reference, registry=str(registry))
    # The mending that it names: the state before counts, in which there is no champion yet.
    newest.unlink()
    with pytest.raises(ModelError, match="has no 'champion'"):
        resolve("street", registry=str(registry))
    assert resolve("street@challenger", registry=str(registry))


def test_a_damaged_old_entry_hides_nothing_but_itself(told: Path, registry: Path, street: list[Path]) -> None:
    (told / "00000001.json").write_bytes(b"gone")
    assert resolve("street", registry=str(registry)).version == model_version(street[0].read_bytes())
    push_model(street[2], str(registry))
    with pytest.raises(ModelError, match=r"00000001\.json is damaged"):
        model_history("street", registry=str(registry))


def test_an_entry_under_another_number_is_refused(told: Path, registry: Path) -> None:
    shutil.copy(told / "00000001.json", told / "00000004.json")
    with pytest.raises(ModelError, match=r"00000004\.json says that it is entry 1"):
        resolve("street", registry=str(registry))


def test_foreign_files_change_nothing(told: Path, registry: Path, street: list[Path]) -> None:
    for name in ("README.md", "00000009.json.bak", "9.json", "deeper/00000009.json"):
        (told / name).parent.mkdir(exist_ok=True)
        (told / name).write_text("{}")
    (told.parent / "notes.safetensors").write_text("no model")
    (registry / "_training" / "x" / "_history").mkdir(parents=True)
    (registry / "_training" / "x" / "_history" / "00000009.json").write_text("{}")
    assert resolve("street", registry=str(registry)).version == model_version(street[0].read_bytes())
    assert [entry.action for entry in model_history("street", registry=str(registry))] == ["push", "push", "promote"]


def test_aliases_of_older_releases_hold_until_the_first_entry(registry: Path, street: list[Path]) -> None:
    old, new = (model_version(path.read_bytes()) for path in street[:2])
    (registry / "street").mkdir(parents=True)
    shutil.copy(street[0], registry / "street" / f"{old}.safetensors")
    (registry / "street" / "aliases.json").write_text(json.dumps({"champion": old, "stable": old}))
    assert resolve("street", registry=str(registry)).version == old
    push_model(street[1], str(registry))
    assert {name: resolve(f"street@{name}", registry=str(registry)).version for name in ("stable", "challenger")} == {
        "stable": old, "challenger": new,
    }  # fmt: skip
    change_champion(str(registry), "street", new, "promote", instead_of=old)
    assert resolve("street", registry=str(registry)).version == new
    assert resolve("street@stable", registry=str(registry)).version == old
    assert json.loads((registry / "street" / "aliases.json").read_text())["champion"] == old, "nothing is overwritten"


def test_a_history_in_memory(memory_folder: str, street: list[Path]) -> None:
    push_model(street[0], memory_folder)
    (path,) = fsspec.filesystem("memory").glob("/place/street/_history/*")
    assert path.endswith("00000001.json")
    assert resolve("street@challenger", registry=memory_folder).version == model_version(street[0].read_bytes())
