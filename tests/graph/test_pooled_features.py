"""Features beside their pooled selves, for which the prior is an approximation."""

from __future__ import annotations

import pytest
import torch
from brute_force import Between, Trap, images, predicted, sampled
from torch.nn import functional as F

from bkn_core.graph.trace import trace

EXAMPLE = images(3)


# Pooled features of a layer beside the features themselves: an approximation, but never "they cancel".
POOLED: dict[str, Between] = {
    "less a local average": lambda t, h: h - F.avg_pool2d(h, 3, 1, 1),
    "less the average of an image": lambda t, h: h - h.mean((2, 3), keepdim=True),
    "less a maximum": lambda t, h: F.max_pool2d(h, 3, 1, 1) - h,
    "times the average of an image": lambda t, h: h * torch.sigmoid(h.mean((2, 3), keepdim=True)),
}


@pytest.mark.parametrize("name", POOLED)
def test_features_beside_their_pooled_selves_do_not_cancel(name: str) -> None:
    model = Trap(POOLED[name], kernel=1)
    graph = trace(model, EXAMPLE)
    if "bn2" in graph.priors:
        ratio = predicted(model, EXAMPLE)["bn2"].variance / sampled(model, images(500))["bn2"].variance
        assert ratio.min() > 0.3 and ratio.max() < 4
