"""What a drawn mask looks like: tints and outlines where the labels are, and nowhere else."""

from __future__ import annotations

import numpy as np

from models.masks import encode_mask_png, encode_rle
from pipeline.insight.overlay import brightened, class_labels, instance_labels, painted

RED, GREEN = (255, 0, 0), (0, 255, 0)


def test_labels_are_outlined_in_full_colour_tinted_inside_and_clear_outside() -> None:
    pixels = np.full((9, 9, 3), 100, np.uint8)
    labels = np.zeros((9, 9), np.int32)
    labels[2:7, 2:7] = 1
    drawn = painted(pixels, labels, np.array([(0, 0, 0), RED], np.uint8))
    assert tuple(drawn[2, 4]) == RED == tuple(drawn[4, 6])
    inside = drawn[4, 4].astype(int)
    assert 100 < inside[0] < 255 and inside[1] == inside[2] < 100
    assert (drawn[labels == 0] == 100).all()


def test_touching_labels_are_told_apart_by_outlines() -> None:
    labels = np.ones((6, 8), np.int32)
    labels[:, 4:] = 2
    drawn = painted(np.zeros((6, 8, 3), np.uint8), labels, np.array([(0, 0, 0), RED, GREEN], np.uint8))
    assert tuple(drawn[3, 3]) == RED and tuple(drawn[3, 4]) == GREEN
    assert 0 < drawn[3, 1, 0] < 255 and 0 < drawn[3, 6, 1] < 255


def test_instances_keep_their_place_and_get_colours_of_their_own() -> None:
    first, second = np.zeros((5, 7), bool), np.zeros((5, 7), bool)
    first[:2], second[4] = True, True
    labels, colors = instance_labels([{"rle": encode_rle(first)}, {"rle": encode_rle(second)}], (5, 7))
    assert ((labels == 1) == first).all() and ((labels == 2) == second).all()
    assert np.abs(colors[1].astype(int) - colors[2]).max() > 100
    assert not colors[0].any()


def test_no_instances_are_no_labels() -> None:
    labels, colors = instance_labels([], (3, 4))
    assert labels.shape == (3, 4) and not labels.any() and len(colors) == 1


def test_classes_are_coloured_by_the_palette_and_black_is_clear() -> None:
    ids = np.array([[0, 1], [2, 1]], np.uint8)
    labels, colors = class_labels(encode_mask_png(ids, [(0, 0, 0), RED, GREEN]))
    assert labels[0, 0] == 0
    assert tuple(colors[labels[0, 1]]) == RED and tuple(colors[labels[1, 0]]) == GREEN


def test_a_mask_whose_id_0_has_a_colour_is_painted_there_too() -> None:
    labels, colors = class_labels(encode_mask_png(np.zeros((2, 2), np.uint8), [GREEN]))
    assert (labels > 0).all() and (colors[labels] == GREEN).all()


def test_only_dark_images_are_brightened_and_their_order_of_grey_is_kept() -> None:
    ramp = np.repeat(np.arange(60, dtype=np.uint8)[None, :, None], 3, axis=2).repeat(60, axis=0)
    shown = brightened(ramp)
    assert shown.max() == 255 and (np.diff(shown[0, :, 0].astype(int)) >= 0).all()
    light = np.full((4, 4, 3), 200, np.uint8)
    assert brightened(light) is light


def test_a_black_image_stays_drawable() -> None:
    assert not brightened(np.zeros((4, 4, 3), np.uint8)).any()
