"""How fast each architecture answers on this machine's CPU: as its library gives it, and through the Segmenter.

    python benchmarks/architectures.py [NAME ...] [--size-px 512] [--batch 2] [--repeat 3] [--classes 21] [--profile]

Both start from the same 8-bit pixels. The library's way is what its own pages show: pixels to float32, normalised, an
eager forward in float32, argmax (Mask R-CNN: its own post-processing). Ours is `Segmenter.submit` and `finish` in the
precision that a run would choose, which normalises, runs the network, and gives class ids, confidence, entropy and
pixels of each class. `network` compares the two forwards alone. The two ways take turns (A B A B), so that other jobs
on the machine slow both: ratios hold, images/s do not. Medians of K turns, after one that is not counted.

Weights are random, but their normalisation layers have seen the images, so that no signal fades or blows up. `agree`
is the share of pixels to which both ways give the same class (Mask R-CNN: share of the library's 20 best detections
that ours has too, with the same class and a box of IoU > 0.9). It says little by itself, because a deep network of
random weights blows up any rounding; beside it stands what the library's own network answers under `torch.autocast` in
bf16, which is what others would do. Trained networks, which are surer, agree far more: the last line has the shipped
one, on the pictures in `examples/nuclei`.

Goal: images/s at least 2.5 times the library's for networks of convolutions, where the CPU has AVX512-BF16 or AMX.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torchvision.ops import box_iou
from torchvision.ops.misc import FrozenBatchNorm2d

from models.architectures import ARCHITECTURES, architecture, build, card_for
from models.card import Card
from models.file import load_module
from models.preprocessing import IMAGENET_MEAN, IMAGENET_STD, image_statistics
from models.segmenter import Segmenter, supports_bf16
from pipeline.registry import resolve

#: Of the detectors' 20 best detections, those that count as found by both overlap by more than this.
SAME_BOX_IOU = 0.9
BEST = 20
EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "nuclei"


class Measured(NamedTuple):
    """Seconds for a batch, one number for each turn."""

    library_s: list[float]
    ours_s: list[float]
    library_network_s: list[float]
    our_network_s: list[float]
    agreement: float
    mixed_agreement: float


def photos(count: int, size_px: int) -> np.ndarray:
    """Soft blotches with grain: uint8 [N, size_px, size_px, 3]."""
    random = np.random.default_rng(0)
    images = np.empty((count, size_px, size_px, 3), np.uint8)
    for image in images:
        coarse = random.integers(0, 256, (size_px // 16, size_px // 16, 3)).astype(np.float32)
        soft = cv2.resize(coarse, (size_px, size_px), interpolation=cv2.INTER_CUBIC)
        image[:] = np.clip(soft + random.normal(0, 8, soft.shape), 0, 255)
    return images


def library_input(images_NHWC: np.ndarray, *, normalised: bool) -> torch.Tensor:
    """float32 [N, 3, H, W], contiguous. Detectors normalise by themselves."""
    images_NCHW = torch.from_numpy(images_NHWC).permute(0, 3, 1, 2).contiguous().float() / 255
    if not normalised:
        return images_NCHW
    mean, std = (torch.tensor(numbers).view(1, 3, 1, 1) for numbers in (IMAGENET_MEAN, IMAGENET_STD))
    return (images_NCHW - mean) / std


def card_of(name: str, classes: int) -> Card:
    """The architecture with its own defaults."""
    names = ("background", *(f"class-{index}" for index in range(1, classes)))
    return card_for("benchmark", name, class_names=names, preprocessing={"normalization": "imagenet"})


def settled_network(card: Card, images_NHWC: np.ndarray) -> Any:
    """The card's network with random weights under which activations, logits and detections are of plausible sizes."""
    torch.manual_seed(0)
    network: Any = build(card)
    detects = architecture(card.architecture).detects
    few = images_NHWC[:2, :256, :256]
    probes = library_input(few if len(few) > 1 else few.repeat(2, axis=0), normalised=not detects)
    hooks: list[Any] = []
    for part in network.modules():
        if isinstance(part, torch.nn.modules.batchnorm._BatchNorm):
            part.momentum = 1.0
        elif isinstance(part, FrozenBatchNorm2d):
            hooks.append(part.register_forward_pre_hook(_take_statistics))
    heads: list[Any] = list(architecture(card.architecture).logits_layers(network))
    if detects:
        heads = [network.roi_heads.box_predictor.cls_score, network.roi_heads.mask_predictor.mask_fcn_logits]
        network.backbone.train()
    else:
        network.train()
    with torch.no_grad():
        (network.backbone if detects else network)(probes)
        network.eval()
        for hook in hooks:
            hook.remove()
        # What is pooled over a whole image has other values in a part of it.
        seen = list(probes) if detects else library_input(images_NHWC[:2], normalised=True)
        for head, spread in zip(heads, (2.0, 4.0), strict=False):
            _spread(network, head, seen, spread)
    return network


