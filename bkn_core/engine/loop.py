"""Training: one loop from the first step to the last, which can stop after any of them and go on from there."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from bkn_core.engine.batches import BatchPlan, augment, epoch_order, generator_at, normalize
from bkn_core.engine.build import build_model, load_splits
from bkn_core.engine.checkpoint import load_state, load_strictly_, save_state, save_weights
from bkn_core.engine.data import DataSplits, prefetch
from bkn_core.engine.device import autocast, mixed_precision, synchronize
from bkn_core.engine.distributed import World, join_world
from bkn_core.engine.evaluation import Metrics, measure_model, modes, save_predictions
from bkn_core.engine.events import EpochEnded, Event, Notice, Started, Stepped
from bkn_core.engine.finite import BufferSnapshot, all_finite, first_not_finite
from bkn_core.engine.models import count_parameters
from bkn_core.engine.optimization import build_optimizer, set_step_
from bkn_core.engine.run_folder import RunFolder
from bkn_core.errors import BknError, DivergedError, InterruptedRun
from bkn_core.norm.layers import BatchKalmanNorm
from bkn_core.recipe import Recipe

_SAVE_SECONDS = 300.0  # a long epoch is saved in between
_SKIPS = 10  # bad steps in a row that end a run even where they are skipped
OnEvent = Callable[[Event], None]


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a finished run gave.

    Args:
        run: its folder.
        steps: optimizer steps.
        seconds: time spent in training steps, over all its parts.
        images_per_second: training images per second.
        metrics: the last epoch's measures by kind of statistics.
        best_top1: the best epoch's top-1, by the first kind.
        best_epoch: which one that was, from 1.
    """

    run: Path
    steps: int
    seconds: float
    images_per_second: float
    metrics: dict[str, Metrics]
    best_top1: float
    best_epoch: int


