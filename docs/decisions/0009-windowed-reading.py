"""Windows of TIFFs by tifffile and by GDAL: `python docs/decisions/0009-windowed-reading.py [SIZE_PX]`.

Needs `pip install rasterio` besides Maskmill itself. Each case runs in a process of its own.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np

TILE_PX, STEP_PX = 512, 448
LAYOUTS = {
    "tiles, none": {"tile": (512, 512)},
    "tiles, deflate": {"tile": (512, 512), "compression": "deflate", "predictor": True},
    "tiles, LZW": {"tile": (256, 256), "compression": "lzw"},
    "tiles, zstd": {"tile": (512, 512), "compression": "zstd"},
    "tiles, JPEG": {"tile": (512, 512), "compression": "jpeg"},
    "strips, none": {"rowsperstrip": 16},
    "strips, deflate": {"rowsperstrip": 16, "compression": "deflate"},
}
Read = Callable[[int, int], np.ndarray]


def by_tifffile(data: bytes) -> tuple[Read, int]:
    from pipeline.corpus.windows import open_windows

    reader = open_windows(data)
    assert reader is not None
    return lambda y, x: reader.read(y, x, TILE_PX, TILE_PX), reader.height


def by_gdal(data: bytes) -> tuple[Read, int]:
    from rasterio.io import MemoryFile
    from rasterio.windows import Window

    warnings.simplefilter("ignore")  # GDAL misses the place on Earth
    file, local = MemoryFile(data), threading.local()

    def opened() -> object:
        if not hasattr(local, "dataset"):  # a dataset belongs to one thread
            local.dataset = file.open()
        return local.dataset

    return lambda y, x: opened().read(window=Window(x, y, TILE_PX, TILE_PX)), opened().height


def peak_mb() -> float:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def measure(path: str, library: str, threads: int) -> None:
    read, size = {"tifffile": by_tifffile, "GDAL": by_gdal}[library](Path(path).read_bytes())
    read(0, 0)
    before_mb = peak_mb()
    places = [*range(0, size - TILE_PX, STEP_PX), size - TILE_PX]
    began_s, cpu_s = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda y: [read(y, x)[0, 0] for x in places] and None, places))
    wall_s, cpu_s = time.perf_counter() - began_s, time.process_time() - cpu_s
    grown_mb = peak_mb() - before_mb
    print(f"{library:9} {threads} threads  {wall_s:6.2f} s  {cpu_s:6.2f} s of CPU  +{grown_mb:4.0f} MB", flush=True)


def main(size_px: int) -> None:
    import tifffile

    rng = np.random.default_rng(0)
    small = rng.normal(120, 40, (size_px // 20, size_px // 20)).astype(np.float32)
    image = np.clip(cv2.resize(small, (size_px, size_px), interpolation=cv2.INTER_CUBIC), 0, 255).astype(np.uint8)
    image = image // 2 + rng.integers(0, 8, image.shape, dtype=np.uint8)
    for name, options in LAYOUTS.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "image.tif")
            tifffile.imwrite(path, image, **options)
            print(f"{name}: {path.stat().st_size / 1e6:.0f} MB")
            for library in ("tifffile", "GDAL"):
                for threads in (1, 2):
                    subprocess.run([sys.executable, __file__, str(path), library, str(threads)], check=True)


if __name__ == "__main__":
    if len(sys.argv) == 4:
        measure(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 20_000)
