"""The model card: what a network is, what its outputs mean and how images must be prepared for it.
Owns: the card's fields and their validation. Must not know: torch, files, where cards are stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator, model_validator

from models.refinement import AugmentationSettings, CleanupSettings, CrfSettings

#: Raised whenever a reader of an older release could misread a card.
CARD_FORMAT: Literal[1] = 1

Channel = Annotated[int, Field(ge=0, le=255)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ClassInfo(_Frozen):
    """One id of the mask."""

    #: 0..255, the value in the mask.
    id: int = Field(ge=0, le=255)
    name: str = Field(min_length=1)
    #: RGB, 0..255: the palette of mask PNGs and the colour in reports.
    color: tuple[Channel, Channel, Channel]


#: The values that a pixel type spans, unless the card says otherwise.
VALUE_RANGES: Mapping[str, tuple[float, float]] = {"uint8": (0, 255), "uint16": (0, 65535), "float32": (0, 1)}


class Preprocessing(_Frozen):
    """From the pixels of an image to the network's input. The defaults are those of 8-bit RGB.

    With v the pixel mapped linearly from `value_range` to 0..1: `imagenet` is (v - mean) / std with the constants of
    torchvision's ImageNet models; `mean_std` the same with the card's own `mean` and `std`; `unit` is v itself.
    `per_image` is (x - m) / max(s, `std_floor`) of the raw pixel x, with m and s the mean and the population standard
    deviation over all valid pixels and channels of the image.
    """

    normalization: Literal["imagenet", "per_image", "mean_std", "unit"] = "per_image"
    #: In the units of the pixels (grey levels): keeps a blank image from being blown up into noise.
    std_floor: float = Field(default=1.0, gt=0)
    #: `mean_std` only: one number per input channel, in 0..1 units.
    mean: tuple[float, ...] | None = None
    std: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    #: Which bands of an image become the network's channels, in this order; the image's first band is 0.
    bands: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(0, 1, 2), min_length=1)
    #: The type of pixel that the network was made for. Images of another type are refused.
    dtype: Literal["uint8", "uint16", "float32"] = "uint8"
    #: The pixel values that become 0 and 1. None: the whole range of the type, 0..1 for float32.
    value_range: tuple[float, float] | None = None

    @model_validator(mode="after")
    def _constants_fit(self) -> Preprocessing:
        channels = len(self.bands)
        for name, numbers in (("mean", self.mean), ("std", self.std)):
            if (numbers is not None) != (self.normalization == "mean_std"):
                raise ValueError(
                    f"normalization 'mean_std' needs {name}, and no other has it: got {self.normalization!r}"
                )
            if numbers is not None and len(numbers) != channels:
                raise ValueError(f"{name} has {len(numbers)} numbers for {channels} bands")
        if self.normalization == "imagenet" and channels != 3:
            raise ValueError(f"normalization 'imagenet' is for 3 bands, got {channels}: use 'mean_std'")
        if self.value_range is not None and not self.value_range[0] < self.value_range[1]:
            raise ValueError(f"value_range goes from low to high, got {self.value_range}")
        return self

    @property
    def low_high(self) -> tuple[float, float]:
        """The pixel values that become 0 and 1."""
        return self.value_range or VALUE_RANGES[self.dtype]


class NativeSize(_Frozen):
    """Images keep their size, and are padded at the right and bottom to a multiple of the card's `canvas_multiple`."""

    kind: Literal["native"] = "native"


class ResizePolicy(_Frozen):
    """Images are resized so that the short side has `short_side_px`, then padded as `native` ones are.

    Sizes are those of torchvision's `resize(size=short_side_px, max_size=long_side_px)`: the long side is cut to an
    integer, and where it would pass `long_side_px` that side decides. Logits are brought back to the image's own size.
    """

    kind: Literal["resize"] = "resize"
    short_side_px: int = Field(ge=1)
    long_side_px: int | None = None

    @model_validator(mode="after")
    def _sides_fit(self) -> ResizePolicy:
        if self.long_side_px is not None and self.long_side_px <= self.short_side_px:
            raise ValueError(f"long_side_px {self.long_side_px} must be above short_side_px {self.short_side_px}")
        return self


