"""Training: a data set folder in, a model file out. Owns: the schedule, the loop and the provenance that the
card keeps. Must not know: Ray, where data sets come from, where models are promoted to.

    python -m pipeline.learning.training DATASET --out models/zoo/nuclei-unet.safetensors --name nuclei-unet
    --minutes 20
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import math
import os
import platform
import time
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

import models
from models.architectures import build, untrained_card
from models.card import Card
from models.file import load_module, save_model
from models.losses import cross_entropy_dice
from models.segmenter import Segmenter, default_device, supports_bf16
from pipeline.errors import InfrastructureError
from pipeline.learning.augmentation import AugmentationConfig, make_example
from pipeline.learning.dataset import Dataset
from pipeline.learning.evaluation import evaluate
from pipeline.learning.sampling import Batch, Sampler, sampling_chances, stream
from pipeline.learning.tuning import tune_watershed

log = logging.getLogger(__name__)


class TrainingError(InfrastructureError):
    """Training went wrong by itself, with a message that names the step and the images."""


class TrainingConfig(BaseModel):
    """Everything that a training run depends on. With `steps`, equal configs give equal weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: The folder of the data set (see pipeline/learning/dataset.py).
    dataset: Path
    #: The file to write.
    out: Path
    name: str = "model"
    task: Literal["semantic", "instance"] = "instance"
    train_split: str = "train"
    #: Measured once, after training; nothing is chosen by it.
    val_split: str | None = "val"
    encoder: str = "resnet18"
    decoder_channels: tuple[int, ...] = (96, 48, 32, 16)
    #: The end of training: a number of steps, or minutes of wall time, of which the schedule is then a
    #: function.
    steps: int | None = Field(default=None, ge=1)
    minutes: float | None = Field(default=None, gt=0)
    batch_size: int = Field(default=8, ge=1)
    learning_rate: float = Field(default=2e-3, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    #: Share of the run in which the learning rate rises; afterwards it falls as a cosine.
    warmup: float = Field(default=0.05, ge=0, lt=1)
    #: Per step, of the exponential moving average of the weights, which is what gets saved.
    ema_decay: float = Field(default=0.995, ge=0, lt=1)
    #: A stratum of n images is sampled in proportion to n ** this: 1 as they come, 0 all strata alike.
    stratum_power: float = Field(default=0.5, ge=0, le=1)
    augmentation: AugmentationConfig = AugmentationConfig()
    seed: int = 0
    #: None: a GPU where there is one.
    device: str | None = None
    #: None: bf16 where the hardware has it.
    precision: Literal["fp32", "bf16"] | None = None

    @model_validator(mode="after")
    def _ends(self) -> TrainingConfig:
        if (self.steps is None) == (self.minutes is None):
            raise ValueError("give either steps or minutes")
        return self


def train(config: TrainingConfig) -> Path:
    """Trains from random weights and writes one model file, whose path it returns.

    The card records data, code, settings, seed, hardware, time and, unless `val_split` is None, the figures
    on that split, measured through the Segmenter. Safe to repeat: the file is replaced as a whole. Raises
    UsageError for a folder that is no data set, ValueError for a config that does not fit it, TrainingError
    when the loss is not finite.
    """
    started = time.monotonic()
    dataset = Dataset(config.dataset, config.train_split)
    device = config.device or default_device()
    precision = config.precision or ("bf16" if supports_bf16(device) else "fp32")
    card = untrained_card(
        config.name,
        task=config.task,
        class_names=dataset.class_names,
        encoder=config.encoder,
        decoder_channels=config.decoder_channels,
    )
    torch.manual_seed(config.seed)
    module = build(card).to(device).to(memory_format=torch.channels_last)
    averaged, steps = _fit(module, _batches(dataset, card, config), config, device=device, precision=precision)
    minutes = (time.monotonic() - started) / 60
    provenance = _provenance(config, dataset, device=device, precision=precision, steps=steps, minutes=minutes)
    card = card.model_copy(update={"provenance": provenance})
    state = {
        name: tensor.float().cpu() if tensor.is_floating_point() else tensor.cpu() for name, tensor in averaged.items()
    }
    if config.task == "instance":
        module.load_state_dict(averaged)
        segmenter = Segmenter(module, card, device=device, precision=precision)
        card = card.model_copy(update={"postprocessing": tune_watershed(segmenter, dataset)})
        log.info("post-processing chosen on %s: %s", config.train_split, card.postprocessing)
    save_model(config.out, state, card)
    if config.val_split is not None:
        metrics = measure(config.out, Dataset(config.dataset, config.val_split), device=device)
        save_model(config.out, state, card.with_metrics({config.val_split: metrics}))
        log.info("%s on %s: %s", config.name, config.val_split, metrics)
    return config.out


def measure(path: Path, dataset: Dataset, *, device: str) -> dict[str, dict[str, float]]:
    """Figures of a model file on a split, by precision: fp32, and bf16 where the hardware has it."""
    data = path.read_bytes()
    figures = {}
    for precision in ("fp32", "bf16") if supports_bf16(device) else ("fp32",):
        card, module = load_module(data)
        segmenter = Segmenter(module, card, device=device, precision=precision)
        figures[precision] = {name: round(value, 4) for name, value in evaluate(segmenter, dataset).items()}
    return figures


def _fit(
    module: torch.nn.Module,
    batches: Iterator[Batch],
    config: TrainingConfig,
    *,
    device: str,
    precision: str,
) -> tuple[dict[str, torch.Tensor], int]:
    """The averaged weights and the number of steps taken."""
    decayed = [parameter for parameter in module.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in module.parameters() if parameter.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=config.learning_rate,
    )
    mixed = torch.autocast(torch.device(device).type, torch.bfloat16) if precision == "bf16" else nullcontext()
    averaged = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    started, step, recent = time.monotonic(), 0, []
    module.train()
    for batch in batches:
        elapsed = (time.monotonic() - started) / 60
        progress = step / config.steps if config.steps else elapsed / (config.minutes or 1)
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * learning_rate_factor(progress, config.warmup)
        with mixed:
            logits_NCHW = module(batch.inputs.to(device, non_blocking=True))
        loss = cross_entropy_dice(logits_NCHW, batch.targets.to(device), batch.weights.to(device))
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss became {value} at step {step}, on images {', '.join(batch.names)}: "
                "look at these images, or lower learning_rate"
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 5.0)
        optimizer.step()
        step += 1
        _average(averaged, module, min(config.ema_decay, step / (step + 10)))
        recent.append(value)
        if step % 50 == 0:
            log.info("step %d, %.1f min, loss %.4f", step, elapsed, sum(recent) / len(recent))
            recent.clear()
    module.eval()
    return averaged, step


