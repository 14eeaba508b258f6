"""From published weights to one of our model files. Owns: what each library's weights are called, which classes and
preprocessing come with them. Must not know: registries, commands, where the file goes.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field

from models.architectures import architecture, build, card_for
from models.card import Card, ClassInfo, Preprocessing
from models.networks import mask_rcnn, smp, vision
from models.palettes import voc_color
from models.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from models.weights import WeightsError, load_weights, read_weights, reason


class DownloadError(Exception):
    """Weights that could not be fetched from where they are published."""


class ImportConfig(BaseModel):
    """What to import: exactly one of `weights`, `weights_file` and `seed` says which weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: `torchvision:NAME`, or `smp:ARCHITECTURE/ENCODER`.
    source: str
    #: The name of published weights. torchvision: of its weights enumeration, or DEFAULT. smp: the encoder's
    #: (`imagenet`); the decoder is then random, the start of training.
    weights: str | None = None
    #: A `.pth` or `.safetensors` file with a state dict of the library's network.
    weights_file: Path | None = None
    #: Random weights, for tests and measurements.
    seed: int | None = None
    #: Of the model; None: made from the source.
    name: str | None = None
    #: Class names by channel. None: as published with the weights, else `class-0`, `class-1`, ...
    classes: tuple[str, ...] | None = None
    #: `instance` for networks whose channels are background, interior and boundary; ignored for Mask R-CNN.
    task: Literal["semantic", "instance"] = "semantic"
    #: Arguments of the architecture that are not its defaults.
    args: dict[str, Any] = Field(default_factory=dict)
    #: None: as published with the weights, else `imagenet`.
    normalization: Literal["imagenet", "per_image", "unit"] | None = None


class Imported(NamedTuple):
    """What `models.file.save_model` takes."""

    card: Card
    state_dict: dict[str, torch.Tensor]


def import_model(config: ImportConfig) -> Imported:
    """The card and the weights of a published network.

    Raises WeightsError for weights that are unknown, unsafe or do not fit, DownloadError where they cannot be fetched,
    ValueError for an unknown architecture or arguments that are not valid, OSError if the file cannot be read.
    """
    chosen = [config.weights is not None, config.weights_file is not None, config.seed is not None]
    library, _, rest = config.source.partition(":")
    if sum(chosen) > 1:
        raise WeightsError("give one of weights, a weights file and a seed for random weights, not several")
    if library == "torchvision":
        return _import_torchvision(config if any(chosen) else config.model_copy(update={"weights": "DEFAULT"}), rest)
    if library == "smp":
        return _import_smp(config, *_architecture_and_encoder(rest))
    raise WeightsError(f"source {config.source!r} must be torchvision:NAME or smp:ARCHITECTURE/ENCODER")


