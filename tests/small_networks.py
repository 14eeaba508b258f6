"""Every architecture as small as it comes, with weights under which classes and detections are far apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torchvision.ops.misc import FrozenBatchNorm2d

from models.architectures import ARCHITECTURES, architecture, build, card_for
from models.card import Card
from models.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from models.segmenter import Prediction, Segmenter

CLASSES = ("background", "road", "tree", "car")
#: Arguments under which each architecture is small.
SMALL: dict[str, dict[str, Any]] = {
    "unet": {"encoder_depth": 3, "decoder_channels": [16, 8, 8]},
    "unetplusplus": {"encoder_depth": 3, "decoder_channels": [16, 8, 8]},
    "deeplabv3plus": {"decoder_channels": 16},
    "fpn": {"decoder_pyramid_channels": 16, "decoder_segmentation_channels": 32},
    "pspnet": {"psp_out_channels": 16},
    "linknet": {},
    "upernet": {"decoder_channels": 16},
    "segformer": {"encoder": "mit_b0", "decoder_segmentation_channels": 16},
    "dpt": {
        "encoder": "tu-vit_tiny_patch16_224",
        "decoder_intermediate_channels": [16, 16, 16, 16],
        "decoder_fusion_channels": 16,
    },
    "maskrcnn_resnet50_fpn": {"min_size_px": 64, "max_size_px": 96},
    "maskrcnn_resnet50_fpn_v2": {"min_size_px": 64, "max_size_px": 96},
    "maskrcnn_mobilenet_v3_large_fpn": {"min_size_px": 64, "max_size_px": 96},
}
DETECTORS = tuple(name for name, entry in ARCHITECTURES.items() if entry.detects)
SEMANTIC = tuple(name for name in ARCHITECTURES if name not in DETECTORS)
#: Strides, known here so that a card need not build a network to ask.
STRIDES = {"unet": 8, "unetplusplus": 8, "deeplabv3plus": 16, "fpn": 32, "pspnet": 8, "linknet": 32, "upernet": 32,
           "segformer": 32, "dpt": 32}  # fmt: skip
#: Those that take seconds.
HEAVY = frozenset({"fcn_resnet101", "deeplabv3_resnet101"})
#: Those of which only the first half of what is tested is quick.
LARGE = HEAVY | {"fcn_resnet50", "deeplabv3_resnet50"}


def small_card(name: str, **fields: Any) -> Card:
    """A card of four classes, or of two by watershed where `task="instance"`."""
    if fields.get("task") == "instance" and not architecture(name).detects:
        fields["class_names"] = ("background", "nucleus")
    defaults = {"class_names": CLASSES, "canvas_multiple": STRIDES.get(name, 1)}
    return card_for("small", name, SMALL.get(name), **defaults | fields)


def distinct_network(card: Card, seed: int = 3) -> torch.nn.Module:
    """The card's network with fixed weights, scaled so that no two classes are nearly alike anywhere."""
    torch.manual_seed(seed)
    network: Any = build(card)
    found = architecture(card.architecture)
    pixels_1CHW = torch.from_numpy(make_image(*_probe_size(card), 8, bands=card.input_channels)).permute(2, 0, 1)[None]
    # Detectors normalise by themselves.
    probes = pixels_1CHW.float() / 255 if found.detects else pixels_1CHW.float() / 64 - 2
    with torch.no_grad():
        if found.detects:
            if "mobilenet" in card.architecture:
                _randomise_statistics(network)
            heads = network.roi_heads
            heads.score_thresh = 0.0
            # The thousand proposals of the default cost seconds.
            network.rpn._post_nms_top_n = {"training": 60, "testing": 60}
            spread_logits(network, heads.box_predictor.cls_score, list(probes), 2.0)
            spread_logits(network, heads.mask_predictor.mask_fcn_logits, list(probes), 4.0)
            return network
        _randomise_statistics(network)
        spread_logits(network, found.logits_layers(network)[0], probes, 4.0)
    return network


def _randomise_statistics(network: Any) -> None:
    """Random, that they matter; such that signals neither fade nor blow up on their way."""
    for part in network.modules():
        if isinstance(part, (torch.nn.modules.batchnorm._BatchNorm, FrozenBatchNorm2d)):
            part.running_mean.normal_(0, 0.02)
            part.running_var.uniform_(0.2, 0.5)


def spread_logits(network: Any, layer: Any, images: Any, spread: float) -> None:
    """Gives the last layer weights under which its logits vary by `spread` for every class, around nothing."""
    layer.weight.normal_()
    outputs: list[torch.Tensor] = []
    hook = layer.register_forward_hook(lambda part, inputs, output: outputs.append(output))
    network(images)
    hook.remove()
    axes = [axis for axis in range(outputs[0].dim()) if axis != 1]
    factor = spread / outputs[0].std(dim=axes)
    layer.bias.sub_(outputs[0].mean(dim=axes)).mul_(factor)
    layer.weight.mul_(factor.view(-1, *[1] * (layer.weight.dim() - 1)))


def _probe_size(card: Card) -> tuple[int, int]:
    policy: Any = card.size_policy
    return (policy.height_px, policy.width_px) if policy.kind == "letterbox" else (64, 64)


def make_image(height: int, width: int, seed: int, *, bands: int = 3, dtype: str = "uint8") -> np.ndarray:
    """Soft blotches with some noise."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (height // 8 + 1, width // 8 + 1, bands))
    smooth = coarse.repeat(8, axis=0).repeat(8, axis=1)[:height, :width]
    image = (smooth // 2 + random.integers(0, 100, (height, width, bands))).astype(np.uint8)
    scale = {"uint8": 1, "uint16": 257, "float32": np.float32(1 / 255)}[dtype]
    return (image.astype(np.float64) * scale).astype(dtype)


def library_logits(network: Any, pixels: np.ndarray) -> torch.Tensor:
    """[C, h, w] as a user of the library gets them: scaled, normalised, forward."""
    image_CHW = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.inference_mode():
        answer = network(((image_CHW - mean) / std)[None])
    return (answer["out"] if isinstance(answer, dict) else answer)[0]


def run(
    segmenter: Segmenter, slots: list[np.ndarray | None], canvas: tuple[int, int] | None = None
) -> list[Prediction]:
    """Predictions of a batch of these images; an empty slot holds rubbish."""
    from models.preprocessing import picture_statistics, select_bands

    first = next(image for image in slots if image is not None)
    canvas = canvas or segmenter.canvas(*first.shape[:2])
    images = np.full((len(slots), *canvas, segmenter.input_channels), 7, segmenter.input_dtype)
    sizes, own_sizes = np.zeros((2, len(slots), 2), dtype=np.int32)
    statistics = np.zeros((len(slots), 2), dtype=np.float32)
    for slot, image in enumerate(slots):
        if image is not None:
            sizes[slot] = segmenter.fit(image, images[slot])
            own_sizes[slot] = image.shape[:2]
            statistics[slot] = picture_statistics(select_bands(image, segmenter.card.preprocessing))[:2]
    return segmenter.finish(segmenter.submit(images, sizes, statistics, own_sizes))
