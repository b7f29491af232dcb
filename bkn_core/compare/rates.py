"""The choice of a learning rate for each row, by validation images alone."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import numpy as np

from bkn_core.compare.cells import Cell
from bkn_core.compare.rows import Rate


def choose_rates(cells: Sequence[Cell]) -> list[Cell]:
    """Mark the cells of the best learning rate of each row as chosen, and forget what the others got on test images.

    The best has the highest mean top-1 on validation images over the seeds, a run that did not finish counting as 0;
    of equal ones, that with the lower validation loss.
    """
    chosen = []
    for cell in cells:
        row = [other for other in cells if other.place == cell.place]
        rates = sorted({other.learning_rate for other in row if other.learning_rate is not None})
        scores = {rate: _score([other for other in row if other.learning_rate == rate]) for rate in rates}
        if len(rates) > 1 and cell.learning_rate != max(rates, key=lambda rate: scores[rate]):
            cell = dataclasses.replace(cell, chosen=False, top1={}, loss={})
        chosen.append(cell)
    return chosen


def tried_rates(cells: Sequence[Cell]) -> tuple[Rate, ...]:
    """Return the learning rates of the cells of a row, none where it has but one."""
    rates = sorted({cell.learning_rate for cell in cells if cell.learning_rate is not None})
    tried = [(rate, [cell for cell in cells if cell.learning_rate == rate]) for rate in rates if len(rates) > 1]
    return tuple(_rate(rate, same) for rate, same in tried)


def at_edge(rate: float | None, rates: Sequence[Rate]) -> Literal["", "lowest", "highest"]:
    """Say whether a learning rate is the lowest or highest of those tried."""
    if len(rates) < 2 or rate not in (rates[0].learning_rate, rates[-1].learning_rate):
        return ""
    return "lowest" if rate == rates[0].learning_rate else "highest"


def _rate(rate: float, cells: Sequence[Cell]) -> Rate:
    unfinished: Counter[str] = Counter(cell.status for cell in cells if cell.status != "finished")
    return Rate(rate, _score(cells)[0], sum(cell.status == "finished" for cell in cells), dict(unfinished))


def _score(cells: Sequence[Cell]) -> tuple[float, float]:
    """Return mean top-1 and negative mean loss on the validation images, by the first kind of statistics."""
    top1 = [next(iter(cell.validation.values()), 0.0) for cell in cells]
    losses = [next(iter(cell.validation_loss.values()), math.inf) for cell in cells]
    return float(np.mean(top1)), -float(np.mean(losses))