def learning_rate_factor(progress: float, warmup: float) -> float:
    """0..1: a linear rise over the share `warmup` of the run, then half a cosine down to 0."""
    if progress < warmup:
        return max(progress / warmup, 0.01)
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def _batches(dataset: Dataset, card: Card, config: TrainingConfig) -> Iterator[Batch]:
    read_labels = dataset.instance_labels if config.task == "instance" else dataset.class_ids
    examples = [make_example(item.name, dataset.image(item), read_labels(item)) for item in dataset.items]
    sampler = Sampler(
        examples=examples,
        chances=sampling_chances(dataset, config.stratum_power),
        task=config.task,
        augmentation=config.augmentation,
        std_floor=card.preprocessing.std_floor,
        batch_size=config.batch_size,
        seed=config.seed,
    )
    return stream(sampler)


def _average(averaged: dict[str, torch.Tensor], module: torch.nn.Module, decay: float) -> None:
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                averaged[name].lerp_(tensor, 1 - decay)
            else:
                averaged[name].copy_(tensor)


def _provenance(
    config: TrainingConfig, dataset: Dataset, *, device: str, precision: str, steps: int, minutes: float
) -> dict[str, object]:
    settings = config.model_dump(mode="json", exclude={"dataset", "out", "device", "precision"})
    return {
        "dataset": config.dataset.resolve().name,
        "split": config.train_split,
        "images": len(dataset),
        "data_sha256": dataset.digest(),
        "code_sha256": _code_digest(),
        "settings": settings,
        "steps": steps,
        "minutes": round(minutes, 1),
        "device": device,
        "precision": precision,
        "hardware": _hardware(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "initial_weights": "random",
        "trained_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _code_digest() -> str:
    """SHA-256 of the sources that training runs through."""
    folders = (Path(models.__file__).parent, Path(__file__).parent)
    sha256 = hashlib.sha256()
    sources = sorted(
        (path.relative_to(folder.parent).as_posix(), path) for folder in folders for path in folder.rglob("*.py")
    )
    for name, path in sources:
        sha256.update(name.encode() + b"\0" + path.read_bytes())
    return sha256.hexdigest()


def _hardware(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    names = [
        line.split(":", 1)[1].strip()
        for line in (Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else [])
        if line.startswith("model name")
    ]
    return f"{os.cpu_count()} x {names[0] if names else platform.processor()}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pipeline.learning.training", description="Train a model.")
    parser.add_argument("dataset", type=Path, help="folder with images/, annotations.json and splits.json")
    parser.add_argument("--out", type=Path, required=True, help="the .safetensors file to write")
    parser.add_argument("--name", default="model")
    parser.add_argument("--task", choices=("semantic", "instance"), default="instance")
    end = parser.add_mutually_exclusive_group(required=True)
    end.add_argument("--minutes", type=float)
    end.add_argument("--steps", type=int)
    for flag, kind in (
        ("seed", int),
        ("batch-size", int),
        ("learning-rate", float),
        ("encoder", str),
        ("device", str),
    ):
        parser.add_argument(f"--{flag}", type=kind, default=argparse.SUPPRESS)
    parser.add_argument("--decoder-channels", type=int, nargs="+", default=argparse.SUPPRESS)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    train(TrainingConfig(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
