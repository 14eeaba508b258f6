"""What a model is taught with: how images are varied, which are seen, what counts as wrong. Owns: these settings and
their defaults. Must not know: torch, data sets, networks, schedules.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Probability = Annotated[float, Field(ge=0, le=1)]
Pixels = Annotated[int, Field(ge=1)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class AugmentationConfig(_Frozen):
    """How much training images are varied. The defaults suit photographs; every setting at 0 (or 1) does nothing."""

    #: Height and width of what the network sees. None: the card's canvas where it has one, else that of the median
    #: image, at most 512; Mask R-CNN sees whole images. One number means a square.
    crop_px: tuple[Pixels, Pixels] | None = None
    #: Factors of the size, drawn log-uniformly.
    scale: tuple[float, float] = (0.6, 1.7)
    #: Height against width changes by a factor from 1 / this to this, drawn log-uniformly.
    stretch: float = Field(default=1.0, ge=1, le=4)
    flip_horizontal: Probability = 0.5
    flip_vertical: Probability = 0.0
    #: Turns by multiples of 90 degrees, all four alike: for images that have no upper side.
    quarter_turns: bool = False
    rotate_probability: Probability = 0.0
    #: Degrees to either side.
    rotate_degrees: float = Field(default=10.0, ge=0, le=180)
    elastic_probability: Probability = 0.0
    #: How far pixels wander (highest standard deviation), and over what length that changes.
    elastic_px: float = Field(default=4.0, ge=0)
    elastic_length_px: float = Field(default=16.0, gt=0)
    #: What lies beyond the image's border: its mirror image, or nothing (grey, and left out of the loss).
    beyond: Literal["mirror", "nothing"] = "mirror"
    #: Brightness, contrast, saturation and gamma change by a factor from 1 - this to 1 + this; hue by so much of the
    #: circle to either side. The five together with this probability.
    color_probability: Probability = 0.8
    brightness: float = Field(default=0.25, ge=0, lt=1)
    contrast: float = Field(default=0.25, ge=0, lt=1)
    saturation: float = Field(default=0.25, ge=0, lt=1)
    gamma: float = Field(default=0.0, ge=0, lt=1)
    hue: float = Field(default=0.0, ge=0, le=0.5)
    #: Factors of each channel alone, as of `brightness`; and the channels in another order.
    channel_gain: float = Field(default=0.0, ge=0, lt=1)
    channel_order_probability: Probability = 0.0
    #: 255 - x: teaches both polarities (fluorescence, bright field).
    invert_probability: Probability = 0.0
    blur_probability: Probability = 0.1
    #: Highest standard deviation of the Gaussian blur.
    blur_px: float = Field(default=1.5, ge=0)
    noise_probability: Probability = 0.25
    #: Highest standard deviation of the noise, after normalisation.
    noise: float = Field(default=0.1, ge=0)
    #: Stray light: a smooth field over the picture, and its highest standard deviation after normalisation.
    veil_probability: Probability = 0.0
    veil: float = Field(default=2.0, ge=0)

    @field_validator("crop_px", mode="before")
    @classmethod
    def _one_number_is_a_square(cls, value: Any) -> Any:
        return (value, value) if isinstance(value, int) else value

    @field_validator("scale")
    @classmethod
    def _scale_goes_up(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1]:
            raise ValueError(f"scale goes from a positive factor to one at least as large, got {value}")
        return value


class SamplingConfig(_Frozen):
    """Which images, and which parts of them, are seen how often."""

    #: A stratum of n images is seen in proportion to n ** this: 1 as they come, 0 all strata alike.
    stratum_power: Probability = 0.5
    #: An image is seen max(1, sqrt(this / f)) times as often, f being the share of images that show the rarest of its
    #: classes (repeat factor sampling; Gupta et al., LVIS, 2019). 0: never.
    rare_image_share: Probability = 0.0
    #: Probability that a crop is laid around a pixel of one of the image's classes, all of them alike: small classes
    #: are then seen more. Otherwise it lies anywhere.
    focus_probability: Probability = 0.0


class LossTerm(_Frozen):
    """One part of a loss on pixels. Formulas and sources are in `models.losses`."""

    kind: Literal["cross_entropy", "dice", "focal", "lovasz"]
    weight: float = Field(default=1.0, gt=0)
    #: `focal` only: how much pixels that are right already lose.
    gamma: float = Field(default=2.0, ge=0)
    #: `cross_entropy` only.
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)


class LossConfig(_Frozen):
    """What counts as wrong. Mask R-CNN has losses of its own, and takes only the last settings from here."""

    terms: tuple[LossTerm, ...] = Field(
        default=(LossTerm(kind="cross_entropy"), LossTerm(kind="dice")),
        min_length=1,
    )
    #: Of `cross_entropy` and `focal`, measured on the training split. `inverse`: 1 / f, f being the class's share of
    #: all pixels; `median`: median of f / f, with f the share in the images that show the class (Eigen and Fergus,
    #: 2015).
    class_weights: Literal["none", "inverse", "median"] = "none"
    #: Those weights to this power: less than 1 evens them out.
    class_weight_power: float = Field(default=1.0, gt=0, le=1)
    #: Networks that tell objects apart by their boundaries: additional weight of pixels where two objects meet, and of
    #: the other pixels of an object's border.
    touching_weight: float = Field(default=4.0, ge=0)
    border_weight: float = Field(default=1.0, ge=0)
    #: Weight of an auxiliary head's loss, where the network has one.
    auxiliary_weight: float = Field(default=0.4, ge=0)
    #: Mask R-CNN: anchors and regions of an image that the losses look at, and at most how large a share of these
    #: regions is objects.
    anchors_per_image: int = Field(default=256, ge=1)
    regions_per_image: int = Field(default=512, ge=1)
    positive_share: float = Field(default=0.25, gt=0, le=1)

    @model_validator(mode="after")
    def _kinds_differ(self) -> LossConfig:
        kinds = [term.kind for term in self.terms]
        if len(set(kinds)) < len(kinds):
            raise ValueError(f"each kind of loss can be there once, got {', '.join(kinds)}")
        return self
