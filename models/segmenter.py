"""One network on one device: batches of uint8 pixels in, class ids and per-image figures out. Owns: the
device, the precision, the forward pass and the reductions. Must not know: decoding, batching, tables, Ray.

For the same batch shape, precision, thread count and device type, an image's results are bit-identical
whatever its neighbours and its slot: all arithmetic is per image or per pixel, and sums are taken over
integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from models.card import ArgmaxPostprocessing, Card, Postprocessing, WatershedPostprocessing
from models.masks import Instance
from models.postprocessing import describe_instances, split_instances, threshold_level
from models.preprocessing import normalize

Precision = Literal["fp32", "bf16", "fp16"]
_DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: Probabilities and entropies are summed in units of 1 / _QUANTUM.
_QUANTUM = 65535


class SegmenterSettings(BaseModel):
    """What changes the answer of a Segmenter, beyond the model itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    precision: Precision = "fp32"
    #: None: what the card says.
    postprocessing: Postprocessing | None = None


class Prediction(NamedTuple):
    """What the network says about one image of h × w pixels. Arrays are on the CPU and own their memory."""

    #: uint8 [h, w], before post-processing.
    class_ids: NDArray[np.uint8]
    #: int64 [C], in the order of `card.classes`.
    pixels: NDArray[np.int64]
    #: float64 [C]: mean, over the pixels of the class, of the probability of the class; NaN where it is
    #: absent.
    confidence: NDArray[np.float64]
    #: Mean over all pixels of the probability of the pixel's class, 0..1. NaN if the network put out NaN for any
    #: pixel: then nothing in this prediction means anything.
    mean_confidence: float
    #: Mean over all pixels of the entropy of the network's channels divided by its maximum, 0..1.
    mean_entropy: float
    #: Instance models: `interior` and `foreground` probabilities as uint8 [h, w] (p * 255, rounded). Else
    #: None.
    instance_evidence: dict[str, NDArray[np.uint8]] | None


class Pending:
    """A submitted batch. Only `Segmenter.finish` looks inside."""

    __slots__ = ("event", "results", "sizes_N2")

    def __init__(
        self, results: dict[str, torch.Tensor], sizes_N2: NDArray[np.int32], event: torch.cuda.Event | None
    ) -> None:
        self.results = results
        self.sizes_N2 = sizes_N2
        self.event = event