def _take_statistics(norm: Any, inputs: Any) -> None:
    variances, means = torch.var_mean(inputs[0], dim=(0, 2, 3), correction=0)
    norm.running_mean.copy_(means)
    # Channels that are blank here need not be so elsewhere.
    norm.running_var.copy_(variances + variances.mean() / 10 + 1e-4)


def _spread(network: Any, layer: Any, images: Any, spread: float) -> None:
    """Logits of every class then vary by `spread`, around nothing."""
    outputs: list[torch.Tensor] = []
    hook = layer.register_forward_hook(lambda part, inputs, output: outputs.append(output))
    if hasattr(network, "roi_heads"):
        network.roi_heads.score_thresh = 0.0
    network(images)
    hook.remove()
    axes = [axis for axis in range(outputs[0].dim()) if axis != 1]
    factor = spread / outputs[0].std(dim=axes).clamp_min(1e-6)
    if layer.bias is not None:
        layer.bias.sub_(outputs[0].mean(dim=axes)).mul_(factor)
    turned = isinstance(layer, torch.nn.ConvTranspose2d)
    layer.weight.mul_(factor.view(1, -1, 1, 1) if turned else factor.view(-1, *[1] * (layer.weight.dim() - 1)))


def seconds(action: Callable[[], Any]) -> float:
    """CPU time of this process."""
    began_s = time.process_time()
    action()
    return time.process_time() - began_s


class Sides:
    """The two ways over the same images."""

    def __init__(self, card: Card, images_NHWC: np.ndarray, precision: str) -> None:
        self._card, self._images = card, images_NHWC
        self._detects = architecture(card.architecture).detects
        self._library = settled_network(card, images_NHWC)
        count, height, width, _ = images_NHWC.shape
        self._sizes = np.tile(np.array([height, width], np.int32), (count, 1))
        self._statistics = np.tile(np.array([0, 1], np.float32), (count, 1))
        if self._detects:
            self._library.roi_heads.score_thresh = card.postprocessing.score_threshold  # type: ignore[union-attr]
        own = build(card)
        own.load_state_dict(self._library.state_dict())
        self.segmenter = Segmenter(own, card, device="cpu", precision=precision)
        self._inputs = library_input(images_NHWC, normalised=not self._detects)
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        self._narrow = self._inputs.to(dtype).contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def library(self) -> Any:
        inputs = library_input(self._images, normalised=not self._detects)
        answer = self._library(list(inputs) if self._detects else inputs)
        if self._detects:
            return answer
        return (answer["out"] if isinstance(answer, dict) else answer).argmax(dim=1).to(torch.uint8).numpy()

    def ours(self) -> Any:
        answers = self.segmenter.finish(self.segmenter.submit(self._images, self._sizes, self._statistics))
        # The library's own detector pastes its masks, so ours must.
        return [(one, self.segmenter.postprocess(one)) for one in answers] if self._detects else answers

    @torch.inference_mode()
    def library_network(self) -> Any:
        return (self._library.backbone if self._detects else self._library)(self._inputs)

    @torch.inference_mode()
    def our_network(self) -> Any:
        network = self.segmenter._module
        return (network.backbone if self._detects else network)(self._narrow)

    def agreements(self) -> tuple[float, float]:
        """Of ours with the library in float32, and of the library in torch's own bf16 with it."""
        exact, ours = self.library(), self.ours()
        with torch.autocast("cpu", torch.bfloat16):
            mixed = self.library()
        if self._detects:
            found = [one[0].detections for one in ours]
            own = [{"boxes": torch.from_numpy(one.boxes), "labels": torch.from_numpy(one.labels)} for one in found]
            return _found_again(exact, own), _found_again(exact, mixed)
        return float((exact == np.stack([one.class_ids for one in ours])).mean()), float((exact == mixed).mean())


