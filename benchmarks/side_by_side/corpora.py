"""The images of the comparison, made by code but for the nuclei. Owns: what a corpus holds. Must not know: engines.

Of most kinds there are 64 different images, over and over under other names.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

DIFFERENT = 64
NUCLEI = Path(__file__).resolve().parents[2] / "examples" / "nuclei"


def write_photos(folder: Path, count: int) -> list[Path]:
    """Photo-like 480×360 JPEGs, quality 90: about 45 kB each, as street scenes of that size are."""
    return _write(folder, count, ".jpg", lambda seed: _jpeg(_photo(seed, 360, 480)))


def write_large_photos(folder: Path, count: int) -> list[Path]:
    """4000×3000 JPEGs, quality 90, of 8 different kinds: 12 megapixels, about 3.5 MB each."""
    return _write(folder, count, ".jpg", lambda seed: _jpeg(_photo(seed, 3000, 4000)), different=8)


def write_tiny(folder: Path, count: int) -> list[Path]:
    """64×64 PNGs: about 11 kB each."""
    return _write(folder, count, ".png", lambda seed: _encode(".png", _photo(seed, 64, 64)))


def write_half_broken(folder: Path, count: int) -> list[Path]:
    """The photos, and as many files again that are none, between them: empty, a web page, noise under a JPEG's first
    bytes, a JPEG cut off in the middle, one whose second half is zeros."""
    good = write_photos(folder, count)
    random = np.random.default_rng(0)
    for index, path in enumerate(good):
        data = path.read_bytes()
        broken = (
            b"",
            b"<!DOCTYPE html><html><title>404 Not Found</title></html>" * 20,
            data[:600] + random.bytes(len(data) - 600),
            data[: len(data) // 2],
            data[: len(data) // 2] + bytes(len(data) // 2),
        )[index % 5]
        path.with_name(f"{path.stem}-broken.jpg").write_bytes(broken)
    return sorted(folder.iterdir())


def write_nuclei(folder: Path, count: int) -> list[Path]:
    """480×360 JPEGs of the nuclei in `examples/`, each scaled and turned another way."""
    sources = sorted(NUCLEI.glob("*.png"))

    def one(seed: int) -> bytes:
        pixels = cv2.imread(str(sources[seed % len(sources)]), cv2.IMREAD_COLOR)
        pixels = np.rot90(pixels, seed // len(sources) % 4)
        return _jpeg(cv2.resize(pixels, (480, 360), interpolation=cv2.INTER_AREA))

    return _write(folder, count, ".jpg", one)


def _write(
    folder: Path, count: int, suffix: str, make: Callable[[int], bytes], *, different: int = DIFFERENT
) -> list[Path]:
    made = [make(seed) for seed in range(min(count, different))]
    paths = [folder / f"{index:06d}{suffix}" for index in range(count)]
    for index, path in enumerate(paths):
        path.write_bytes(made[index % different])
    return paths


def _photo(seed: int, height: int, width: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    rough = random.integers(0, 255, (max(4, height // 12), max(4, width // 12), 3)).astype(np.uint8)
    smooth = cv2.resize(rough, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(smooth + random.normal(0, 1.8, smooth.shape), 0, 255).astype(np.uint8)


def _jpeg(pixels: np.ndarray) -> bytes:
    return _encode(".jpg", pixels, cv2.IMWRITE_JPEG_QUALITY, 90)


def _encode(suffix: str, pixels: np.ndarray, *options: int) -> bytes:
    done, data = cv2.imencode(suffix, pixels, options)
    if not done:
        raise RuntimeError(f"no {suffix} could be made")
    return data.tobytes()