def _import_torchvision(config: ImportConfig, name: str) -> Imported:
    from torchvision.models import get_model_weights

    if name not in (*vision.NAMES, *mask_rcnn.NAMES):
        near = difflib.get_close_matches(name, (*vision.NAMES, *mask_rcnn.NAMES), 2, 0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise WeightsError(
            f"torchvision has no segmentation network {name!r} here: {hint}known are "
            f"{', '.join((*vision.NAMES, *mask_rcnn.NAMES))}"
        )
    try:
        published: list[Any] = list(get_model_weights(name))
    except ValueError:
        published = []
    state: Mapping[str, torch.Tensor] | None = None
    origin: dict[str, Any] = {"source": config.source, "torchvision": metadata.version("torchvision")}
    entry: Any = None
    if config.weights is not None:
        entry = _published(name, config.weights, published)
        state = _downloaded(entry)
        origin |= {"weights": entry.name, "url": entry.url}
    elif config.weights_file is not None:
        digest = hashlib.sha256(config.weights_file.read_bytes()).hexdigest()
        state = read_weights(config.weights_file)
        # torchvision names its files after the beginning of their digest.
        entry = next((one for one in published if f"-{digest[:8]}." in one.url), None)
        origin |= {"weights_sha256": digest} | ({"weights": entry.name} if entry else {})
    else:
        origin["seed"] = config.seed
    # What is no published file is taken for one of the same recipe.
    recipe = entry or (published[-1] if published else None)
    categories = list(recipe.meta["categories"]) if recipe else []
    if not recipe and name in mask_rcnn.NAMES:
        categories = list(get_model_weights("maskrcnn_resnet50_fpn").COCO_V1.meta["categories"])  # type: ignore[attr-defined]
    channels = _channels(state, ("classifier.4.weight", "classifier.low_classifier.weight", _SCORES))
    classes = _classes(config, categories, channels)
    args = dict(config.args)
    if entry is not None and entry.name == "COCO_V1" and name == "maskrcnn_resnet50_fpn":
        args.setdefault("batchnorm_eps", 0.0)
    fields: dict[str, Any] = {"preprocessing": _normalisation(config, None, None)}
    transform = recipe.transforms() if recipe else None
    if name in vision.NAMES and transform is not None:
        fields["preprocessing"] = _normalisation(config, transform.mean, transform.std)
        if transform.resize_size:
            fields["size_policy"] = {"kind": "resize", "short_side_px": transform.resize_size[0]}
    if entry is not None:
        fields["metrics"] = {dataset: dict(figures) for dataset, figures in entry.meta.get("_metrics", {}).items()}
    return _finish(config, name, args=args, classes=classes, fields=fields, origin=origin, state=state)


#: The layer that scores Mask R-CNN's classes.
_SCORES = "roi_heads.box_predictor.cls_score.weight"


def _import_smp(config: ImportConfig, name: str, encoder: str) -> Imported:
    origin: dict[str, Any] = {
        "source": config.source,
        "segmentation-models-pytorch": metadata.version("segmentation-models-pytorch"),
        "timm": metadata.version("timm"),
    }
    state: Mapping[str, torch.Tensor] | None = None
    mean_std: dict[str, Any] = {}
    if config.weights_file is not None:
        state = read_weights(config.weights_file)
        origin["weights_sha256"] = hashlib.sha256(config.weights_file.read_bytes()).hexdigest()
    elif config.weights is not None:
        origin |= {"encoder_weights": config.weights, "decoder": "random: train it before use", "seed": 0}
        mean_std = _encoder_preprocessing(encoder, config.weights)
    elif config.seed is None:
        raise WeightsError(
            "segmentation-models-pytorch publishes weights of encoders only: give a weights file of a trained network, "
            "the name of the encoder's weights (imagenet) as a start for training, or a seed for random weights"
        )
    else:
        origin["seed"] = config.seed
    channels = _channels(state, ("segmentation_head.0.weight", "segmentation_head.head.4.weight"))
    if config.task == "instance":
        classes = _classes(config, ["background", "object"], 2)
    else:
        classes = _classes(config, [], channels)
    bands = (2, 1, 0) if mean_std.get("input_space") == "BGR" else (0, 1, 2)
    highest = max(mean_std.get("input_range") or [1])
    mean, std = ([number / highest for number in mean_std[key]] if mean_std else None for key in ("mean", "std"))
    fields: dict[str, Any] = {"preprocessing": _normalisation(config, mean, std, bands), "task": config.task}
    args = {**config.args, "encoder": encoder}
    return _finish(config, name, args=args, classes=classes, fields=fields, origin=origin, state=state)


def _finish(
    config: ImportConfig,
    architecture_name: str,
    *,
    args: Mapping[str, Any],
    classes: tuple[ClassInfo, ...],
    fields: Mapping[str, Any],
    origin: Mapping[str, Any],
    state: Mapping[str, torch.Tensor] | None,
) -> Imported:
    name = config.name or re.sub(r"[^a-z0-9]+", "-", config.source.partition(":")[2].lower()).strip("-")
    card = card_for(
        name,
        architecture_name,
        args,
        **{
            "classes": classes,
            "background_id": classes[0].id if classes[0].name == "background" else None,
            "provenance": dict(origin),
        }
        | dict(fields),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed or 0)
        network: Any = build(card)
    if config.source.startswith("smp:") and config.weights is not None:
        _load_encoder(network, str(args["encoder"]), config.weights, card)
    if state is not None:
        load_weights(network, state, what=f"{card.architecture} with the arguments {card.architecture_args}")
    tensors = {key: tensor.detach().clone() for key, tensor in network.state_dict().items()}
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise WeightsError(f"the weights hold NaN or infinity in {key!r}")
    return Imported(card, tensors)


def _architecture_and_encoder(rest: str) -> tuple[str, str]:
    name, _, encoder = rest.partition("/")
    found = architecture(name)
    if not encoder or not issubclass(found.args, smp.SmpArgs):
        raise WeightsError(f"smp:{rest} must be smp:ARCHITECTURE/ENCODER, such as smp:unet/resnet34")
    return name, encoder


def _published(name: str, wanted: str, published: Sequence[Any]) -> Any:
    if not published:
        raise WeightsError(f"nobody has published weights of {name}: give a weights file, or a seed for random weights")
    if wanted == "DEFAULT":
        return type(published[0])["DEFAULT"]
    for entry in published:
        if entry.name == wanted:
            return entry
    names = [entry.name for entry in published]
    raise WeightsError(f"torchvision has no weights {wanted!r} of {name}: use DEFAULT or one of {', '.join(names)}")


def _downloaded(entry: Any) -> Mapping[str, torch.Tensor]:
    try:
        state: Mapping[str, torch.Tensor] = entry.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        raise DownloadError(
            f"{entry.url} could not be fetched ({reason(error)}): download it elsewhere and give that as the "
            "weights file"
        ) from error
    return state


def _encoder_preprocessing(encoder: str, weights: str) -> dict[str, Any]:
    from segmentation_models_pytorch.encoders import get_preprocessing_params

    # An unknown encoder is told by the architecture, with the names that are near it.
    smp.check_encoder(encoder)
    try:
        with _quiet_hub():
            found: dict[str, Any] = get_preprocessing_params(encoder, weights)
    except (OSError, RuntimeError) as error:
        raise _unreachable(encoder, weights, error) from error
    except (ValueError, KeyError) as error:
        raise WeightsError(f"the encoder {encoder!r} has no weights {weights!r}: {reason(error)}") from error
    return found


def _load_encoder(network: Any, encoder: str, weights: str, card: Card) -> None:
    from segmentation_models_pytorch.encoders import get_encoder

    depth = card.architecture_args.get("encoder_depth")
    try:
        with _quiet_hub():
            trained = get_encoder(
                encoder,
                card.input_channels,
                **({"depth": depth} if depth else {}),
                # timm's encoders have one set each, and are told only whether to take it.
                weights=True if encoder.startswith("tu-") else weights,
            )
    except (OSError, RuntimeError) as error:
        raise _unreachable(encoder, weights, error) from error
    except (ValueError, KeyError) as error:
        raise WeightsError(f"the encoder {encoder!r} has no weights {weights!r}: {reason(error)}") from error
    wanted = network.encoder.state_dict()
    network.encoder.load_state_dict({key: value for key, value in trained.state_dict().items() if key in wanted})


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """The hub's client tells of each of its retries; that it failed in the end is enough."""
    log = logging.getLogger("huggingface_hub")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def _unreachable(encoder: str, weights: str, error: Exception) -> DownloadError:
    return DownloadError(
        f"the weights {weights!r} of the encoder {encoder!r}, {_published_at(encoder, weights)}, could not be fetched "
        f"({reason(error)}): import them where there is a network, and bring the file that this makes; or give the "
        "state dict of a whole network, decoder and all, as the weights file"
    )


def _published_at(encoder: str, weights: str) -> str:
    """Where an encoder's weights come from."""
    import timm
    from segmentation_models_pytorch.encoders import encoders

    if not encoder.startswith("tu-"):
        return f"https://huggingface.co/{encoders[encoder]['pretrained_settings'][weights]['repo_id']}"
    found: Any = timm.get_pretrained_cfg(encoder[3:])
    return f"https://huggingface.co/{found.hf_hub_id}" if found.hf_hub_id else str(found.url)


def _channels(state: Mapping[str, torch.Tensor] | None, keys: Sequence[str]) -> int | None:
    return next((int(state[key].shape[0]) for key in keys if key in state), None) if state is not None else None


def _classes(config: ImportConfig, published: Sequence[str], channels: int | None) -> tuple[ClassInfo, ...]:
    """Class ids are channels; the colours are those of VOC's scheme."""
    names = list(config.classes or published)
    if channels is not None and len(names) != channels:
        if config.classes is not None:
            raise WeightsError(f"{len(names)} class names are given, the weights have {channels} channels")
        names = []
    if not names:
        names = [f"class-{index}" for index in range(channels or 2)]
    names = ["background" if name == "__background__" else name for name in names]
    # COCO leaves gaps between its ids.
    names = [f"{name} {index}" if name == "N/A" else name for index, name in enumerate(names)]
    return tuple(ClassInfo(id=index, name=name, color=voc_color(index)) for index, name in enumerate(names))


def _normalisation(
    config: ImportConfig, mean: Sequence[float] | None, std: Sequence[float] | None, bands: tuple[int, ...] = (0, 1, 2)
) -> Preprocessing:
    if config.normalization is not None:
        return Preprocessing(normalization=config.normalization, bands=bands)
    published = (tuple(mean or IMAGENET_MEAN), tuple(std or IMAGENET_STD))
    if published == (IMAGENET_MEAN, IMAGENET_STD):
        return Preprocessing(normalization="imagenet", bands=bands)
    return Preprocessing(normalization="mean_std", mean=published[0], std=published[1], bands=bands)
