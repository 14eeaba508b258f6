"""A dense conditional random field over the network's answer, in a local window. Owns: the mean-field iterations, on
the device of their inputs. Must not know: networks, cards, batching. Slow on a CPU (docs/decisions/0008).

The model is Krähenbühl & Koltun's (Efficient Inference in Fully Connected CRFs, 2011) with the truncation of ConvCRF
(Teichmann & Cipolla, Convolutional CRFs for Semantic Segmentation, 2018): pixels further apart than the window do not
see each other. That replaces their permutohedral lattice, an approximation of the sums, by exact sums over
fewer pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from models.probabilities import pixel_softmax
from models.refinement import CrfSettings

#: Elements of [N, C, rows, W] worked on at a time: what a core's cache holds, and what keeps a GPU busy.
_CHUNK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 25}
#: First row or column, and the one after the last.
_Span = tuple[int, int]
#: First row, the one after the last, and the sums for these rows.
_Message = tuple[int, int, torch.Tensor]
#: What each pixel brings to its bilateral and its smoothness terms, [N, 1, H, W] with margin.
_Factors = tuple[torch.Tensor, torch.Tensor]


@torch.no_grad()
def refine(
    logits_NCHW: torch.Tensor,
    images_NHWC: torch.Tensor,
    settings: CrfSettings,
    *,
    sizes_N2: torch.Tensor | None = None,
    rows_per_chunk: int | None = None,
) -> torch.Tensor:
    """Refined probabilities float32 [N, C, H, W], on the inputs' device.

    `logits_NCHW` float [N, C, H, W]; for probabilities give their logarithm (minus infinity is fine).
    `images_NHWC` uint8 [N, H, W, 3], RGB. `sizes_N2`: height and width of each image's valid part, at the top left;
    None means all of it. The rest takes no part, whatever it holds (NaN too), and comes out as softmax(logits).

    With unary U_i(l) = -log softmax(logits)_i(l), positions p in pixels and colours I in grey levels, Q starts as
    exp(-U) and `iterations` times becomes

        Q_i(l) = exp(-U_i(l) + Σ_m w_m Σ_{j ≠ i} k_m(i, j) / √(n_m(i) n_m(j)) Q_j(l)) / Z_i
        k_1(i, j) = exp(-|p_i - p_j|² / 2 bilateral_sigma_px² - |I_i - I_j|² / 2 bilateral_sigma_levels²)
        k_2(i, j) = exp(-|p_i - p_j|² / 2 smoothness_sigma_px²)

    where j runs over the valid pixels of the window around i, and n_m(i) = Σ_j k_m(i, j) with j = i in it: the
    symmetric normalisation of Krähenbühl & Koltun's code, an option in ConvCRF's. The sign is plus because under Potts
    compatibility the penalty Σ_{l' ≠ l} Q_j(l') is 1 - Q_j(l), and the 1 vanishes in Z.

    Each image depends on itself only; deterministic; not differentiable. Memory: two copies of the
    logits and two of the image, all float32, and chunks of `rows_per_chunk` rows (by default as many as suit the
    device), which do not change the result. Raises ValueError when shapes or types do not fit.
    """
    count, channels, height, width = _checked_shape(logits_NCHW, images_NHWC, sizes_N2)
    if rows_per_chunk is None:
        budget = _CHUNK_ELEMENTS.get(logits_NCHW.device.type, _CHUNK_ELEMENTS["cuda"])
        rows_per_chunk = max(8, budget // max(1, count * channels * width))
    logits_NCHW = logits_NCHW.float()
    valid_N1HW = _valid(sizes_N2, count, height, width, logits_NCHW.device)
    margin = settings.window_px // 2
    field = _Field(images_NHWC, valid_N1HW, settings, rows_per_chunk)
    everything = (margin, (0, height), (0, width))
    # The margin is 0: from there no message comes. What is not valid is set to 0 as well, because 0 * NaN is NaN.
    current = logits_NCHW.new_zeros(count, channels, height + 2 * margin, width + 2 * margin)
    _window(current, *everything).copy_(pixel_softmax(logits_NCHW).masked_fill_(~valid_N1HW, 0))
    following = torch.zeros_like(current)
    for _ in range(settings.iterations):
        for begin, end, message in field.messages(current):
            refined = pixel_softmax(message.add_(logits_NCHW[:, :, begin:end]))
            refined.masked_fill_(~valid_N1HW[:, :, begin:end], 0)
            _window(following, margin, (begin, end), (0, width)).copy_(refined)
        current, following = following, current
    del following
    return pixel_softmax(logits_NCHW).masked_fill_(valid_N1HW, 0).add_(_window(current, *everything))


class _Field:
    """The pairwise terms of one batch. All maps have a margin of half a window, in which they are 0."""

    def __init__(
        self, images_NHWC: torch.Tensor, valid_N1HW: torch.Tensor, settings: CrfSettings, rows_per_chunk: int
    ) -> None:
        self._settings = settings
        self._rows = rows_per_chunk
        self._height, self._width = valid_N1HW.shape[2:]
        self._margin = settings.window_px // 2
        scale = 1 / (2**0.5 * settings.bilateral_sigma_levels)
        pad = (self._margin,) * 4
        self._colors = torch.nn.functional.pad(images_NHWC.permute(0, 3, 1, 2).float().mul_(scale), pad)
        valid = torch.nn.functional.pad(valid_N1HW.float(), pad)
        nothing = torch.zeros_like(valid)
        # Factors of 1 count the neighbours; the square roots of weight and count in each factor normalise the terms.
        self._bilateral = self._normalised(settings.bilateral_weight, valid, (valid, nothing))
        self._smoothness = self._normalised(settings.smoothness_weight, valid, (nothing, valid))

    def messages(self, maps: torch.Tensor) -> Iterator[_Message]:
        """Sums over j of normalised, weighted pairwise terms times maps_j [N, C, rows, W], chunk by chunk."""
        return self._sums(maps, (self._bilateral, self._smoothness))

    def _sums(self, maps: torch.Tensor, factors: _Factors) -> Iterator[_Message]:
        margin, width = self._margin, self._width
        for begin in range(0, self._height, self._rows):
            end = min(begin + self._rows, self._height)
            total = maps.new_zeros(*maps.shape[:2], end - begin, width)
            for dy, dx in _half_window(margin):
                # Terms between s and s + (dx, dy); each serves s as the one and s + (dx, dy) as the other.
                left, right = max(dx, 0), max(-dx, 0)
                terms = self._terms(factors, (begin - dy, end), (-left, width + right), (dy, dx))
                ahead = _window(maps, margin, _moved((begin, end), dy), _moved((0, width), dx))
                behind = _window(maps, margin, _moved((begin, end), -dy), _moved((0, width), -dx))
                total.addcmul_(terms[:, :, dy:, left : left + width], ahead)
                total.addcmul_(terms[:, :, : end - begin, right : right + width], behind)
            yield begin, end, total

    def _terms(self, factors: _Factors, rows: _Span, columns: _Span, offset: tuple[int, int]) -> torch.Tensor:
        """[N, 1, rows, columns] for s in this part of the image and s + offset."""
        settings = self._settings
        bilateral, smoothness = factors
        dy, dx = offset
        here = (self._margin, rows, columns)
        there = (self._margin, _moved(rows, dy), _moved(columns, dx))
        squared_px = dx * dx + dy * dy
        squares = (_window(self._colors, *here) - _window(self._colors, *there)).square_()
        terms = squares[:, 0:1] + squares[:, 1:2]
        terms.add_(squares[:, 2:3]).neg_().sub_(squared_px / (2 * settings.bilateral_sigma_px**2)).exp_()
        terms.mul_(_window(bilateral, *here)).mul_(_window(bilateral, *there))
        nearness = math.exp(-squared_px / (2 * settings.smoothness_sigma_px**2))
        return terms.addcmul_(_window(smoothness, *here), _window(smoothness, *there), value=nearness)

    def _normalised(self, weight: float, valid: torch.Tensor, ones: _Factors) -> torch.Tensor:
        factors = torch.zeros_like(valid)
        if weight > 0:
            for begin, end, neighbours in self._sums(valid, ones):
                inner = _window(factors, self._margin, (begin, end), (0, self._width))
                inner.copy_(neighbours.add_(1).rsqrt_().mul_(weight**0.5))
        return factors.mul_(valid)


def _half_window(margin: int) -> list[tuple[int, int]]:
    """(dy, dx) of one of each pair of opposite neighbours."""
    return [(dy, dx) for dy in range(margin + 1) for dx in range(-margin, margin + 1) if dy > 0 or dx > 0]


def _window(maps: torch.Tensor, margin: int, rows: _Span, columns: _Span) -> torch.Tensor:
    """A part of maps with a margin, in the coordinates of the image; it may reach into the margin."""
    return maps[:, :, rows[0] + margin : rows[1] + margin, columns[0] + margin : columns[1] + margin]


def _moved(span: _Span, by_px: int) -> _Span:
    return span[0] + by_px, span[1] + by_px


def _valid(sizes_N2: torch.Tensor | None, count: int, height: int, width: int, device: torch.device) -> torch.Tensor:
    """bool [N, 1, H, W]."""
    if sizes_N2 is None:
        return torch.ones(count, 1, height, width, dtype=torch.bool, device=device)
    sizes = sizes_N2.to(device).view(count, 2, 1, 1, 1)
    rows = torch.arange(height, device=device).view(1, 1, -1, 1)
    columns = torch.arange(width, device=device).view(1, 1, 1, -1)
    return (rows < sizes[:, 0]) & (columns < sizes[:, 1])


def _checked_shape(
    logits_NCHW: torch.Tensor, images_NHWC: torch.Tensor, sizes_N2: torch.Tensor | None
) -> tuple[int, int, int, int]:
    if logits_NCHW.dim() != 4 or not logits_NCHW.is_floating_point():
        raise ValueError(f"logits must be float [N, C, H, W], got {logits_NCHW.dtype} {tuple(logits_NCHW.shape)}")
    count, channels, height, width = logits_NCHW.shape
    if images_NHWC.dtype != torch.uint8 or images_NHWC.shape != (count, height, width, 3):
        raise ValueError(
            f"images must be uint8 ({count}, {height}, {width}, 3) as the logits are, "
            f"got {images_NHWC.dtype} {tuple(images_NHWC.shape)}"
        )
    if sizes_N2 is not None and sizes_N2.shape != (count, 2):
        raise ValueError(f"{count} images need sizes of shape ({count}, 2), got {tuple(sizes_N2.shape)}")
    return count, channels, height, width
