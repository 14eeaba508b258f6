from __future__ import annotations

import pickle
import urllib.request
from collections import OrderedDict
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import segmentation_models_pytorch as library
import torch
from safetensors.torch import save_file
from small_networks import CLASSES, small_card
from torchvision.models import detection, segmentation

from models.architectures import build
from models.card import ResizePolicy
from models.file import load_module, save_model
from models.importing import DownloadError, ImportConfig, import_model
from models.palettes import voc_color
from models.weights import WeightsError, read_weights

SMALL_UNET = {"encoder_depth": 3, "decoder_channels": [16, 8, 8]}


pytestmark = pytest.mark.usefixtures("one_thread")


def imported(**settings: Any) -> Any:
    return import_model(ImportConfig(**settings))


@pytest.fixture
def no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every download fails at once; torch's cache of them is empty, and here."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    # What urllib keeps of its proxies must not outlive this.
    monkeypatch.setattr(urllib.request, "_opener", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    checkpoints = tmp_path / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    return checkpoints


@pytest.fixture(scope="module")
def lraspp() -> torch.nn.Module:
    torch.manual_seed(1)
    return segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=21).eval()


def test_published_weights_come_with_classes_colours_and_preprocessing(
    no_network: Path, lraspp: torch.nn.Module
) -> None:
    torch.save(lraspp.state_dict(), no_network / "lraspp_mobilenet_v3_large-d234d4ea.pth")
    card, state = imported(source="torchvision:lraspp_mobilenet_v3_large")
    assert card.name == "lraspp-mobilenet-v3-large"
    assert [info.name for info in card.classes][:2] == ["background", "aeroplane"]
    assert (len(card.classes), card.background_id) == (21, 0)
    assert card.classes[15].color == (192, 128, 128)
    assert card.preprocessing.normalization == "imagenet"
    assert card.size_policy == ResizePolicy(short_side_px=520)
    assert card.provenance["weights"] == "COCO_WITH_VOC_LABELS_V1"
    assert card.metrics["COCO-val2017-VOC-labels"]["miou"] == 57.9  # type: ignore[index, call-overload]
    assert state.keys() == lraspp.state_dict().keys()
    for name, tensor in lraspp.state_dict().items():
        assert torch.equal(state[name], tensor)
    named, _ = imported(
        source="torchvision:lraspp_mobilenet_v3_large", weights="COCO_WITH_VOC_LABELS_V1", name="street"
    )
    assert named.name == "street"


def test_what_cannot_be_fetched_says_so(no_network: Path) -> None:
    with pytest.raises(DownloadError, match=r"lraspp.*\.pth could not be fetched .*download it elsewhere"):
        imported(source="torchvision:lraspp_mobilenet_v3_large", weights="DEFAULT")


@pytest.mark.parametrize(
    ("encoder", "place"),
    [("resnet18", "smp-hub/resnet18.imagenet"), ("tu-convnext_atto", "timm/convnext_atto.d2_in1k")],
)
def test_an_encoder_that_cannot_be_fetched_says_which_and_what_to_do(
    encoder: str, place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    message = (
        rf"the weights 'imagenet' of the encoder '{encoder}', https://huggingface.co/{place}, could not be fetched "
        r"\(.+\): import them where there is a network, .* or give the state dict of a whole network"
    )
    with pytest.raises(DownloadError, match=message):
        imported(source=f"smp:unet/{encoder}", weights="imagenet", args=SMALL_UNET)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"model": state, "epoch": 3},
        lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}},
    ],
)
def test_weights_from_a_file_give_the_librarys_own_network(tmp_path: Path, lraspp: torch.nn.Module, wrap: Any) -> None:
    torch.save(wrap(lraspp.state_dict()), tmp_path / "own.pth")
    card, state = imported(source="torchvision:lraspp_mobilenet_v3_large", weights_file=tmp_path / "own.pth")
    save_model(tmp_path / "own.safetensors", state, card)
    _, network = load_module((tmp_path / "own.safetensors").read_bytes())
    images = torch.rand(1, 3, 40, 50)
    with torch.inference_mode():
        assert torch.equal(network(images)["out"], lraspp(images)["out"])


