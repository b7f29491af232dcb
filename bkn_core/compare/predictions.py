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
    """Return which images each run gets right, (runs, images), or None where they were measured on other images.

    Raises:
        InputError: the predictions of a run are missing or damaged.
    """
    found = [_predictions(run, mode) for run in runs]
    if not found or not all(np.array_equal(labels, found[0][0]) for labels, _ in found):
        return None
    return np.stack([correct for _, correct in found])


def has_predictions(run: Path) -> bool:
    """Say whether there is a file of predictions; some copies of runs leave it out."""
    return (run / "predictions.npz").exists()


def _predictions(run: Path, mode: str) -> tuple[NDArray[Any], Correct]:
    """Return the labels of the test images and which of them a run gets right."""
    path = run / "predictions.npz"
    try:
        if not path.is_file():  # a pipe would be waited for
            raise OSError("there is no such file")
        with open(path, "rb") as file, np.load(file) as arrays:
            labels = arrays["labels"]
            # As in the run's own measure, an image without a finite loss is a mistake.
            correct = (arrays[f"{mode}_predictions"] == labels) & np.isfinite(arrays[f"{mode}_losses"])
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} cannot be read: {error}", "Leave this run out, or train it again.") from error
    return labels, correct
