from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.architectures import card_for, untrained_card
from models.card import Card, ClassInfo, Preprocessing, ResizePolicy
from models.losses import IGNORED
from models.masks import encode_rle
from models.preprocessing import image_statistics, normalize
from pipeline.errors import UsageError
from pipeline.learning.dataset import Dataset
from pipeline.learning.examples import Batch, Examples
from pipeline.learning.recipe import AugmentationConfig, SamplingConfig

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "labels"))
from small_datasets import write_voc
from tiny_nuclei import write_dataset

#: Views are the images themselves, normalised.
STILL = AugmentationConfig(
    scale=(1, 1), flip_horizontal=0, color_probability=0, blur_probability=0, noise_probability=0, beyond="nothing"
)
DETECTOR = "maskrcnn_mobilenet_v3_large_fpn"


@pytest.fixture(scope="module")
def discs(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return Dataset(write_dataset(tmp_path_factory.mktemp("data") / "discs", images=9), "train")


@pytest.fixture(scope="module")
def street(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Six masks of classes 0 and 1, the upper rows not known; class 2 on one image only, 4 pixels large."""
    folder = tmp_path_factory.mktemp("data") / "street"
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    random = np.random.default_rng(0)
    for index in range(6):
        mask = np.zeros((48, 64), dtype=np.uint8)
        mask[:, 20 + 4 * index :] = 1
        if index == 0:
            mask[40:42, 50:52] = 2
        mask[:4] = 255
        Image.fromarray(mask).save(folder / "masks" / f"{index}.png")
        pixels = (mask % 5 * 60)[:, :, None] + random.integers(0, 60, (48, 64, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / f"{index}.png")
    (folder / "classes.json").write_text(json.dumps(["road", "car", "cat"]))
    (folder / "splits.json").write_text(json.dumps({"train": [f"{index}.png" for index in range(6)]}))
    return Dataset(folder, "train")


def semantic_card(names: tuple[str, ...] = ("road", "car", "cat")) -> Card:
    return untrained_card("street", task="semantic", class_names=names).model_copy(update={"canvas_multiple": 16})


def instance_card() -> Card:
    return untrained_card("discs", task="instance", class_names=("background", "disc"))


def detector_card(names: tuple[str, ...] = ("background", "disc")) -> Card:
    return card_for("boxes", DETECTOR, class_names=names, canvas_multiple=1)


def examples(dataset: Dataset, card: Card, **changes: object) -> Examples:
    settings: dict[str, object] = {
        "augmentation": AugmentationConfig(),
        "sampling": SamplingConfig(),
        "batch_size": 4,
        "seed": 3,
    }
    return Examples(dataset, card, **{**settings, **changes})  # type: ignore[arg-type]


def assert_equal(first: Batch, second: Batch) -> None:
    assert first.names == second.names
    for left, right in zip(first.inputs, second.inputs, strict=True):
        assert torch.equal(left, right)
    for left, right in zip(first.targets, second.targets, strict=True):
        if isinstance(left, torch.Tensor):
            assert torch.equal(left, right)
        else:
            assert all(torch.equal(left[name], right[name]) for name in left)


WILD = AugmentationConfig(
    rotate_probability=0.5, elastic_probability=0.5, quarter_turns=True, invert_probability=0.5, veil_probability=0.5
)


@pytest.mark.parametrize("kind", ["classes", "boundaries", "detection"])
def test_a_step_is_the_same_for_any_number_of_workers(kind: str, discs: Dataset) -> None:
    card = {
        "classes": semantic_card(("background", "disc")), "boundaries": instance_card(), "detection": detector_card(),
    }[kind]  # fmt: skip
    made = examples(discs, card, augmentation=WILD)
    streamed = list(islice(made.stream(5, threads=2), 3))
    for step, batch in enumerate(streamed, start=5):
        whole = examples(discs, card, augmentation=WILD).batch(step)
        assert_equal(whole, batch)
        shares = [made.batch(step, rank, 3) for rank in range(3)]
        assert [len(share.names) for share in shares] == [1, 1, 2]
        assert sum((share.names for share in shares), ()) == whole.names
        assert torch.equal(torch.cat([share.inputs[0].flatten() for share in shares[:2]]),
                           torch.cat([one.flatten() for one in whole.inputs[:2]]))  # fmt: skip
    assert streamed[0].names != streamed[1].names
    other = examples(discs, card, augmentation=WILD, seed=4).batch(5)
    assert not torch.equal(other.inputs[0].flatten()[:500], streamed[0].inputs[0].flatten()[:500])
    with pytest.raises(ValueError, match="5 workers cannot share a batch of 4"):
        made.batch(0, 0, 5)


def test_a_plain_view_is_what_the_segmenter_sees(street: Dataset) -> None:
    for normalization in ("per_image", "imagenet", "unit"):
        card = semantic_card().model_copy(update={"preprocessing": Preprocessing(normalization=normalization)})
        batch = examples(street, card, augmentation=STILL).batch(0)
        assert isinstance(batch.inputs, torch.Tensor)
        assert batch.inputs.is_contiguous(memory_format=torch.channels_last)
        assert batch.emphasis is None
        for name, inputs, targets in zip(batch.names, batch.inputs, batch.targets, strict=True):
            item = next(item for item in street.items if item.name == name)
            pixels = street.image(item)
            statistics = torch.tensor([image_statistics(pixels)])
            expected = normalize(
                torch.from_numpy(pixels.copy())[None], statistics, card.preprocessing, dtype=torch.float32
            )
            assert torch.allclose(inputs, expected[0], atol=1e-6)
            assert np.array_equal(targets.numpy(), street.class_ids(item))
            assert (targets[:4] == IGNORED).all()


def test_changed_colors_are_normalised_as_a_whole_image_of_them(discs: Dataset) -> None:
    """Under another light the view of a part keeps the mean and deviation that its whole image would give it."""
    bright = STILL.model_copy(update={"color_probability": 1.0, "contrast": 0.0, "saturation": 0.0, "brightness": 0.2})
    card = semantic_card(("background", "disc"))
    plain = examples(discs, card, augmentation=STILL.model_copy(update={"crop_px": (32, 32)})).batch(0)
    lit = examples(discs, card, augmentation=bright.model_copy(update={"crop_px": (32, 32)})).batch(0)
    # The same part of the same images; brightness alone is taken out by the normalisation, but for what it clips.
    assert plain.names == lit.names
    differences = (plain.inputs[index] - lit.inputs[index] for index in range(4))  # type: ignore[operator]
    assert sum(float(one.abs().mean()) for one in differences) / 4 < 0.1


def test_classes_are_found_by_name(street: Dataset) -> None:
    card = semantic_card(("cat", "tree", "car", "road"))
    batch = examples(street, card, augmentation=STILL).batch(0)
    item = next(item for item in street.items if item.name == batch.names[0])
    expected = np.array([3, 2, 0, *[IGNORED] * 253])[street.class_ids(item)]
    assert np.array_equal(batch.targets[0].numpy(), expected)  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="has a class 'cat' that the model lacks: it has road, car"):
        examples(street, semantic_card(("road", "car")))


def test_objects_by_boundaries(discs: Dataset) -> None:
    batch = examples(discs, instance_card(), augmentation=STILL).batch(0)
    item = next(item for item in discs.items if item.name == batch.names[0])
    targets = batch.targets[0]
    assert isinstance(targets, torch.Tensor)
    assert np.array_equal(targets.numpy() > 0, discs.instance_labels(item) > 0)
    assert set(targets.unique().tolist()) == {0, 1, 2}
    assert batch.emphasis is not None
    assert set(batch.emphasis.unique().tolist()) >= {0, 1}


@pytest.fixture
def crowded(tmp_path: Path) -> Dataset:
    """One image: an object of each of two categories, one over the other, and a crowd."""
    folder = tmp_path / "crowded"
    (folder / "images").mkdir(parents=True)
    Image.fromarray(np.full((32, 40, 3), 90, dtype=np.uint8)).save(folder / "images" / "a.png")
    annotations = []
    for number, (category, (x0, y0, x1, y1), crowd) in enumerate(
        [(1, (0, 0, 20, 20), 0), (2, (10, 10, 30, 30), 0), (1, (24, 0, 40, 16), 1)]
    ):
        mask = np.zeros((32, 40), dtype=bool)
        mask[y0:y1, x0:x1] = True
        rle = encode_rle(mask)
        segmentation = {"size": rle["size"], "counts": rle["counts"].decode()}
        annotations.append(
            {"id": number + 1, "image_id": 7, "category_id": category, "iscrowd": crowd, "segmentation": segmentation}
        )
    images = [{"id": 7, "file_name": "a.png", "width": 40, "height": 32}]
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(content))
    return Dataset(folder)


def test_objects_by_boxes(crowded: Dataset) -> None:
    batch = examples(crowded, detector_card(("background", "cat", "dog")), augmentation=STILL, batch_size=1).batch(0)
    assert isinstance(batch.inputs, list)
    assert batch.inputs[0].shape == (3, 32, 40)
    target = batch.targets[0]
    assert isinstance(target, dict)
    found = {int(label): box.tolist() for label, box in zip(target["labels"], target["boxes"], strict=True)}
    assert found == {1: [0, 0, 20, 20], 2: [10, 10, 30, 30]}
    assert target["masks"].sum(dim=(1, 2)).tolist() == [400, 400]
    assert target["ignored"].sum() == 16 * 16 - 6 * 6
    assert batch.to("cpu").targets[0].keys() == target.keys()  # type: ignore[union-attr]


def test_a_crowd_teaches_no_pixels(crowded: Dataset) -> None:
    card = instance_card().model_copy(update={"classes": detector_card(("background", "cat")).classes})
    wide = STILL.model_copy(update={"crop_px": (32, 64)})
    for one in (card, semantic_card(("background", "cat", "dog"))):
        batch = examples(crowded, one, augmentation=wide, batch_size=1).batch(0)
        # The crowd but for the object before it, and what is beyond the image.
        assert (batch.targets[0] == IGNORED).sum() == 16 * 16 - 6 * 6 + 32 * 24


def test_views_have_the_size_that_the_card_serves(street: Dataset, discs: Dataset) -> None:
    assert examples(street, semantic_card()).crop == (48, 64)
    halved = semantic_card().model_copy(update={"size_policy": ResizePolicy(short_side_px=96)})
    made = examples(street, halved, augmentation=STILL)
    assert made.crop == (96, 128)
    batch = made.batch(0)
    # Twice the size: the first 4 rows, which are not known, are 8.
    assert (batch.targets[0][:8] == IGNORED).all()  # type: ignore[index]
    assert not (batch.targets[0][8:] == IGNORED).any()  # type: ignore[index]
    with pytest.raises(ValueError, match=r"crop_px \(40, 40\) must be multiples of the network's 16 pixels"):
        examples(street, semantic_card(), augmentation=AugmentationConfig(crop_px=40))


def test_rare_classes(street: Dataset) -> None:
    made = examples(street, semantic_card(), sampling=SamplingConfig(rare_image_share=0.5, stratum_power=1))
    pixels = made.pixels_of_classes()
    assert pixels[:, 2].tolist() == [4, 0, 0, 0, 0, 0]
    assert pixels.sum(axis=1).tolist() == [44 * 64] * 6
    assert made.chances[0] / made.chances[1] == pytest.approx((0.5 * 6) ** 0.5)
    weights = made.class_weights("inverse")
    assert weights is not None
    assert weights[2] > 100 * weights[0]
    assert made.class_weights("none") is None
    small = STILL.model_copy(update={"crop_px": (16, 16)})

    def share(probability: float) -> float:
        sampling = SamplingConfig(focus_probability=probability, stratum_power=1)
        batches = [
            examples(street, semantic_card(), augmentation=small, sampling=sampling).batch(step) for step in range(24)
        ]
        return sum(float((batch.targets == 2).sum()) for batch in batches)  # type: ignore[union-attr, union-attr]

    assert share(1.0) > 2 * share(0.0)


def test_preparing_ahead_leaves_torchs_threads_to_the_step(street: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        made = examples(street, semantic_card())
        counts: list[int] = []
        batch = made.batch
        monkeypatch.setattr(made, "batch", lambda *place: (counts.append(torch.get_num_threads()), batch(*place))[1])
        list(islice(made.stream(threads=2), 3))
        assert len(counts) >= 3
        assert set(counts) == {1}
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(usual)


def test_images_that_do_not_fit_into_the_cache_are_read_again(street: Dataset) -> None:
    none, one = examples(street, semantic_card(), cache_bytes=0), examples(street, semantic_card(), cache_bytes=13000)
    assert_equal(none.batch(1), examples(street, semantic_card()).batch(1))
    assert_equal(one.batch(1), none.batch(1))
    assert len(none._cache) == 0
    assert len(one._cache) == 1


def test_an_epoch_shows_every_image(street: Dataset) -> None:
    made = examples(street, semantic_card(), batch_size=3)
    assert len(made) == 6
    assert made.steps_per_epoch == 2
    assert {name for step in (0, 1) for name in made.batch(step).names} == {item.name for item in street.items}


def test_rare_objects_are_seen_more_often(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "discs", images=8)
    content = json.loads((folder / "annotations.json").read_text())
    rare = content["images"][0]
    content["categories"].append({"id": 99, "name": "rare"})
    for one in content["annotations"]:
        if one["image_id"] == rare["id"]:
            one["category_id"] = 99
    (folder / "annotations.json").write_text(json.dumps(content))
    dataset = Dataset(folder, "train")
    card = detector_card(dataset.class_names)
    made = examples(dataset, card, sampling=SamplingConfig(rare_image_share=0.9))
    chances = dict(zip([item.name for item in dataset.items], made.chances.tolist(), strict=True))
    assert chances.pop(rare["file_name"]) > 1.5 * max(chances.values())


def test_objects_that_nobody_told_apart_are_not_learnt_as_nothing(tmp_path: Path) -> None:
    dataset = Dataset(write_voc(tmp_path), "val")
    card = detector_card(dataset.class_names)
    with pytest.raises(UsageError, match=r"2007_3\.jpg tells no objects apart"):
        examples(dataset, card, batch_size=1).batch(0)


def test_what_cannot_be_taught_is_refused(street: Dataset) -> None:
    with pytest.raises(UsageError, match="has labels of classes only, and unet is to tell objects apart"):
        examples(street, instance_card())
    sixteen = semantic_card().model_copy(update={"preprocessing": Preprocessing(dtype="uint16")})
    with pytest.raises(ValueError, match="data sets are read as 8-bit RGB"):
        examples(street, sixteen)


def test_one_band(street: Dataset) -> None:
    card = semantic_card().model_copy(update={"preprocessing": Preprocessing(bands=(1,), normalization="unit")})
    batch = examples(street, card, augmentation=STILL).batch(0)
    assert isinstance(batch.inputs, torch.Tensor)
    assert batch.inputs.shape == (4, 1, 48, 64)
    item = next(item for item in street.items if item.name == batch.names[0])
    assert np.allclose(batch.inputs[0, 0].numpy() * 255, street.image(item)[:, :, 1], atol=1e-3)
    assert isinstance(card.classes[0], ClassInfo)
