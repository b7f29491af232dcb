"""The metrics of a run as TensorBoard events, written while it goes on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from bkn_core.engine.run_folder import RunFolder
from bkn_core.errors import OutputError, RecipeError
from bkn_core.recipe import Recipe


def check_tensorboard(recipe: Recipe) -> None:
    """Refuse a recipe that asks for TensorBoard where it cannot be imported.

    Raises:
        RecipeError: it does.
    """
    if recipe.log.tensorboard:
        _writer_class()


class EventFile:
    """The scalars of a run in tensorboard/.

    A new file begins with all rows so far, and tells TensorBoard to forget what older files say: a run that goes on
    writes again what had come after its last save.

    Args:
        folder: the run.

    Raises:
        RecipeError: TensorBoard is not installed.
        OutputError: the file cannot be written.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.path = folder.path / "tensorboard"
        with self._writing():
            self.writer = _writer_class()(str(self.path), purge_step=1)
        for row in folder.records():
            self.add(row)
        self.flush()

    def add(self, row: dict[str, Any]) -> None:
        """Add the numbers of a row of metrics.jsonl."""
        with self._writing():
            for key, value in row.items():
                if key not in ("kind", "step", "epoch") and isinstance(value, (int, float)):
                    self.writer.add_scalar(f"{row['kind']}/{key}", value, row["step"])

    def flush(self) -> None:
        """Let readers see what was added."""
        with self._writing():
            self.writer.flush()

    def close(self) -> None:
        """Write what is left and close the file."""
        with self._writing():
            self.writer.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(f"{self.path} could not be written: {error}", "Free some space.") from error


def _writer_class() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise RecipeError(
            f"log.tensorboard is true, but TensorBoard cannot be imported: {error}",
            "pip install tensorboard, or set log.tensorboard to false (of a run that goes on: in its config.yaml).",
        ) from error
    return SummaryWriter
