from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save

from models.architectures import build, untrained_card
from models.card import Card
from models.file import CARD_KEY, ModelFileError, load_module, model_version, read_card, save_model


@pytest.fixture(scope="module")
def card() -> Card:
    return untrained_card("tiny", class_names=("background", "a", "b"))


@pytest.fixture(scope="module")
def data(card: Card, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    save_model(path, build(card).state_dict(), card)
    return path.read_bytes()


def test_round_trip(card: Card, tmp_path: Path) -> None:
    module = build(card)
    path = tmp_path / "tiny.safetensors"
    version = save_model(path, module.state_dict(), card)
    data = path.read_bytes()
    assert version == model_version(data)
    assert len(version) == 12
    assert read_card(path) == read_card(str(path)) == read_card(data) == card
    loaded_card, loaded = load_module(data)
    assert loaded_card == card
    assert not loaded.training
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
    assert [entry.name for entry in tmp_path.iterdir()] == ["tiny.safetensors"]


def test_equal_models_have_equal_bytes(card: Card, data: bytes, tmp_path: Path) -> None:
    _, module = load_module(data)
    save_model(tmp_path / "again", module.state_dict(), card)
    assert (tmp_path / "again").read_bytes() == data


def test_half_precision_weights_are_loaded_as_float32(card: Card, tmp_path: Path) -> None:
    state = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in build(card).state_dict().items()
    }
    save_model(tmp_path / "half", state, card)
    _, module = load_module((tmp_path / "half").read_bytes())
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


@pytest.mark.parametrize("kept", [1, 7, 8, 9, 1000, 100_000, -1])
def test_truncated(data: bytes, kept: int, tmp_path: Path) -> None:
    (tmp_path / "cut").write_bytes(data[:kept])
    for source in (data[:kept], tmp_path / "cut"):
        with pytest.raises(ModelFileError, match=r"cut off|not a model file"):
            read_card(source)
    with pytest.raises(ModelFileError):
        load_module(data[:kept])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello",
        b"\x89PNG\r\n\x1a\n" + bytes(100),
        b"PK\x03\x04" + bytes(100),
        bytes(100),
        b"\x04" + bytes(7) + b"{nope",
        b"\x02" + bytes(7) + b"[]",
    ],
)
def test_not_a_model(content: bytes) -> None:
    with pytest.raises(ModelFileError, match="not a model file"):
        read_card(content)


@pytest.mark.parametrize("entry", [3, {"dtype": "F32"}, {"data_offsets": []}, {"data_offsets": "xy"}])
def test_malformed_header(entry: object) -> None:
    header = json.dumps({"weight": entry}).encode()
    with pytest.raises(ModelFileError, match="malformed"):
        read_card(len(header).to_bytes(8, "little") + header)


def test_missing_card() -> None:
    with pytest.raises(ModelFileError, match="without a model card"):
        read_card(save({"weight": torch.zeros(1)}))


@pytest.mark.parametrize("text", ["{}", "nope", '{"name": "X"}'])
def test_invalid_card(text: str) -> None:
    with pytest.raises(ModelFileError, match="model card is not valid"):
        read_card(save({"weight": torch.zeros(1)}, metadata={CARD_KEY: text}))


def test_card_of_a_later_format(card: Card) -> None:
    text = json.dumps({**card.model_dump(mode="json"), "format": 2})
    with pytest.raises(ModelFileError, match="'format'"):
        read_card(save({"weight": torch.zeros(1)}, metadata={CARD_KEY: text}))


def test_weights_that_do_not_fit(card: Card, tmp_path: Path) -> None:
    state = build(card).state_dict()
    name = "segmentation_head.0.bias"
    metadata = {CARD_KEY: card.model_dump_json()}
    wrong_shape = {**state, name: torch.zeros(7)}
    with pytest.raises(ModelFileError, match=r"'segmentation_head.0.bias' has shape \(7,\), not \(3,\)"):
        load_module(save(wrong_shape, metadata=metadata))
    with pytest.raises(ModelFileError, match="has shape"):
        save_model(tmp_path / "never", wrong_shape, card)
    assert not (tmp_path / "never").exists()
    with pytest.raises(ModelFileError, match=r"1 tensors are missing, the first is 'segmentation_head\.0\.bias'"):
        load_module(save({key: value for key, value in state.items() if key != name}, metadata=metadata))
    with pytest.raises(ModelFileError, match="1 tensors are unknown, the first is 'extra'"):
        load_module(save({**state, "extra": torch.zeros(1)}, metadata=metadata))
    with pytest.raises(ModelFileError, match=r"NaN or infinity in 'segmentation_head\.0\.bias'"):
        load_module(save({**state, name: torch.full((3,), torch.inf)}, metadata=metadata))


def test_unknown_architecture(card: Card) -> None:
    other = card.model_copy(update={"architecture": "transformer"})
    with pytest.raises(ModelFileError, match="unknown architecture 'transformer'"):
        load_module(save({"weight": torch.zeros(1)}, metadata={CARD_KEY: other.model_dump_json()}))


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1)}, tmp_path / "model.pt")
    with pytest.raises(ModelFileError, match="not a model file"):
        load_module((tmp_path / "model.pt").read_bytes())


def test_failed_write_leaves_the_old_file(
    card: Card, data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tiny"
    path.write_bytes(data)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("models.file.os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_model(path, build(card).state_dict(), card)
    assert path.read_bytes() == data
    assert [entry.name for entry in tmp_path.iterdir()] == ["tiny"]


def test_a_header_nested_beyond_all_measure_is_a_sentence(data: bytes) -> None:
    header = b'{"a": ' + b"[" * 100_000
    with pytest.raises(ModelFileError, match="not JSON"):
        read_card(len(header).to_bytes(8, "little") + header)


def test_a_card_that_asks_for_a_huge_network_takes_no_memory_for_it(card: Card, data: bytes) -> None:
    """Whatever the card says, the file's weights are as many as they are."""
    arguments = card.architecture_args | {"decoder_channels": [20_000, 20_000, 8]}  # 14 GB
    hostile = card.model_copy(update={"architecture_args": arguments})
    file = save(load_safetensors(data), metadata={CARD_KEY: hostile.model_dump_json()})
    with pytest.raises(ModelFileError, match="needs more than"):
        load_module(file)