class Segmenter:
    """Holds one network on one device.

    `submit` and `finish` belong to one thread; `postprocess` may be called from several at once.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        card: Card,
        *,
        device: str,
        precision: str,
        postprocessing: Postprocessing | None = None,
    ) -> None:
        """Moves `module` (as from `load_module`) to the device; it must not be used elsewhere afterwards.

        Raises ValueError for a precision that the device cannot compute, or post-processing of another task.
        """
        _check_precision(device, precision)
        self.card = card
        self.device = device
        self.precision = precision
        self.postprocessing = postprocessing or card.postprocessing
        if self.postprocessing.kind != card.postprocessing.kind:
            raise ValueError(
                f"postprocessing {self.postprocessing.kind!r} does not fit model {card.name!r} ({card.task})"
            )
        self._dtype = _DTYPES[precision]
        self._on_cuda = torch.device(device).type == "cuda"
        self._module = _in_precision(module.eval(), self._dtype).to(device).to(memory_format=torch.channels_last)
        self._ids = torch.tensor([info.id for info in card.classes], dtype=torch.uint8, device=device)

    def canvas(self, height: int, width: int) -> tuple[int, int]:
        """The padded (height, width) in which an image of this size must be submitted."""
        step = self.card.canvas_multiple
        if self.card.pools_whole_image and (height % step or width % step):
            raise ValueError(
                f"model {self.card.name!r} pools over the whole image: sizes must be multiples of {step}, "
                f"got {height} x {width}"
            )
        return -(-height // step) * step, -(-width // step) * step

    def submit(
        self, images_NHWC: NDArray[np.uint8], sizes_N2: NDArray[np.int32], statistics_N2: NDArray[np.float32]
    ) -> Pending:
        """Starts one batch. On CUDA it returns before the device is done, without synchronising.

        `images_NHWC` uint8 [N, H, W, 3], each image at the top left, padded to the canvas by repeating its
        edge; it may be reused as soon as this returns. `sizes_N2`: height and width of the valid part, height
        0 for an empty slot. `statistics_N2`: mean and standard deviation of each valid part over all
        channels, 0..255. Raises torch.OutOfMemoryError when the device's memory does not hold the batch; safe
        to retry with a smaller one.
        """
        count, height, width = images_NHWC.shape[:3]
        if sizes_N2.shape != (count, 2) or statistics_N2.shape != (count, 2):
            raise ValueError(f"{count} images need sizes and statistics of shape ({count}, 2)")
        if images_NHWC.dtype != np.uint8 or (height, width) != self.canvas(height, width):
            raise ValueError(
                f"images must be uint8 on a canvas of multiples of {self.card.canvas_multiple}, "
                f"got {images_NHWC.dtype} {images_NHWC.shape}"
            )
        with torch.inference_mode():
            images = self._upload(images_NHWC)
            sizes = self._upload(sizes_N2)
            inputs = normalize(images, self._upload(statistics_N2), self.card.preprocessing, dtype=self._dtype)
            logits_NCHW = self._module(inputs).float()
            results = self._reduce(logits_NCHW, sizes)
            if not self._on_cuda:
                return Pending(results, sizes_N2.copy(), None)
            on_host = {name: _download(tensor) for name, tensor in results.items()}
            event = torch.cuda.Event()
            event.record()
        return Pending(on_host, sizes_N2.copy(), event)

    def finish(self, pending: Pending) -> list[Prediction]:
        """Waits for the device and returns one Prediction per non-empty slot, in the slots' order."""
        if pending.event is not None:
            pending.event.synchronize()
        arrays = {name: tensor.numpy() for name, tensor in pending.results.items()}
        return [
            self._prediction(arrays, slot, int(height), int(width))
            for slot, (height, width) in enumerate(pending.sizes_N2)
            if height > 0
        ]

    def postprocess(self, prediction: Prediction) -> tuple[NDArray[np.uint8], list[Instance]]:
        """Final class ids uint8 [h, w] and instances (none for semantic models). On the CPU, thread safe,
        deterministic.

        For instance models the class ids are those of the instances kept: foreground that belongs to none is
        background, so pixels per class must be counted on this result and not taken from the prediction.
        """
        if not isinstance(self.postprocessing, WatershedPostprocessing) or prediction.instance_evidence is None:
            return prediction.class_ids, []
        evidence = prediction.instance_evidence
        labels = split_instances(evidence["interior"], evidence["foreground"], self.postprocessing)
        instances = describe_instances(labels, evidence["foreground"], self.card.foreground_id)
        background_id = self.card.background_id or 0
        class_ids = np.where(labels > 0, np.uint8(self.card.foreground_id), np.uint8(background_id))
        return class_ids, instances

    def _upload(self, array: NDArray[np.generic]) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if not self._on_cuda:
            return tensor
        # Pinned memory is torch's own copy, which its allocator keeps until the transfer is done.
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def _reduce(self, logits_NCHW: torch.Tensor, sizes_N2: torch.Tensor) -> dict[str, torch.Tensor]:
        """Pixel maps and integer sums per image, on the device, with no synchronisation."""
        _, channels, height, width = logits_NCHW.shape
        log_probabilities = logits_NCHW.log_softmax(dim=1)
        probabilities = log_probabilities.exp()
        entropy_NHW = (probabilities * log_probabilities).sum(dim=1).neg_().div_(math.log(max(channels, 2)))
        maps: dict[str, torch.Tensor] = {}
        if isinstance(self.postprocessing, ArgmaxPostprocessing):
            winner_NHW, index_NHW = probabilities.max(dim=1)
        else:
            maps["foreground"] = _to_uint8(probabilities[:, 1] + probabilities[:, 2])
            maps["interior"] = _to_uint8(probabilities[:, 1])
            inside = maps["foreground"] >= threshold_level(self.postprocessing.foreground_threshold)
            foreground_index = [info.id for info in self.card.classes].index(self.card.foreground_id)
            index_NHW = (inside if foreground_index == 1 else ~inside).long()
            background = probabilities[:, 0]
            winner_NHW = torch.where(inside, 1 - background, background)
        maps["class_ids"] = self._ids[index_NHW]
        rows = torch.arange(height, device=logits_NCHW.device, dtype=torch.int32).view(1, -1, 1)
        columns = torch.arange(width, device=logits_NCHW.device, dtype=torch.int32).view(1, 1, -1)
        valid_NHW = (rows < sizes_N2[:, 0].view(-1, 1, 1)) & (columns < sizes_N2[:, 1].view(-1, 1, 1))
        maps["broken"] = (winner_NHW.isnan() & valid_NHW).any(dim=2).any(dim=1)
        winner = _quantised(winner_NHW, valid_NHW)
        pixels, confidence = [], []
        for index in range(len(self.card.classes)):
            of_class = (index_NHW == index) & valid_NHW
            pixels.append(of_class.sum(dim=(1, 2)))
            confidence.append((winner * of_class).sum(dim=(1, 2)))
        maps["pixels"] = torch.stack(pixels, dim=1)
        maps["confidence"] = torch.stack(confidence, dim=1)
        maps["entropy"] = _quantised(entropy_NHW, valid_NHW).sum(dim=(1, 2))
        return maps

    def _prediction(self, arrays: dict[str, NDArray[np.generic]], slot: int, height: int, width: int) -> Prediction:
        pixels = np.asarray(arrays["pixels"][slot], dtype=np.int64)
        sums = np.asarray(arrays["confidence"][slot], dtype=np.int64)
        with np.errstate(invalid="ignore"):
            confidence = sums / (pixels * float(_QUANTUM))
        scale = float("nan") if arrays["broken"][slot] else 1 / (height * width * _QUANTUM)
        evidence = None
        if "interior" in arrays:
            evidence = {name: _cropped(arrays[name], slot, height, width) for name in ("interior", "foreground")}
        return Prediction(
            class_ids=_cropped(arrays["class_ids"], slot, height, width),
            pixels=pixels.copy(),
            confidence=confidence,
            mean_confidence=float(sums.sum()) * scale,
            mean_entropy=float(np.asarray(arrays["entropy"])[slot]) * scale,
            instance_evidence=evidence,
        )


