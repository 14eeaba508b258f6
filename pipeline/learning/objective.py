"""What training makes small: the parts of the loss of one batch. Owns: which losses a network gets, their weights, and
that the workers' losses are those of the whole batch. Must not know: optimisers, data sets, how a batch is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import distributed

from models import losses
from models.card import Card
from models.detection_losses import DetectionTraining
from pipeline.learning.examples import Batch
from pipeline.learning.recipe import LossConfig, LossTerm


class Objective:
    """The loss of a network on a batch, in parts."""

    def __init__(self, card: Card, loss: LossConfig, class_weights: Sequence[float] | None = None) -> None:
        """`class_weights`: one for each of the network's channels (`Examples.class_weights`), None for all alike.

        Raises ValueError for another number of them.
        """
        if class_weights is not None and len(class_weights) != card.network_channels:
            raise ValueError(f"{len(class_weights)} class weights for {card.network_channels} channels of the network")
        self.loss = loss
        self.detects = card.postprocessing.kind == "detections"
        self._class_weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)

    def trainee(self, network: torch.nn.Module) -> torch.nn.Module:
        """What is called to get losses, and what DistributedDataParallel has to wrap: the network itself, or around one
        that detects a module whose forward pass takes the truth as well. Parameters are shared.
        """
        if not self.detects or isinstance(network, DetectionTraining):
            return network
        return DetectionTraining(
            network,
            anchors_per_image=self.loss.anchors_per_image,
            regions_per_image=self.loss.regions_per_image,
            positive_share=self.loss.positive_share,
        )

    def parts(self, module: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """Named, weighted parts of the loss, scalars in float32; the loss is their sum.

        `module`: the trainee, or DistributedDataParallel around it, in training mode; `batch` on its device. Call it
        under autocast or not. With workers, every one gets the parts of the whole batch, and gradients that
        DistributedDataParallel averages into those of the whole batch; only Mask R-CNN's are each worker's own.
        """
        if self.detects:
            if not isinstance(getattr(module, "module", module), DetectionTraining):
                module = self.trainee(module)
            found: dict[str, torch.Tensor] = module(batch.inputs, batch.targets)
            return found
        outputs: Any = module(batch.inputs)
        heads = outputs if isinstance(outputs, dict) else {"out": outputs}
        targets_NHW: Any = batch.targets
        weights_NHW = None
        if batch.emphasis is not None:
            weights_of_emphasis = targets_NHW.new_tensor(
                [1.0, 1 + self.loss.border_weight, 1 + self.loss.touching_weight], dtype=torch.float32
            )
            weights_NHW = weights_of_emphasis[batch.emphasis.long()]
        parts = {}
        for head, logits_NCHW in heads.items():
            factor = 1.0 if head == "out" else self.loss.auxiliary_weight
            if factor:
                for term in self.loss.terms:
                    name = term.kind if head == "out" else f"{head}_{term.kind}"
                    value = self._term(term, logits_NCHW, targets_NHW, weights_NHW)
                    parts[name] = factor * term.weight * value
        return parts

    def _term(
        self, term: LossTerm, logits_NCHW: torch.Tensor, targets_NHW: torch.Tensor, weights_NHW: torch.Tensor | None
    ) -> torch.Tensor:
        class_weights_C = self._class_weights
        if term.kind == "dice":
            return losses.dice(logits_NCHW, targets_NHW, total=_over_workers)
        if term.kind == "lovasz":
            return losses.lovasz(logits_NCHW, targets_NHW, total=_over_workers)
        if term.kind == "focal":
            return losses.focal(
                logits_NCHW, targets_NHW, weights_NHW,
                gamma=term.gamma, class_weights_C=class_weights_C, total=_over_workers,
            )  # fmt: skip
        return losses.cross_entropy(
            logits_NCHW, targets_NHW, weights_NHW,
            class_weights_C=class_weights_C, label_smoothing=term.label_smoothing, total=_over_workers,
        )  # fmt: skip


def _over_workers(sums: torch.Tensor) -> torch.Tensor:
    """Added up over all workers. Backwards each worker's gradient is added up too: `world` times its share of that of
    the one loss, which DistributedDataParallel's mean makes right.
    """
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return sums
    from torch.distributed.nn.functional import all_reduce

    added: torch.Tensor = all_reduce(sums)
    return added
