"""One network on one device: batches of pixels in, class ids, instances and per-image figures out. Owns: the
forward pass, and what is done on the device around it. Must not know: decoding, batching, tables, Ray.

For the same batch shape, precision, thread count and device type, an image's results are bit-identical
whatever its neighbours and its slot: all arithmetic is per image or per pixel, and sums are taken over
integers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from models.architectures import architecture, least_canvas, with_exact_tiles
from models.augmented import average_probabilities
from models.card import Card, DetectionsPostprocessing, Postprocessing
from models.compilation import CompiledNetwork
from models.crf import refine
from models.detection import detect
from models.devices import Precision, default_device, dtype_of, supports_bf16
from models.final_masks import postprocess
from models.fitting import fit_size, lies_as_it_is, place, takes_exact_tiles, tile_policy
from models.folding import fold_batch_norms
from models.masks import Instance
from models.mosaic import DetectionMosaic, Mosaic
from models.networks.mask_rcnn import hidden_layers
from models.precision import compute_in, lower_precision
from models.prediction import Prediction, detections_prediction, mosaic_prediction, pixels_prediction
from models.preprocessing import normalize
from models.probabilities import pixel_softmax
from models.reduction import reduce_logits, reduce_resampled
from models.tiling import TileGrid
from models.transfer import Pending, Results, Transfer, arrays_of

__all__ = ["Pending", "Precision", "Prediction", "Segmenter", "default_device", "supports_bf16"]

# Keeps a logarithm finite: what is no probability at all must still show.
_LEAST_PROBABILITY = 1e-30


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
        self._dtype = dtype_of(precision, device)
        self.card = card = with_exact_tiles(card, module)
        self.device = device
        self.precision = precision
        self.postprocessing = postprocessing or card.postprocessing
        if self.postprocessing.kind != card.postprocessing.kind:
            raise ValueError(
                f"postprocessing {self.postprocessing.kind!r} does not fit model {card.name!r} ({card.task})"
            )
        network: Any = module.eval()
        if self._dtype != torch.float32:
            _lower(network, card, self._dtype)
        network = network.to(device)
        for parameter in network.parameters():
            # Those of a Conv3d, which some encoders have, know no such order.
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        self._module = network
        if compile and isinstance(self.postprocessing, DetectionsPostprocessing):
            network.backbone = CompiledNetwork(network.backbone)
        self._forward = CompiledNetwork(network) if compile else network
        self._ids = torch.tensor([info.id for info in card.classes], dtype=torch.uint8, device=device)
        self._transfer = Transfer(device)

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
            images, sizes, statistics = self._transfer.upload(images_NHWC, sizes_N2, statistics_N2)
            results: Results
            if isinstance(self.postprocessing, DetectionsPostprocessing):
                results = self._detect(images, statistics, image_sizes)
            else:
                inputs = normalize(images, statistics, self.card.preprocessing, dtype=self._dtype)
                logits_NCHW = self._refined(inputs, images, sizes)
                if tiles:
                    results = {"probabilities": pixel_softmax(_marked(logits_NCHW)).to(torch.float16)}
                else:
                    results = self._reduce(logits_NCHW, sizes, sizes_N2, image_sizes)
            return Pending(*self._transfer.download(results), image_sizes)

    def finish(self, pending: Pending) -> list[Any]:
        """Waits for the device and returns one Prediction per non-empty slot, in the slots' order.

        For tiles: what their mosaic takes, which is a Prediction for detections, else probabilities float16 [C, h, w].
        """
        if pending.event is not None:
            pending.event.synchronize()
        predictions: list[Any] = []
        for slot, (height, width) in enumerate(pending.image_sizes_N2.tolist()):
            arrays = arrays_of(pending.results, slot)
            if arrays is None or height <= 0:
                continue
            if "probabilities" in arrays:
                predictions.append(arrays["probabilities"][:, :height, :width])
            elif "boxes" in arrays:
                predictions.append(detections_prediction(arrays, height, width, classes=len(self.card.classes)))
            else:
                predictions.append(pixels_prediction(arrays, height, width))
        return predictions

    def assemble(self, mosaic: Mosaic | DetectionMosaic) -> Prediction:
        """The prediction of an image all of whose tiles have been added. Raises ValueError while some are missing."""
        return mosaic_prediction(mosaic, self.card)

    def postprocess(self, prediction: Prediction) -> tuple[NDArray[np.uint8], list[Instance]]:
        """Final class ids uint8 [h, w] and instances (none for semantic models): see `models.final_masks`."""
        return postprocess(prediction, self.card, self.postprocessing)

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
                lambda view_NCHW: _marked(self._logits(view_NCHW)),
                inputs_NCHW,
                card.augmentation,
                canvas_multiple=card.canvas_multiple,
                sizes_N2=sizes_N2.clamp_min(1),
            )
            logits_NCHW = averaged_NCHW.clamp_min_(_LEAST_PROBABILITY).log_()
        if card.crf is not None:
            refined_NCHW = refine(_marked(logits_NCHW), images_NHWC, card.crf, sizes_N2=sizes_N2)
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
        detects = self.postprocessing.kind == "detections"
        if policy.kind in ("native", "resize") or (policy.kind == "tile" and takes_exact_tiles(self.card)):
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
        if detects and not bool((used == (height, width)).all()):
            raise ValueError(f"model {self.card.name!r} takes images without padding, in batches of one size")

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


def _marked(logits_NCHW: torch.Tensor) -> torch.Tensor:
    """The same, minus infinity made NaN in place: a softmax hides it, as it does no other value that is not finite."""
    return logits_NCHW.masked_fill_(logits_NCHW == -torch.inf, torch.nan)


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