def default_device() -> str:
    """`cuda` where torch can use a GPU, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def supports_bf16(device: str) -> bool:
    """True where bfloat16 is fast in hardware: AVX512-BF16 or AMX on the CPU, Ampere and later on CUDA."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= (8, 0)
    probes: list[Callable[[], bool] | None] = [
        getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    ]
    return any(probe is not None and probe() for probe in probes)


def _check_precision(device: str, precision: str) -> None:
    if precision not in _DTYPES:
        raise ValueError(f"unknown precision {precision!r}: use one of {', '.join(_DTYPES)}")
    if precision == "fp16" and torch.device(device).type == "cpu":
        raise ValueError("precision 'fp16' is for GPUs: on the CPU use 'bf16' or 'fp32'")


def _in_precision(module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Weights in `dtype`; BatchNorm stays float32, because its running statistics do not survive 8 bits of
    mantissa.
    """
    if dtype == torch.float32:
        return module
    for part in module.modules():
        if not isinstance(part, torch.nn.modules.batchnorm._BatchNorm):
            for name, parameter in part.named_parameters(recurse=False):
                part.register_parameter(name, torch.nn.Parameter(parameter.to(dtype), requires_grad=False))
    return module


def _download(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def _to_uint8(probability: torch.Tensor) -> torch.Tensor:
    return probability.nan_to_num(0.0).mul_(255).round_().clamp_(0, 255).to(torch.uint8)


def _quantised(values: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """float [N, H, W] in 0..1 to int32 multiples of 1 / _QUANTUM; 0 where not valid or NaN."""
    return values.nan_to_num(0.0).clamp(0, 1).mul_(_QUANTUM).round_().to(torch.int32).mul_(valid)


def _cropped(maps: NDArray[np.generic], slot: int, height: int, width: int) -> NDArray[np.uint8]:
    return np.array(maps[slot, :height, :width], dtype=np.uint8)
