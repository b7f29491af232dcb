"""Finished runs that no training made: folders with chosen predictions and curves."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bkn_core.compare.cells import Cell, finished_cell
from bkn_core.engine.run_folder import RunFolder
from bkn_core.recipe import Recipe, load_recipe

LABELS = np.arange(200) % 10


def make_run(
    path: Path, words: Sequence[str], *, accuracy: float = 0.5, epochs: int = 3, modes: Sequence[str] = ("population",)
) -> Cell:
    """Write a finished run of the default recipe under KEY=VALUE words, right in a random part of 200 images."""
    return finish_run(path, load_recipe(None, words), accuracy=accuracy, epochs=epochs, modes=modes)


def finish_run(
    path: Path, recipe: Recipe, *, accuracy: float = 0.5, epochs: int = 3, modes: Sequence[str] = ("population",)
) -> Cell:
    """Write the files of a finished run, as training would."""
    folder = RunFolder.create(recipe, path)
    random = np.random.default_rng(zlib.crc32(f"{recipe.norm.kind} {recipe.train.seed}".encode()))
    arrays: dict[str, Any] = {"labels": LABELS}
    results = {}
    for mode in modes:
        right = random.random(len(LABELS)) < accuracy
        arrays |= {f"{mode}_predictions": np.where(right, LABELS, LABELS + 1), f"{mode}_losses": np.ones(len(LABELS))}
        results[mode] = {"top1": float(right.mean()), "loss": 1.0}
    np.savez(path / "predictions.npz", **arrays)
    for epoch in range(1, epochs + 1):
        grown = {f"{mode}_top1": results[mode]["top1"] * (1 - math.exp(-3 * epoch / epochs)) for mode in modes}
        folder.record({"kind": "epoch", "step": epoch, "epoch": epoch, **grown})
    folder.write_summary("finished", seconds=2.0, images_per_second=100.0, results=results)
    return finished_cell(folder, recipe)


def fake_train(calls: list[tuple[str, str]]) -> Callable[..., None]:
    """Return a stand-in for `train` that notes what it is called with and finishes at once."""

    def train(recipe: Recipe, *, out: Path | None = None, resume: Path | None = None, **callbacks: Any) -> None:
        path = out or resume
        assert path is not None
        calls.append(("resume" if resume else "out", path.name))
        if resume is not None:
            (path / "config.yaml").unlink()
        stats = recipe.eval_stats
        finish_run(path, recipe, modes=("population", "batch") if stats == "both" else (stats,))

    return train
