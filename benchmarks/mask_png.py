"""Ways to make the PNG of a mask: CPU time of one thread, bytes, and whether equal masks give equal bytes.

    python benchmarks/mask_png.py [--masks FOLDER] [--count N] [--rounds K]

Masks are street-like ones made by code (480×360, 11 classes) or, with `--masks`, label maps from PNG files (palette or
gray). Times are the median over all masks and K rounds, in random order. Each way's output is decoded and
compared. Those that are no whole encoder get the filter, the chunks and the palette of ours, and only deflate
differently. "Answers" is how many different outputs one mask gave in the K rounds, at most.
Peers that are not installed are skipped: `pip install isal deflate`.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import random
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import cv2
import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table
from side_by_side.stand_in import street

from models import masks
from models.masks import decode_mask_png, encode_mask_png
from models.palettes import distinct_color

Encode = Callable[[np.ndarray], bytes]
COLORS = [distinct_color(index) for index in range(12)]


def opencv(ids: np.ndarray) -> bytes:
    """Gray: OpenCV writes no palette."""
    how = [cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_UP, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE]
    return cv2.imencode(".png", ids, how)[1].tobytes()


def pillow(level: int) -> Encode:
    def encode(ids: np.ndarray) -> bytes:
        image, buffer = Image.fromarray(ids), io.BytesIO()
        colors = [*COLORS, *[(128, 128, 128)] * (256 - len(COLORS))]
        image.putpalette([channel for color in colors for channel in color])
        image.save(buffer, "PNG", compress_level=level)
        return buffer.getvalue()

    return encode


class Whole:
    """What is made of all the data at once, where our encoder wants it bit by bit."""

    def __init__(self, compress: Callable[[Any], bytes]) -> None:
        self._compress = compress
        self._data = bytearray()

    def compress(self, data: Any) -> bytes:
        self._data += memoryview(data).cast("B")
        return b""

    def flush(self) -> bytes:
        return self._compress(self._data)


def deflated_by(begin: Callable[[], Any]) -> Encode:
    """Our encoder around another deflate."""

    def encode(ids: np.ndarray) -> bytes:
        with mock.patch.object(masks.zlib_ng, "compressobj", lambda *_: begin()):
            return encode_mask_png(ids, COLORS)

    return encode


def ways() -> tuple[dict[str, Encode], list[str]]:
    """The ways, and the peers that are not installed."""
    from zlib_ng import zlib_ng

    ng = zlib_ng.compressobj
    found: dict[str, Encode] = {
        "OpenCV, filter up, strategy RLE": opencv,
        "Pillow, level 1": pillow(1),
        "Pillow, level 6": pillow(6),
        "zlib, level 1, strategy RLE": deflated_by(lambda: zlib.compressobj(1, zlib.DEFLATED, 15, 8, zlib.Z_RLE)),
        "zlib-ng, level 1": deflated_by(lambda: ng(1)),
        "zlib-ng, level 2": deflated_by(lambda: ng(2)),
        "zlib-ng, level 3": deflated_by(lambda: ng(3)),
        "zlib-ng, strategy RLE (what we do)": lambda ids: encode_mask_png(ids, COLORS),
    }
    missing = []
    try:
        libdeflate = importlib.import_module("deflate")
        found["libdeflate, level 1"] = deflated_by(lambda: Whole(lambda data: bytes(libdeflate.zlib_compress(data, 1))))
    except ImportError:
        missing.append("deflate")
    try:
        igzip = importlib.import_module("isal.isal_zlib")
        for level in (0, 1, 3):
            found[f"igzip, level {level}"] = deflated_by(lambda level=level: igzip.compressobj(level))
    except ImportError:
        missing.append("isal")
    return found, missing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--masks", type=Path, default=None)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    paths = sorted(options.masks.glob("*.png"))[: options.count] if options.masks else []
    some = [decode_mask_png(path.read_bytes()) for path in paths] or [street(seed) for seed in range(options.count)]
    found, missing = ways()
    spent_s: dict[str, list[float]] = {name: [] for name in found}
    outputs: dict[str, list[set[bytes]]] = {name: [set() for _ in some] for name in found}
    shuffle = random.Random(0).sample  # so that memory holds something else before each
    for _ in range(options.rounds):
        for n in shuffle(range(len(some)), len(some)):
            for name in shuffle(list(found), len(found)):
                encode, ids = found[name], some[n]
                began_s = time.thread_time()
                data = encode(ids)
                spent_s[name].append(time.thread_time() - began_s)
                outputs[name][n].add(data)
    title = f"{len(some)} masks of {options.masks.parent.name if options.masks else 'streets'}"
    table = Table(title=f"{title}, one thread, load {os.getloadavg()[0]:.1f}")
    for column in ("way", "ms", "bytes", "answers"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for name in found:
        for ids, seen in zip(some, outputs[name], strict=True):
            assert all(np.array_equal(decode_mask_png(data), ids) for data in seen), name
        size_bytes = np.mean([len(min(seen)) for seen in outputs[name]])
        answers = max(len(seen) for seen in outputs[name])
        table.add_row(name, f"{np.median(spent_s[name]) * 1e3:.3f}", f"{size_bytes:,.0f}", str(answers))
    if missing:
        table.caption = f"not installed, and so left out: {', '.join(missing)}"
    Console().print(table)


if __name__ == "__main__":
    main()
