"""What a training leaves behind: events for its caller, and in the main process the files of the run folder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from bkn_core.engine.checkpoint import save_state, save_weights
from bkn_core.engine.environment import command
from bkn_core.engine.evaluation import save_predictions
from bkn_core.engine.events import EpochEnded, Event, Notice, Started, Stepped
from bkn_core.engine.memory import PeakMemory
from bkn_core.engine.metrics_log import MetricsLog
from bkn_core.engine.models import count_parameters
from bkn_core.engine.run_folder import RunFolder
from bkn_core.engine.steps import Step
from bkn_core.engine.tasks.task import Measured
from bkn_core.engine.training import Training
from bkn_core.errors import BknError, DivergedError, InterruptedRun, OutputError
from bkn_core.layers.batch_kalman import BatchKalmanNorm


class Records:
    """The records of one run.

    Args:
        folder: where they are written; None in all processes but the main one, which then stay silent.
        on_event: called with every event.
        training: the run.
    """

    def __init__(self, folder: RunFolder | None, on_event: Callable[[Event], None], training: Training) -> None:
        self.folder, self.on_event, self.training = folder, on_event, training
        self.results: dict[str, Any] = {}
        self.memory = PeakMemory(training.world.device)
        self.log: MetricsLog | None = None

    @property
    def path(self) -> Path:
        """The run folder."""
        return self.folder.path if self.folder is not None else Path()

    def started(self, training: Training) -> None:
        """A run begins or goes on; records after its step will be written again."""
        if self.folder is None:
            return
        layers = [m for m in training.model.modules() if isinstance(m, BatchKalmanNorm)]
        self.folder.sweep()
        self.folder.forget_after(training.step, training.measured)
        self.log = MetricsLog(self.folder, training.recipe)
        self.folder.write_environment(training.world.device, training.data)
        self._summarize("running", "")
        self.folder.log(
            f"started at step {training.step} of {training.steps} on {training.world.device} by {command()}"
        )
        for text in training.splits.notes:
            self.folder.log(text)
            self.on_event(Notice(text))
        if training.step:  # those on the disk may be of another step than the state, or lost
            self._save_weights(training, self.folder.weights)
        self.on_event(
            Started(
                run=self.path,
                step=training.step,
                steps=training.steps,
                epochs=training.recipe.train.epochs,
                device=str(training.world.device),
                parameters=count_parameters(training.model),
                train_images=len(training.splits.train),
                test_images=len(training.splits.test),
                validation_images=len(training.splits.validation or ()),
                priors=sum(layer.expects_prior for layer in layers),
                norms=len(layers),
            )
        )

    def stepped(self, training: Training, epoch: int, step: Step) -> None:
        """A step is done; its loss is read from the device only when it is to be logged."""
        shown = None
        if training.step % training.recipe.log.every == 0 or training.step == training.steps:
            shown = torch.stack(training.losses).mean().item()
            training.losses.clear()
        if self.log is None:
            return
        if step.skipped:
            self.log.folder.log(step.skipped)
            self.on_event(Notice(step.skipped))
        if shown is not None:
            row = {"kind": "step", "step": training.step, "epoch": epoch + 1, "loss": shown}
            self.log.add({**row, "learning_rate": step.learning_rate, "gain": training.mean_gain})
        self.on_event(Stepped(training.step, epoch + 1, step.images, shown, step.learning_rate))

    def epoch_ended(self, training: Training, metrics: dict[str, Measured]) -> None:
        """An epoch is done and measured on the images that epochs are compared on: keep the best weights, save."""
        train_loss = (training.epoch_loss / training.plan.images).item()
        is_best = training.end_epoch(next(iter(metrics.values())).figure)
        if self.log is None:
            return
        epoch, speed = training.measured, training.images_per_second
        row: dict[str, Any] = {"kind": "epoch", "step": training.step, "epoch": epoch, "train_loss": train_loss}
        is_test = training.splits.validation is None
        for kind, measured in metrics.items():
            name = kind if is_test else f"validation_{kind}"
            row |= {f"{name}_{key}": value for key, value in measured.summary().items() if isinstance(value, float)}
        self.log.add({**row, "images_per_second": speed, "seconds": training.seconds})
        if is_test:
            self.results = {kind: measured.summary() for kind, measured in metrics.items()}
            save_predictions(self.path / "predictions.npz", training.splits.test, metrics)
        if is_best:
            self._save_weights(training, self.log.folder.best)
        self.save(training)
        self.log.publish(is_last=False)
        self._summarize("running", "")
        figures = {kind: m.figure for kind, m in metrics.items()}
        loss = {kind: m.loss for kind, m in metrics.items()}
        epochs = training.recipe.train.epochs
        images: Literal["test", "validation"] = "test" if is_test else "validation"
        word = training.task.word
        self.on_event(EpochEnded(epoch, epochs, training.step, train_loss, word, figures, loss, speed, images))

    def save(self, training: Training) -> None:
        """Save the weights of this step, then the whole state: a run that it calls finished has its weights."""
        if self.log is not None:
            state = training.state()
            self.log.flush()  # what the state counts as done can be seen
            self._save_weights(training, self.log.folder.weights)
            save_state(self.log.folder.state, state)

    def _save_weights(self, training: Training, path: Path) -> None:
        splits = training.splits
        save_weights(path, training.evaluated, training.recipe, splits.classes, splits.preprocess)

    def finished(self, training: Training, metrics: dict[str, Measured]) -> None:
        """Write what a finished run, measured on the test images, has beside its checkpoints."""
        if self.log is None:
            return
        text = "finished"
        if training.measured < training.recipe.train.epochs:
            best, share = training.best["epoch"], 100 * training.best[training.task.figure]
            text = f"stopped early after epoch {training.measured}: none since epoch {best} had a better validation "
            text += f"{training.task.word} than its {share:.2f} %"
            self.on_event(Notice(text))
        self.results = {kind: measured.summary() for kind, measured in metrics.items()}
        if training.splits.validation is not None:  # without, the last epoch wrote them
            save_predictions(self.path / "predictions.npz", training.splits.test, metrics)
        self.log.publish(is_last=True)
        self._close("finished", text)

    @contextlib.contextmanager
    def ending(self) -> Iterator[None]:
        """Write how a run ended that did not finish, by whatever it was."""
        try:
            yield
        except BaseException as error:
            if isinstance(error, DivergedError) and self.folder is not None:
                saved = self.folder.state.exists()
                error.hint += " The last checkpoint is sound." if saved else " No checkpoint was saved before."
            is_stop = isinstance(error, (InterruptedRun, KeyboardInterrupt))
            text = error.message if isinstance(error, BknError) else f"{type(error).__name__}: {error}"
            with contextlib.suppress(OutputError):  # the disk may be what failed
                self._close("interrupted" if is_stop else "failed", text)
            raise

    def _close(self, status: str, text: str) -> None:
        if self.folder is None:
            return
        self._summarize(status, text)
        self.folder.log(text)
        if self.log is not None:
            self.log.close()

    def _summarize(self, status: str, text: str) -> None:
        if self.folder is None:
            return
        run = self.training
        values: dict[str, Any] = {"step": run.step, "steps": run.steps, "seconds": run.seconds, "best": run.best}
        values["images_per_second"] = run.images_per_second
        values |= {"parameters": count_parameters(run.model), "peak_memory": self.memory.read()}
        self.folder.write_summary(status, **values, results=self.results, message=text)
