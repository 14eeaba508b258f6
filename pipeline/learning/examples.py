"""The batches of training: step by step, from images and labels in memory. Owns: what a step's batch is, the cache of
decoded images, and preparing ahead. Must not know: losses, optimisers, who trains.

A batch is a function of the data set, the settings, the seed and the step. Workers take slices of it, so what is seen
does not depend on how many there are, and going on needs only the number of the step.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from models.card import Card, LetterboxPolicy, TilePolicy
from models.fitting import fit_size
from models.losses import IGNORED
from models.masks import decode_rle
from models.preprocessing import image_statistics, normalize, select_bands
from pipeline.errors import UsageError
from pipeline.learning import augmentation as views
from pipeline.learning.dataset import Dataset, Item, LabelledObject, Labels
from pipeline.learning.labels.place import in_order
from pipeline.learning.recipe import AugmentationConfig, SamplingConfig
from pipeline.learning.sampling import class_weights, epoch_order, image_chances
from pipeline.learning.targets import boundary_targets, detection_targets, object_layers

#: Bytes of decoded images and labels that are kept; the others are read again each time.
CACHE_BYTES = 2 << 30
#: Steps that are prepared ahead of the device.
AHEAD_STEPS = 4
#: Pixels. The longest side of a view where nothing says how large it is to be.
_LONGEST_CROP_PX = 512
#: Pixels of the grid from which an image's statistics are estimated after its colours have changed.
_SAMPLE_PX = 4096


class Batch(NamedTuple):
    """What a worker sees in one step."""

    names: tuple[str, ...]
    #: Normalised: float32 [N, C, H, W], channels_last; for networks that detect a list of [C, h, w].
    inputs: torch.Tensor | list[torch.Tensor]
    #: int64 [N, H, W], channels of the network or IGNORED; for networks that detect what `detection_targets` makes.
    targets: torch.Tensor | list[dict[str, torch.Tensor]]
    #: uint8 [N, H, W] as of `boundary_targets`, for networks that learn boundaries.
    emphasis: torch.Tensor | None = None

    def to(self, device: str | torch.device) -> Batch:
        """The same on a device."""

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=True)

        targets: torch.Tensor | list[dict[str, torch.Tensor]]
        if isinstance(self.targets, torch.Tensor):
            targets = moved(self.targets)
        else:
            targets = [{name: moved(tensor) for name, tensor in one.items()} for one in self.targets]
        inputs = self.inputs
        return Batch(
            self.names,
            moved(inputs) if isinstance(inputs, torch.Tensor) else [moved(one) for one in inputs],
            targets,
            None if self.emphasis is None else moved(self.emphasis),
        )


class _Picture(NamedTuple):
    """An image in memory."""

    #: uint8 [h, w, 3].
    pixels: NDArray[np.uint8]
    #: [K, h, w]. Classes: uint8 channels or IGNORED; boundaries: int32 labels, -1 not known; K is 1. Detection: what
    #: is ignored, then layers of objects' numbers from 1, 0 where none is; two that overlap are in different layers.
    maps: NDArray[np.uint8] | NDArray[np.int32]
    #: Detection: the network's channel of each object, in the order of their numbers.
    channels: tuple[int, ...]
    #: Mean and standard deviation of the whole image.
    statistics: tuple[float, float]


class Examples:
    """The batches of one split for one network. Safe to share by threads."""

    def __init__(
        self,
        dataset: Dataset,
        card: Card,
        *,
        augmentation: AugmentationConfig,
        sampling: SamplingConfig,
        batch_size: int,
        seed: int,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        """`batch_size`: of all workers together. Reads all labels at once where `sampling` asks for rare classes.

        Raises UsageError where the labels cannot teach this network, ValueError where the card takes other pixels than
        8-bit RGB or the crop does not fit the network.
        """
        if card.preprocessing.dtype != "uint8" or max(card.preprocessing.bands) > 2:
            raise ValueError(
                f"data sets are read as 8-bit RGB; {card.name!r} takes bands {list(card.preprocessing.bands)} of "
                f"{card.preprocessing.dtype}"
            )
        if not len(dataset):
            raise UsageError(f"split {dataset.split!r} of {dataset.source.title} has no images")
        self.dataset = dataset
        self.card = card
        self.kind: Literal["classes", "boundaries", "detection"] = {
            "argmax": "classes", "watershed": "boundaries", "detections": "detection",
        }[card.postprocessing.kind]  # type: ignore[assignment]  # fmt: skip
        if self.kind != "classes" and not dataset.has_objects:
            raise UsageError(
                f"{dataset.source.title} has labels of classes only, and {card.architecture} is to tell objects apart: "
                "train a semantic network, or give labels of objects (COCO)"
            )
        if self.kind == "detection":
            # A mirror image would be objects that are not there.
            augmentation = augmentation.model_copy(update={"beyond": "nothing"})
        self.augmentation = augmentation
        self.sampling = sampling
        self.batch_size = batch_size
        self.seed = seed
        self.crop = _crop(card, dataset, augmentation)
        self._channels = _channels(card, dataset, self.kind)
        self._cache: dict[int, _Picture] = {}
        self._free_bytes = cache_bytes
        self._lock = threading.Lock()
        self._pixels_of_classes: NDArray[np.int64] | None = None
        counts = self.pixels_of_classes() if sampling.rare_image_share else None
        self.chances = image_chances([item.stratum for item in dataset.items], counts, sampling)

    def __len__(self) -> int:
        """Images."""
        return len(self.dataset)

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which as many images are seen as there are, at least 1."""
        return max(1, round(len(self) / self.batch_size))

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """What worker `rank` of `world` sees in a step: its slice of the step's batch, at least one example. Raises
        ValueError where there are more workers than examples; UsageError for images that cannot be read.
        """
        if world > self.batch_size:
            raise ValueError(f"{world} workers cannot share a batch of {self.batch_size}: raise batch_size")
        first, last = self.batch_size * rank // world, self.batch_size * (rank + 1) // world
        positions = range(step * self.batch_size + first, step * self.batch_size + last)
        orders = {
            epoch: epoch_order(self.chances, self.seed, epoch) for epoch in {one // len(self) for one in positions}
        }
        indices = [int(orders[one // len(self)][one % len(self)]) for one in positions]
        names = tuple(self.dataset.items[index].name for index in indices)
        examples = [
            self._example(index, np.random.default_rng([self.seed, 1, position]))
            for index, position in zip(indices, positions, strict=True)
        ]
        if self.kind == "detection":
            return Batch(names, [one[0] for one in examples], [one[1] for one in examples])  # type: ignore[misc]
        # Each is channels_last already; torch.stack would turn them twice.
        inputs = torch.empty(len(examples), *examples[0][0].shape, memory_format=torch.channels_last)
        for place, (one, _, _) in zip(inputs, examples, strict=True):
            place.copy_(one)
        targets = torch.stack([one[1] for one in examples])  # type: ignore[misc]
        emphasis = None if self.kind == "classes" else torch.stack([one[2] for one in examples])  # type: ignore[misc]
        return Batch(names, inputs, targets, emphasis)

    def stream(
        self, start_step: int = 0, rank: int = 0, world: int = 1, *, threads: int = 1, ahead: int = AHEAD_STEPS
    ) -> Iterator[Batch]:
        """The batches of `start_step` and all after it, in order, without end; `ahead` of them are being prepared by
        `threads`. Close it (or let it go) to stop them.
        """
        with _single_threaded(min(threads, ahead)) as pool:
            step = start_step + ahead
            pending = [pool.submit(self.batch, one, rank, world) for one in range(start_step, step)]
            try:
                while True:
                    batch = pending.pop(0).result()
                    pending.append(pool.submit(self.batch, step, rank, world))
                    step += 1
                    yield batch
            finally:
                for future in pending:
                    future.cancel()

    def pixels_of_classes(self) -> NDArray[np.int64]:
        """int64 [images, network channels]: pixels of each channel's targets in the images as they are. Reads all
        labels, once.
        """
        if self._pixels_of_classes is None:
            channels = self.card.network_channels

            def counted(item: Item) -> NDArray[np.int64]:
                if self.kind == "boundaries":
                    (numbers,), _ = self._maps(item)
                    ids: NDArray[Any] = boundary_targets(numbers)[0]
                else:
                    ids = self._channels[self.dataset.class_ids(item)]
                return np.bincount(ids.ravel(), minlength=256)[:channels]

            self._pixels_of_classes = np.stack(list(in_order(counted, self.dataset.items)))
        return self._pixels_of_classes

    def class_weights(self, kind: Literal["none", "inverse", "median"], power: float = 1.0) -> tuple[float, ...] | None:
        """Of the network's channels, as `sampling.class_weights`; None for `none` and for networks that detect."""
        if kind == "none" or self.kind == "detection":
            return None
        return class_weights(self.pixels_of_classes(), kind, power)

    def _example(
        self, index: int, random: np.random.Generator
    ) -> tuple[torch.Tensor, torch.Tensor | dict[str, torch.Tensor], torch.Tensor | None]:
        """Inputs, targets and emphasis of one random view."""
        picture = self._picture(index)
        height, width = picture.pixels.shape[:2]
        scale = 1.0 if self.kind == "detection" else fit_size(self.card, height, width).height / height
        focus = self._focus(picture, random)
        window = views.draw_window((height, width), self.crop, self.augmentation, random, scale=scale, focus=focus)
        rows, columns = window.source(height, width)
        sample = _grid(picture.pixels)
        pixels, changed = views.recolored(picture.pixels[rows, columns], sample, self.augmentation, random)
        statistics = _changed(picture.statistics, sample, changed)
        outside = {"classes": IGNORED, "boundaries": -1, "detection": 0}[self.kind]
        pixels, maps_KHW = views.look(
            pixels, picture.maps[:, rows, columns], window, self.augmentation, random,
            outside=outside, size=(height, width),
        )  # fmt: skip
        inputs_CHW = self._inputs(views.blurred(pixels, self.augmentation, random), statistics)
        inputs_CHW = views.disturbed(inputs_CHW, self.augmentation, random)
        if self.kind == "classes":
            return inputs_CHW, torch.from_numpy(maps_KHW[0]).to(torch.int64), None
        if self.kind == "boundaries":
            targets, emphasis = boundary_targets(maps_KHW[0])  # type: ignore[arg-type]
            return inputs_CHW, torch.from_numpy(targets), torch.from_numpy(emphasis)
        layers_KHW = torch.from_numpy(maps_KHW)
        return inputs_CHW, detection_targets(layers_KHW[1:], picture.channels, layers_KHW[0] > 0), None

    def _inputs(self, pixels: NDArray[np.uint8], statistics: tuple[float, float]) -> torch.Tensor:
        bands = select_bands(pixels, self.card.preprocessing)
        return normalize(
            torch.from_numpy(np.ascontiguousarray(bands))[None],
            torch.tensor([statistics], dtype=torch.float32),
            self.card.preprocessing,
            dtype=torch.float32,
        )[0]

    def _focus(self, picture: _Picture, random: np.random.Generator) -> tuple[int, int] | None:
        if self.kind != "classes" or random.random() >= self.sampling.focus_probability:
            return None
        present = np.flatnonzero(np.bincount(picture.maps.ravel(), minlength=256)[:IGNORED])
        if not len(present):
            return None
        pixels = np.flatnonzero(picture.maps.ravel() == random.choice(present))
        return divmod(int(random.choice(pixels)), picture.maps.shape[2])

    def _picture(self, index: int) -> _Picture:
        picture = self._cache.get(index)
        if picture is None:
            item = self.dataset.items[index]
            # torch takes only arrays that may be written to.
            pixels = np.require(self.dataset.image(item), requirements="W")
            maps, channels = self._maps(item)
            picture = _Picture(pixels, maps, channels, image_statistics(pixels))
            with self._lock:
                size_bytes = pixels.nbytes + maps.nbytes
                if index not in self._cache and size_bytes <= self._free_bytes:
                    self._free_bytes -= size_bytes
                    self._cache[index] = picture
        return picture

    def _maps(self, item: Item) -> tuple[NDArray[np.uint8] | NDArray[np.int32], tuple[int, ...]]:
        """As in _Picture."""
        labels = self.dataset.labels(item)
        if self.kind == "classes":
            return self._channels[labels.class_ids()][None], ()
        if self.kind == "boundaries":
            return np.where(labels.ignored(), np.int32(-1), labels.instance_labels())[None], ()
        objects = [one for one in self._objects(item, labels) if not one.is_crowd]
        layers = object_layers([decode_rle(one.rle) for one in objects], (item.height, item.width))
        maps = np.concatenate([labels.ignored()[None].astype(np.int32), layers])
        return maps, tuple(int(self._channels[one.class_id]) for one in objects)

    def _objects(self, item: Item, labels: Labels) -> tuple[LabelledObject, ...]:
        if labels.objects is None:
            raise UsageError(
                f"the label of {item.name} tells no objects apart, as those of other images of "
                f"{self.dataset.source.title} do: what is there would be learnt as nothing. Leave it out of the split"
            )
        return labels.objects


@contextmanager
def _single_threaded(threads: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of threads in each of which torch and OpenCV compute by that thread alone. Their helpers would wait for
    each other and for those of the step by spinning: on 2 busy cores that made a batch 10 to 30 times as expensive.

    torch keeps the number of helpers by thread, but a new thread takes what any thread has set last; OpenCV has one
    number for all.
    """
    usual, usual_opencv = torch.get_num_threads(), cv2.getNumThreads()
    ready = threading.Barrier(threads + 1)

    def prepare() -> None:
        torch.set_num_threads(1)
        # The first question settles what holds for this thread.
        torch.get_num_threads()
        ready.wait()

    with ThreadPoolExecutor(threads, thread_name_prefix="examples", initializer=prepare) as pool:
        for _ in range(threads):
            pool.submit(int)
        ready.wait()
        torch.set_num_threads(usual)
        cv2.setNumThreads(1)
        try:
            yield pool
        finally:
            cv2.setNumThreads(usual_opencv)


def _channels(card: Card, dataset: Dataset, kind: str) -> NDArray[np.uint8]:
    """uint8 [256]: the network's channel by the data set's class id, found by the class's name. IGNORED stays."""
    channels = np.full(256, IGNORED, dtype=np.uint8)
    if kind == "boundaries":
        return channels
    names = {info.name: channel for channel, info in enumerate(card.classes)}
    for class_id, name in enumerate(dataset.class_names):
        if name not in names:
            raise UsageError(
                f"{dataset.source.title} has a class {name!r} that the model lacks: it has {', '.join(names)}"
            )
        channels[class_id] = names[name]
    return channels


def _crop(card: Card, dataset: Dataset, augmentation: AugmentationConfig) -> tuple[int, int] | None:
    policy, step = card.size_policy, card.canvas_multiple
    fixed: tuple[int, int] | None = None
    if isinstance(policy, LetterboxPolicy):
        fixed = policy.height_px, policy.width_px
    elif isinstance(policy, TilePolicy):
        fixed = policy.tile_px, policy.tile_px
    chosen = augmentation.crop_px
    if chosen is not None:
        if any(side % step for side in chosen):
            raise ValueError(f"crop_px {chosen} must be multiples of the network's {step} pixels")
        return chosen
    if fixed is not None or card.postprocessing.kind == "detections":
        return fixed
    fits = [fit_size(card, item.height, item.width) for item in dataset.items]
    sides = (float(np.median([fit.height for fit in fits])), float(np.median([fit.width for fit in fits])))
    least = _LONGEST_CROP_PX // step * step or step
    return tuple(min(least, max(step, round(side / step) * step)) for side in sides)  # type: ignore[return-value]


def _grid(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """uint8 [n, 1, 3]: pixels on a regular grid over the image, about _SAMPLE_PX of them."""
    stride = max(1, int((pixels.shape[0] * pixels.shape[1] / _SAMPLE_PX) ** 0.5))
    return pixels[::stride, ::stride].reshape(-1, 1, 3)


def _changed(
    statistics: tuple[float, float], before: NDArray[np.uint8], after: NDArray[np.uint8]
) -> tuple[float, float]:
    """Mean and deviation of an image in other colours, from those that it had and a sample of its pixels before and
    after. Exact where nothing changed.
    """
    if np.array_equal(before, after):
        return statistics
    old, new = image_statistics(before), image_statistics(after)
    return statistics[0] + new[0] - old[0], statistics[1] * new[1] / max(old[1], 1e-6)
