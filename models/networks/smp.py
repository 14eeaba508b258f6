"""The networks of segmentation-models-pytorch, with its own encoders or timm's. Owns: their arguments and how they are
made. Must not know: cards, weights' origin, files, devices.

Sources: https://smp.readthedocs.io (0.6) and https://huggingface.co/docs/timm. Names of parameters are the library's.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

Width = Annotated[int, Field(ge=1)]


class EncoderArgs(BaseModel):
    """What a timm encoder (`tu-...`) is told beyond its name. None: timm's own default."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: Height and width for which position tables are made.
    img_size: tuple[Width, Width] | None = None
    #: Transformers: take any size, interpolating the position table.
    dynamic_img_size: bool | None = None
    #: Swin and its kin: refuse other sizes than `img_size`.
    strict_img_size: bool | None = None


class SmpArgs(BaseModel):
    """What every architecture of the library takes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: A name of `segmentation_models_pytorch.encoders`, or `tu-` and a model of timm.
    encoder: str = "resnet18"
    encoder_args: EncoderArgs = EncoderArgs()
    output_channels: int = Field(ge=1)

    def settings(self) -> dict[str, Any]:
        """Keywords for the library's class, beyond encoder and channels."""
        return self.model_dump(exclude={"encoder", "encoder_args", "output_channels"})


class UnetArgs(SmpArgs):
    """U-Net and U-Net++: stride 2 ** `encoder_depth`, which is also the number of `decoder_channels`, deepest first."""

    encoder_depth: int = Field(default=5, ge=3, le=5)
    decoder_channels: tuple[Width, ...] = (256, 128, 64, 32, 16)
    decoder_use_norm: bool | Literal["batchnorm", "identity", "layernorm", "instancenorm"] = "batchnorm"
    decoder_attention_type: Literal["scse"] | None = None
    decoder_interpolation: Literal["nearest", "bilinear", "bicubic"] = "nearest"

    @model_validator(mode="after")
    def _one_width_per_halving(self) -> UnetArgs:
        if len(self.decoder_channels) != self.encoder_depth:
            raise ValueError(
                f"encoder_depth {self.encoder_depth} needs {self.encoder_depth} decoder_channels, "
                f"got {len(self.decoder_channels)}"
            )
        return self


class LinknetArgs(SmpArgs):
    """LinkNet."""

    encoder_depth: int = Field(default=5, ge=3, le=5)
    decoder_use_norm: bool | Literal["batchnorm", "identity", "layernorm", "instancenorm"] = "batchnorm"


class FpnArgs(SmpArgs):
    """Feature pyramid network. Its decoder's GroupNorm looks at the whole image."""

    encoder_depth: int = Field(default=5, ge=3, le=5)
    decoder_pyramid_channels: Width = 256
    decoder_segmentation_channels: Width = 128
    decoder_merge_policy: Literal["add", "cat"] = "add"
    decoder_interpolation: Literal["nearest", "bilinear", "bicubic"] = "nearest"


class PspnetArgs(SmpArgs):
    """PSPNet: stride 2 ** `encoder_depth`."""

    encoder_depth: int = Field(default=3, ge=3, le=5)
    psp_out_channels: Width = 512
    decoder_use_norm: bool | Literal["batchnorm", "identity", "layernorm", "instancenorm"] = "batchnorm"

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"upsampling": 2**self.encoder_depth}


class Deeplabv3plusArgs(SmpArgs):
    """DeepLabV3+."""

    encoder_depth: int = Field(default=5, ge=4, le=5)
    encoder_output_stride: Literal[8, 16] = 16
    decoder_channels: Width = 256
    decoder_atrous_rates: tuple[Width, Width, Width] = (12, 24, 36)
    decoder_aspp_separable: bool = True


class UpernetArgs(SmpArgs):
    """UPerNet."""

    encoder_depth: int = Field(default=5, ge=3, le=5)
    decoder_channels: Width = 256
    decoder_use_norm: bool | Literal["batchnorm", "identity", "layernorm", "instancenorm"] = "batchnorm"


