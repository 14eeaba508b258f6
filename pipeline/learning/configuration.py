"""What a training run is told. Owns: the settings, their limits, and which of them make it another run. Must not know:
how anything is done.

The command, the Python call and the flow share it.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from pipeline.config import BatchSize, Threads
from pipeline.learning.labels.source import Layout
from pipeline.learning.labels.splits import Splitting
from pipeline.learning.recipe import AugmentationConfig, LossConfig, SamplingConfig

Engine = Literal["auto", "local", "ray"]

#: What decides where and how fast a run is done, not what comes out. (The number of workers moves the last bits only.)
_ELSEWHERE = frozenset(
    {
        "dataset", "dataset_profile", "layout", "registry", "registry_profile", "out", "checkpoints", "engine",
        "workers", "threads", "use_gpu", "ray_address", "max_failures", "shared_filesystem", "restart", "check",
    }
)  # fmt: skip


class TrainConfig(BaseModel):
    """One `maskmill train` command. Holds no secret: credentials come from the environment and named profiles."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str = Field(description="The labelled data set: a folder or URL, in any of the layouts.")
    name: str = Field(pattern=r"^[a-z][a-z0-9-]*$", max_length=80, description="Of the model.")

    # What is trained.
    arch: str | None = Field(None, description="An architecture. Default: that of INIT, else unet.")
    encoder: str | None = Field(None, description="Its encoder, where it takes one.")
    args: dict[str, JsonValue] = Field({}, description="Other arguments of the architecture.")
    task: Literal["auto", "semantic", "instance"] = Field(
        "auto", description="auto: instance where objects of one class are told apart, or the architecture detects."
    )
    normalization: Literal["auto", "imagenet", "per_image", "unit"] = Field(
        "auto", description="Of pixels. auto: that of the weights it starts from, else per_image."
    )
    init: str | None = Field(None, description="A model to start from; where classes differ the head is new.")
    backbone_weights: str | None = Field(
        None, description="DEFAULT, the name of published weights, or a file: what the backbone starts from."
    )
    freeze: Literal["none", "backbone"] | Annotated[int, Field(ge=0)] = Field(
        "none", description="Keep the backbone as it is: always, or for so many epochs."
    )
    freeze_norm: bool = Field(False, description="Batch norm keeps the statistics that it starts with.")

    # The data.
    layout: Layout | None = Field(None, description="Of the data set. Default: by its files.")
    labels_of: str | None = Field(None, description="Whose masks are the truth, where the data set is a DEST.")
    splitting: Splitting | None = Field(None, description="Draw splits, whatever the data set says of its own.")
    train_split: str = "train"
    val_split: str | None = Field("val", description="Measured as training goes on; none: nothing is.")
    val_images: int | None = Field(None, ge=1, description="Measure on so many of them, evenly taken.")
    val_every: int = Field(1, ge=1, description="Epochs from one measurement to the next.")
    epoch_images: int | None = Field(
        None, ge=1, le=1_000_000_000, description="Images drawn in an epoch. Default: the split's number."
    )
    augmentation: AugmentationConfig = AugmentationConfig()
    sampling: SamplingConfig = SamplingConfig()
    loss: LossConfig = LossConfig()

    # How long: exactly one.
    epochs: int | None = Field(None, ge=1, le=1_000_000)
    steps: int | None = Field(None, ge=1, le=1_000_000_000)
    minutes: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="Of wall time, which the schedule then follows."
    )

    # How.
    batch_size: BatchSize = Field(8, description="Images of one step, over all workers.")
    accumulate: int = Field(1, ge=1, description="A step's images go through the network in so many portions.")
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = Field(2e-3, gt=0, allow_inf_nan=False)
    backbone_rate: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="Factor of the learning rate for the backbone."
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="sgd only.")
    weight_decay: float = Field(0.01, ge=0, allow_inf_nan=False, description="Of weights with more than one dimension.")
    schedule: Literal["poly", "cosine"] = "cosine"
    poly_power: float = Field(0.9, gt=0)
    warmup: float = Field(0.05, ge=0, lt=1, description="Share of the run in which the learning rate rises.")
    ema_decay: float = Field(0.995, ge=0, lt=1, description="Of the averaged weights, which are what is kept.")
    clip_norm: float | None = Field(5.0, gt=0, description="Of the gradient, at most.")
    keep: Literal["best", "last"] = Field("best", description="Which weights are kept: the best by val, or the last.")
    patience: int | None = Field(None, ge=1, description="Stop after so many measurements without a better one.")
    seed: int = Field(0, ge=0)
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 where the hardware has it.")

    # Where.
    registry: str | None = Field(None, description="Where the model goes, as NAME/VERSION.safetensors.")
    out: str | None = Field(None, description="Write the model to this file too.")
    checkpoints: str | None = Field(None, description="Default: _training/KEY under the registry, or beside the file.")
    engine: Engine = Field("auto", description="local: in this process; ray: Ray Train.")
    workers: int = Field(1, ge=1)
    threads: Threads | None = Field(None, description="CPU threads of each worker.")
    use_gpu: bool | None = Field(None, description="None: where there is one.")
    ray_address: str | None = None
    shared_filesystem: bool = Field(False, description="Local paths mean the same on every node.")
    max_failures: int = Field(10, ge=0, description="Deaths of workers or nodes after which a run gives up.")
    dataset_profile: str | None = Field(None, description="AWS profile for the data set.")
    registry_profile: str | None = Field(None, description="AWS profile for registry and checkpoints.")
    check: bool = Field(True, description="Look for broken labels first.")
    restart: bool = Field(False, description="Forget what an earlier run of the same settings has done.")

    @model_validator(mode="after")
    def _parts_agree(self) -> TrainConfig:
        ends = [one for one in (self.epochs, self.steps, self.minutes) if one is not None]
        if len(ends) != 1:
            raise ValueError("give one of epochs, steps and minutes")
        if self.batch_size % (self.accumulate * self.workers):
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of workers x accumulate = "
                f"{self.workers} x {self.accumulate}"
            )
        if self.init is not None and self.backbone_weights is not None:
            raise ValueError("give init or backbone_weights, not both")
        if "://" in (self.backbone_weights or ""):
            raise ValueError("backbone_weights is an address: give DEFAULT, a name, or a file on this machine")
        if self.patience is not None and self.val_split is None:
            raise ValueError("patience needs a val_split to measure on")
        if self.registry is None and self.out is None:
            raise ValueError("give a registry, or a file as out: where is the model to go?")
        if self.engine == "local" and self.workers > 1:
            raise ValueError("the engine local has one worker: use ray for more")
        return self

    @property
    def portion_size(self) -> int:
        """Images that go through the network at once, over all workers."""
        return self.batch_size // self.accumulate

    def settings(self) -> dict[str, Any]:
        """What decides which weights come out, as JSON values: for cards and for `run_key`."""
        # Where these are not given, a run keeps the key that it had before they could be.
        absent = {name for name in ("labels_of", "splitting") if getattr(self, name) is None}
        return self.model_dump(mode="json", exclude=set(_ELSEWHERE | absent))


def run_key(config: TrainConfig, **digests: str | None) -> str:
    """16 hexadecimal digits: equal for equal settings, data and starting weights, wherever these lie."""
    told = json.dumps({"settings": config.settings(), "digests": digests}, sort_keys=True)
    return f"{config.name}-{hashlib.sha256(told.encode()).hexdigest()[:16]}"