class LetterboxPolicy(_Frozen):
    """Images are resized to fit into one fixed canvas, at its top left; the rest repeats their edge."""

    kind: Literal["letterbox"] = "letterbox"
    height_px: int = Field(ge=1)
    width_px: int = Field(ge=1)


class TilePolicy(_Frozen):
    """Images are cut into square tiles that overlap; smaller images are padded to one tile, but for models to which
    padding is part of the image: those that pool over it, and those of detections, which resize each tile by themselves
    as an image of its size.
    """

    kind: Literal["tile"] = "tile"
    tile_px: int = Field(ge=1)
    overlap_px: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _tiles_advance(self) -> TilePolicy:
        if self.overlap_px >= self.tile_px:
            raise ValueError(f"overlap_px {self.overlap_px} must be smaller than tile_px {self.tile_px}")
        return self


SizePolicy = Annotated[NativeSize | ResizePolicy | LetterboxPolicy | TilePolicy, Field(discriminator="kind")]


class ArgmaxPostprocessing(_Frozen):
    """Semantic: each pixel takes the class of its highest probability."""

    kind: Literal["argmax"] = "argmax"


class WatershedPostprocessing(_Frozen):
    """Instance: components of the interior are markers, which grow over the foreground until they meet.

    The network's channels are background, interior, boundary; foreground probability = interior + boundary.
    Thresholds are compared with probabilities quantised to 1/255.
    """

    kind: Literal["watershed"] = "watershed"
    foreground_threshold: float = Field(default=0.5, gt=0, lt=1)
    interior_threshold: float = Field(default=0.5, gt=0, lt=1)
    #: Markers below this area in pixels are not grown.
    min_marker_px: int = Field(default=4, ge=0)
    #: Instances below this area in pixels are dropped, from the mask as well.
    min_area_px: int = Field(default=16, ge=0)
    #: Instances below this score, the mean of their foreground probability, are dropped, from the mask as well. At 0 it
    #: is no part of the card's JSON: cards and settings from before it was there stay what they were.
    score_threshold: float = Field(default=0.0, ge=0, lt=1, exclude_if=lambda value: value == 0)


class DetectionsPostprocessing(_Frozen):
    """Instance: the network finds boxes, each with a class, a score and a mask of its own (Mask R-CNN)."""

    kind: Literal["detections"] = "detections"
    #: Detections at or below this score are dropped.
    score_threshold: float = Field(default=0.05, ge=0, lt=1)
    #: A pixel belongs to an instance where the mask's probability is at least this.
    mask_threshold: float = Field(default=0.5, gt=0, lt=1)
    #: Of two boxes that overlap by more than this, the one of lower score is dropped.
    nms_iou: float = Field(default=0.5, gt=0, le=1)
    #: True: only boxes of the same class suppress each other.
    nms_per_class: bool = True
    #: The best detections of an image that are kept.
    top_k: int = Field(default=100, ge=1)


Postprocessing = Annotated[
    ArgmaxPostprocessing | WatershedPostprocessing | DetectionsPostprocessing, Field(discriminator="kind")
]


