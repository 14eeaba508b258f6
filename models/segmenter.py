"""One network on one device: batches of pixels in, class ids, instances and per-image figures out. Owns: the
device, the precision, uploads and downloads, the forward pass. Must not know: decoding, batching, tables, Ray.

For the same batch shape, precision, thread count and device type, an image's results are bit-identical
whatever its neighbours and its slot: all arithmetic is per image or per pixel, and sums are taken over
integers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from models.architectures import architecture, least_canvas
from models.augmented import average_probabilities
from models.card import Card, DetectionsPostprocessing, Postprocessing, WatershedPostprocessing
from models.cleanup import clean_class_ids, clean_labels
from models.compilation import CompiledNetwork
from models.crf import refine
from models.detection import detect
from models.fitting import fit_size, lies_as_it_is, place, tile_policy
from models.folding import fold_batch_norms
from models.masks import Instance
from models.mosaic import DetectionMosaic, Mosaic
from models.networks.mask_rcnn import hidden_layers
from models.pasting import Detections, paste_detections
from models.postprocessing import describe_instances, split_instances
from models.precision import compute_in, lower_precision
from models.preprocessing import normalize
from models.probabilities import pixel_softmax
from models.reduction import QUANTUM, reduce_logits, reduce_resampled
from models.runs import clean_instances, paint
from models.seams import InstanceEvidence, split_in_blocks
from models.tiling import TileGrid

Precision = Literal["fp32", "bf16", "fp16"]
_DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# Keeps a logarithm finite: what is no probability at all must still show.
_LEAST_PROBABILITY = 1e-30


class Prediction(NamedTuple):
    """What the network says about one image of h × w pixels. Arrays are on the CPU and own their memory."""

    #: uint8 [h, w], before post-processing. Empty for detections, of which post-processing makes them.
    class_ids: NDArray[np.uint8]
    #: int64 [C], in the order of `card.classes`. Zeros for detections.
    pixels: NDArray[np.int64]
    #: float64 [C]: mean, over the pixels of the class, of the probability of the class; NaN where it is
    #: absent. Detections: mean score of those of the class.
    confidence: NDArray[np.float64]
    #: Mean over all pixels of the probability of the pixel's class, 0..1; detections: mean score, 0 where there are
    #: none. NaN if the network put out NaN or infinity anywhere: then nothing in this prediction means anything.
    mean_confidence: float
    #: Mean over all pixels (or detections; 0 where there are none) of the entropy of the network's channels divided by
    #: its maximum, 0..1.
    mean_entropy: float
    #: Watershed models: `interior` and `foreground` probabilities as uint8 [h, w] (p * 255, rounded). Else
    #: None.
    instance_evidence: dict[str, NDArray[np.uint8]] | None
    #: Models of detections only.
    detections: Detections | None = None
    #: Images in tiles only: for watershed models in place of `instance_evidence`, for detections the objects found.
    whole: InstanceEvidence | list[Instance] | None = None


#: Maps and figures: each with a first axis of slots, or slot by slot.
Results = dict[str, torch.Tensor] | list[dict[str, torch.Tensor] | None]


class Pending:
    """A submitted batch. Only `Segmenter.finish` looks inside."""

    __slots__ = ("event", "image_sizes_N2", "results")

    def __init__(
        self,
        results: Results,
        event: torch.cuda.Event | None,
        image_sizes_N2: NDArray[np.int32],
    ) -> None:
        self.results = results
        self.event = event
        self.image_sizes_N2 = image_sizes_N2


class Segmenter:
    """Holds one network on one device.

    `submit` and `finish` belong to one thread; `canvas`, `fit` and `postprocess` may be called from several at once.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        card: Card,
        *,
        device: str,
        precision: str,
        postprocessing: Postprocessing | None = None,
        compile: bool = False,
    ) -> None:
        """Moves `module` (as from `load_module`) to the device; it must not be used elsewhere afterwards.

        `compile`: through torch.compile, for each canvas once; answers then differ in their last bits. Raises
        ValueError for a precision that the device cannot compute, or post-processing of another task.
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
        network: Any = module.eval()
        if self._dtype != torch.float32:
            _lower(network, card, self._dtype)
        network = network.to(device).to(memory_format=torch.channels_last)
        self._module = network
        if compile and isinstance(self.postprocessing, DetectionsPostprocessing):
            network.backbone = CompiledNetwork(network.backbone)
        self._forward = CompiledNetwork(network) if compile else network
        self._ids = torch.tensor([info.id for info in card.classes], dtype=torch.uint8, device=device)
        # Transfers in either direction run beside the batch that is being computed.
        self._uploads = torch.cuda.Stream(device) if self._on_cuda else None
        self._downloads = torch.cuda.Stream(device) if self._on_cuda else None

    @property
    def input_dtype(self) -> np.dtype[Any]:
        """The type of pixel that `submit` takes: uint8, uint16 or float32."""
        return np.dtype(self.card.preprocessing.dtype)

    @property
    def input_channels(self) -> int:
        """The channels that `submit` takes."""
        return self.card.input_channels

    @property
    def lies_as_it_is(self) -> bool:
        """True where `fit` of an 8-bit RGB image would only pad, so that it may be decoded straight onto its canvas."""
        return lies_as_it_is(self.card)

    def canvas(self, height: int, width: int) -> tuple[int, int]:
        """The (height, width) in which an image of this size must be submitted: a function of it and the card alone.

        Raises ValueError for a size that the card's size policy cannot serve.
        """
        fit = fit_size(self.card, height, width)
        return fit.canvas_height, fit.canvas_width

    def mosaic(self, height: int, width: int) -> Mosaic | DetectionMosaic | None:
        """What takes the tiles of an image of this size; None for one that goes through the network in one piece.

        Tiles are submitted with `tiles=True`, on the canvas of their window, and their answers added to the mosaic.
        """
        policy = tile_policy(self.card, height, width)
        if policy is None:
            return None
        grid = TileGrid(
            height,
            width,
            tile_px=policy.tile_px,
            overlap_px=policy.overlap_px,
            multiple=self.card.canvas_multiple,
        )
        if isinstance(self.postprocessing, DetectionsPostprocessing):
            return DetectionMosaic(grid, self.card)
        return Mosaic(grid, self.card)

    def fit(self, pixels: NDArray[Any], out: NDArray[Any]) -> tuple[int, int]:
        """Puts an image [h, w, B] onto its canvas [*canvas(h, w), input_channels]; gives its height and width there.

        See `models.fitting.place`. `out` may hold the pixels already, at its top left, where nothing is resized.
        Raises ValueError for bands, a type or a size that the card does not serve.
        """
        return place(self.card, pixels, out)

    def submit(
        self,
        images_NHWC: NDArray[Any],
        sizes_N2: NDArray[np.int32],
        statistics_N2: NDArray[np.float32],
        image_sizes_N2: NDArray[np.int32] | None = None,
        *,
        tiles: bool = False,
    ) -> Pending:
        """Starts one batch. On CUDA it returns before the device is done, without synchronising (but for detections,
        which cannot be computed without); the batch is brought over beside the one that is still being computed.

        `images_NHWC` [N, H, W, input_channels] of `input_dtype`, each image at the top left, padded to the canvas by
        repeating its edge, as `fit` does; it may be reused as soon as this returns. `sizes_N2`: height and width of the
        image on the canvas, height 0 for an empty slot. `statistics_N2`: mean and standard deviation of each valid part
        over all channels, in the pixels' units. `image_sizes_N2`: height and width of the image itself, which the
        results will have; needed where the card resizes, else those on the canvas. `tiles`: the images are tiles of
        larger ones, and `finish` gives what a mosaic takes. Raises ValueError for what does not fit,
        torch.OutOfMemoryError when the device's memory does not hold the batch; safe to retry with a smaller one.
        """
        self._check(images_NHWC, sizes_N2, statistics_N2, image_sizes_N2)
        image_sizes = np.array(sizes_N2 if image_sizes_N2 is None else image_sizes_N2, dtype=np.int32)
        image_sizes[sizes_N2[:, 0] <= 0] = 0
        with torch.inference_mode():
            images, sizes, statistics = self._upload(images_NHWC, sizes_N2, statistics_N2)
            results: Results
            if isinstance(self.postprocessing, DetectionsPostprocessing):
                results = self._detect(images, statistics, image_sizes)
            else:
                inputs = normalize(images, statistics, self.card.preprocessing, dtype=self._dtype)
                logits_NCHW = self._refined(inputs, images, sizes)
                if tiles:
                    results = {"probabilities": pixel_softmax(logits_NCHW).to(torch.float16)}
                else:
                    results = self._reduce(logits_NCHW, sizes, sizes_N2, image_sizes)
            if self._downloads is None:
                return Pending(results, None, image_sizes)
            return Pending(*self._download(results, self._downloads), image_sizes)

    def finish(self, pending: Pending) -> list[Any]:
        """Waits for the device and returns one Prediction per non-empty slot, in the slots' order.

        For tiles: what their mosaic takes, which is a Prediction for detections, else probabilities float16 [C, h, w].
        """
        if pending.event is not None:
            pending.event.synchronize()
        predictions: list[Any] = []
        for slot, (height, width) in enumerate(pending.image_sizes_N2.tolist()):
            arrays = _arrays_of(pending.results, slot)
            if arrays is None or height <= 0:
                continue
            if "probabilities" in arrays:
                predictions.append(arrays["probabilities"][:, :height, :width])
                continue
            make = self._detected if "boxes" in arrays else self._prediction
            predictions.append(make(arrays, height, width))
        return predictions

    def assemble(self, mosaic: Mosaic | DetectionMosaic) -> Prediction:
        """The prediction of an image all of whose tiles have been added. Raises ValueError while some are missing."""
        grid = mosaic.grid
        if isinstance(mosaic, Mosaic):
            figures = mosaic.summary()
            return Prediction(mosaic.class_ids, *figures, instance_evidence=None, whole=mosaic.evidence)
        found = mosaic.found()
        scores = np.array([one.score for one in found.instances])
        ids = np.array([one.class_id for one in found.instances], np.int64)
        confidence = [scores[ids == info.id].mean() if (ids == info.id).any() else np.nan for info in self.card.classes]
        return Prediction(
            class_ids=paint(
                found.instances, height=grid.height, width=grid.width, background_id=self.card.background_id or 0
            ),
            pixels=np.zeros(len(self.card.classes), np.int64),
            confidence=np.array(confidence),
            mean_confidence=found.mean_confidence,
            mean_entropy=found.mean_entropy,
            instance_evidence=None,
            whole=found.instances,
        )

    def postprocess(self, prediction: Prediction) -> tuple[NDArray[np.uint8], list[Instance]]:
        """Final class ids uint8 [h, w] and instances (none for semantic models). On the CPU, thread safe,
        deterministic.

        For instance models the class ids are those of the instances kept: foreground that belongs to none is
        background, so pixels per class must be counted on this result and not taken from the prediction.
        """
        settings, cleanup = self.postprocessing, self.card.cleanup
        background_id = self.card.background_id or 0
        if isinstance(settings, DetectionsPostprocessing) and (prediction.detections or prediction.whole is not None):
            class_ids, instances = prediction.class_ids, prediction.whole
            if prediction.detections is not None:
                class_ids, instances = paste_detections(
                    prediction.detections,
                    [info.id for info in self.card.classes],
                    background_id=background_id,
                    mask_threshold=settings.mask_threshold,
                )
            assert isinstance(instances, list)
            return self._cleaned(class_ids, instances, may_overlap=True)
        if isinstance(settings, WatershedPostprocessing) and isinstance(prediction.whole, InstanceEvidence):
            class_ids, instances = split_in_blocks(
                prediction.whole, class_id=self.card.foreground_id, background_id=background_id
            )
            return self._cleaned(class_ids, instances, may_overlap=False)
        if isinstance(settings, WatershedPostprocessing) and prediction.instance_evidence is not None:
            evidence = prediction.instance_evidence
            labels = split_instances(evidence["interior"], evidence["foreground"], settings)
            if cleanup is not None and not cleanup.does_nothing:
                labels = clean_labels(labels, cleanup)
            instances = describe_instances(labels, evidence["foreground"], self.card.foreground_id)
            return np.where(labels > 0, np.uint8(self.card.foreground_id), np.uint8(background_id)), instances
        if cleanup is not None and not cleanup.does_nothing:
            return clean_class_ids(prediction.class_ids, cleanup, background_id=self.card.background_id), []
        return prediction.class_ids, []

    def _cleaned(
        self, class_ids: NDArray[np.uint8], instances: list[Instance], *, may_overlap: bool
    ) -> tuple[NDArray[np.uint8], list[Instance]]:
        cleanup = self.card.cleanup
        if cleanup is None or cleanup.does_nothing:
            return class_ids, instances
        background_id = self.card.background_id or 0
        taken = None if may_overlap else class_ids
        instances = clean_instances(instances, cleanup, taken=taken, background_id=background_id)
        height, width = class_ids.shape
        return paint(instances, height=height, width=width, background_id=background_id), instances

    def _logits(self, inputs_NCHW: torch.Tensor) -> torch.Tensor:
        answer = self._forward(inputs_NCHW)
        return (answer["out"] if isinstance(answer, Mapping) else answer).float()

    def _refined(self, inputs_NCHW: torch.Tensor, images_NHWC: torch.Tensor, sizes_N2: torch.Tensor) -> torch.Tensor:
        """Logits float32 [N, C, H, W], or the logarithms of probabilities that were made of several."""
        card = self.card
        if card.augmentation is None:
            logits_NCHW = self._logits(inputs_NCHW)
        else:
            averaged_NCHW = average_probabilities(
                self._logits,
                inputs_NCHW,
                card.augmentation,
                canvas_multiple=card.canvas_multiple,
                sizes_N2=sizes_N2.clamp_min(1),
            )
            logits_NCHW = averaged_NCHW.clamp_min_(_LEAST_PROBABILITY).log_()
        if card.crf is not None:
            refined_NCHW = refine(logits_NCHW, images_NHWC, card.crf, sizes_N2=sizes_N2)
            logits_NCHW = refined_NCHW.clamp_min_(_LEAST_PROBABILITY).log_()
        return logits_NCHW

    def _check(
        self,
        images_NHWC: NDArray[Any],
        sizes_N2: NDArray[np.int32],
        statistics_N2: NDArray[np.float32],
        image_sizes_N2: NDArray[np.int32] | None,
    ) -> None:
        count, height, width, channels = images_NHWC.shape
        if sizes_N2.shape != (count, 2) or statistics_N2.shape != (count, 2):
            raise ValueError(f"{count} images need sizes and statistics of shape ({count}, 2)")
        policy, step = self.card.size_policy, self.card.canvas_multiple
        if policy.kind in ("native", "resize"):
            fits, where = not height % step and not width % step, f"multiples of {step}"
        else:
            fixed = self.canvas(1, 1)
            fits, where = (height, width) == fixed, f"{fixed[0]} x {fixed[1]}"
        if images_NHWC.dtype != self.input_dtype or channels != self.input_channels or not fits:
            raise ValueError(
                f"images must be {self.input_dtype} on a canvas of {where} with {self.input_channels} channels, "
                f"got {images_NHWC.dtype} {images_NHWC.shape}"
            )
        if image_sizes_N2 is None and policy.kind in ("resize", "letterbox"):
            raise ValueError(f"size_policy {policy.kind!r} needs the images' own sizes too")
        if image_sizes_N2 is not None and image_sizes_N2.shape != (count, 2):
            raise ValueError(f"{count} images need image sizes of shape ({count}, 2), got {image_sizes_N2.shape}")
        used = sizes_N2[sizes_N2[:, 0] > 0]
        if self.postprocessing.kind == "detections" and not bool((used == (height, width)).all()):
            raise ValueError(f"model {self.card.name!r} takes images without padding, in batches of one size")

    def _upload(self, *arrays: NDArray[Any]) -> list[torch.Tensor]:
        tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
        if self._uploads is None:
            return tensors
        # Pinned memory is torch's own copy, which its allocator keeps until the transfer is done. On a stream of its
        # own the transfer does not wait for the batch before, which the current stream is still computing.
        with torch.cuda.stream(self._uploads):
            moved = [tensor.pin_memory().to(self.device, non_blocking=True) for tensor in tensors]
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._uploads)
        for tensor in moved:
            tensor.record_stream(current)
        return moved

    def _download(self, results: Results, downloads: torch.cuda.Stream) -> tuple[Results, torch.cuda.Event]:
        """Copies under way into pinned memory, and the event after which they may be read."""

        def copied(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            copies = {}
            for name, tensor in tensors.items():
                pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                copies[name] = pinned.copy_(tensor, non_blocking=True)
                # Its memory must not go to the next batch before it has been read.
                tensor.record_stream(downloads)
            return copies

        downloads.wait_stream(torch.cuda.current_stream(self.device))
        # Blocking: a thread that waits leaves its core to those that decode.
        event = torch.cuda.Event(blocking=True)
        with torch.cuda.stream(downloads):
            if isinstance(results, list):
                fetched: Results = [None if result is None else copied(result) for result in results]
            else:
                fetched = copied(results)
            event.record(downloads)
        return fetched, event

    def _reduce(
        self,
        logits_NCHW: torch.Tensor,
        sizes: torch.Tensor,
        sizes_N2: NDArray[np.int32],
        image_sizes_N2: NDArray[np.int32],
    ) -> Results:
        if self.card.size_policy.kind in ("native", "tile"):
            return reduce_logits(logits_NCHW, self._ids, self.card, self.postprocessing, sizes)
        results: list[dict[str, torch.Tensor] | None] = []
        for slot, ((height, width), (own_height, own_width)) in enumerate(
            zip(sizes_N2.tolist(), image_sizes_N2.tolist(), strict=True)
        ):
            if height <= 0:
                results.append(None)
                continue
            window_CHW = logits_NCHW[slot, :, :height, :width]
            results.append(
                reduce_resampled(
                    window_CHW, self._ids, self.card, self.postprocessing, height=own_height, width=own_width
                )
            )
        return results

    def _detect(
        self, images: torch.Tensor, statistics: torch.Tensor, image_sizes_N2: NDArray[np.int32]
    ) -> list[dict[str, torch.Tensor] | None]:
        if not isinstance(self.postprocessing, DetectionsPostprocessing):
            raise TypeError(f"postprocessing {self.postprocessing.kind!r} has no detections")
        inputs = normalize(images, statistics, self.card.preprocessing, dtype=torch.float32)
        wanted = [bool(height > 0) for height in image_sizes_N2[:, 0]]
        return detect(self._module, inputs, self.postprocessing, wanted=wanted, dtype=self._dtype)

    def _prediction(self, arrays: dict[str, NDArray[Any]], height: int, width: int) -> Prediction:
        pixels = np.array(arrays["pixels"], dtype=np.int64)
        sums = np.asarray(arrays["confidence"], dtype=np.int64)
        with np.errstate(invalid="ignore"):
            confidence = sums / (pixels * float(QUANTUM))
        scale = float("nan") if arrays["broken"] else 1 / (height * width * QUANTUM)
        evidence = None
        if "interior" in arrays:
            evidence = {name: _cropped(arrays[name], height, width) for name in ("interior", "foreground")}
        return Prediction(
            class_ids=_cropped(arrays["class_ids"], height, width),
            pixels=pixels,
            confidence=confidence,
            mean_confidence=float(sums.sum()) * scale,
            mean_entropy=float(arrays["entropy"]) * scale,
            instance_evidence=evidence,
        )

    def _detected(self, arrays: dict[str, NDArray[Any]], height: int, width: int) -> Prediction:
        classes = len(self.card.classes)
        boxes, scores, labels, masks = (arrays[name].copy() for name in ("boxes", "scores", "labels", "masks"))
        counts = np.bincount(labels, minlength=classes)
        with np.errstate(invalid="ignore"):
            confidence = np.bincount(labels, weights=scores, minlength=classes) / counts
        nothing = float("nan") if arrays["broken"] else 0.0
        figures = (scores, arrays["entropy"]) if len(labels) else (np.zeros(1), np.zeros(1))
        means = [float(figure.mean(dtype=np.float64)) for figure in figures]
        return Prediction(
            class_ids=np.empty((0, 0), np.uint8),
            pixels=np.zeros(classes, np.int64),
            confidence=confidence,
            mean_confidence=means[0] + nothing,
            mean_entropy=means[1] + nothing,
            instance_evidence=None,
            detections=Detections(boxes, scores, labels, masks, height, width),
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


def _lower(network: Any, card: Card, dtype: torch.dtype) -> None:
    found = architecture(card.architecture)
    if not found.detects:
        fold_batch_norms(network, (1, card.input_channels, *least_canvas(card)))
        lower_precision(network, dtype, logits_layers=found.logits_layers(network))
        return
    # Boxes do not survive 8 bits of mantissa, and torchvision's pooling knows no bf16.
    fold_batch_norms(network.backbone, (1, card.input_channels, 64, 64))
    lower_precision(network.backbone, dtype)
    for layer, input_shape in hidden_layers(network):
        fold_batch_norms(layer, input_shape)
        compute_in(layer, dtype)


def _arrays_of(results: Results, slot: int) -> dict[str, NDArray[Any]] | None:
    if isinstance(results, list):
        result = results[slot]
        return None if result is None else {name: tensor.numpy() for name, tensor in result.items()}
    return {name: tensor.numpy()[slot] for name, tensor in results.items()}


def _cropped(map_HW: NDArray[Any], height: int, width: int) -> NDArray[np.uint8]:
    return np.array(map_HW[:height, :width], dtype=np.uint8)
