"""The training loop, as each worker runs it. Owns: the order of a step and of an epoch, when a run ends, what goes into
a checkpoint. Must not know: Ray, losses' formulas, where data and models lie.

A step depends on the settings, the state before it and its number, and on nothing else: batches and random numbers are
functions of (seed, step, rank). So a run that continues from a checkpoint does what it would have done.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from typing import Any, NamedTuple

import torch
from torch.nn.parallel import DistributedDataParallel

from pipeline.errors import InfrastructureError, StoppedError
from pipeline.learning.checkpoints import Checkpoint, CheckpointFolder, Progress
from pipeline.learning.configuration import TrainConfig
from pipeline.learning.examples import Batch, Examples
from pipeline.learning.objective import Objective
from pipeline.learning.optimization import (
    Average,
    Frozen,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    set_rate,
)
from pipeline.learning.peers import Peers
from pipeline.learning.schedule import rate_factor
from pipeline.learning.trace import EpochTally, finite, trace_name, trace_parquet
from pipeline.machine import cores

State = dict[str, torch.Tensor]
#: Keeps random numbers of steps and workers apart, whatever the seed.
_SEED_STRIDE = 1_000_003
#: More threads of one process would wait for each other: part of making a batch holds the interpreter's lock.
_MOST_READERS = 4
#: Steps after which several workers ask each other whether to go on.
_AGREE_STEPS = 10


class TrainingError(InfrastructureError):
    """Training went wrong by itself, with a message that names the step and the images."""


class StepEvent(NamedTuple):
    """How far a run is. `share` 0..1; `loss` is that of the last step that was read: this one, or the one before."""

    step: int
    epoch: int
    share: float
    loss: float
    images_per_s: float
    elapsed_s: float


class EpochEvent(NamedTuple):
    """A row of the trace."""

    row: dict[str, Any]
    best: bool


class Fitted(NamedTuple):
    """What a run came to, the same for every worker but for `weights`."""

    progress: Progress
    #: The averaged weights that are kept, on the CPU; None but for the first worker.
    weights: State | None
    #: The step that this call began with: 0 for a new run.
    resumed_step: int


class Loop:
    """One worker's part in one run."""

    def __init__(
        self,
        config: TrainConfig,
        *,
        module: torch.nn.Module,
        examples: Examples,
        objective: Objective,
        folder: CheckpointFolder,
        peers: Peers,
        precision: str,
        epoch_steps: int,
        measure: Callable[[State], dict[str, float]] | None,
        score: Callable[[dict[str, float]], float],
        tell: Callable[[StepEvent | EpochEvent], None],
        should_stop: Callable[[], bool],
    ) -> None:
        """`module` with its first weights, on `peers.device`. `measure` gives the figures of averaged weights, and is
        asked of the first worker; `score` what is best of them: higher is better.
        """
        self._config = config
        self._module = module
        self._examples = examples
        self._objective = objective
        self._folder = folder
        self._peers = peers
        self._bf16 = precision == "bf16"
        self._epoch_steps = epoch_steps
        self._measure = measure
        self._score = score
        self._tell = tell
        self._should_stop = should_stop
        self._optimizer = make_optimizer(module, config)
        self._average = Average(module, config.ema_decay)
        self._watch = _Watch(peers)
        self._total_steps = config.steps or (config.epochs * epoch_steps if config.epochs else None)

    def fit(self) -> Fitted:
        """Trains from the newest checkpoint, or from the beginning, to the end.

        Raises TrainingError when the loss or the gradient is not finite, StoppedError when asked to stop, UsageError
        where another process trains the same, StorageError where a checkpoint cannot be written.
        """
        found = self._folder.latest()
        progress = self._restored(found) if found else Progress()
        resumed_step = progress.step
        began_s = time.monotonic() - progress.elapsed_s
        if self._peers.first:
            self._keep_trace(progress)  # of a checkpoint after which the run was killed
        # One stream for the whole run: what is prepared ahead at the end of an epoch is what the next begins with.
        stream: Any = self._examples.stream(
            progress.step * self._config.accumulate, self._peers.rank, self._peers.world, threads=self._readers()
        )
        with contextlib.closing(stream) as batches:
            while not progress.finished:
                progress = self._epoch(progress, began_s, batches)
        weights = None
        if self._peers.first:
            weights = {name: tensor.detach().cpu() for name, tensor in self._average.tensors.items()}
            if self._config.keep == "best" and progress.best_step not in (None, progress.step):
                assert progress.best_step is not None
                weights = self._folder.best(progress.best_step)
        return Fitted(progress, weights, resumed_step)

    # ── an epoch ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _epoch(self, progress: Progress, began_s: float, batches: Iterator[Batch]) -> Progress:
        """One epoch, its measurement and its checkpoint; the last may be shorter."""
        config, peers = self._config, self._peers
        tally = EpochTally()
        end = (progress.epoch + 1) * self._epoch_steps
        step, over = self._steps(progress, end, began_s, batches, tally)
        epoch = progress.epoch + 1
        row: dict[str, Any] = {
            "epoch": epoch,
            "step": step,
            "elapsed_s": time.monotonic() - began_s,
            "learning_rate": self._optimizer.param_groups[-1]["lr"] / self._optimizer.param_groups[-1]["rate"],
            **finite(tally.means()),
            "images_per_s": tally.images_per_s,
            "data_wait": tally.wait_s / tally.train_s if tally.train_s else None,
        }
        best = False
        update: dict[str, Any] = {}
        due = epoch % config.val_every == 0 or over
        if peers.first and self._measure is not None and due:
            measured_s = time.monotonic()
            with torch.random.fork_rng(devices=[]):
                figures = self._measure(self._average.tensors)
            row |= {f"val_{name}": value for name, value in finite(figures).items()}
            row["val_s"] = time.monotonic() - measured_s
            score = self._score(figures)
            best = progress.best_score is None or score > progress.best_score
            update = {"stale": progress.stale + 1}
            if best:
                update = {"best_step": step, "best_score": score, "stale": 0}
        stale = bool(config.patience and update.get("stale", 0) >= config.patience)
        over = bool(peers.agreed(over or stale))
        row["elapsed_s"] = time.monotonic() - began_s
        progress = progress.model_copy(
            update={
                "step": step, "epoch": epoch, "elapsed_s": row["elapsed_s"], "trace": (*progress.trace, row),
                "finished_at": datetime.now(UTC).isoformat(timespec="seconds") if over else "",
                "finished": over, "threads": torch.get_num_threads(), **update,
            }
        )  # fmt: skip
        if peers.first:
            self._keep(progress, best=best)
            self._tell(EpochEvent(row, best))
        # Nobody goes on before it is written: who is told of a run's end may rely on it.
        peers.agreed(0.0)
        return progress

    def _keep(self, progress: Progress, *, best: bool) -> None:
        if best and self._config.keep == "best":
            self._folder.save_best(progress.step, self._average.tensors)
        self._folder.save(progress, self._tensors())
        # After the checkpoint: an epoch that is done again must not find the row of the one that was lost.
        self._keep_trace(progress)

    def _keep_trace(self, progress: Progress) -> None:
        for row in progress.trace[-2:]:
            self._folder.put(trace_name(int(row["epoch"])), trace_parquet([row]))  # type: ignore[arg-type]

    def _tensors(self) -> State:
        return {
            **{f"model/{name}": tensor for name, tensor in self._module.state_dict().items()},
            **{f"average/{name}": tensor for name, tensor in self._average.tensors.items()},
            **{
                f"optimizer/{name}": tensor for name, tensor in optimizer_tensors(self._module, self._optimizer).items()
            },
        }

    def _restored(self, found: Checkpoint) -> Progress:
        self._module.load_state_dict(found.part("model"))
        self._average.load(found.part("average"))
        load_optimizer_tensors(self._module, self._optimizer, found.part("optimizer"))
        return found.progress

    # ── a step ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _steps(
        self, progress: Progress, end: int, began_s: float, batches: Iterator[Batch], tally: EpochTally
    ) -> tuple[int, bool]:
        """Takes steps up to number `end`, or to the end of the run; gives the steps done and whether that is all."""
        config, step, watch = self._config, progress.step, self._watch
        Frozen.at(progress.epoch, config).apply(self._module)
        network = self._wrapped()
        entered_s = time.monotonic()
        share = self._share(step, began_s)
        for taken in itertools.count():
            # Workers agree on the clock, and on stopping, now and then: asking at each step would be waiting.
            if self._peers.world == 1 or taken % _AGREE_STEPS == 0:
                share = self._share(step, began_s)
                if self._peers.agreed(self._should_stop()):
                    raise StoppedError("stopped on request: the same command continues from the last epoch")
            elif self._total_steps is not None:
                share = self._share(step, began_s)
            # At least one: measuring may have used up the last of the time.
            if step >= end or (share >= 1 and taken):
                break
            rate = config.learning_rate * rate_factor(
                share, shape=config.schedule, warmup=config.warmup, power=config.poly_power
            )
            set_rate(self._optimizer, rate)
            figures, names, waited_s = self._step(network, batches, step)
            tally.wait_s += waited_s
            step += 1
            self._average.follow(step)
            watch.note(step, figures, names, tally)
            tally.images += config.batch_size
            tally.train_s = time.monotonic() - entered_s
            if self._peers.first:
                self._tell(
                    StepEvent(
                        step, progress.epoch + 1, share, watch.loss, tally.images_per_s, time.monotonic() - began_s
                    )
                )
        watch.settle(tally)
        tally.train_s = time.monotonic() - entered_s
        return step, self._share(step, began_s) >= 1

    def _step(
        self, network: torch.nn.Module, batches: Iterator[Batch], step: int
    ) -> tuple[dict[str, torch.Tensor], list[str], float]:
        """One step of the optimiser: its figures (tensors, so as not to wait for the device), the images, the wait."""
        config = self._config
        seed = (config.seed * _SEED_STRIDE + step) * _SEED_STRIDE + self._peers.rank
        # torch takes no more than 63 bits; a date as a seed is more.
        torch.manual_seed(seed % (1 << 63))
        self._optimizer.zero_grad(set_to_none=True)
        figures: dict[str, torch.Tensor] = {}
        names: list[str] = []
        waited_s = 0.0
        for portion in range(config.accumulate):
            asked_s = time.monotonic()
            batch = next(batches)
            waited_s += time.monotonic() - asked_s
            names += batch.names
            with self._without_sync(network, last=portion == config.accumulate - 1):
                with self._mixed():
                    parts = self._objective.parts(network, batch.to(self._peers.device))
                loss = torch.stack([part.float() for part in parts.values()]).sum() / config.accumulate
                loss.backward()
            for name, part in {"loss": loss, **{f"loss_{name}": part for name, part in parts.items()}}.items():
                portion_of = 1 if name == "loss" else config.accumulate
                figures[name] = figures.get(name, torch.zeros((), device=loss.device)) + part.detach() / portion_of
        figures["gradient_norm"] = self._clipped()
        self._optimizer.step()
        return figures, names, waited_s

    def _clipped(self) -> torch.Tensor:
        """The norm of the gradient, which is then at most what the settings say: `clip_grad_norm_`, without its pass
        over the gradients where that would multiply them by 1. (On a GPU looking would be waiting.)
        """
        learning = [one for one in self._module.parameters() if one.grad is not None]
        norm = torch.nn.utils.get_total_norm([one.grad for one in learning if one.grad is not None])
        limit = self._config.clip_norm
        if limit is not None and not (norm.device.type == "cpu" and norm < limit):
            torch.nn.utils.clip_grads_with_norm_(learning, limit, norm)
        return norm

    def _share(self, step: int, began_s: float) -> float:
        """Of the run, that is done before this step: 0..1 and above."""
        if self._total_steps is not None:
            return step / self._total_steps
        assert self._config.minutes is not None
        return self._peers.agreed((time.monotonic() - began_s) / (60 * self._config.minutes))

    def _wrapped(self) -> torch.nn.Module:
        trainee = self._objective.trainee(self._module)
        if self._peers.world == 1:
            return trainee
        devices = [torch.device(self._peers.device)] if self._peers.device.startswith("cuda") else None
        return DistributedDataParallel(trainee, device_ids=devices, find_unused_parameters=True)

    def _readers(self) -> int:
        """Threads that make batches. On a CPU the step wants all cores for itself; beside a GPU they are idle."""
        if not self._peers.device.startswith("cuda"):
            return 1
        return max(1, min(_MOST_READERS, cores() // self._peers.world - 1))

    def _mixed(self) -> AbstractContextManager[Any]:
        kind = torch.device(self._peers.device).type
        return torch.autocast(kind, torch.bfloat16) if self._bf16 else nullcontext()

    def _without_sync(self, network: torch.nn.Module, *, last: bool) -> AbstractContextManager[Any]:
        if last or not isinstance(network, DistributedDataParallel):
            return nullcontext()
        no_sync: AbstractContextManager[Any] = network.no_sync()
        return no_sync


class _Watch:
    """Reads the figures of a step after the next has been given to the device, so that it never waits for a reader
    (but for the first, of which people want to hear); and stops a run whose figures are no numbers.
    """

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        self._noted: tuple[int, list[str], torch.Tensor, list[str]] | None = None
        #: Of the last step that was read, in this epoch or the one before; NaN before the first.
        self.loss = math.nan

    def note(self, step: int, figures: dict[str, torch.Tensor], names: list[str], tally: EpochTally) -> None:
        """The figures of one step (from 1), which are this worker's."""
        keys = list(figures)
        own = torch.stack([figures[key].float().reshape(()) for key in keys])
        self.settle(tally)
        self._noted = (step, keys, own, names)
        if math.isnan(self.loss):
            self.settle(tally)

    def settle(self, tally: EpochTally) -> None:
        """Raises TrainingError, on all workers alike."""
        if self._noted is None:
            return
        step, keys, own, names = self._noted
        self._noted = None
        mine = all(map(math.isfinite, own.tolist()))
        values = dict(zip(keys, self._peers.mean(own.clone()).tolist(), strict=True))
        wrong = next((key for key, value in values.items() if not math.isfinite(value)), None)
        if wrong is not None:
            culprits = [
                one for finite_there, some in self._peers.gathered((mine, names)) if not finite_there for one in some
            ]
            what = "the gradient" if wrong == "gradient_norm" else wrong.replace("loss_", "the loss ")
            what = "the loss" if wrong == "loss" else what
            raise TrainingError(
                f"{what} became {values[wrong]} at step {step}, on images {', '.join(culprits or names)}: look at "
                "these images, or lower the learning rate"
            )
        self.loss = values["loss"]
        tally.add(values)
