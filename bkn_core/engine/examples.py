"""A picture of images beside their masks and what a network says of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from bkn_core.engine.files import replacing
from bkn_core.engine.plots import new_figure, plain

_NAMED = 12  # classes whose names fit below
_IGNORED = "0.85"


def draw_examples(path: Path, shown: Sequence[tuple[Tensor, Tensor, Tensor]], classes: Sequence[str]) -> None:
    """Draw image, mask and prediction of a few images, one a row; ignored pixels are grey.

    Args:
        path: the file.
        shown: image, uint8 (C, H, W), mask and prediction, (H, W), of each.
        classes: their names.

    Raises:
        OutputError: the file could not be written.
    """
    from matplotlib import colormaps
    from matplotlib.patches import Patch

    colors = colormaps["tab20" if len(classes) > 10 else "tab10"].with_extremes(over=_IGNORED)
    figure = new_figure(figsize=(6.6, 2.1 * len(shown) + 0.8), layout="constrained")
    axes = np.atleast_2d(figure.subplots(len(shown), 3))
    for row, (image, *planes) in zip(axes, shown, strict=True):
        row[0].imshow(image.permute(1, 2, 0).squeeze(2).numpy(), cmap="gray")
        for axis, plane in zip(row[1:], planes, strict=True):
            axis.imshow(plane.numpy(), cmap=colors, vmin=-0.5, vmax=colors.N - 0.5, interpolation="nearest")
    for axis, title in zip(axes[0], ("image", "mask", "prediction"), strict=True):
        axis.set_title(title)
    for axis in axes.flat:
        axis.set_axis_off()
    named = [Patch(color=colors(i), label=plain(name[:24])) for i, name in enumerate(classes[:_NAMED])]
    figure.legend(handles=named, loc="outside lower center", ncols=4, fontsize=8)
    with replacing(path) as aside:
        figure.savefig(aside, format="png", dpi=120)
