"""What may happen between a network and its mask, as settings that a card or a run can hold. Owns: the fields, their
ranges and defaults; every default leaves the answer as it is, or is only reached when asked for.
Must not know: torch, arrays, how any of it is computed (`models.augmented`, `crf`, `cleanup`, `suppression`).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

Flip = Literal["horizontal", "vertical", "both"]
Scale = Annotated[float, Field(ge=0.125, le=8)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class AugmentationSettings(_Frozen):
    """Test-time augmentation: the views of an image over which probabilities are averaged.

    Views are every scale times no flip and every flip, so the network runs `len(views)` times.
    """

    #: `both`: horizontal and vertical at once, half a turn.
    flips: tuple[Flip, ...] = ()
    #: Factors of the canvas; leave 1.0 in unless the native size is not wanted.
    scales: tuple[Scale, ...] = Field(default=(1.0,), min_length=1)

    @field_validator("flips", "scales")
    @classmethod
    def _no_view_twice(cls, given: tuple[Flip, ...] | tuple[float, ...]) -> tuple[Flip, ...] | tuple[float, ...]:
        if len(set(given)) != len(given):
            raise ValueError(f"a view counts once, got {given}")
        return given

    @property
    def views(self) -> tuple[tuple[float, Flip | None], ...]:
        """(scale, flip) in the order in which they are summed."""
        return tuple((scale, flip) for scale in self.scales for flip in (None, *self.flips))


class CrfSettings(_Frozen):
    """Dense CRF in a local window, Potts compatibility: `models.crf.refine` has the formula.

    Window, iterations, weights and sigmas are the defaults of the ConvCRF authors' own code (Teichmann & Cipolla,
    Convolutional CRFs for Semantic Segmentation, 2018, arXiv 1805.04777; `default_conf` in
    github.com/MarvinTeichmann/ConvCRF), which names Krähenbühl & Koltun (2011) as their source. Three things differ.
    There kernels act on maps pooled 4 × 4, so that a window spans 44 pixels of the image; here it is as wide as it
    says. There messages are not normalised, and weigh 0.2 beside 0.8 of the unary; here they are normalised
    symmetrically, as in Krähenbühl & Koltun's code, and weigh 1 beside 1. And there the appearance kernel knows no
    positions (`use_bias` is off); here it has `bilateral_sigma_px`, as in both papers, which hardly shows in a window
    of 11 pixels: exp(-5² / (2 · 80²)) is 0.998.
    """

    iterations: int = Field(default=5, ge=1, le=100)
    #: Side of the square window whose centre is the pixel; odd. Time grows with its square.
    window_px: int = Field(default=11, ge=3, le=101)
    #: Of neighbours that are near and of a similar colour.
    bilateral_weight: float = Field(default=10.0, ge=0)
    bilateral_sigma_px: float = Field(default=80.0, gt=0)
    #: Grey levels (0..255 units), over the three channels.
    bilateral_sigma_levels: float = Field(default=13.0, gt=0)
    #: Of neighbours that are near, whatever their colour.
    smoothness_weight: float = Field(default=3.0, ge=0)
    smoothness_sigma_px: float = Field(default=3.0, gt=0)

    @field_validator("window_px")
    @classmethod
    def _has_a_centre(cls, window_px: int) -> int:
        if window_px % 2 == 0:
            raise ValueError(f"window_px must be odd, so that a pixel is in the middle: got {window_px}")
        return window_px


class CleanupSettings(_Frozen):
    """Morphology on the finished mask, in this order; 0 leaves a step out. `models.cleanup` says what each does."""

    #: Radius of the disk: what it does not fit into is removed from its class or instance.
    opening_radius_px: int = Field(default=0, ge=0, le=64)
    #: Radius of the disk: gaps that it does not fit into are closed.
    closing_radius_px: int = Field(default=0, ge=0, le=64)
    #: Holes up to this area in pixels are filled.
    max_hole_area_px: int = Field(default=0, ge=0)
    #: Regions below this area in pixels are removed.
    min_region_area_px: int = Field(default=0, ge=0)

    @property
    def does_nothing(self) -> bool:
        steps = (self.opening_radius_px, self.closing_radius_px, self.max_hole_area_px)
        return not any(steps) and self.min_region_area_px <= 1


class SuppressionSettings(_Frozen):
    """Which of an image's objects are kept: `models.suppression` has the rule."""

    #: Objects below this score are dropped.
    score_threshold: float = Field(default=0.0, ge=0, le=1)
    #: Of two that overlap by more than this IoU the one of the lower score is dropped; None keeps both.
    iou_threshold: float | None = Field(default=0.5, ge=0, le=1)
    #: True: objects of different classes suppress each other too.
    across_classes: bool = False
    #: At most so many are kept, those of the highest scores; None keeps all.
    max_count: int | None = Field(default=None, ge=1)
