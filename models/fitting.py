"""From an image's size to the network's canvas, and the pixels onto it. Owns: the arithmetic of the size policies.
Must not know: networks, devices, decoding. Thread safe.

A canvas is a function of the image's size and the card, never of other images.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.card import Card, LetterboxPolicy, ResizePolicy, TilePolicy
from models.preprocessing import select_bands

#: A resized image longer than so many short sides is refused: with no limit a line of pixels would fill the memory.
_LONGEST = 64
#: Where the card says nothing of tiles. Measured in docs/decisions/0009.
_TILE_PX = 1024
_OVERLAP_PX = 128


class Fit(NamedTuple):
    """Where an image comes to lie: its size on the canvas, at the top left, and the canvas. Pixels."""

    height: int
    width: int
    canvas_height: int
    canvas_width: int


def fit_size(card: Card, height: int, width: int) -> Fit:
    """How the card's size policy treats an image of `height` by `width`, both at least 1.

    Raises ValueError for a size that the policy cannot serve.
    """
    policy = card.size_policy
    step = card.canvas_multiple
    if isinstance(policy, LetterboxPolicy):
        scale = min(policy.height_px / height, policy.width_px / width)
        inner = (
            min(policy.height_px, max(1, round(height * scale))),
            min(policy.width_px, max(1, round(width * scale))),
        )
        return Fit(*inner, policy.height_px, policy.width_px)
    if isinstance(policy, TilePolicy):
        if max(height, width) > policy.tile_px:
            raise ValueError(
                f"{height} x {width} pixels are more than one tile of {policy.tile_px}: cut the image into tiles first"
            )
        if not takes_exact_tiles(card):
            return Fit(height, width, policy.tile_px, policy.tile_px)
    inner = (height, width)
    if isinstance(policy, ResizePolicy):
        inner = _resized(policy, height, width)
    return Fit(*inner, -(-inner[0] // step) * step, -(-inner[1] // step) * step)


def takes_exact_tiles(card: Card) -> bool:
    """True where images smaller than a tile are not padded to one, because padding would change the answer."""
    return card.postprocessing.kind == "detections" or bool(card.pools_whole_image)


def tile_policy(card: Card, height: int, width: int) -> TilePolicy | None:
    """How an image of `height` by `width` is cut; None where it goes through the network in one piece.

    By the card's own policy where that is to tile, else above `tile_above_pixels` where images keep their size.
    """
    policy = card.size_policy
    if isinstance(policy, TilePolicy):
        return policy if max(height, width) > policy.tile_px else None
    if policy.kind != "native" or card.tile_above_pixels is None or height * width <= card.tile_above_pixels:
        return None
    step = card.canvas_multiple
    return TilePolicy(tile_px=-(-_TILE_PX // step) * step, overlap_px=_OVERLAP_PX)


def lies_as_it_is(card: Card) -> bool:
    """True where fitting only pads: images may be decoded straight onto the canvas, as 8-bit RGB."""
    preprocessing = card.preprocessing
    kept = card.size_policy.kind in ("native", "tile")
    return kept and preprocessing.bands == (0, 1, 2) and preprocessing.dtype == "uint8"


def place(card: Card, pixels: NDArray[Any], out: NDArray[Any]) -> tuple[int, int]:
    """Puts an image [h, w, B] onto its canvas `out` [H, W, C], C = `card.input_channels`, of the card's pixel type.

    Takes the card's bands, resizes as its size policy says, and repeats the edge over the rest. Returns height and
    width of the image on the canvas. Resizing is that of torchvision's `transforms.v2`: bilinear, antialiased.
    Raises WrongPixelsError (a ValueError) for other bands or another type than the card's, ValueError for an image or
    canvas whose size does not fit.
    """
    pixels = select_bands(pixels, card.preprocessing)
    fit = fit_size(card, pixels.shape[0], pixels.shape[1])
    expected = (fit.canvas_height, fit.canvas_width, card.input_channels)
    if out.shape != expected or out.dtype != pixels.dtype:
        raise ValueError(f"the canvas must be {pixels.dtype} {expected}, got {out.dtype} {out.shape}")
    height, width = fit.height, fit.width
    if (height, width) != pixels.shape[:2]:
        pixels = resize(pixels, height, width)
    if not np.may_share_memory(out, pixels):
        out[:height, :width] = pixels
    pad(out, height, width)
    return height, width


def pad(out: NDArray[Any], height: int, width: int) -> None:
    """Repeats the last row and column of the image at the top left of `out` over the rest of it, in place."""
    out[height:, :width] = out[height - 1, :width]
    out[:, width:] = out[:, width - 1 : width]


def resize(pixels: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    """Bilinear and antialiased, align_corners=False; integer types are rounded to nearest. A new array."""
    import torch

    wide = pixels.dtype in (np.uint8, np.float32)
    # Writable, though nothing is written: torch warns of what is not.
    source = torch.from_numpy(np.require(pixels if wide else pixels.astype(np.float32), requirements=["C", "W"]))
    with torch.inference_mode():
        resized_NCHW = torch.nn.functional.interpolate(
            source.permute(2, 0, 1)[None], size=(height, width), mode="bilinear", align_corners=False, antialias=True
        )
    array: NDArray[Any] = resized_NCHW[0].permute(1, 2, 0).numpy()
    return array if wide else np.rint(array).astype(pixels.dtype)


def _resized(policy: ResizePolicy, height: int, width: int) -> tuple[int, int]:
    """As torchvision's `_compute_resized_image_output_size`."""
    short, long = min(height, width), max(height, width)
    new_short, new_long = policy.short_side_px, int(policy.short_side_px * long / short)
    if policy.long_side_px is not None and new_long > policy.long_side_px:
        new_short, new_long = max(1, int(policy.long_side_px * new_short / new_long)), policy.long_side_px
    elif new_long > _LONGEST * new_short:
        raise ValueError(
            f"{height} x {width} pixels would become {new_long} long at a short side of {new_short}: "
            f"give the card's size_policy a long_side_px"
        )
    return (new_short, new_long) if height <= width else (new_long, new_short)
