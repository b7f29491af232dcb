"""What the runs of a comparison cost: steps and seconds to a target, speed and memory against the reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from bkn_core.compare.cells import Cell, reference_place
from bkn_core.compare.epochs import Epoch, measured_epochs


def with_costs(cells: Sequence[Cell], target: float | None) -> list[Cell]:
    """Return the cells with what those that finished cost.

    Args:
        cells: of the whole comparison.
        target: top-1 to be reached, a fraction; None is the best epoch of the reference of the same seed.

    Raises:
        InputError: the metrics of a run are damaged.
    """
    places = list(dict.fromkeys(cell.place for cell in cells))
    finished = [cell for cell in cells if cell.chosen and cell.status == "finished"]
    known = {(cell.place, cell.seed): cell for cell in finished}
    return [
        _costed(cell, known.get((reference_place(cell.place, places), cell.seed)), target) if cell in finished else cell
        for cell in cells
    ]


def _costed(cell: Cell, reference: Cell | None, target: float | None) -> Cell:
    mode = next(iter(cell.top1), "population")
    goal = target
    if goal is None and reference is not None:
        goal = max((epoch.top1 for epoch in measured_epochs(reference.run, mode)), default=None)
    reached = _first(measured_epochs(cell.run, mode), goal)
    theirs = (None, None) if reference is None else (reference.images_per_second, reference.peak_memory)
    return dataclasses.replace(
        cell,
        target=goal,
        steps_to_target=None if reached is None else reached.step,
        seconds_to_target=None if reached is None else reached.seconds,
        relative_images_per_second=_ratio(cell.images_per_second, theirs[0]),
        relative_peak_memory=_ratio(cell.peak_memory, theirs[1]),
    )


def _first(epochs: Sequence[Epoch], goal: float | None) -> Epoch | None:
    """Return the first epoch that reached a goal."""
    return next((epoch for epoch in epochs if goal is not None and epoch.top1 >= goal), None)


def _ratio(ours: float | None, theirs: float | None) -> float | None:
    return ours / theirs if ours is not None and theirs else None
