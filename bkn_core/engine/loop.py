"""The verb `train`: one loop from the first step to the last, which can stop after any of them and go on from there."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from bkn_core.engine.build import check_recipe
from bkn_core.engine.checkpoint import check_recipe as check_resumed
from bkn_core.engine.checkpoint import deciding_keys, largest_file, load_state
from bkn_core.engine.distributed import World, join_world
from bkn_core.engine.events import Event, Notice
from bkn_core.engine.locks import alone_in
from bkn_core.engine.records import Records
from bkn_core.engine.run_folder import RunFolder, numbered_folder, run_name
from bkn_core.engine.tasks.task import Measured
from bkn_core.engine.tensorboard import check_tensorboard
from bkn_core.engine.training import Training
from bkn_core.errors import InterruptedRun
from bkn_core.recipe import Recipe

_LONGER = "train.epochs is {0}, was {1}: from here on learning rate and gain follow the schedule of {0} epochs"
_SAVE_SECONDS = 300.0  # a long epoch is saved in between


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a finished run gave.

    Args:
        run: its folder.
        steps: optimizer steps that were taken.
        seconds: time spent in training steps, over all its parts.
        images_per_second: training images per second.
        metrics: the last epoch's measures on the test images, by kind of statistics.
        best: the figure that decides, of the best epoch on the validation images, by the first kind; without any, of
            the last epoch.
        best_epoch: which one that was, from 1.
        validated: whether there were validation images.
        figure: the name of the figure that decides.
        word: what people call it.
    """

    run: Path
    steps: int
    seconds: float
    images_per_second: float
    metrics: dict[str, Measured]
    best: float
    best_epoch: int
    validated: bool = False
    figure: str = "top1"
    word: str = "top-1"


def train(
    recipe: Recipe,
    *,
    out: Path | str | None = None,
    resume: Path | str | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> TrainResult:
    """Train as a recipe says, into a run folder.

    Args:
        recipe: what to do; where a run is resumed, its own recipe; where data, device, logs and measures lie or are
            may differ, and `train.epochs` may be larger.
        out: the run folder, default `runs/<recipe>-<data>-<model>-<norm>-g<g>-s<s>-seed<seed>`.
        resume: the folder of an interrupted run to continue, bit for bit on the CPU.
        on_event: called with every event, in the main process.
        should_stop: asked after every step; true saves and ends the run.

    Raises:
        InterruptedRun: `should_stop` said so; the last finished step is saved.
        DivergedError: a value was not finite.
        BusyError: another process trains in the folder.
        BknError: any fault of recipe, data, device or disk.
    """
    out, resume = (None if folder is None else Path(folder) for folder in (out, resume))
    with (
        join_world(check_recipe(recipe).train.device) as world,
        _numerics(recipe),
        contextlib.ExitStack() as held,
    ):
        check_tensorboard(recipe)
        known = None if resume is None else RunFolder.open(resume)
        if known is not None and world.is_main:
            _keep(known.path, held, on_event)
        if known is not None:
            check_resumed(deciding_keys(known.recipe), recipe)
        if known is None and out is not None:
            RunFolder.refuse_taken(out)
        training = Training(recipe, world)  # before the folder is made: what cannot begin leaves none behind
        if known is not None and known.state.exists():
            training.restore(load_state(known.state, largest_file(training.model)))
        folder = known if world.is_main else None
        if known is None and world.is_main:
            folder = RunFolder.create(
                recipe, _keep(out or numbered_folder(Path("runs") / run_name(recipe)), held, on_event)
            )
        if known is not None:
            notes = [*_on_resuming(training, known.recipe.train.epochs)]  # in all processes: they agree on the end
            if world.is_main:
                for text in notes:
                    on_event(Notice(text))
                known.adopt(recipe)
        records = Records(folder, on_event, training)
        with records.ending():
            return _run(training, records, should_stop)


def _on_resuming(training: Training, epochs: int) -> Iterator[str]:
    """Say what a run that goes on, or does not, should know; `epochs` were to be trained before."""
    config = training.recipe.train
    if training.is_stalled:
        yield f"the run has ended early after epoch {training.measured}: train.patience above {config.patience} goes on"
    elif training.measured >= config.epochs:
        yield f"the run has all of its {config.epochs} epochs: more train.epochs go on"
    elif config.epochs > epochs:
        yield _LONGER.format(config.epochs, epochs)


def _keep(path: Path, held: contextlib.ExitStack, on_event: Callable[[Event], None]) -> Path:
    """Keep other processes out of a run folder until the stack is closed."""
    if not held.enter_context(alone_in(path)):
        on_event(Notice(f"{path} lies on a file system without locks: start no second process in it"))
    return path


def _run(training: Training, records: Records, should_stop: Callable[[], bool]) -> TrainResult:
    world = training.world
    watch = _Watch(world, records, should_stop)
    records.started(training)
    splits = training.splits

    def heed() -> None:
        if world.size == 1:  # processes that measure on their own cannot agree on a moment to stop
            watch(training)

    metrics: dict[str, Measured] = {}
    while training.measured < training.recipe.train.epochs and not training.is_stalled:
        epoch = training.measured
        for passes in training.epoch(epoch):
            step = training.take_step(epoch, passes)
            records.stepped(training, epoch, step)
            watch(training)
        metrics = training.measure(splits.deciding, heed)
        records.epoch_ended(training, metrics)
    if splits.validation is not None:
        metrics = training.measure(splits.test, heed)  # only now: nothing was chosen by them
    elif not metrics:  # a finished run that is resumed
        metrics = training.measure(splits.test, lambda: None)
    records.finished(training, metrics)
    world.barrier()
    return TrainResult(
        records.path,
        training.step,
        training.seconds,
        training.images_per_second,
        metrics,
        training.best[training.task.figure],
        training.best["epoch"],
        splits.validation is not None,
        training.task.figure,
        training.task.word,
    )


class _Watch:
    """Between steps: heeds a request to stop, and saves a long epoch now and then."""

    def __init__(self, world: World, records: Records, should_stop: Callable[[], bool]) -> None:
        self.world, self.records, self.should_stop = world, records, should_stop
        self.saved = time.monotonic()

    def __call__(self, training: Training) -> None:
        if self.world.any(self.should_stop()):
            self.records.save(training)
            raise InterruptedRun(
                f"stopped after step {training.step} of {training.steps}, which is saved",
                f"Continue with `bkn train --resume {self.records.path}`.",
            )
        if time.monotonic() - self.saved > _SAVE_SECONDS:
            self.records.save(training)
            self.saved = time.monotonic()


@contextlib.contextmanager
def _numerics(recipe: Recipe) -> Iterator[None]:
    """Set determinism for the time of a run."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(recipe.train.deterministic)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
