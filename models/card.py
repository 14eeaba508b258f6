"""The model card: what a network is, what its outputs mean and how images must be prepared for it.
Owns: the card's fields and their validation. Must not know: torch, files, where cards are stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator, model_validator

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


class Preprocessing(_Frozen):
    """From uint8 RGB to the network's input.

    `imagenet`: (x / 255 - mean) / std with the constants of torchvision's ImageNet models. `per_image`: (x -
    m) / max(s, `std_floor`), with m and s the mean and the population standard deviation over all valid
    pixels and channels of the image.
    """

    normalization: Literal["imagenet", "per_image"] = "per_image"
    #: Grey levels (0..255 units): keeps a blank image from being blown up into noise.
    std_floor: float = Field(default=1.0, gt=0)


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


Postprocessing = Annotated[ArgmaxPostprocessing | WatershedPostprocessing, Field(discriminator="kind")]


class Card(_Frozen):
    """Everything about a model but its weights. Stored as JSON in the header of the model's file."""

    format: Literal[1] = CARD_FORMAT
    #: Used in paths and commands.
    name: str = Field(pattern=r"^[a-z][a-z0-9-]*$", max_length=80)
    task: Literal["semantic", "instance"]
    #: A key of `models.architectures.ARCHITECTURES`, and the arguments which that architecture takes.
    architecture: str
    architecture_args: dict[str, JsonValue]
    #: What the mask's ids mean. Semantic: one per network channel, in the channels' order.
    classes: tuple[ClassInfo, ...] = Field(min_length=1)
    #: The id of "nothing here", where there is one: not counted as foreground.
    background_id: int | None = None
    preprocessing: Preprocessing = Preprocessing()
    #: `native`: images keep their size and are padded at the right and bottom to a multiple of
    #: `canvas_multiple`.
    size_policy: Literal["native"] = "native"
    #: Pixels; a multiple of the network's stride.
    canvas_multiple: int = Field(default=32, ge=1)
    #: True for networks that pool over the whole image: padding would change their answer.
    pools_whole_image: bool = False
    postprocessing: Postprocessing
    #: How the weights came about: data, code, settings, seed, hardware, time.
    provenance: dict[str, JsonValue] = {}
    #: Measured figures, as `{"dataset/split": {"metric": value}}`.
    metrics: dict[str, JsonValue] = {}

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
        kind = "watershed" if self.task == "instance" else "argmax"
        if self.postprocessing.kind != kind:
            raise ValueError(f"task {self.task!r} needs postprocessing {kind!r}, got {self.postprocessing.kind!r}")
        if self.task == "instance" and (self.background_id is None or len(self.classes) != 2):
            raise ValueError("an instance model has exactly two classes, of which background_id names one")
        return self

    @property
    def network_channels(self) -> int:
        """Number of channels that the network must put out."""
        return 3 if self.task == "instance" else len(self.classes)

    @property
    def foreground_id(self) -> int:
        """Instance models: the id of the one class that is not background. Raises ValueError for others."""
        if self.task != "instance":
            raise ValueError(f"model {self.name!r} has task {self.task!r}: it has no single foreground class")
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
