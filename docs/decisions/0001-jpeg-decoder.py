"""The measurement behind 0001-jpeg-decoder.md. Prints images per second of one core, and the answer to damage."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import simplejpeg
import torch
import torchvision
from awkward_corpus import encode, photo
from PIL import Image


def main() -> None:
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    jpegs = [encode(Image.fromarray(photo(480, 360, seed)), "JPEG", quality=90) for seed in range(32)]
    half = len(jpegs[0]) // 2
    cut, hole = jpegs[0][:half], jpegs[0][:half] + b"\xff\xd5" + jpegs[0][half + 2 :]
    buffer = np.empty((360, 480, 3), np.uint8)

    def with_torchvision(data: bytes) -> Any:
        pixels = torchvision.io.decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        return pixels.permute(1, 2, 0).contiguous()

    decoders: dict[str, Callable[[bytes], Any]] = {
        "simplejpeg into a buffer": lambda data: simplejpeg.decode_jpeg(data, buffer=buffer, strict=True),
        "simplejpeg": lambda data: simplejpeg.decode_jpeg(data, strict=True),
        "torchvision": with_torchvision,
        "OpenCV": lambda data: cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB),
        "Pillow": lambda data: np.asarray(Image.open(io.BytesIO(data)).convert("RGB")),
    }
    print(f"{sum(map(len, jpegs)) // len(jpegs)} bytes on average")
    best_s = dict.fromkeys(decoders, float("inf"))
    for _ in range(10):  # in turns, so that a change of clock speed meets them all
        for name, decode in decoders.items():
            start_s = time.thread_time()
            for data in jpegs * 4:
                decode(data)
            best_s[name] = min(best_s[name], time.thread_time() - start_s)
    for name, decode in decoders.items():
        rate = 4 * len(jpegs) / best_s[name]
        print(f"{name:26}{rate:7.0f}/s  cut: {said(decode, cut)}  hole: {said(decode, hole)}")


def said(decode: Callable[[bytes], Any], data: bytes) -> str:
    try:
        return "no image" if decode(data) is None else "decodes"
    except (ValueError, RuntimeError, OSError):
        return "error"


if __name__ == "__main__":
    main()
