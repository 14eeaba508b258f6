"""What a network is computed on, and in what. Owns: devices' names, the precisions that each has. Must not
know: networks, cards, images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch

Precision = Literal["fp32", "bf16", "fp16"]
_DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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


def dtype_of(precision: str, device: str) -> torch.dtype:
    """The type of number that `precision` names. Raises ValueError for one that is unknown, or not for this device."""
    if precision not in _DTYPES:
        raise ValueError(f"unknown precision {precision!r}: use one of {', '.join(_DTYPES)}")
    if precision == "fp16" and torch.device(device).type == "cpu":
        raise ValueError("precision 'fp16' is for GPUs: on the CPU use 'bf16' or 'fp32'")
    return _DTYPES[precision]