def train(
    recipe: Recipe,
    *,
    out: Path | None = None,
    resume: Path | None = None,
    on_event: OnEvent = lambda event: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> TrainResult:
    """Train as a recipe says, into a run folder.

    Args:
        recipe: what to do; where a run is resumed, its own recipe with another device at most.
        out: the run folder, default `runs/<recipe>-<norm>-g<g>-s<s>-seed<seed>`.
        resume: the folder of an interrupted run to continue, bit for bit on the CPU.
        on_event: called with every event, in the main process.
        should_stop: asked after every step; true saves and ends the run.

    Raises:
        InterruptedRun: `should_stop` said so; the last finished step is saved.
        DivergedError: a value was not finite.
        BknError: any fault of recipe, data, device or disk.
    """
    with join_world(recipe.train.device) as world, _numerics(recipe):
        folder = RunFolder.open(resume) if resume is not None else None
        if folder is None and world.is_main:
            folder = RunFolder.create(recipe, out)
        training = Training(recipe, folder, world, on_event if world.is_main else lambda event: None)
        try:
            if resume is not None and training.folder is not None and training.folder.state.exists():
                training.restore(load_state(training.folder.state))
            return training.run(should_stop)
        except BknError as error:
            status = "interrupted" if isinstance(error, InterruptedRun) else "failed"
            training.close(status, error.message)
            raise


@contextlib.contextmanager
def _numerics(recipe: Recipe) -> Iterator[None]:
    """Set determinism for the time of a run."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(recipe.train.deterministic)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


class Training:
    """A run in progress: everything that changes from step to step."""

    def __init__(self, recipe: Recipe, folder: RunFolder | None, world: World, on_event: OnEvent) -> None:
        self.recipe, self.folder, self.world, self.on_event = recipe, folder, world, on_event
        torch.manual_seed(recipe.train.seed)
        self.splits: DataSplits = load_splits(recipe)
        model = build_model(recipe, self.splits.preprocess, len(self.splits.classes), images=self.splits.train)
        self.layout = torch.channels_last if recipe.train.channels_last else torch.contiguous_format
        self.model = model.to(world.device, memory_format=self.layout).train()
        self.ema = self._averaged()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(self.model, recipe.optim, world.device)
        self.amp = mixed_precision(recipe.train.amp, world.device)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=self.amp is torch.float16)
        network = torch.compile(self.model) if recipe.train.compile else self.model
        self.network = world.wrap(network)  # type: ignore[arg-type]
        self.snapshot = BufferSnapshot(self.model)
        self.plan = BatchPlan(len(self.splits.train), recipe.batch.per_device, world.rank, world.size)
        self.accumulated = max(1, recipe.batch.gradient // self.plan.joint)
        self.epoch_steps = -(-len(self.plan) // self.accumulated)
        self.steps = self.epoch_steps * recipe.train.epochs
        self.step = self.measured = self.skipped = 0
        self.seconds, self.images = 0.0, 0
        self.saved_at = time.monotonic()
        self.losses: list[Tensor] = []
        self.epoch_loss = torch.zeros((), device=world.device)
        self.best: dict[str, Any] = {"top1": -1.0, "epoch": 0}
        self.metrics: dict[str, Metrics] = {}
        torch.manual_seed(recipe.train.seed + world.rank)

    def run(self, should_stop: Callable[[], bool]) -> TrainResult:
        """Go through the remaining steps."""
        self._announce()
        for epoch in range(self.measured, self.recipe.train.epochs):
            started = time.perf_counter()
            for passes in self._epoch(epoch):
                self._train_step(epoch, passes)
                self.seconds += time.perf_counter() - started
                self._stop_if(should_stop)
                started = time.perf_counter()
            synchronize(self.world.device)
            self._end_epoch(epoch, should_stop)
        return self._finish()

    def _epoch(self, epoch: int) -> Iterator[list[tuple[int, Tensor, Tensor]]]:
        """Yield, for each remaining step of an epoch, its passes: index, images and labels on the CPU."""
        first = (self.step - epoch * self.epoch_steps) * self.accumulated
        order = epoch_order(self.plan.images, self.recipe.train.seed, epoch)
        indices = range(first, len(self.plan))
        batches = prefetch(self.splits.train, [self.plan.batch(order, i) for i in indices])
        passes = []
        for i, (images, labels) in zip(indices, batches, strict=True):
            passes.append((i, images, labels))
            if len(passes) == self.accumulated or i == len(self.plan) - 1:
                yield passes
                passes = []

    def _train_step(self, epoch: int, passes: list[tuple[int, Tensor, Tensor]]) -> None:
        """Average the gradients of a gradient batch and take one step, or refuse it as a whole."""
        rate = set_step_(
            self.optimizer, self.model, self.recipe.optim, self._gain_schedule, step=self.step, steps=self.steps
        )
        self.snapshot.take()
        total = sum(self.plan.joint_images(i) for i, _, _ in passes)
        losses = []
        for i, images, labels in passes:
            with self._without_exchange(is_last=i == passes[-1][0]):
                loss = self._loss(epoch, i, images, labels) / total
                self.scaler.scale(loss * self.world.size).backward()
            losses.append(loss.detach())
        loss = torch.stack(losses).sum()
        if self.recipe.train.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters, self.recipe.train.clip_norm)
        if self.scaler.is_enabled() or all_finite(loss, self.parameters):
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.skipped = 0
        else:
            self._refuse(epoch, passes)
            loss = torch.zeros_like(loss)
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        self.step += 1
        self._note(epoch, loss, total, rate)

    def _loss(self, epoch: int, index: int, images: Tensor, labels: Tensor) -> Tensor:
        """Return the summed cross entropy of this process's part of a pass."""
        device = self.world.device
        weight = 1.0
        if len(labels) == 0:  # nothing left for this process: take part in the exchange with nothing
            images, labels = self.splits.train.batch(torch.zeros(1, dtype=torch.int64))
            weight = 0.0
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        generator = generator_at(self.recipe.train.seed, epoch, index, self.world.rank)
        images = augment(images, self.recipe.data.augment, generator)
        inputs = normalize(images, self.splits.preprocess, memory_format=self.layout)
        with autocast(device, self.amp):
            logits = self.network(inputs)
        return weight * F.cross_entropy(logits.float(), labels, reduction="sum")

    def _without_exchange(self, *, is_last: bool) -> contextlib.AbstractContextManager[None]:
        """Exchange gradients only in the last pass of a step."""
        if isinstance(self.network, nn.parallel.DistributedDataParallel) and not is_last:
            return self.network.no_sync()
        return contextlib.nullcontext()

    def _refuse(self, epoch: int, passes: list[tuple[int, Tensor, Tensor]]) -> None:
        """Undo a step that is not finite, and stop or go on as the recipe says."""
        self.snapshot.restore()
        where = first_not_finite(self.model, lambda: self._loss(epoch, *passes[-1]))
        self.snapshot.restore()
        self.skipped += 1
        text = f"step {self.step + 1} (epoch {epoch + 1}): the {where} is not finite"
        if self.recipe.train.nonfinite == "stop" or self.skipped > _SKIPS:
            raise DivergedError(
                text, "Lower optim.lr, set train.clip_norm, or train.nonfinite=skip. The last checkpoint is sound."
            )
        self._tell(f"{text}; the step is skipped")

    def _note(self, epoch: int, loss: Tensor, images: int, rate: float) -> None:
        """Keep the loss on the device and read it only when it is to be logged."""
        self.images += images
        self.losses.append(loss)
        self.epoch_loss += loss * images
        shown = None
        if self.step % self.recipe.log.every == 0 or self.step == self.steps:
            shown = torch.stack(self.losses).mean().item()
            self.losses.clear()
            row = {"kind": "step", "step": self.step, "epoch": epoch + 1, "loss": shown, "learning_rate": rate}
            if self.world.is_main and self.folder is not None:
                self.folder.record({**row, "gain": self._mean_gain()})
        self.on_event(Stepped(self.step, epoch + 1, images, shown, rate))

    def _mean_gain(self) -> float | None:
        gains = [m.gain for m in self.model.modules() if isinstance(m, BatchKalmanNorm) and m.expects_prior]
        return torch.stack(gains).mean().item() if gains else None

    def _stop_if(self, should_stop: Callable[[], bool]) -> None:
        if self.world.any(should_stop()):
            self._save()
            folder = self.folder.path if self.folder is not None else ""
            raise InterruptedRun(
                f"stopped after step {self.step} of {self.steps}, which is saved",
                f"Continue with `bkn train --resume {folder}`.",
            )
        if self.world.any(time.monotonic() - self.saved_at > _SAVE_SECONDS):
            self._save()

    def _end_epoch(self, epoch: int, should_stop: Callable[[], bool]) -> None:
        """Measure, keep the best weights, save."""
        self.world.average_(self.model)
        self.metrics = {kind: self._measure(kind, should_stop) for kind in modes(self.recipe.eval_stats)}
        self.measured = epoch + 1
        first = next(iter(self.metrics.values()))
        train_loss = (self.epoch_loss / self.plan.images).item()
        self.epoch_loss.zero_()
        is_best = first.top1 > self.best["top1"]
        if is_best:
            self.best = {"top1": first.top1, "epoch": epoch + 1}
        speed = self.images / max(self.seconds, 1e-9)
        if self.world.is_main and self.folder is not None:
            row: dict[str, Any] = {"kind": "epoch", "step": self.step, "epoch": epoch + 1, "train_loss": train_loss}
            for kind, measured in self.metrics.items():
                row |= {f"{kind}_top1": measured.top1, f"{kind}_loss": measured.loss}
            self.folder.record({**row, "images_per_second": speed})
            if is_best:
                self._save_weights(self.folder.best)
        self._save()
        top1 = {kind: m.top1 for kind, m in self.metrics.items()}
        loss = {kind: m.loss for kind, m in self.metrics.items()}
        self.on_event(EpochEnded(epoch + 1, self.recipe.train.epochs, self.step, train_loss, top1, loss, speed))

    def _measure(self, kind: str, should_stop: Callable[[], bool]) -> Metrics:
        def stop() -> None:  # a resumed run measures the epoch again; processes that measure alone cannot agree
            if self.world.size == 1:
                self._stop_if(should_stop)

        return measure_model(
            self.evaluated,
            self.splits.test,
            self.splits.preprocess,
            kind=kind,
            device=self.world.device,
            batch_size=self.recipe.eval.batch_size,
            topk=self.recipe.eval.topk,
            channels_last=self.recipe.train.channels_last,
            stop=stop,
        )

    def _finish(self) -> TrainResult:
        """Write what remains of a finished run."""
        folder = self.folder
        result = TrainResult(
            folder.path if folder is not None else Path(),
            self.steps,
            self.seconds,
            self.images / max(self.seconds, 1e-9),
            self.metrics,
            self.best["top1"],
            self.best["epoch"],
        )
        if self.world.is_main and folder is not None:
            save_predictions(folder.path / "predictions.npz", self.splits.test.labels, self.metrics)
            folder.write_table()
            if self.recipe.log.plots:
                from bkn_core.engine.plots import plot_curves

                plot_curves(folder)
            if self.recipe.log.tensorboard:
                from bkn_core.engine.plots import write_tensorboard

                write_tensorboard(folder)
            self.close("finished", "finished")
        self.world.barrier()
        return result

    @property
    def evaluated(self) -> nn.Module:
        """The model that is measured and saved as weights: the average where there is one."""
        return self.model if self.ema is None else self.ema.module

    @property
    def _gain_schedule(self) -> str:
        return self.recipe.norm.gain_schedule if self.recipe.norm.kind == "bkn" else "constant"

    def _averaged(self) -> AveragedModel | None:
        decay = self.recipe.train.ema
        if decay is None:
            return None
        return AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(decay)).eval()

    def _announce(self) -> None:
        layers = [m for m in self.model.modules() if isinstance(m, BatchKalmanNorm)]
        if self.world.is_main and self.folder is not None:
            self.folder.write_environment(self.world.device)
            self.folder.write_summary("running", step=self.step, steps=self.steps)
            self.folder.log(f"started at step {self.step} of {self.steps} on {self.world.device}")
        self.on_event(
            Started(
                self.folder.path if self.folder is not None else Path(),
                self.step,
                self.steps,
                self.recipe.train.epochs,
                str(self.world.device),
                count_parameters(self.model),
                len(self.splits.train),
                len(self.splits.test),
                sum(layer.expects_prior for layer in layers),
                len(layers),
            )
        )

    def _tell(self, text: str) -> None:
        if self.world.is_main and self.folder is not None:
            self.folder.log(text)
        self.on_event(Notice(text))

    def close(self, status: str, text: str) -> None:
        """Write how the run ended."""
        if not self.world.is_main or self.folder is None:
            return
        self.folder.log(text)
        measured = {kind: metrics.summary() for kind, metrics in self.metrics.items()}
        self.folder.write_summary(
            status,
            step=self.step,
            steps=self.steps,
            seconds=self.seconds,
            images_per_second=self.images / max(self.seconds, 1e-9),
            results=measured,
            best=self.best,
            message=text,
        )

    def _save(self) -> None:
        """Save the state of this step, then the weights alone."""
        self.saved_at = time.monotonic()
        if not self.world.is_main or self.folder is None:
            return
        save_state(self.folder.state, self.state())
        self._save_weights(self.folder.weights)

    def _save_weights(self, path: Path) -> None:
        save_weights(path, self.evaluated, self.recipe, self.splits.classes, self.splits.preprocess)

    def state(self) -> dict[str, Any]:
        """Return all that resuming needs, as tensors, numbers and texts."""
        device = self.world.device
        return {
            "schema": "bkn.state/1",
            "step": self.step,
            "measured": self.measured,
            "seconds": self.seconds,
            "images": self.images,
            "best": self.best,
            "losses": torch.stack(self.losses).cpu() if self.losses else torch.zeros(0),
            "epoch_loss": self.epoch_loss.cpu(),
            "model": {name: tensor.cpu() for name, tensor in self.model.state_dict().items()},
            "average": self.ema.state_dict() if self.ema is not None else {},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.zeros(0),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take up where a saved state left off.

        Raises:
            InputError: the state does not fit the recipe's model.
        """
        device = self.world.device
        load_strictly_(self.model, state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            self.ema.load_state_dict(state["average"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.measured = state["step"], state["measured"]
        self.seconds, self.images, self.best = state["seconds"], state["images"], state["best"]
        self.losses = list(state["losses"].to(device).unbind())
        self.epoch_loss = state["epoch_loss"].to(device)
        torch.set_rng_state(state["random"])
        if device.type == "cuda" and len(state["random_cuda"]):
            torch.cuda.set_rng_state(state["random_cuda"], device)
        if self.folder is not None and self.world.is_main:
            self.folder.forget_after(self.step)
