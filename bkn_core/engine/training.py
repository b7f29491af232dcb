"""A training in progress: what changes from step to step, one step of it, and its whole state as plain data."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bkn_core.centred_weights import CentredWeights, centred_weights
from bkn_core.data.batches import BatchPlan, epoch_order, generator_at
from bkn_core.data.splits import Images, prefetch
from bkn_core.engine.build import build_model, load_splits
from bkn_core.engine.checkpoint import deciding_keys, load_strictly_
from bkn_core.engine.device import autocast, mixed_precision
from bkn_core.engine.distributed import World
from bkn_core.engine.evaluation import measure_model, modes
from bkn_core.engine.fingerprint import check_data, fingerprint
from bkn_core.engine.finite import BufferSnapshot, all_finite, check_weights, first_not_finite
from bkn_core.engine.models import example_images
from bkn_core.engine.objective import RANDOM_STATE
from bkn_core.engine.optimization import average_weights, build_optimizer, set_step_
from bkn_core.engine.state import checked_state
from bkn_core.engine.steps import Pass, Step
from bkn_core.engine.tasks.named import task_of
from bkn_core.engine.tasks.task import Measured
from bkn_core.errors import DivergedError
from bkn_core.layers.batch_kalman import BatchKalmanNorm
from bkn_core.layers.rivals.build import WEIGHTS
from bkn_core.layers.rivals.groups import set_length_
from bkn_core.priors.accumulation import accumulation
from bkn_core.recipe import Recipe

# What all processes move alike: the priors of the next step and their gains depend on it, and one process saves it.
_SHARED = ("innovation", "sensitivity", "residual", "uncertainty", "fixed_gain", "running_mean", "running_var", "_past")
_SKIPS = 10  # bad steps in a row that end a run even where they are skipped


class Training:
    """Model, optimizer and counters of a run.

    Args:
        recipe: what to do.
        world: this process among all.
    """

    def __init__(self, recipe: Recipe, world: World) -> None:
        self.recipe, self.world, self.task = recipe, world, task_of(recipe)
        self.splits = load_splits(recipe)
        self.data = fingerprint(self.splits)
        self.layout = torch.channels_last if recipe.train.channels_last else torch.contiguous_format
        with RANDOM_STATE:
            torch.manual_seed(recipe.train.seed)
            model = build_model(recipe, self.splits.preprocess, len(self.splits.classes), images=self.splits.train)
            torch.manual_seed(recipe.train.seed + world.rank)
        self.model: nn.Module = model.to(world.device).to(memory_format=self.layout).train()
        self.centred = CentredWeights(self._weights_to_centre())
        self.average = average_weights(self.model, recipe.train.ema)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(self.model, recipe.optim, world.device)
        self.amp = mixed_precision(recipe.train.amp, world.device)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=self.amp is torch.float16)
        if recipe.train.compile:
            self.model.compile(dynamic=False)  # the closed form takes minutes with a symbolic number of images
        self.network = world.wrap(self.model)
        self.snapshot = BufferSnapshot(self.model)
        self.shared = [b for name, b in self.model.named_buffers() if name.endswith(_SHARED)]
        size = world.images_per_pass(recipe.batch)
        self.plan = BatchPlan(len(self.splits.train), size, world.rank, world.size)
        self.objective = self.task.objective(recipe, self.splits, size, world.device)
        self.accumulated = recipe.batch.gradient // self.plan.joint
        self.epoch_steps = -(-len(self.plan) // self.accumulated)
        self.steps = self.epoch_steps * recipe.train.epochs
        set_length_(self.model, recipe.train.epochs * len(self.plan) * -(-size // recipe.batch.statistics))
        self.step = self.measured = self.skipped = self.images = 0
        self.seconds = 0.0
        self.losses: list[Tensor] = []
        self.epoch_loss = torch.zeros((), device=world.device)
        self.best: dict[str, Any] = {self.task.figure: -1.0, "epoch": 0}

    def _weights_to_centre(self) -> Iterator[nn.Parameter]:
        if self.recipe.norm.weights == "centred" and self.recipe.norm.kind not in WEIGHTS:  # which have their own
            colours = self.splits.preprocess
            example = example_images(len(colours.mean), colours.image_size).to(self.world.device)
            yield from centred_weights(self.model, example).values()

    @property
    def evaluated(self) -> nn.Module:
        """The model that is measured and saved as weights: the average where there is one."""
        return self.model if self.average is None else self.average.module

    @property
    def images_per_second(self) -> float:
        """Training images per second of all steps so far."""
        return self.images / max(self.seconds, 1e-9)

    @property
    def mean_gain(self) -> float | None:
        """The mean Kalman gain of the layers with a prior."""
        gains = [m.gain for m in self.model.modules() if isinstance(m, BatchKalmanNorm) and m.expects_prior]
        return torch.stack(gains).mean().item() if gains else None

    @property
    def is_stalled(self) -> bool:
        """Whether none of the last `train.patience` epochs was better than those before."""
        patience = self.recipe.train.patience
        return patience is not None and self.world.any(self.measured - self.best["epoch"] >= patience)

    def epoch(self, epoch: int) -> Iterator[list[Pass]]:
        """Yield the passes of each remaining step of an epoch."""
        first = (self.step - epoch * self.epoch_steps) * self.accumulated
        order = epoch_order(self.plan.images, self.recipe.train.seed, epoch)
        indices = range(first, len(self.plan))
        batches = prefetch(self.splits.train, [self.plan.batch(order, i) for i in indices])
        passes: list[Pass] = []
        for i, (images, labels) in zip(indices, batches, strict=True):
            passes.append(Pass(i, images, labels))
            if len(passes) == self.accumulated or i == len(self.plan) - 1:
                yield passes
                passes = []

    def take_step(self, epoch: int, passes: list[Pass]) -> Step:
        """Average the gradients of a gradient batch and take one step, or refuse it as a whole.

        Raises:
            DivergedError: a value is not finite and the recipe does not skip such steps.
        """
        started = time.perf_counter()
        rate = set_step_(self.optimizer, self.model, self.recipe, step=self.step, steps=self.steps)
        self.snapshot.take()
        images = sum(self.plan.joint_images(part.index) for part in passes)
        loss = self._backward(epoch, passes, images)
        self.world.average_(self.shared)
        self.centred.centre_gradients_()
        if self.recipe.train.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters, self.recipe.train.clip_norm)
        skipped = ""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if self.scaler.is_enabled() or all_finite(loss, gradients + self.snapshot.finite + self._forgotten(passes)):
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.centred.centre_weights_()
            self.skipped = 0
        else:
            skipped, loss = self._refuse(epoch, passes), torch.zeros_like(loss)
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.step += 1
        self.images += images
        self.losses.append(loss)
        self.epoch_loss += loss * images
        self.seconds += time.perf_counter() - started
        return Step(loss, images, rate, skipped)

    def _backward(self, epoch: int, passes: list[Pass], images: int) -> Tensor:
        """Add up the gradients of the mean loss over all passes, and return that loss."""
        is_alone = self.recipe.norm.kind == "bkn" and self.world.size == 1
        with accumulation(self.model) if is_alone else contextlib.nullcontext():
            losses = [self._backward_part(epoch, part, images, is_last=part is passes[-1]) for part in passes]
        return self.world.total(torch.stack(losses).sum())

    def _backward_part(self, epoch: int, part: Pass, images: int, *, is_last: bool) -> Tensor:
        untouched = None if len(part.labels) else BufferSnapshot(self.model)
        with self._without_exchange(is_last=is_last):
            loss = self._loss(epoch, part) / images
            self.scaler.scale(loss * self.world.size).backward()  # type: ignore[no-untyped-call]
        if untouched is not None:
            untouched.restore()
        return loss.detach()

    def _loss(self, epoch: int, part: Pass) -> Tensor:
        """Return the summed loss of this process's part of a pass."""
        device, images, labels, weight = self.world.device, part.images, part.labels, 1.0
        if len(labels) == 0:  # nothing left for this process: take part in the exchange with nothing
            images, labels = self.splits.train.batch(torch.zeros(1, dtype=torch.int64))
            weight = 0.0
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        generator = generator_at(self.recipe.train.seed, epoch, part.index, self.world.rank)
        inputs, targets = self.objective.inputs(images, labels, generator, self.layout)
        with autocast(device, self.amp):
            logits = self.network(inputs)
        return weight * self.objective.loss(logits.float(), targets)

    def _without_exchange(self, *, is_last: bool) -> contextlib.AbstractContextManager[None]:
        """Exchange gradients only in the last pass of a step."""
        if isinstance(self.network, nn.parallel.DistributedDataParallel) and not is_last:
            return self.network.no_sync()
        return contextlib.nullcontext()

    def _forgotten(self, passes: list[Pass]) -> list[Tensor]:
        """Infinities where a layer has not remembered its statistics; a pass without images leaves no trace anyway."""
        return self.snapshot.forgotten() if all(len(part.labels) for part in passes) else []

    def _refuse(self, epoch: int, passes: list[Pass]) -> str:
        """Undo a step that is not finite, and say why or raise."""
        self.snapshot.restore()
        where = first_not_finite(self.model, lambda: torch.stack([self._loss(epoch, part) for part in passes]).sum())
        self.snapshot.restore()
        self.skipped += 1
        text = f"step {self.step + 1} (epoch {epoch + 1}): the {where} is not finite"
        if self.recipe.train.nonfinite == "stop" or self.skipped > _SKIPS:
            raise DivergedError(text, "Lower optim.lr, set train.clip_norm, or train.nonfinite=skip.")
        return f"{text}; the step is skipped"

    def measure(self, images: Images, stop: Callable[[], None]) -> dict[str, Measured]:
        """Measure the model on images by the recipe's kinds of statistics.

        Args:
            images: the validation or the test images.
            stop: called before every batch; it may raise.

        Raises:
            DivergedError: the last update made a parameter infinite.
        """
        check_weights(self.model, self.evaluated, self.step)
        self.world.follow_(list(nn.ModuleList([self.model, self.evaluated]).buffers()))
        return {
            kind: measure_model(
                self.evaluated,
                images,
                self.splits.preprocess,
                task=self.task,
                kind=kind,
                device=self.world.device,
                batch_size=self.recipe.eval.batch_size,
                topk=self.recipe.eval.topk,
                channels_last=self.recipe.train.channels_last,
                stop=stop,
            )
            for kind in modes(self.recipe.eval_stats)
        }

    def end_epoch(self, figure: float) -> bool:
        """Count an epoch as measured and return whether it is the best so far: without validation images, the last."""
        self.measured += 1
        self.epoch_loss.zero_()
        if self.splits.validation is not None and figure <= self.best[self.task.figure]:
            return False
        self.best = {self.task.figure: figure, "epoch": self.measured}
        return True

    def state(self) -> dict[str, Any]:
        """Return all that resuming needs, as tensors, numbers and texts.

        Raises:
            DivergedError: the last update made a parameter infinite.
        """
        check_weights(self.model, self.evaluated, self.step)
        device = self.world.device
        return {
            "schema": "bkn.state/1",
            "recipe": deciding_keys(self.recipe),
            "data": self.data,
            "step": self.step,
            "measured": self.measured,
            "skipped": self.skipped,
            "seconds": self.seconds,
            "images": self.images,
            "best": self.best,
            "losses": torch.stack(self.losses).cpu() if self.losses else torch.zeros(0),
            "epoch_loss": self.epoch_loss.cpu(),
            "model": {name: tensor.cpu() for name, tensor in self.model.state_dict().items()},
            "average": self.average.state_dict() if self.average is not None else {},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.zeros(0),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take up where a saved state left off.

        Raises:
            InputError: the state is not one of this recipe and data; nothing was changed.
        """
        device, state = self.world.device, checked_state(state, self)
        check_data(state["data"], self.data)
        load_strictly_(self.model, state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            load_strictly_(self.average, state["average"])
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        for counter in ("step", "measured", "skipped", "seconds", "images", "best"):
            setattr(self, counter, state[counter])
        self.losses = list(state["losses"].to(device).unbind())
        self.epoch_loss = state["epoch_loss"].to(device)
        with RANDOM_STATE:
            torch.set_rng_state(state["random"])
        if device.type == "cuda" and len(state["random_cuda"]):
            torch.cuda.set_rng_state(state["random_cuda"], device)
