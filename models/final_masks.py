"""From what a network says to the final mask and instances. Owns: which steps each kind of model goes through, and
their order. Must not know: networks, devices, tables; how a step works.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from models.card import Card, DetectionsPostprocessing, Postprocessing, WatershedPostprocessing
from models.cleanup import clean_class_ids, clean_labels
from models.masks import Instance
from models.pasting import paste_detections
from models.postprocessing import describe_instances, split_instances
from models.prediction import Prediction
from models.runs import clean_instances, paint
from models.seams import InstanceEvidence, split_in_blocks


def postprocess(
    prediction: Prediction, card: Card, settings: Postprocessing
) -> tuple[NDArray[np.uint8], list[Instance]]:
    """Final class ids uint8 [h, w] and instances (none for semantic models). On the CPU, thread safe,
    deterministic.

    For instance models the class ids are those of the instances kept: foreground that belongs to none is
    background, so pixels per class must be counted on this result and not taken from the prediction.
    """
    cleanup = card.cleanup
    background_id = card.background_id or 0
    if isinstance(settings, DetectionsPostprocessing) and (prediction.detections or prediction.whole is not None):
        class_ids, instances = prediction.class_ids, prediction.whole
        if prediction.detections is not None:
            class_ids, instances = paste_detections(
                prediction.detections,
                [info.id for info in card.classes],
                background_id=background_id,
                mask_threshold=settings.mask_threshold,
            )
        assert isinstance(instances, list)
        return _cleaned(card, class_ids, instances, may_overlap=True)
    if isinstance(settings, WatershedPostprocessing) and isinstance(prediction.whole, InstanceEvidence):
        class_ids, instances = split_in_blocks(
            prediction.whole, class_id=card.foreground_id, background_id=background_id
        )
        return _cleaned(card, class_ids, instances, may_overlap=False)
    if isinstance(settings, WatershedPostprocessing) and prediction.instance_evidence is not None:
        evidence = prediction.instance_evidence
        labels = split_instances(evidence["interior"], evidence["foreground"], settings)
        if cleanup is not None and not cleanup.does_nothing:
            labels = clean_labels(labels, cleanup)
        instances = describe_instances(labels, evidence["foreground"], card.foreground_id)
        return np.where(labels > 0, np.uint8(card.foreground_id), np.uint8(background_id)), instances
    if cleanup is not None and not cleanup.does_nothing:
        return clean_class_ids(prediction.class_ids, cleanup, background_id=card.background_id), []
    return prediction.class_ids, []


def _cleaned(
    card: Card, class_ids: NDArray[np.uint8], instances: list[Instance], *, may_overlap: bool
) -> tuple[NDArray[np.uint8], list[Instance]]:
    cleanup = card.cleanup
    if cleanup is None or cleanup.does_nothing:
        return class_ids, instances
    background_id = card.background_id or 0
    taken = None if may_overlap else class_ids
    instances = clean_instances(instances, cleanup, taken=taken, background_id=background_id)
    height, width = class_ids.shape
    return paint(instances, height=height, width=width, background_id=background_id), instances
