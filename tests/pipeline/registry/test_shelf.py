"""From a name, an alias, a path or a URL to one model file."""

from __future__ import annotations

import json
from pathlib import Path

import fsspec
import pytest

from models.file import model_version
from pipeline import registry
from pipeline.errors import ModelError, StorageError
from pipeline.registry import listings, resolve
from pipeline.storage import bucket as bucket_storage


@pytest.fixture
def versions(
    tmp_path: Path, semantic_model: Path, other_semantic_model: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, str]:
    """A registry with two versions of `street`, the second its champion, and one of `lonely`; the versions."""
    found = []
    for name, model in (("street", semantic_model), ("street", other_semantic_model), ("lonely", semantic_model)):
        version = model_version(model.read_bytes())
        path = tmp_path / "shelf" / name / f"{version}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(model.read_bytes())
        found.append(version)
    aliases = {"champion": found[1], "challenger": found[0]}
    (tmp_path / "shelf" / "street" / "aliases.json").write_text(json.dumps(aliases))
    monkeypatch.setenv("MASKMILL_REGISTRY", str(tmp_path / "shelf"))
    return found[0], found[1]


def test_a_path_is_a_model(semantic_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = resolve(str(semantic_model))
    assert model.card.name == "tiny-semantic"
    assert model.version == model_version(semantic_model.read_bytes())
    monkeypatch.chdir(semantic_model.parent)
    for reference in (semantic_model.name, f"./{semantic_model.name}", f"file://{semantic_model}"):
        assert resolve(reference).version == model.version


def test_a_url_is_a_model(memory_folder: str, semantic_model: Path) -> None:
    fsspec.filesystem("memory").pipe(f"{memory_folder}/m.safetensors", semantic_model.read_bytes())
    assert resolve(f"{memory_folder}/m.safetensors").data == semantic_model.read_bytes()


@pytest.mark.s3
def test_a_registry_on_s3(
    s3_bucket: str, s3_client: object, semantic_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = model_version(semantic_model.read_bytes())
    s3_client.put_object(  # type: ignore[attr-defined]
        Bucket=s3_bucket.removeprefix("s3://"),
        Key=f"shelf/street/{version}.safetensors",
        Body=semantic_model.read_bytes(),
    )
    monkeypatch.setenv("MASKMILL_REGISTRY", f"{s3_bucket}/shelf/")
    assert resolve("street").version == version


def test_names_aliases_and_versions(versions: tuple[str, str]) -> None:
    old, champion = versions
    assert resolve("street").version == champion
    assert resolve("street@champion").version == champion
    assert resolve("street@challenger").version == old
    assert resolve(f"street@{old}").version == old
    assert resolve("lonely").version == old


def test_without_a_champion_a_name_with_two_versions_is_unclear(versions: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "shelf" / "street" / "aliases.json").unlink()
    with pytest.raises(ModelError, match="has no 'champion'") as failed:
        resolve("street")
    assert all(version in str(failed.value) for version in versions)


def test_listings_name_versions_and_aliases(versions: tuple[str, str]) -> None:
    old, champion = versions
    shelf = {(line.name, line.version): line.aliases for line in listings() if line.name in ("street", "lonely")}
    assert shelf == {("street", champion): ("champion",), ("street", old): ("challenger",), ("lonely", old): ()}


def test_files_that_lie_elsewhere_are_no_models_of_the_registry(versions: tuple[str, str], tmp_path: Path) -> None:
    for name in ("flat.safetensors", "street/old/1.safetensors", "Not A Name/1.safetensors"):
        (tmp_path / "shelf" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "shelf" / name).write_bytes(b"")
    assert {line.name for line in listings()} == {"lonely", "street", "nuclei-unet"}


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("street@nobody", "has no 'nobody'"),
        ("nobody", "no model is called 'nobody' (known: "),
        ("Street", "'Street' is neither"),
        ("", "'' is neither"),
        ("street@", "'street@' is neither"),
        ("../street", "cannot be read"),
        ("no/such/file.safetensors", "no such file"),
    ],
)
def test_what_cannot_be_found_is_one_sentence(versions: tuple[str, str], reference: str, expected: str) -> None:
    with pytest.raises(ModelError) as failed:
        resolve(reference)
    assert expected in str(failed.value)


@pytest.mark.parametrize("damaged", ["{", "[]", '{"champion": 3}', "null"])
def test_a_damaged_alias_file_is_named(versions: tuple[str, str], tmp_path: Path, damaged: str) -> None:
    (tmp_path / "shelf" / "street" / "aliases.json").write_text(damaged)
    with pytest.raises(ModelError, match=r"street/aliases\.json"):
        resolve("street")


def test_a_registry_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKMILL_REGISTRY", str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match=r"nowhere.*MASKMILL_REGISTRY"):
        resolve("street")


@pytest.mark.parametrize("reference", ["street", "s3://bucket/street.safetensors"])
def test_a_store_that_fails_is_the_world_s_fault(reference: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has to change anything, and another try may find the model."""
    monkeypatch.setattr(bucket_storage, "_RETRIES_PER_REQUEST", 0)
    for name, value in (("ACCESS_KEY_ID", "a"), ("SECRET_ACCESS_KEY", "b"), ("ENDPOINT_URL", "http://127.0.0.1:1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("MASKMILL_REGISTRY", "s3://bucket/models")
    with pytest.raises(StorageError, match="cannot be read: could not"):
        resolve(reference)


def test_models_that_ship_come_after_the_registrys(
    tmp_path: Path, semantic_model: Path, other_semantic_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "zoo").mkdir()
    (tmp_path / "zoo" / "street.safetensors").write_bytes(semantic_model.read_bytes())
    monkeypatch.setattr(registry.shelf.resources, "files", lambda package: tmp_path)
    monkeypatch.delenv("MASKMILL_REGISTRY", raising=False)
    shipped = model_version(semantic_model.read_bytes())
    assert resolve("street").version == shipped
    assert resolve("street@champion").version == shipped
    own = model_version(other_semantic_model.read_bytes())
    path = tmp_path / "shelf" / "street" / f"{own}.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(other_semantic_model.read_bytes())
    monkeypatch.setenv("MASKMILL_REGISTRY", str(tmp_path / "shelf"))
    assert resolve("street").version == shipped
    assert resolve(f"street@{own}").version == own
    (path.parent / "aliases.json").write_text(json.dumps({"champion": own}))
    assert resolve("street").version == own
    assert resolve(f"street@{shipped}").version == shipped


def test_what_ships_is_usable() -> None:
    from models.file import load_module

    for line in listings():
        model = resolve(f"{line.name}@{line.version}")
        assert model.card.name == line.name
        load_module(model.data)