@pytest.mark.parametrize("name", ["deeplabv3_mobilenet_v3_large", pytest.param("fcn_resnet50", marks=pytest.mark.slow)])
def test_the_classifier_that_only_training_uses_is_dropped(tmp_path: Path, name: str) -> None:
    full = getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=4, aux_loss=True)
    torch.save(full.state_dict(), tmp_path / "w.pth")
    card, state = imported(
        source=f"torchvision:{name}", weights_file=tmp_path / "w.pth", classes=("background", "a", "b", "c")
    )
    assert [info.name for info in card.classes] == ["background", "a", "b", "c"]
    assert not [key for key in state if key.startswith("aux_classifier")]


@pytest.mark.slow
def test_mask_rcnn_that_was_trained_without_freezing(tmp_path: Path) -> None:
    torch.manual_seed(2)
    own: Any = detection.maskrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, min_size=64, max_size=96, box_score_thresh=0.0
    ).eval()
    torch.save(own.state_dict(), tmp_path / "w.pth")
    args = {"min_size_px": 64, "max_size_px": 96}
    card, state = imported(source="torchvision:maskrcnn_resnet50_fpn", weights_file=tmp_path / "w.pth", args=args)
    assert (card.task, card.postprocessing.kind, len(card.classes)) == ("instance", "detections", 91)
    assert card.classes[1].name == "person"
    assert card.classes[12].name == "N/A 12"
    assert card.classes[90].color == voc_color(90)
    assert card.architecture_args == {**args, "output_channels": 91}
    images = torch.rand(1, 3, 64, 64)
    save_model(tmp_path / "m.safetensors", state, card)
    _, network = load_module((tmp_path / "m.safetensors").read_bytes())
    with torch.inference_mode():
        for name, level in own.backbone(images).items():
            assert torch.allclose(network.backbone(images)[name], level, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("architecture", "suffix"), [("unet", ".pth"), ("fpn", ".safetensors"), ("pspnet", ".pth")])
def test_networks_of_smp_from_a_file(tmp_path: Path, architecture: str, suffix: str) -> None:
    args = SMALL_UNET if architecture == "unet" else {}
    torch.manual_seed(3)
    own = library.create_model(architecture, "resnet18", encoder_weights=None, classes=3, **args).eval()
    path = tmp_path / f"w{suffix}"
    if suffix == ".pth":
        torch.save(own.state_dict(), path)
    else:
        save_file(own.state_dict(), path)
    card, state = imported(source=f"smp:{architecture}/resnet18", weights_file=path, args=args)
    assert card.name == f"{architecture}-resnet18"
    assert [info.name for info in card.classes] == ["class-0", "class-1", "class-2"]
    assert card.preprocessing.normalization == "imagenet"
    save_model(tmp_path / "m.safetensors", state, card)
    _, network = load_module((tmp_path / "m.safetensors").read_bytes())
    images = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(network(images), own(images))


