"""From cells to rows and comparisons: mean and spread over seeds, and each row against a reference in pairs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from bkn_core.compare.cells import Cell, Place, reference_place
from bkn_core.compare.predictions import correct_together
from bkn_core.compare.rates import at_edge, tried_rates
from bkn_core.compare.rows import Comparison, Equivalence, Row, Spread
from bkn_core.compare.statistics import (
    equivalence_p,
    is_significant,
    mcnemar,
    paired_interval,
    paired_t,
    two_level_interval,
)
from bkn_core.kinds import GROUPLESS

MARGIN = 0.005
"""Half a point: differences inside it do not matter."""


def summarize(cells: Sequence[Cell]) -> list[Row]:
    """Return one row for every norm, batch sizes, recipe, model and variant, in the order of the cells.

    Raises:
        InputError: the predictions of a run are damaged.
    """
    places = list(dict.fromkeys(cell.place for cell in cells))
    return [_row(place, _label(place, places), [cell for cell in cells if cell.place == place]) for place in places]


def compare_rows(rows: Sequence[Row], cells: Sequence[Cell]) -> list[Comparison]:
    """Set every row against its reference.

    Raises:
        InputError: the predictions of a run are damaged.
    """
    comparisons = []
    known = {row.place: row for row in rows}
    for row in rows:
        reference = known[reference_place(row.place, [*known])]
        if row is reference:
            continue
        ours, theirs = _by_seed(row, cells), _by_seed(reference, cells)
        seeds = tuple(sorted(ours.keys() & theirs.keys()))
        pairs = {seed: (ours[seed], theirs[seed]) for seed in seeds}
        modes = [mode for mode in row.top1 if mode in reference.top1 and seeds]
        comparisons += [_comparison(row, reference, mode, pairs) for mode in modes]
    return comparisons


def _by_seed(row: Row, cells: Sequence[Cell]) -> dict[int, Cell]:
    """Return the finished cells of a row by their seeds."""
    return {cell.seed: cell for cell in cells if row.holds(cell) and cell.chosen and cell.status == "finished"}


def _label(place: Place, places: Sequence[Place]) -> str:
    sizes = [f"s={place.statistics}"] if place.norm not in GROUPLESS else []
    gradients = {other.gradient for other in places if other[:3] == place[:3]}  # of the same recipe, model and norm
    sizes += [f"g={place.gradient}"] if len(gradients) > 1 else []
    words = " ".join(word for word in (place.recipe, place.model, place.norm, *sizes) if word)
    return f"{words} ({place.variant})" if place.variant else words


def _row(place: Place, label: str, tried: Sequence[Cell]) -> Row:
    cells = [cell for cell in tried if cell.chosen]
    finished = [cell for cell in cells if cell.status == "finished"]
    modes = dict.fromkeys(mode for cell in finished for mode in cell.top1)
    rate = next((cell.learning_rate for cell in cells), None)
    rates = tried_rates(tried)
    reached = [cell for cell in finished if cell.steps_to_target is not None]
    return Row(
        place.norm,
        place.gradient,
        place.statistics,
        place.variant,
        len(finished),
        {mode: _spread([cell for cell in finished if mode in cell.top1], mode) for mode in modes},
        float(np.mean([cell.images_per_second for cell in finished])) if finished else math.nan,
        dict(Counter(cell.status for cell in cells if cell.status != "finished")),
        label=label,
        recipe=place.recipe,
        model=place.model,
        learning_rate=rate,
        edge=at_edge(rate, rates),
        rates=rates,
        parameters=next((cell.parameters for cell in finished if cell.parameters is not None), None),
        peak_memory=_mean(finished, lambda cell: cell.peak_memory),
        relative_images_per_second=_mean(finished, lambda cell: cell.relative_images_per_second),
        relative_peak_memory=_mean(finished, lambda cell: cell.relative_peak_memory),
        reached=len(reached),
        steps_to_target=_mean(reached, lambda cell: cell.steps_to_target),
        seconds_to_target=_mean(reached, lambda cell: cell.seconds_to_target),
    )


def _mean(cells: Sequence[Cell], value: Callable[[Cell], float | None]) -> float | None:
    """Return the mean over the cells that know a value."""
    known = [found for cell in cells if (found := value(cell)) is not None]
    return float(np.mean(known)) if known else None


def _spread(cells: Sequence[Cell], mode: str) -> Spread:
    values = [cell.top1[mode] for cell in cells]
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    correct = correct_together([cell.run for cell in cells], mode)
    return Spread(float(np.mean(values)), sd, None if correct is None else two_level_interval(correct))


def _comparison(row: Row, reference: Row, mode: str, pairs: dict[int, tuple[Cell, Cell]]) -> Comparison:
    ours, theirs = (np.array([pair[side].top1[mode] for pair in pairs.values()]) for side in (0, 1))
    correct = {seed: correct_together([our.run, their.run], mode) for seed, (our, their) in pairs.items()}
    known = {seed: pair for seed, pair in correct.items() if pair is not None}
    interval = None
    if len(known) == len(pairs) and len({pair.shape for pair in known.values()}) == 1:
        interval = paired_interval(*np.stack(list(known.values()), 1))
    return Comparison(
        row.label,
        reference.label,
        mode,
        tuple(pairs),
        float(np.mean(ours - theirs)),
        interval,
        {seed: mcnemar(*pair) for seed, pair in known.items()},
        paired_t(ours, theirs),
        _equivalence(ours - theirs, [pair[0].astype(float) - pair[1] for pair in known.values()]),
    )


def _equivalence(by_seed: np.ndarray, by_image: Sequence[np.ndarray]) -> Equivalence | None:
    """Test over the seeds, and for a single one over its images."""
    differences = by_seed if len(by_seed) > 1 else next(iter(by_image), None)
    if differences is None or (p := equivalence_p(differences, MARGIN)) is None:
        return None
    return Equivalence(MARGIN, p, "seeds" if len(by_seed) > 1 else "images", is_significant(p))
