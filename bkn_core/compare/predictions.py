"""Which test images a run gets right, as its predictions.npz tells."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bkn_core.compare.statistics import Correct
from bkn_core.errors import InputError


def correct_together(runs: Sequence[Path], mode: str) -> Correct | None:
    """Return which images each run gets right, (runs, images), or None where that is not known of the same images.

    Some copies of runs leave their predictions out.

    Raises:
        InputError: the predictions of a run are damaged.
    """
    if not all((run / "predictions.npz").exists() for run in runs):
        return None
    found = [_predictions(run, mode) for run in runs]
    if not found or not all(np.array_equal(labels, found[0][0]) for labels, _ in found):
        return None
    return np.stack([correct for _, correct in found])


def check_predictions(run: Path, modes: Sequence[str]) -> None:
    """Refuse damaged predictions.

    Raises:
        InputError: naming the file.
    """
    for mode in modes:
        correct_together([run], mode)


def _predictions(run: Path, mode: str) -> tuple[NDArray[Any], Correct]:
    """Return the labels of the test images and which of them a run gets right."""
    path = run / "predictions.npz"
    try:
        if not path.is_file():  # a pipe would be waited for
            raise OSError("it is no file")
        with open(path, "rb") as file, np.load(file) as arrays:
            labels, found, losses = (arrays[key] for key in ("labels", f"{mode}_predictions", f"{mode}_losses"))
            if not (labels.ndim == 1 and labels.size > 0 and labels.shape == found.shape == losses.shape):
                raise ValueError(f"{labels.size} labels, {found.size} predictions and {losses.size} losses")
            # As in the run's own measure, an image without a finite loss is a mistake.
            correct = (found == labels) & np.isfinite(losses)
    except (OSError, KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} cannot be read: {error}", "Leave this run out, or train it again.") from error
    return labels, correct
