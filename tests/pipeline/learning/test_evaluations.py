from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_networks import small_card

from models.architectures import untrained_card
from models.masks import Instance, encode_rle
from pipeline.errors import UsageError
from pipeline.learning.evaluations import align_classes, counting_score, evaluations_table, measure_image
from pipeline.learning.labels.truth import IGNORE_ID, LabelledObject, Labels
from pipeline.learning.scores import score
from pipeline.table.evaluations import EVALUATIONS, MEASURES

SIZE = (20, 30)


def box(top: int, bottom: int, left: int, right: int) -> np.ndarray:
    mask = np.zeros(SIZE, dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


def labelled(mask: np.ndarray, class_id: int = 1, *, crowd: bool = False) -> LabelledObject:
    return LabelledObject(class_id, encode_rle(mask), float(mask.sum()), crowd)


def found(mask: np.ndarray, score: float, class_id: int = 1) -> Instance:
    return Instance(class_id, score, (0, 0, 0, 0), int(mask.sum()), encode_rle(mask))


def test_what_a_row_holds() -> None:
    truth = Labels(*SIZE, objects=(labelled(box(0, 5, 0, 5)), labelled(box(10, 20, 10, 20), crowd=True)))
    predicted = np.zeros(SIZE, dtype=np.uint8)
    predicted[0:5, 0:4] = 1
    row = measure_image(predicted, [found(box(0, 5, 0, 4), 0.9)], truth)
    assert row.keys() == set(MEASURES.names)
    assert row["ignored_pixels"] == 100
    assert row["confusion"] == [
        {"actual": 0, "predicted": 0, "pixels": 600 - 25 - 100},
        {"actual": 1, "predicted": 0, "pixels": 5},
        {"actual": 1, "predicted": 1, "pixels": 20},
    ]
    assert row["panoptic"] == [{"class_id": 1, "matched": 1, "predicted": 1, "actual": 1, "matched_iou": 0.8}]
    assert row["objects"] == [{"class_id": 1, "all": 1, "small": 1, "medium": 0, "large": 0}]
    (detection,) = row["detections"]
    assert (detection["class_id"], detection["score"]) == (1, 0.9)
    other = Labels(*SIZE, objects=(labelled(box(0, 5, 0, 6)),))
    assert measure_image(predicted, [], other)["truth_crc32"] != row["truth_crc32"]


def test_labels_or_models_of_classes_only_have_no_instances() -> None:
    class_ids = np.full(SIZE, 2, dtype=np.uint8)
    class_ids[:, 0] = IGNORE_ID
    truth = Labels(*SIZE, class_ids=class_ids)
    for instances in (None, [found(box(0, 5, 0, 4), 0.9)]):
        row = measure_image(class_ids * 0 + 2, instances, truth)
        assert row["confusion"] == [{"actual": 2, "predicted": 2, "pixels": 20 * 29}]
        assert row["panoptic"] is row["detections"] is row["objects"] is None
    with_objects = Labels(*SIZE, objects=(labelled(box(0, 5, 0, 5)),))
    assert measure_image(class_ids, None, with_objects)["detections"] is None


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UsageError, match=r"prediction has shape \(30, 20\), the label \(20, 30\)"):
        measure_image(np.zeros(SIZE[::-1], dtype=np.uint8), None, Labels(*SIZE, objects=()))
    with pytest.raises(UsageError, match=r"no class: \[9\]"):
        measure_image(np.zeros(SIZE, dtype=np.uint8), None, Labels(*SIZE, objects=(), unknown={9: 1}))


def test_classes_are_the_same_by_name() -> None:
    alignment = align_classes({0: "background", 3: "tree", 9: "kite"}, ("tree", "background", "road"))
    assert alignment.names == ("tree", "background", "road", "kite")
    predicted = np.array([[0, 3], [9, 7]], dtype=np.uint8)
    assert alignment.class_ids(predicted).tolist() == [[1, 0], [3, IGNORE_ID]]
    assert [one.class_id for one in alignment.instances([found(box(0, 1, 0, 1), 0.5, 9)])] == [3]
    with pytest.raises(UsageError, match="none of the data set's"):
        align_classes({0: "background", 1: "cat"}, ("background", "dog"))


def test_several_classes_of_a_model_may_be_one_of_the_labels() -> None:
    alignment = align_classes(
        {0: "background", 1: "car", 2: "lorry"},
        ("background", "vehicle"),
        renamed={"car": "vehicle", "lorry": "vehicle"},
    )
    assert alignment.names == ("background", "vehicle")
    assert alignment.class_ids(np.array([[0, 1, 2]], dtype=np.uint8)).tolist() == [[0, 1, 1]]
    with pytest.raises(UsageError, match="'bike' is no class of the model"):
        align_classes({0: "car"}, ("car",), renamed={"bike": "car"})
    with pytest.raises(UsageError, match="'bike' is no class of the data set"):
        align_classes({0: "car"}, ("car",), renamed={"car": "bike"})


def test_detectors_are_cut_where_others_are_not() -> None:
    assert counting_score(untrained_card("net", task="instance")) == 0.0
    assert counting_score(small_card("maskrcnn_mobilenet_v3_large_fpn")) == 0.5
    truth = Labels(*SIZE, objects=(labelled(box(0, 5, 0, 5)),))
    doubtful = [found(box(0, 5, 0, 5), 0.3)]
    row = measure_image(np.zeros(SIZE, dtype=np.uint8), doubtful, truth, min_score=0.5)
    assert [(one["matched"], one["predicted"], one["actual"]) for one in row["panoptic"]] == [(0, 0, 1)]
    assert [one["score"] for one in row["detections"]] == [0.3]


def test_classes_of_the_model_alone_are_wrong_wherever_they_are() -> None:
    alignment = align_classes({0: "road", 1: "kite"}, ("road", "tree"))
    predicted = np.zeros(SIZE, dtype=np.uint8)
    predicted[:10] = 1
    truth = Labels(*SIZE, class_ids=np.zeros(SIZE, dtype=np.uint8))
    row = measure_image(alignment.class_ids(predicted), None, truth) | {"image_uri": "a", "status": "ok"}
    scores = score(evaluations_table([row], alignment.names), resamples=0)
    assert scores.iou_per_class == {"road": 0.5, "tree": None, "kite": 0.0}
    assert scores.miou == 0.25
    assert scores.left_out == ("tree",)


def test_a_table_goes_through_parquet_and_other_readers() -> None:
    truth = Labels(*SIZE, objects=(labelled(box(0, 5, 0, 5)),))
    predicted = np.zeros(SIZE, dtype=np.uint8)
    rows = [
        {"image_uri": "a", "status": "ok", "width": 30, **measure_image(predicted, [], truth)},
        {"image_uri": "b", "status": "error", "error_kind": "corrupt"},
    ]
    table = evaluations_table(rows, ("background", "object"))
    assert table.schema.equals(EVALUATIONS)
    sink = io.BytesIO()
    pq.write_table(table, sink)
    again = pq.read_table(pa.BufferReader(sink.getvalue()))
    scores = score(again, resamples=10)
    assert scores == score(table, resamples=10)
    assert (scores.images, scores.failed) == (1, 1)
    assert scores.class_names == ("background", "object")
