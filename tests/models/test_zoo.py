"""The model that is shipped, on the images that are shipped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models.file import load_module, model_version, read_card
from models.preprocessing import image_statistics
from models.segmenter import Segmenter

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "zoo" / "nuclei-unet.safetensors"
IMAGES = ROOT / "examples" / "nuclei"


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    card, module = load_module(MODEL.read_bytes())
    return Segmenter(module, card, device="cpu", precision="fp32")


def test_is_small_and_tells_what_it_is() -> None:
    card = read_card(MODEL)
    assert MODEL.stat().st_size < 16e6
    assert card.name == "nuclei-unet"
    assert model_version(MODEL.read_bytes()) == "180137b706e5"
    assert card.class_names() == {0: "background", 1: "nucleus"}
    figures = card.metrics["val"]["fp32"]  # type: ignore[index, call-overload]
    assert figures["images"] == 40  # type: ignore[index, call-overload]
    assert figures["foreground_iou"] >= 0.83  # type: ignore[index, call-overload, operator]
    assert {"data_sha256", "code_sha256", "settings", "hardware", "minutes", "torch"} <= card.provenance.keys()


@pytest.mark.parametrize(
    ("prefix", "nuclei"),
    [("03b9306f44e9", 22), ("3441821e", 28), ("6fb82031", 7), ("751f421d", 29), ("337b6eed", 51)],
)
def test_counts_nuclei(segmenter: Segmenter, prefix: str, nuclei: int) -> None:
    (path,) = IMAGES.glob(f"{prefix}*.png")
    with Image.open(path) as image:
        pixels = np.array(image.convert("RGB"))
    height, width = pixels.shape[:2]
    canvas_height, canvas_width = segmenter.canvas(height, width)
    padded = np.pad(pixels, ((0, canvas_height - height), (0, canvas_width - width), (0, 0)), mode="edge")
    pending = segmenter.submit(
        padded[None],
        np.array([[height, width]], dtype=np.int32),
        np.array([image_statistics(pixels)], dtype=np.float32),
    )
    (prediction,) = segmenter.finish(pending)
    class_ids, instances = segmenter.postprocess(prediction)
    assert 0.6 * nuclei <= len(instances) <= 1.6 * nuclei
    assert sum(instance.area for instance in instances) == np.count_nonzero(class_ids)


def test_examples_cover_all_sizes_and_kinds() -> None:
    sizes = set()
    for path in IMAGES.glob("*.png"):
        with Image.open(path) as image:
            sizes.add(image.size)
    assert sizes == {
        (256, 256), (360, 360), (320, 256), (640, 512), (1024, 1024), (696, 520), (347, 260), (1272, 603)
    }  # fmt: skip
    assert len(list(IMAGES.glob("*.png"))) >= 24
    readme = (IMAGES / "README.md").read_text()
    assert "CC0" in readme
    for path in IMAGES.glob("*.png"):
        assert path.name[:12] in readme
