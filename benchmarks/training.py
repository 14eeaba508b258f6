"""What the training loop costs beside a bare PyTorch loop: images/s of both, and core-seconds, in one sitting.

    python benchmarks/training.py [--steps N] [--batch-size N] [--crop-px N] [--encoder E] [--rounds K] [--threads T]

The bare loop takes batches that lie ready as tensors: forward, loss, backward, optimiser, with the same network, batch,
loss, precision and optimiser, and nothing else. Ours decodes, augments, clips, averages weights, keeps its trace and
writes a checkpoint in each epoch. Both are run in turn, so that a machine with other work slows both; medians. Without
a GPU all of that takes turns with the network on the same cores, and core-seconds say how much it is, whatever else the
machine does.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from models.architectures import build
from models.segmenter import default_device, supports_bf16
from pipeline.learning.checkpoints import CheckpointFolder
from pipeline.learning.configuration import TrainConfig
from pipeline.learning.dataset import Dataset
from pipeline.learning.initialization import begin
from pipeline.learning.job import make_examples
from pipeline.learning.loop import EpochEvent, Loop
from pipeline.learning.objective import Objective
from pipeline.learning.optimization import make_optimizer
from pipeline.learning.peers import Peers

HEIGHT, WIDTH, CLASSES = 360, 480, 11


def write_dataset(folder: Path, images: int) -> None:
    """Street-like pictures and their labels: PNGs of 480×360 in 11 classes."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for index in range(images):
        random = np.random.default_rng(index)
        coarse = random.normal(size=(9, 12, CLASSES)).astype(np.float32)
        fine = [cv2.resize(coarse[:, :, one], (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC) for one in range(CLASSES)]
        classes = np.argmax(fine, axis=0).astype(np.uint8)
        colors = random.integers(0, 255, (CLASSES, 3))
        pixels = np.clip(colors[classes] + random.normal(0, 8, (HEIGHT, WIDTH, 3)), 0, 255).astype(np.uint8)
        cv2.imwrite(str(folder / "images" / f"{index}.png"), pixels)
        cv2.imwrite(str(folder / "masks" / f"{index}.png"), classes)
    (folder / "classes.json").write_text(json.dumps([f"class-{one}" for one in range(CLASSES)]))
    (folder / "splits.json").write_text(json.dumps({"train": [f"{index}.png" for index in range(images)]}))


class Speed(NamedTuple):
    images_per_s: float
    core_s_per_image: float


class Contest:
    """The same training twice."""

    def __init__(self, config: TrainConfig, device: str, precision: str, epoch_steps: int) -> None:
        self.config, self.device, self.precision, self.epoch_steps = config, device, precision, epoch_steps
        self.dataset = Dataset(config.dataset, "train")
        self.card, self.weights, _ = begin(config, self.dataset)
        self.examples = make_examples(config, self.dataset, self.card)
        self.objective = Objective(self.card, config.loss, None)

    def _module(self) -> torch.nn.Module:
        module = build(self.card, blank=True)
        module.load_state_dict(self.weights)
        return module.to(self.device).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]

    def bare(self, batches: list[Any]) -> Speed:
        module = self._module()
        optimizer = make_optimizer(module, self.config)
        kind = torch.device(self.device).type
        began_s = began_core_s = 0.0
        steps = self.config.steps or 0
        for step, batch in enumerate(itertools.islice(itertools.cycle(batches), steps + 2)):
            if step == 2:  # what comes first is slower
                self._wait()
                began_s, began_core_s = time.perf_counter(), time.process_time()
            mixed = torch.autocast(kind, torch.bfloat16) if self.precision == "bf16" else nullcontext()
            optimizer.zero_grad(set_to_none=True)
            with mixed:
                loss = sum(self.objective.parts(module, batch).values())
            loss.backward()  # type: ignore[union-attr]
            optimizer.step()
        self._wait()
        images = steps * self.config.batch_size
        return Speed(images / (time.perf_counter() - began_s), (time.process_time() - began_core_s) / images)

    def ours(self, folder: str) -> Speed:
        """From the first checkpoint to the last: the first epoch is there to warm up."""
        ends: list[tuple[float, float]] = []
        loop = Loop(
            self.config.model_copy(update={"steps": (self.config.steps or 0) + self.epoch_steps}),
            module=self._module(), examples=self.examples, objective=self.objective,
            folder=CheckpointFolder(folder), peers=Peers(self.device), precision=self.precision,
            epoch_steps=self.epoch_steps, measure=None, score=lambda figures: 0.0,
            tell=lambda event: (
                ends.append((time.perf_counter(), time.process_time())) if isinstance(event, EpochEvent) else None
            ),
            should_stop=lambda: False,
        )  # fmt: skip
        loop.fit()
        images = (self.config.steps or 0) * self.config.batch_size
        return Speed(images / (ends[-1][0] - ends[0][0]), (ends[-1][1] - ends[0][1]) / images)

    def crops(self, steps: int) -> float:
        """Core-seconds of a crop, by one thread, from images that are decoded: the median step."""
        usual = torch.get_num_threads()
        torch.set_num_threads(1)
        cv2.setNumThreads(1)
        spent_s = []
        for step in range(steps):
            began_s = time.thread_time()
            self.examples.batch(step)
            spent_s.append(time.thread_time() - began_s)
        torch.set_num_threads(usual)
        return statistics.median(spent_s) / self.config.batch_size

    def _wait(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--epoch-steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--crop-px", type=int, default=256)
    parser.add_argument("--encoder", default="resnet18")
    parser.add_argument("--rounds", type=int, default=3, help="0: only what a crop costs")
    parser.add_argument("--threads", type=int, help="of the network; 1 on a machine that does other work")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = default_device()
    precision = "bf16" if supports_bf16(device) else "fp32"
    with tempfile.TemporaryDirectory(prefix="maskmill-bench-") as scratch:
        write_dataset(Path(scratch) / "data", options.images)
        config = TrainConfig(
            dataset=f"{scratch}/data", name="bench", out=f"{scratch}/never.safetensors", encoder=options.encoder,
            steps=options.steps, batch_size=options.batch_size, val_split=None,
            augmentation={"crop_px": options.crop_px},  # type: ignore[arg-type]
        )  # fmt: skip
        contest = Contest(config, device, precision, options.epoch_steps)
        batches = [contest.examples.batch(step).to(device) for step in range(4)]
        contest.crops(options.images // options.batch_size + 1)  # decodes
        print(f"a crop alone: {1e3 * contest.crops(options.steps):.2f} core-ms")
        if not options.rounds:
            return
        speeds: dict[str, list[Speed]] = {"bare": [], "ours": []}
        contest.bare(batches)  # kernels are chosen at their first use
        for number in range(options.rounds):
            speeds["bare"].append(contest.bare(batches))
            speeds["ours"].append(contest.ours(f"{scratch}/run-{number}"))
    pairs = list(zip(speeds["bare"], speeds["ours"], strict=True))
    share = statistics.median(ours.images_per_s / bare.images_per_s for bare, ours in pairs)
    core_share = statistics.median(bare.core_s_per_image / ours.core_s_per_image for bare, ours in pairs)
    table = Table(
        title=f"unet/{options.encoder}, batch {options.batch_size} of {options.crop_px}², {precision}, {device}, "
        f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}"
    )
    for column in ("loop", "images/s", "share of bare", "core-ms per image", "share of bare"):
        table.add_column(column, justify="left" if column == "loop" else "right")
    for label, name, shares in (
        ("bare, cached tensors", "bare", ("", "")),
        ("maskmill train", "ours", (f"{share:.3f}", f"{core_share:.3f}")),
    ):
        rate = statistics.median(one.images_per_s for one in speeds[name])
        core_ms = 1e3 * statistics.median(one.core_s_per_image for one in speeds[name])
        table.add_row(label, f"{rate:.2f}", shares[0], f"{core_ms:.1f}", shares[1])
    for name, measured in speeds.items():
        print(
            f"{name}: " + ", ".join(f"{one.images_per_s:.2f}/s {1e3 * one.core_s_per_image:.0f} ms" for one in measured)
        )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
