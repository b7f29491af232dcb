"""The pictures of a page that show layers: their gains, what their priors miss, and the variance of micro-batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from bkn_core.compare.drawing import Picture, new_axis, to_picture
from bkn_core.compare.looks import Look
from bkn_core.engine.insides import Insides, Variances
from bkn_core.engine.plots import new_figure, plain

Inside = tuple[str, Look, Insides]  # label and look of a row, and what one of its runs shows
_SMALLEST = 1e-12  # a variance below it is drawn like it
_RANGE = (0.02, 0.98)  # of all values, those that have a colour of their own


def draw_gains(insides: Sequence[Inside]) -> Picture | None:
    """Draw the gain that each layer's uncertainty implies, else the one that it uses; None without any."""
    known = [(label, look, inside.gains) for label, look, inside in insides if inside.gains]
    if not known:
        return None
    figure, axis = new_axis(height=3.6)
    for _, look, gains in known:
        values = [max(layer.implied) if layer.implied else layer.used for layer in gains]
        axis.plot(range(len(values)), values, **look.style())
    names = max((gains for _, _, gains in known), key=len)
    _name_layers(axis, [layer.name for layer in names])
    axis.set_ylim(bottom=0)
    axis.set_ylabel("gain q")
    means = ", ".join(
        f"{label} {sum(max(layer.implied) if layer.implied else layer.used for layer in gains) / len(gains):.3f}"
        for label, _, gains in known
    )
    return to_picture(figure, "gains", "Gain of each layer", f"The gain of each layer. Means over layers: {means}.")


def draw_misses(insides: Sequence[Inside]) -> Picture | None:
    """Draw by how much each layer's prior misses the variance that it reads; None where no layer has a prior."""
    known = [(label, look, inside.priors) for label, look, inside in insides if inside.priors]
    if not known:
        return None
    figure, axis = new_axis(height=3.6)
    axis.axhline(0, color="black", linewidth=1)
    for _, look, misses in known:
        used = [math.nan if miss.refined[1] is None else miss.refined[1] for miss in misses]
        closed = [math.nan if miss.analytic[1] is None else miss.analytic[1] for miss in misses]
        axis.plot(range(len(used)), used, **look.style())
        axis.plot(range(len(closed)), closed, **look.style(linewidth=0.7, markerfacecolor="none", alpha=0.7))
    longest = max((misses for _, _, misses in known), key=len)
    _name_layers(axis, [miss.name for miss in longest])
    axis.set_ylabel("log(observed / predicted variance)")
    words = "What the prior of each layer misses of the variance: filled markers as the layer uses it, hollow ones "
    words += "the closed form alone. Above 0 the prior is too small."
    return to_picture(figure, "priors", "What the priors miss", words)


def draw_variances(insides: Sequence[Inside]) -> list[Picture]:
    """Draw, for each row, log variances of one layer in single statistics groups, under the moving variance."""
    known = [(label, inside.variances) for label, _, inside in insides if inside.variances is not None]
    values = sorted(value for _, found in known for line in _logs([found.moving, *found.observed]) for value in line)
    if not values:
        return []
    low, high = (values[round(share * (len(values) - 1))] for share in _RANGE)
    pictures = []
    for number, (label, found) in enumerate(known):
        maps = [("what the layer reads", found.observed)]
        maps += [("posterior, by which it normalizes", found.used)] if found.used else []
        for part, (what, groups) in enumerate(maps):
            pictures.append(_draw_map(f"variances-{number}-{part}", f"{label}: {what}", found, groups, (low, high)))
    return pictures


def _draw_map(
    name: str, title: str, found: Variances, groups: Sequence[Sequence[float | None]], limits: tuple[float, float]
) -> Picture:
    figure = new_figure(figsize=(5.2, 2.9), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1, 7))
    look: dict[str, Any] = {"aspect": "auto", "interpolation": "none", "cmap": "cividis"}
    look |= {"vmin": limits[0], "vmax": max(limits[1], limits[0] + 1e-6)}
    moving, observed = _logs([found.moving]), _logs(groups)
    above.imshow(moving, **look)
    above.set_yticks([0], ["moving"])
    image = below.imshow(observed, **look)
    below.set(xlabel="channel", ylabel=f"groups of {found.statistics}")
    below.yaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=[above, below], label="log10 of the variance", extend="both")
    gap = _gap(moving[0], observed)
    words = f"{title}, layer {found.layer}: {len(groups)} groups of {found.statistics} images, "
    words += f"{len(found.moving)} channels. They are off the moving variance by a factor of {10**gap:.2f} on average."
    return to_picture(figure, name, title, words)


def _gap(moving: Sequence[float], observed: Sequence[Sequence[float]]) -> float:
    """Return the mean distance of the logarithms."""
    distances = [abs(value - middle) for line in observed for value, middle in zip(line, moving, strict=True)]
    return sum(distances) / max(1, len(distances))


def _logs(lines: Sequence[Sequence[float | None]]) -> list[list[float]]:
    return [[math.log10(max(_SMALLEST, value or 0.0)) for value in line] for line in lines]


def _name_layers(axis: Any, names: Sequence[str]) -> None:
    every = -(-len(names) // 18)
    shown = range(0, len(names), every)
    axis.set_xticks(shown, [plain(names[i]) for i in shown], rotation=40, ha="right", fontsize=8)
