from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torchvision.models.detection.roi_heads import paste_masks_in_image

from models.masks import decode_rle
from models.pasting import Detections, paste_detections

CLASS_IDS = [0, 3, 7, 200]


def detections(boxes: list[list[float]], *, height: int, width: int, seed: int = 0, grid: int = 28) -> Detections:
    random = np.random.default_rng(seed)
    coarse = random.uniform(0, 1, (len(boxes), grid // 7, grid // 7))
    masks = coarse.repeat(7, axis=1).repeat(7, axis=2).astype(np.float32)
    return Detections(
        np.array(boxes, np.float32).reshape(-1, 4),
        np.linspace(0.9, 0.2, len(boxes), dtype=np.float32),
        np.arange(len(boxes)) % 3 + 1,
        masks,
        height,
        width,
    )


def random_boxes(count: int, height: int, width: int, seed: int) -> list[list[float]]:
    random = np.random.default_rng(seed)
    corners = random.uniform(0, 1, (count, 2, 2)) * (width, height)
    return np.sort(corners, axis=1).reshape(count, 4).tolist()


@pytest.mark.parametrize(("height", "width"), [(60, 90), (1, 40), (37, 1), (400, 300)])
def test_masks_are_torchvisions(height: int, width: int) -> None:
    edges = [[0, 0, width, height], [0, 0, 0.5, 0.5], [width - 0.3, 0, width, height], [0, height / 2, width, height]]
    found = detections(edges + random_boxes(20, height, width, 1), height=height, width=width)
    pasted = paste_masks_in_image(
        torch.from_numpy(found.masks)[:, None], torch.from_numpy(found.boxes), (height, width)
    )
    expected = (pasted[:, 0] >= 0.5).numpy()
    class_ids, instances = paste_detections(found, CLASS_IDS, background_id=0, mask_threshold=0.5)
    kept = np.flatnonzero(expected.any(axis=(1, 2)))
    assert len(instances) == len(kept) > 3
    picture = np.zeros((height, width), np.uint8)
    for one, index in reversed(list(zip(instances, kept, strict=True))):
        assert np.array_equal(decode_rle(one.rle), expected[index])
        assert one.area == expected[index].sum()
        assert one.score == pytest.approx(found.scores[index])
        picture[expected[index]] = CLASS_IDS[found.labels[index]]
    assert np.array_equal(class_ids, picture)


def test_run_lengths_are_pycocotools_own_whatever_the_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    found = detections([[0, 0, 50, 40], [3.2, 0, 17, 40]], height=40, width=50)
    found = found._replace(masks=np.ones_like(found.masks))
    whole = paste_detections(found, CLASS_IDS, background_id=0, mask_threshold=0.3)
    monkeypatch.setattr("models.pasting._BAND_PIXELS", 41)
    banded = paste_detections(found, CLASS_IDS, background_id=0, mask_threshold=0.3)
    assert np.array_equal(whole[0], banded[0])
    assert whole[1] == banded[1]
    for one in whole[1]:
        assert one.rle == coco_mask.encode(np.asfortranarray(decode_rle(one.rle).astype(np.uint8)))


def test_masks_without_a_pixel_are_dropped() -> None:
    found = detections([[2, 2, 8, 8]], height=20, width=20)
    found = found._replace(masks=np.zeros_like(found.masks))
    class_ids, instances = paste_detections(found, CLASS_IDS, background_id=7, mask_threshold=0.5)
    assert instances == []
    assert (class_ids == 7).all()


def test_needs_no_torch() -> None:
    code = "import sys, models.pasting; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_hundreds_of_masks_on_megapixels_take_little_memory() -> None:
    code = """
import json
import numpy as np
from models.pasting import Detections, paste_detections

random = np.random.default_rng(3)
height, width = 3000, 4000
corners = random.uniform(0, 1, (300, 2, 2)) * (width, height)
boxes = np.sort(corners, axis=1).reshape(300, 4).astype(np.float32)
boxes[:10] = 0, 0, width, height
masks = random.uniform(0, 1, (300, 4, 4)).repeat(7, axis=1).repeat(7, axis=2).astype(np.float32)
found = Detections(boxes, np.linspace(0.9, 0.2, 300, dtype=np.float32), np.ones(300, np.int64), masks, height, width)
class_ids, instances = paste_detections(found, [0, 1], background_id=0, mask_threshold=0.5)
(peak_kb,) = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(json.dumps([len(instances), sum(one.area for one in instances), int(peak_kb) / 1024]))
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    count, area, peak_mb = json.loads(answer.stdout)
    assert count == 300
    assert area > 100_000_000
    assert peak_mb < 400
