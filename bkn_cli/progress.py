"""The progress of a training, as a bar on a terminal and as one line an epoch elsewhere."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

if TYPE_CHECKING:
    from types import TracebackType

    from bkn_cli.render import Reporter


class TrainingProgress:
    """Draws the events of a run, and of the runs of a comparison.

    Args:
        reporter: the voice of the command.
        jobs: runs at a time; several are processes, which save and end when this one is asked to.
    """

    def __init__(self, reporter: Reporter, *, jobs: int = 1) -> None:
        self.reporter, self.jobs = reporter, jobs
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(10),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=reporter.human,
            transient=True,
            disable=not reporter.human.is_terminal,
        )
        self.task = self.bar.add_task("training", total=None, speed="", visible=jobs == 1)
        self.matrix: TaskID | None = None
        self.shares: dict[int, float] = {}
        self.reused = 0
        self.loss, self.device, self.heading, self.images, self.since = "", "", "", 0, time.perf_counter()

    def __enter__(self) -> TrainingProgress:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def __call__(self, event: Any) -> None:
        """Draw one event."""
        name = type(event).__name__
        draw = getattr(self, f"_{name.lower()}", None)
        if draw is not None:
            draw(event)

    def _started(self, event: Any) -> None:
        self.reporter.phase = "stepping"
        known = f", {event.priors} of {event.norms} norm layers with a prior" if event.priors else ""
        where = f", from step {event.step}" if event.step else ""
        held_out = f", {event.validation_images} validation" if event.validation_images else ""
        heading = (
            f"{event.train_images} training{held_out} and {event.test_images} test images, "
            f"{event.parameters:,} parameters"
            f"{known}, on {event.device}{where}"
        )
        if heading != self.heading:  # the runs of a comparison often have one
            self.reporter.say(heading)
        self.heading = heading
        self.reporter.say(f"run folder: {event.run}")
        self.device = f"on {event.device}"
        self.bar.reset(self.task, total=event.steps, completed=event.step)
        self.images, self.since = 0, time.perf_counter()

    def _stepped(self, event: Any) -> None:
        self.images += event.images
        if event.loss is not None:
            self.loss = f"loss {event.loss:z.3f}"
        speed = self.images / max(time.perf_counter() - self.since, 1e-9)
        self.bar.update(
            self.task,
            completed=event.step,
            description=f"epoch {event.epoch} {self.loss} lr {event.learning_rate:.2g} {self.device}",
            speed=f"{speed:.0f} images/s",
        )

    def _epochended(self, event: Any) -> None:
        images = "validation " if event.images == "validation" else ""
        word = f"{images}{event.word}"
        measured = ", ".join(f"{word} {100 * value:.2f} % ({kind})" for kind, value in event.figures.items())
        self.reporter.say(
            f"epoch {event.epoch:>3}/{event.epochs}  training loss {event.train_loss:z.4f}  {measured}  "
            f"{event.images_per_second:.0f} images/s"
        )

    def _notice(self, event: Any) -> None:
        self.reporter.warn(event.text)

    def _cellstarted(self, event: Any) -> None:
        if self.matrix is None:
            self.matrix = self.bar.add_task("all runs", total=event.total, speed="")
        how = ", already there" if event.reused else ""
        which = f"run {event.index} of {event.total}"
        self.reporter.say(
            Text.assemble(
                (which, "bold"), f": {event.norm}, s = {event.statistics}, seed {event.seed}{event.more}{how}"
            )
        )
        self.reused += event.reused  # their time is none of the others'
        self.bar.update(self.matrix, total=event.total - self.reused)
        if self.jobs > 1 and not event.reused:
            self.reporter.phase = "stepping"

    def _cellmoved(self, event: Any) -> None:
        self.shares[event.index] = event.share
        if self.matrix is not None:
            self.bar.update(self.matrix, completed=sum(self.shares.values()))

    def _cellended(self, event: Any) -> None:
        if self.jobs == 1:
            self.reporter.phase = "free"
        cell = event.cell
        if not event.reused:
            self._cellmoved(SimpleNamespace(index=event.index, share=1.0))
        if cell.status != "finished":
            self.reporter.warn(f"{cell.norm} at s = {cell.statistics}, seed {cell.seed}: {cell.status}: {cell.message}")
        elif self.jobs > 1 and not event.reused:
            measured = ", ".join(f"top-1 {100 * top1:.2f} % ({kind})" for kind, top1 in cell.top1.items())
            self.reporter.say(f"{cell.run.name}: {measured}  {cell.images_per_second:.0f} images/s")
