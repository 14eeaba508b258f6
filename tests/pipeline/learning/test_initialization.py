from __future__ import annotations

import json
import sys
import urllib.request
from pathlib import Path

import pytest
import torch
from torchvision.models import mobilenet_v3_large

from models.architectures import build, card_for
from models.card import DetectionsPostprocessing
from models.file import save_model
from pipeline.errors import InfrastructureError, StoppedError, UsageError
from pipeline.learning.dataset import Dataset
from pipeline.learning.initialization import begin
from pipeline.learning.loop import EpochEvent
from pipeline.learning.optimization import Frozen, make_optimizer
from pipeline.learning.training import Note, train
from pipeline.registry import push_model, resolve, set_alias

sys.path.insert(0, str(Path(__file__).parent))
from tiny_nuclei import write_dataset, write_json
from tiny_training import TINY, tiny

_ARGS = {"encoder": "resnet18", **TINY["args"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "discs")


def saved(path: Path, classes: tuple[str, ...]) -> dict[str, torch.Tensor]:
    card = card_for("other", "unet", _ARGS, class_names=classes)
    state = build(card).state_dict()
    save_model(path, state, card)
    return state


def test_random_weights_follow_the_seed(folder: Path, tmp_path: Path) -> None:
    dataset = Dataset(folder, "train")
    one, same, other = (begin(tiny(folder, tmp_path, seed=seed), dataset) for seed in (1, 1, 2))
    assert one.card.task == "instance"
    assert torch.equal(one.weights["encoder.conv1.weight"], same.weights["encoder.conv1.weight"])
    assert not torch.equal(one.weights["encoder.conv1.weight"], other.weights["encoder.conv1.weight"])


@pytest.mark.parametrize(
    ("classes", "new"),
    [
        (("background", "disc"), []),
        (("background", "cell"), ["segmentation_head.0.bias", "segmentation_head.0.weight"]),
        (("a", "b", "c"), ["segmentation_head.0.bias", "segmentation_head.0.weight"]),
    ],
)
def test_another_model_gives_all_but_a_head_for_other_classes(
    folder: Path, tmp_path: Path, classes: tuple[str, ...], new: list[str]
) -> None:
    given = saved(tmp_path / "other.safetensors", classes)
    config = tiny(folder, tmp_path, init=str(tmp_path / "other.safetensors"), arch=None, task="semantic", args={})
    card, weights, origin = begin(config, Dataset(folder, "train"))
    assert [info.name for info in card.classes] == ["background", "disc"]
    assert origin["new_tensors"] == new
    for name, tensor in given.items():
        assert (name in new) or torch.equal(weights[name], tensor), name
    build(card).load_state_dict(weights)


def test_a_model_of_the_registry_that_is_trained_into(folder: Path, tmp_path: Path) -> None:
    given = saved(tmp_path / "other.safetensors", ("background", "disc"))
    pushed = push_model(str(tmp_path / "other.safetensors"), str(tmp_path / "models"))
    config = tiny(folder, tmp_path / "models", init="other@challenger", arch=None, task="semantic", args={})
    _, weights, origin = begin(config, Dataset(folder, "train"))
    assert origin == {"initial_weights": f"other@{pushed.version}", "new_tensors": []}
    assert torch.equal(weights["encoder.conv1.weight"], given["encoder.conv1.weight"])


def test_an_alias_that_moves_means_what_it_meant_at_the_start(folder: Path, tmp_path: Path) -> None:
    registry = str(tmp_path / "models")
    versions = []
    for alias in ("challenger", "next"):
        saved(tmp_path / "other.safetensors", ("background", "disc"))
        versions.append(push_model(str(tmp_path / "other.safetensors"), registry, alias=alias).version)
    config = tiny(
        folder, tmp_path / "models", init="other@challenger", arch=None, task="semantic", args={}, epochs=2,
        val_split=None,
    )  # fmt: skip
    seen: list[object] = []
    with pytest.raises(StoppedError):
        train(config, listen=seen.append, should_stop=lambda: any(isinstance(one, EpochEvent) for one in seen))

    def move(event: object) -> None:
        if isinstance(event, Note) and event.text.startswith("continues"):
            set_alias(f"other@{versions[1]}", "challenger", registry=registry)

    outcome = train(config, listen=move)
    assert outcome.resumed_step > 0
    assert resolve(outcome.uri).card.provenance["initial_weights"] == f"other@{versions[0]}"


def test_a_watershed_of_several_classes_is_refused_in_one_sentence(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "discs")
    truth = json.loads((folder / "annotations.json").read_text())
    truth["categories"].append({"id": 9, "name": "square"})
    write_json(folder / "annotations.json", truth)
    with pytest.raises(UsageError, match=r"\Aan instance model by watershed has exactly two classes[^\n]*\Z"):
        begin(tiny(folder, tmp_path, task="instance"), Dataset(folder, "train"))


def test_an_init_of_another_architecture_is_refused(folder: Path, tmp_path: Path) -> None:
    saved(tmp_path / "other.safetensors", ("a", "b"))
    config = tiny(folder, tmp_path, init=str(tmp_path / "other.safetensors"), arch="fpn", args={})
    with pytest.raises(UsageError, match="is a unet, not a fpn"):
        begin(config, Dataset(folder, "train"))


@pytest.mark.parametrize("arch", ["maskrcnn_mobilenet_v3_large_fpn", "lraspp_mobilenet_v3_large"])
def test_a_file_of_a_classifier_is_a_backbone(folder: Path, tmp_path: Path, arch: str) -> None:
    classifier = mobilenet_v3_large(weights=None)
    torch.save(classifier.state_dict(), tmp_path / "mobilenet.pth")
    config = tiny(folder, tmp_path, arch=arch, args={}, backbone_weights=str(tmp_path / "mobilenet.pth"))
    card, weights, _ = begin(config, Dataset(folder, "train"))
    first = next(name for name in weights if name.startswith("backbone") and name.endswith("0.0.weight"))
    assert torch.equal(weights[first], classifier.state_dict()["features.0.0.weight"])
    assert card.preprocessing.normalization == "imagenet"
    torch.save({"features.0.0.weight": torch.zeros(1)}, tmp_path / "mobilenet.pth")
    with pytest.raises(UsageError, match="do not fit"):
        begin(config, Dataset(folder, "train"))


@pytest.mark.parametrize(("objects", "top_k"), [(40, 100), (80, 160)])
def test_a_detector_may_find_twice_what_an_image_shows(tmp_path: Path, objects: int, top_k: int) -> None:
    folder = write_dataset(tmp_path / "discs", images=3)
    truth = json.loads((folder / "annotations.json").read_text())
    (name,) = json.loads((folder / "splits.json").read_text())["train"]
    (image,) = [one["id"] for one in truth["images"] if one["file_name"] == name]
    one = next(entry for entry in truth["annotations"] if entry["image_id"] == image)
    truth["annotations"] = [one | {"id": number + 1} for number in range(objects)]
    write_json(folder / "annotations.json", truth)
    config = tiny(folder, tmp_path, arch="maskrcnn_mobilenet_v3_large_fpn", args={"norm": "group"})
    card = begin(config, Dataset(folder, "train")).card
    assert isinstance(card.postprocessing, DetectionsPostprocessing) and card.postprocessing.top_k == top_k


def test_what_is_frozen_does_not_learn(folder: Path, tmp_path: Path) -> None:
    config = tiny(folder, tmp_path, freeze=1, freeze_norm=True)
    card, _, _ = begin(config, Dataset(folder, "train"))
    module = build(card)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    optimizer = make_optimizer(module, config)
    for epoch, learns in ((0, False), (1, True)):
        Frozen.at(epoch, config).apply(module)
        optimizer.zero_grad(set_to_none=True)
        module(torch.randn(2, 3, 32, 32)).square().sum().backward()
        optimizer.step()
        after = module.state_dict()
        assert torch.equal(before["encoder.conv1.weight"], after["encoder.conv1.weight"]) is not learns
        assert not torch.equal(before["segmentation_head.0.weight"], after["segmentation_head.0.weight"])
        assert torch.equal(before["encoder.bn1.running_mean"], after["encoder.bn1.running_mean"])


@pytest.mark.parametrize(
    ("arch", "said"),
    [
        (
            "unet",
            r"the weights 'imagenet' of the encoder 'resnet18', https://\S+, could not be fetched .*: import them",
        ),
        ("deeplabv3_resnet50", r"resnet50-\w+\.pth could not be fetched .*: download it elsewhere and give that file"),
    ],
)
def test_published_weights_that_cannot_be_fetched(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arch: str, said: str
) -> None:
    """No network, and nothing that was fetched before."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    # What urllib keeps of its proxies must not outlive this.
    monkeypatch.setattr(urllib.request, "_opener", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    config = tiny(folder, tmp_path, arch=arch, args={}, task="semantic", backbone_weights="DEFAULT")
    with pytest.raises(InfrastructureError, match=said):
        begin(config, Dataset(folder, "train"))