def _found_again(exact: Any, others: Any) -> float:
    found: list[bool] = []
    for one, other in zip(exact, others, strict=True):
        same = box_iou(one["boxes"][:BEST], other["boxes"].float()) > SAME_BOX_IOU
        same &= one["labels"][:BEST, None] == other["labels"][None]
        found += same.any(dim=1).tolist()
    return float(np.mean(found)) if found else float("nan")


def measured(sides: Sides, repeat: int) -> Measured:
    ways = (sides.library, sides.ours, sides.library_network, sides.our_network)
    taken: tuple[list[float], ...] = ([], [], [], [])
    agreements = sides.agreements()
    for way in ways[2:]:
        way()
    for _ in range(repeat):
        for way, times in zip(ways, taken, strict=True):
            times.append(seconds(way))
    return Measured(*taken, *agreements)


def trained_agreement(precision: str) -> float:
    """The share of pixels for which the shipped model says the same in float32 and in `precision`."""
    card, module = load_module(resolve("nuclei-unet").data)
    segmenters = [Segmenter(copy.deepcopy(module), card, device="cpu", precision=name) for name in ("fp32", precision)]
    same: list[np.ndarray] = []
    for path in sorted(EXAMPLES.glob("*.png")):
        pixels = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
        canvas = np.empty((1, *segmenters[0].canvas(*pixels.shape[:2]), 3), np.uint8)
        size = np.array([segmenters[0].fit(pixels, canvas[0])], np.int32)
        statistics_12 = np.array([image_statistics(pixels)], np.float32)
        ids = [one.finish(one.submit(canvas, size, statistics_12))[0].class_ids.ravel() for one in segmenters]
        same.append(ids[0] == ids[1])
    return float(np.concatenate(same).mean())


def print_profile(sides: Sides, console: Console) -> None:
    from torch.profiler import ProfilerActivity, profile

    for title, way in (("library", sides.library), ("ours", sides.ours)):
        with profile(activities=[ProfilerActivity.CPU]) as found:
            way()
        console.print(title, found.key_averages().table(sort_by="self_cpu_time_total", row_limit=14), soft_wrap=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ARCHITECTURES)}; all by default")
    parser.add_argument("--size-px", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--classes", type=int, default=21)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16" if supports_bf16("cpu") else "fp32")
    parser.add_argument("--profile", action="store_true", help="where the time goes, for each name, instead of a table")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cv2.setNumThreads(1)
    console = Console()
    table = Table(
        title=f"{options.size_px}² pixels, batches of {options.batch}, {options.classes} classes, "
        f"{options.threads} threads, ours in {options.precision}, torch {torch.__version__}"
    )
    table.add_column("architecture")
    for column in ("library, images/s", "ours, images/s", "ratio", "network alone, ratio", "agree", "autocast agrees"):
        table.add_column(column, justify="right")
    images = photos(options.batch, options.size_px)
    for name in options.names or ARCHITECTURES:
        began_s = time.monotonic()
        sides = Sides(card_of(name, options.classes), images, options.precision)
        if options.profile:
            print_profile(sides, console)
            continue
        found = measured(sides, options.repeat)
        library_s, ours_s, library_network_s, our_network_s = (statistics.median(times) for times in found[:4])
        row = (
            name,
            f"{options.batch / library_s:.2f}",
            f"{options.batch / ours_s:.2f}",
            f"{library_s / ours_s:.2f}",
            f"{library_network_s / our_network_s:.2f}",
            f"{found.agreement:.3f}",
            f"{found.mixed_agreement:.3f}",
        )
        table.add_row(*row)
        console.print(f"{' '.join(row)}  ({time.monotonic() - began_s:.0f} s)", style="dim", highlight=False)
        del sides
        gc.collect()
    if not options.profile:
        console.print(table)
    if not options.names:
        console.print(f"nuclei-unet, trained: {trained_agreement(options.precision):.4f} of pixels agree with float32")


if __name__ == "__main__":
    main()