class SegformerArgs(SmpArgs):
    """SegFormer's decoder; with an encoder `mit_b0` to `mit_b5` the network of the paper."""

    encoder: str = "mit_b0"
    encoder_depth: int = Field(default=5, ge=3, le=5)
    decoder_segmentation_channels: Width = 256


class DptArgs(SmpArgs):
    """DPT on a vision transformer of timm. Takes any size unless `encoder_args` says otherwise."""

    encoder: str = "tu-vit_base_patch16_224.augreg_in21k"
    encoder_args: EncoderArgs = EncoderArgs(dynamic_img_size=True)
    encoder_depth: int = Field(default=4, ge=1)
    encoder_output_indices: tuple[int, ...] | None = None
    decoder_readout: Literal["ignore", "add", "cat"] = "cat"
    decoder_intermediate_channels: tuple[Width, ...] = (256, 512, 1024, 1024)
    decoder_fusion_channels: Width = 256


def maker(name: str) -> Callable[..., torch.nn.Module]:
    """`make(args, input_channels=...)` of the library's class whose lower-case name is `name`."""
    return functools.partial(_make, name)


def _make(name: str, args: SmpArgs, *, input_channels: int) -> torch.nn.Module:
    """The network with random weights. Raises ValueError for an unknown encoder (naming near ones) or one that this
    architecture cannot use.
    """
    import segmentation_models_pytorch as library

    check_encoder(args.encoder)
    extra = args.encoder_args.model_dump(exclude_none=True)
    if extra and not args.encoder.startswith("tu-"):
        raise ValueError(f"encoder_args {sorted(extra)} are for timm encoders (tu-...), not for {args.encoder!r}")
    try:
        network: torch.nn.Module = library.create_model(
            name,
            encoder_name=args.encoder,
            encoder_weights=None,
            in_channels=input_channels,
            classes=args.output_channels,
            **args.settings(),
            **extra,
        )
    except (ValueError, KeyError, RuntimeError, TypeError, AttributeError, AssertionError, IndexError) as error:
        raise ValueError(f"{name} cannot be built on the encoder {args.encoder!r}: {error}") from error
    depth = getattr(args, "encoder_depth", 5)
    if args.encoder.startswith(("resnet", "resnext")):
        # The library keeps the stages below `encoder_depth`, which forward never reaches: 33 MB for resnet18.
        for stage in range(depth, 5):
            delattr(network.encoder, f"layer{stage}")
    merge: Any = getattr(getattr(network, "decoder", None), "merge", None)
    if getattr(merge, "policy", None) == "add":
        network.decoder.merge = _Sum()  # type: ignore[union-attr]
    return network


class _Sum(torch.nn.Module):
    """Of maps of one shape. The library stacks them first, and adds up over the stack: in bf16 on a CPU that took a
    third of an FPN's time.
    """

    def forward(self, maps: list[torch.Tensor]) -> torch.Tensor:
        total = maps[0]
        for one in maps[1:]:
            total = total + one
        return total


def stride(network: torch.nn.Module) -> int:
    """Pixels: heights and widths of the input must be multiples of it."""
    encoder: Any = network.encoder
    # DPT halves the grid of patches once more than its encoder says.
    return int(encoder.output_stride) * (2 if type(network).__name__ == "DPT" else 1)


def logits_layers(network: torch.nn.Module) -> list[torch.nn.Module]:
    """The last learned layer, before logits are brought to the size of the input."""
    head: Any = network.segmentation_head
    return [head.head[-1] if hasattr(head, "head") else head[0]]


def check_encoder(name: str) -> None:
    """Raises ValueError for an encoder that neither library knows, naming the nearest ones."""
    import timm
    from segmentation_models_pytorch.encoders import get_encoder_names

    # A name with a colon would make timm look on the network or in folders.
    if name in get_encoder_names() or (name.startswith("tu-") and ":" not in name and timm.is_model(name[3:])):
        return
    known = [*get_encoder_names(), *(f"tu-{model}" for model in timm.list_models())]
    near = difflib.get_close_matches(name, known, 3, 0.5)
    hint = f": did you mean {', '.join(near)}?" if near else ""
    raise ValueError(
        f"there is no encoder {name!r}{hint} (known: those of segmentation-models-pytorch, and tu-NAME for timm's)"
    )