class Card(_Frozen):
    """Everything about a model but its weights. Stored as JSON in the header of the model's file."""

    format: Literal[1] = CARD_FORMAT
    #: Used in paths and commands.
    name: str = Field(pattern=r"^[a-z][a-z0-9-]*$", max_length=80)
    task: Literal["semantic", "instance"]
    #: A key of `models.architectures.ARCHITECTURES`, and the arguments which that architecture takes.
    architecture: str
    architecture_args: dict[str, JsonValue]
    #: What the mask's ids mean. Semantic and detections: one per network channel, in the channels' order.
    classes: tuple[ClassInfo, ...] = Field(min_length=1)
    #: The id of "nothing here", where there is one: not counted as foreground.
    background_id: int | None = None
    preprocessing: Preprocessing = Preprocessing()
    #: How an image's size becomes the network's. The bare string "native" is read too.
    size_policy: SizePolicy = NativeSize()
    #: Pixels; a multiple of the network's stride.
    canvas_multiple: int = Field(default=32, ge=1)
    #: Networks that pool over the whole image answer to padding anywhere: theirs is the least that their stride allows.
    #: None: as `models.architectures` finds by looking at the network.
    pools_whole_image: bool | None = None
    #: Images of more pixels are cut into tiles whatever `size_policy` says, but for those that it resizes. None: never.
    tile_above_pixels: int | None = Field(default=16 << 20, ge=1)
    postprocessing: Postprocessing
    #: Morphology on the finished mask, or on each instance.
    cleanup: CleanupSettings | None = None
    #: Dense CRF between the network and the mask. Not for detections.
    crf: CrfSettings | None = None
    #: Test-time augmentation. Not for detections.
    augmentation: AugmentationSettings | None = None
    #: How the weights came about: data, code, settings, seed, hardware, time.
    provenance: dict[str, JsonValue] = {}
    #: Measured figures, as `{"dataset/split": {"metric": value}}`.
    metrics: dict[str, JsonValue] = {}

    @field_validator("size_policy", mode="before")
    @classmethod
    def _bare_names_are_policies(cls, policy: Any) -> Any:
        return {"kind": policy} if isinstance(policy, str) else policy

    @field_validator("classes")
    @classmethod
    def _ids_are_unique(cls, classes: tuple[ClassInfo, ...]) -> tuple[ClassInfo, ...]:
        ids = [info.id for info in classes]
        names = [info.name for info in classes]
        if len(set(ids)) != len(ids) or len(set(names)) != len(names):
            raise ValueError(f"class ids and names must be unique, got ids {ids} and names {names}")
        return classes

    @model_validator(mode="after")
    def _parts_agree(self) -> Card:
        if self.background_id is not None and self.background_id not in {info.id for info in self.classes}:
            raise ValueError(f"background_id {self.background_id} is not among the classes")
        kind = self.postprocessing.kind
        fitting = ("argmax",) if self.task == "semantic" else ("watershed", "detections")
        if kind not in fitting:
            names = " or ".join(map(repr, fitting))
            raise ValueError(f"task {self.task!r} needs postprocessing {names}, got {kind!r}")
        if kind == "watershed" and (self.background_id is None or len(self.classes) != 2):
            raise ValueError("an instance model by watershed has exactly two classes, of which background_id names one")
        if self.crf is not None and (self.preprocessing.dtype != "uint8" or self.input_channels != 3):
            raise ValueError("a CRF compares the colours of 8-bit RGB pixels, which this model does not take")
        if kind == "detections":
            if self.crf is not None or self.augmentation is not None:
                raise ValueError("crf and augmentation refine probabilities of pixels, which detections have not")
            if self.background_id != self.classes[0].id or len(self.classes) < 2:
                raise ValueError("a model of detections has the background as its first class, and at least one more")
            if self.size_policy.kind not in ("native", "tile"):
                raise ValueError(
                    f"a model of detections resizes by itself (min_size_px and max_size_px of its architecture): its "
                    f"size_policy is 'native' or 'tile', not {self.size_policy.kind!r}"
                )
            if isinstance(self.size_policy, TilePolicy) and not self.size_policy.overlap_px:
                raise ValueError(
                    "objects that lie across a seam are put together where tiles overlap: a model of detections needs "
                    "an overlap_px, best one that is larger than most of its objects"
                )
        return self

    @property
    def network_channels(self) -> int:
        """Number of channels that the network must put out."""
        return 3 if self.postprocessing.kind == "watershed" else len(self.classes)

    @property
    def input_channels(self) -> int:
        """Number of channels that the network must take."""
        return len(self.preprocessing.bands)

    @property
    def foreground_id(self) -> int:
        """Watershed models: the id of the one class that is not background. Raises ValueError for others."""
        if self.postprocessing.kind != "watershed":
            raise ValueError(f"model {self.name!r} ({self.postprocessing.kind}) has no single foreground class")
        return next(info.id for info in self.classes if info.id != self.background_id)

    @property
    def palette(self) -> tuple[tuple[int, int, int], ...]:
        """RGB by class id, from id 0 to the highest; ids that mean nothing are grey."""
        colors: Mapping[int, tuple[int, int, int]] = {info.id: info.color for info in self.classes}
        return tuple(colors.get(index, (128, 128, 128)) for index in range(max(colors) + 1))

    def class_names(self) -> dict[int, str]:
        return {info.id: info.name for info in self.classes}

    def with_metrics(self, metrics: Mapping[str, Any]) -> Card:
        """A copy whose `metrics` are replaced."""
        return Card.model_validate({**self.model_dump(), "metrics": dict(metrics)})
