"""One large TIFF from file to mask, by windows, with a stand-in for the network; prints what it took, as JSON.

python tests/large_image.py FILE TASK: run as a process of its own, so that its peak memory is that of this work alone.
"""

from __future__ import annotations

import json
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import torch
from torch.nn import functional

from models.architectures import untrained_card
from models.card import WatershedPostprocessing
from models.masks import Instance, encode_mask_png, mask_crc32
from models.seams import InstanceEvidence, split_in_blocks
from models.tally import tally
from models.tiling import TileBlender, TileGrid
from pipeline.corpus.bands import select_bands, window_statistics
from pipeline.corpus.windows import WindowReader, open_windows

PATTERN_PX = 1000


def pattern(bands: int) -> np.ndarray:
    """uint8 [PATTERN_PX, PATTERN_PX, bands]: bright discs, some of which touch, that repeat without a seam."""
    rng = np.random.default_rng(0)
    sheet = np.zeros((PATTERN_PX, PATTERN_PX), np.float32)
    near = np.arange(-22, 23)
    for _ in range(600):
        y, x, radius = rng.uniform(0, PATTERN_PX), rng.uniform(0, PATTERN_PX), rng.uniform(6, 14)
        distance = np.hypot((int(y) + near - y)[:, None], int(x) + near - x)
        place = np.ix_((int(y) + near) % PATTERN_PX, (int(x) + near) % PATTERN_PX)
        sheet[place] = np.maximum(sheet[place], np.clip(1.5 - distance / radius, 0, 1))
    gray = (30 + 200 * sheet + rng.uniform(0, 6, sheet.shape)).astype(np.uint8)
    return np.repeat(gray[:, :, None], bands, axis=2)


def write_large(path: Path, *, height: int, width: int, bands: int, tile_px: int | None) -> None:
    """A TIFF of the repeated pattern, written piece by piece: tiles that are not compressed, or strips of 16 rows that
    are, where `tile_px` is None.
    """
    sheet = pattern(bands)
    if bands == 1:
        sheet = sheet[:, :, 0]

    def tiles() -> Iterator[np.ndarray]:
        assert tile_px is not None
        for y in range(0, height, tile_px):
            rows = sheet.take(range(y, y + tile_px), axis=0, mode="wrap")
            for x in range(0, width, tile_px):
                yield rows.take(range(x, x + tile_px), axis=1, mode="wrap")

    def strips() -> Iterator[bytes]:
        for y in range(0, height, 16):
            rows = sheet.take(range(y, min(y + 16, height)), axis=0, mode="wrap")
            yield zlib.compress(rows.take(range(width), axis=1, mode="wrap"), 1)

    tifffile.imwrite(
        path,
        tiles() if tile_px else strips(),
        shape=(height, width, *sheet.shape[2:]),
        dtype=np.uint8,
        photometric="rgb" if bands == 3 else "minisblack",
        tile=(tile_px, tile_px) if tile_px else None,
        rowsperstrip=None if tile_px else 16,
        compression=None if tile_px else "deflate",
    )


def stand_in(pixels: np.ndarray, channels: int) -> torch.Tensor:
    """float16 [channels, h, w] that add up to 1, from uint8 [h, w, 3]: a blur, and bumps along the gray axis."""
    gray = torch.from_numpy(pixels[:, :, 0].copy()).float()[None, None] / 255
    smooth = functional.avg_pool2d(functional.pad(gray, (2, 2, 2, 2), mode="replicate"), 5, 1)[0]
    centers = {3: torch.tensor([0.15, 0.8, 0.45])}.get(channels, torch.linspace(0.1, 0.9, channels))
    return (-40 * (smooth - centers.view(-1, 1, 1)) ** 2).softmax(dim=0).half()


def segment(reader: WindowReader, task: str, *, tile_px: int = 512, overlap_px: int = 64) -> dict[str, Any]:
    """Class ids of the whole image, and for instances the evidence."""
    card = untrained_card("stand-in", task=task)
    grid = TileGrid(reader.height, reader.width, tile_px=tile_px, overlap_px=overlap_px)
    blender = TileBlender(grid, card)
    class_ids = np.empty((reader.height, reader.width), np.uint8) if task == "semantic" else None
    settings = card.postprocessing
    evidence = None
    if isinstance(settings, WatershedPostprocessing):
        evidence = InstanceEvidence(reader.height, reader.width, settings)
    for window in grid.windows():
        raw = reader.read(window.y, window.x, window.height, window.width)
        pixels = select_bands(raw, None, None, alpha=reader.alpha)
        for band in blender.add(window, stand_in(pixels, card.network_channels)):
            if class_ids is not None:
                class_ids[band.y : band.y + len(band.class_ids)] = band.class_ids
            if evidence is not None:
                evidence.add_band(band)
    return {"card": card, "class_ids": class_ids, "evidence": evidence, "summary": blender.summary()}


def forget_peak() -> None:
    """What programs and libraries took to load is no matter, and depends on what the system has in its cache."""
    tally(np.zeros((1, 1), np.uint8))
    Path("/proc/self/clear_refs").write_text("5")


def peak_mb() -> float:
    """Of this process since `forget_peak`. (`getrusage` would tell the peak of the process that started it, if
    higher.)"""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def main(path: str, task: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    forget_peak()
    took: dict[str, Any] = {"start_mb": peak_mb()}
    began_s = time.monotonic()

    def mark(stage: str) -> None:
        took[f"{stage}_mb"], took[f"{stage}_s"] = round(peak_mb()), round(time.monotonic() - began_s, 1)

    data = Path(path).read_bytes()
    reader = open_windows(data)
    assert reader is not None
    mark("read")
    took["statistics"] = window_statistics(reader, lambda raw: select_bands(raw, None, None))
    mark("statistics")
    found = segment(reader, task)
    mark("blend")
    reader.close()
    del reader, data
    class_ids, instances = found["class_ids"], list[Instance]()
    card = found["card"]
    if found["evidence"] is not None:
        class_ids, instances = split_in_blocks(
            found.pop("evidence"), class_id=card.foreground_id, background_id=card.background_id or 0
        )
        mark("split")
    took["png_bytes"] = len(encode_mask_png(class_ids, card.palette))
    mark("png")
    counted = tally(class_ids)
    took["pixels"] = [counted.pixels.get(index, 0) for index in range(4)]
    took["regions"] = counted.regions
    mark("regions")
    took["crc32"] = mask_crc32(class_ids, [one.rle for one in instances])
    took["instances"] = len(instances)
    took["mean_confidence"] = found["summary"].mean_confidence
    took["peak_mb"] = round(peak_mb())
    return took


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
