"""What a network is, and knows, before it is trained here. Owns: the card that training starts with, and where first
weights come from: random ones, a published backbone, another model. Must not know: losses, schedules, checkpoints.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError

from models.architectures import architecture, build, card_for
from models.card import Card, ClassInfo, DetectionsPostprocessing, Preprocessing
from models.file import load_module
from models.importing import DownloadError, ImportConfig, import_model
from models.networks import smp
from models.palettes import distinct_color
from models.weights import WeightsError, read_weights
from pipeline.errors import InfrastructureError, UsageError
from pipeline.learning.configuration import TrainConfig
from pipeline.learning.dataset import Dataset
from pipeline.learning.optimization import backbone_of
from pipeline.registry import resolve

_COUNTED_IMAGES = 1000


class Beginning(NamedTuple):
    """A card without figures, and the weights of its network: on the CPU, float32."""

    card: Card
    weights: dict[str, torch.Tensor]
    #: For the card: which weights these are.
    origin: dict[str, Any]


def begin(config: TrainConfig, dataset: Dataset) -> Beginning:
    """The network that `config` asks for, for the classes of `dataset`. Equal arguments give equal weights.

    Raises UsageError for what does not fit together, InfrastructureError where published weights cannot be fetched.
    """
    try:
        if config.init is not None:
            return _from_model(config, dataset, config.init)
        if config.backbone_weights is not None:
            return _from_backbone(config, dataset, config.backbone_weights)
        card = _new_card(config, dataset, config.arch or "unet", _args(config))
        return Beginning(card, _random_weights(card, config.seed), {"initial_weights": "random"})
    except DownloadError as error:
        raise InfrastructureError(str(error)) from error
    except ValidationError as error:
        # Of the card: pydantic's own text is of several lines, with an address.
        raise UsageError(error.errors()[0]["msg"].removeprefix("Value error, ")) from error
    except ValueError as error:
        raise UsageError(str(error)) from error


def _args(config: TrainConfig) -> dict[str, Any]:
    return {**config.args, **({"encoder": config.encoder} if config.encoder else {})}


def _task(config: TrainConfig, dataset: Dataset, *, detects: bool) -> str:
    if config.task != "auto":
        return config.task
    alone = dataset.has_objects and len(dataset.class_names) == 2 and dataset.background_id == 0
    return "instance" if detects or alone else "semantic"


def _new_card(
    config: TrainConfig,
    dataset: Dataset,
    architecture_name: str,
    args: Mapping[str, Any],
    preprocessing: Preprocessing | None = None,
    **fields: Any,
) -> Card:
    task = _task(config, dataset, detects=architecture(architecture_name).detects)
    if task == "instance" and not dataset.has_objects:
        raise UsageError(
            f"an instance model needs objects that are told apart, and {dataset.source.title} has labels of classes "
            "only: train a semantic model (task=semantic, and no Mask R-CNN)"
        )
    if config.normalization != "auto":
        preprocessing = Preprocessing(normalization=config.normalization)
    classes = tuple(
        ClassInfo(id=index, name=name, color=distinct_color(index)) for index, name in enumerate(dataset.class_names)
    )
    card = card_for(
        config.name,
        architecture_name,
        args,
        task=task,  # type: ignore[arg-type]
        class_names=dataset.class_names,
        classes=classes,
        background_id=dataset.background_id,
        preprocessing=preprocessing or Preprocessing(),
        **fields,
    )
    if not isinstance(card.postprocessing, DetectionsPostprocessing):
        return card
    top_k = max(card.postprocessing.top_k, 2 * _most_objects(dataset))
    return card.model_copy(update={"postprocessing": card.postprocessing.model_copy(update={"top_k": top_k})})


def _most_objects(dataset: Dataset) -> int:
    """Of an image, among at most `_COUNTED_IMAGES` that are evenly taken."""
    counted = dataset.items[:: max(1, -(-len(dataset.items) // _COUNTED_IMAGES))]
    return max((len(dataset.labels(item).objects or ()) for item in counted), default=0)


def _random_weights(card: Card, seed: int) -> dict[str, torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % (1 << 63))
        return {name: tensor.detach().clone() for name, tensor in build(card).state_dict().items()}


def _from_model(config: TrainConfig, dataset: Dataset, reference: str) -> Beginning:
    """All weights of another model that mean the same here; the others, of the head, are new."""
    model = resolve(reference, registry=config.registry, profile=config.registry_profile)
    other, module = load_module(model.data)
    name = config.arch or other.architecture
    if name != other.architecture:
        raise UsageError(f"init {reference} is a {other.architecture}, not a {name}: leave the architecture out")
    args = {key: value for key, value in other.architecture_args.items() if key != "output_channels"} | _args(config)
    card = _new_card(
        config, dataset, name, args, other.preprocessing,
        size_policy=other.size_policy, canvas_multiple=other.canvas_multiple,
    )  # fmt: skip
    same = card.task == other.task and [one.name for one in card.classes] == [one.name for one in other.classes]
    own = _random_weights(card, config.seed)
    # A head is what changes its shape with the number of classes; with as many others it is still another head.
    head = set() if same else _head(card)
    given = module.state_dict()
    taken = {
        key: given[key].float() if given[key].is_floating_point() else given[key]
        for key in own
        if key not in head and key in given and given[key].shape == own[key].shape
    }
    fresh = sorted(own.keys() - taken.keys())
    if not same and len(taken) < len(own) // 2:
        raise UsageError(
            f"init {reference} has {len(taken)} of the {len(own)} tensors that this network needs: other args?"
        )
    origin = {
        "initial_weights": f"{other.name}@{model.version}",
        "new_tensors": fresh,
    }
    return Beginning(card, {**own, **taken}, origin)


def _head(card: Card) -> set[str]:
    """Names of tensors whose shape depends on the number of output channels."""
    fields = card.model_dump()
    channels = int(card.architecture_args["output_channels"])  # type: ignore[call-overload, arg-type]
    found = architecture(card.architecture)
    args = {**fields["architecture_args"], "output_channels": channels + 1}
    wider = found.make(found.args.model_validate(args), input_channels=card.input_channels).state_dict()
    return {name for name, tensor in build(card, blank=True).state_dict().items() if tensor.shape != wider[name].shape}


def _from_backbone(config: TrainConfig, dataset: Dataset, weights: str) -> Beginning:
    name, args = config.arch or "unet", _args(config)
    path = Path(weights)
    is_file = path.suffix in (".pth", ".pt", ".safetensors")
    of_smp = issubclass(architecture(name).args, smp.SmpArgs)
    if of_smp and not is_file:
        encoder = str(args.pop("encoder", None) or architecture(name).args.model_fields["encoder"].default)
        published = "imagenet" if weights == "DEFAULT" else weights
        imported = import_model(ImportConfig(source=f"smp:{name}/{encoder}", weights=published, args=args))
        card = _new_card(config, dataset, name, {**args, "encoder": encoder}, imported.card.preprocessing)
        own = _random_weights(card, config.seed)
        backbone = {key: tensor for key, tensor in imported.state_dict.items() if key.startswith("encoder.")}
        return Beginning(card, {**own, **backbone}, {"initial_weights": f"{encoder}/{published}"})
    # Published weights of backbones are those of classifiers on ImageNet.
    card = _new_card(config, dataset, name, args, Preprocessing(normalization="imagenet"))
    own = _random_weights(card, config.seed)
    if is_file:
        state: Mapping[str, torch.Tensor] = read_weights(path)
        origin = f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"
    else:
        state, origin = _published_classifier(name, weights)
    prefix = _backbone_prefix(card)
    bare = {key.removeprefix("features.").removeprefix(prefix): tensor for key, tensor in state.items()}
    taken = {prefix + key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in bare.items()}
    taken = {key: tensor for key, tensor in taken.items() if key in own and tensor.shape == own[key].shape}
    wanted = [key for key in own if key.startswith(prefix) and not key.endswith("num_batches_tracked")]
    missing = [key for key in wanted if key not in taken and "fpn" not in key]
    if missing:
        raise WeightsError(
            f"the backbone weights {weights} do not fit {name}: {len(missing)} of {len(wanted)} tensors are missing, "
            f"the first is {missing[0]!r}"
        )
    return Beginning(card, {**own, **taken}, {"initial_weights": origin})


def _backbone_prefix(card: Card) -> str:
    network: Any = build(card, blank=True)
    backbone: Any = backbone_of(network)
    if backbone is None:
        raise WeightsError(f"{card.architecture} has no backbone that weights are published for")
    if hasattr(network, "encoder"):
        return "encoder."
    return "backbone.body." if hasattr(backbone, "body") else "backbone."


def _published_classifier(architecture_name: str, weights: str) -> tuple[Mapping[str, torch.Tensor], str]:
    """torchvision's weights for the classifier in `<head>_<classifier>[_fpn...]`."""
    from torchvision.models import get_model_weights

    known = ("resnet50", "resnet101", "mobilenet_v3_large")
    classifier = next((one for one in known if one in architecture_name), None)
    if classifier is None:
        raise WeightsError(f"nobody publishes a backbone for {architecture_name}")
    entries = get_model_weights(classifier)
    if weights not in entries.__members__:
        raise WeightsError(
            f"torchvision has no weights {weights!r} of {classifier}: use {', '.join(entries.__members__)}"
        )
    entry: Any = entries[weights]
    try:
        return entry.get_state_dict(progress=False, check_hash=True, weights_only=True), f"{classifier}/{entry.name}"
    except (OSError, RuntimeError) as error:
        raise DownloadError(
            f"{entry.url} could not be fetched ({error}): download it elsewhere and give that file as backbone weights"
        ) from error