def test_random_weights_follow_the_seed() -> None:
    before = torch.get_rng_state()
    settings = {"source": "smp:unet/resnet18", "args": SMALL_UNET, "classes": ("background", "nucleus")}
    card, first = imported(**settings, seed=1, task="instance", normalization="per_image")
    _, again = imported(**settings, seed=1, task="instance")
    _, other = imported(**settings, seed=2, task="instance")
    assert card.postprocessing.kind == "watershed"
    assert card.preprocessing.normalization == "per_image"
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert not torch.equal(first["encoder.conv1.weight"], other["encoder.conv1.weight"])
    assert torch.equal(torch.get_rng_state(), before)


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1), "more": Malicious(tmp_path / "ran")}, tmp_path / "new.pth")
    (tmp_path / "old.pth").write_bytes(pickle.dumps(Malicious(tmp_path / "ran"), protocol=2))
    for name in ("new.pth", "old.pth"):
        # What torch found, and not its advice to load the file all the same.
        with pytest.raises(WeightsError, match=r"(?i)can run any code \([^()]*unsupported global[^()]*\); save"):
            read_weights(tmp_path / name)
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "new.pth", weights_only=False)
    assert (tmp_path / "ran").exists(), "the file would not have done anything anyway"


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 nothing", b"\x80\x02}."])
def test_what_holds_no_weights(tmp_path: Path, content: bytes) -> None:
    for name in ("w.pth", "w.safetensors"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(WeightsError):
            read_weights(tmp_path / name)


def test_layers_of_older_files_are_renamed(tmp_path: Path) -> None:
    state = build(small_card("maskrcnn_mobilenet_v3_large_fpn")).state_dict()
    old = OrderedDict((key.replace("rpn.head.conv.0.0.", "rpn.head.conv."), value) for key, value in state.items())
    assert "rpn.head.conv.weight" in old
    torch.save(old, tmp_path / "w.pth")
    _, new = imported(
        source="torchvision:maskrcnn_mobilenet_v3_large_fpn", weights_file=tmp_path / "w.pth", classes=CLASSES
    )
    assert torch.equal(new["rpn.head.conv.0.0.weight"], old["rpn.head.conv.weight"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "torchvision:fcn_resnet5O", "seed": 1}, "did you mean fcn_resnet50"),
        ({"source": "torchvision:fcn_resnet50", "weights": "COCO"}, "use DEFAULT or one of COCO_WITH_VOC_LABELS_V1"),
        ({"source": "torchvision:maskrcnn_mobilenet_v3_large_fpn"}, "nobody has published weights"),
        ({"source": "torchvision:fcn_resnet50", "weights": "DEFAULT", "seed": 1}, "not several"),
        ({"source": "smp:unet/resnet18"}, "publishes weights of encoders only"),
        ({"source": "smp:unet", "seed": 1}, "must be smp:ARCHITECTURE/ENCODER"),
        ({"source": "smp:unett/resnet18", "seed": 1}, "unknown architecture 'unett': did you mean unet"),
        ({"source": "smp:unet/resnet19", "seed": 1}, "no encoder 'resnet19': did you mean resnet1"),
        ({"source": "smp:unet/resnet18", "seed": 1, "args": {"depth": 3}}, "'depth'"),
        ({"source": "keras:unet", "seed": 1}, "must be torchvision:NAME or smp:"),
    ],
)
def test_what_cannot_be_imported_is_one_sentence(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        imported(**settings)


def test_weights_that_do_not_fit(tmp_path: Path, lraspp: torch.nn.Module) -> None:
    path = tmp_path / "w.pth"
    torch.save(lraspp.state_dict(), path)
    with pytest.raises(WeightsError, match="2 class names are given, the weights have 21 channels"):
        imported(source="torchvision:lraspp_mobilenet_v3_large", weights_file=path, classes=("a", "b"))
    with pytest.raises(WeightsError, match=r"do not fit unet .*: they lack \d+ tensors, the first is"):
        imported(source="smp:unet/resnet18", weights_file=path, args=SMALL_UNET)
    torch.save({"weight": torch.full((1,), np.nan)} | lraspp.state_dict(), path)
    with pytest.raises(WeightsError, match="they have unknown 1 tensors, the first is 'weight'"):
        imported(source="torchvision:lraspp_mobilenet_v3_large", weights_file=path)
    broken = lraspp.state_dict() | {"classifier.low_classifier.bias": torch.full((21,), np.inf)}
    torch.save(broken, path)
    with pytest.raises(WeightsError, match=r"NaN or infinity in 'classifier\.low_classifier\.bias'"):
        imported(source="torchvision:lraspp_mobilenet_v3_large", weights_file=path)
