"""Cross-Iteration Batch Normalization against its formula, with derivatives by autograd, group after group."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bkn_core.convert import convert
from bkn_core.errors import StatisticsError
from bkn_core.layers.rivals.cross_iteration import CrossIterationNorm

LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "conv": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), (4, 5, 6)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, dilation=2), (4, 7, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (4, 9)),
    "linear": (lambda: nn.Linear(4, 6), (4,)),
}


class Loop:
    """One group at a time, each with its weights and the derivatives of its statistics."""

    def __init__(self, layer: CrossIterationNorm) -> None:
        self.layer, self.past, self.number = layer, list[Any](), 0

    def __call__(self, convolution: nn.Module, inputs: Tensor) -> Tensor:
        self.number += 1
        weight = convolution.weight
        x = convolution(inputs)
        axes = [i for i in range(x.dim()) if i != 1]
        mean, square = x.mean(axes), x.square().mean(axes)
        known = [[(mean[c], square[c])] for c in range(6)]
        for old_mean, old_square, slopes, old_weight in self.past if self.number > self.layer.length / 20 else []:
            for c in range(6):
                moved = (weight[c] - old_weight[c]).detach()
                m, s = old_mean[c] + (slopes[c][0] * moved).sum(), old_square[c] + (slopes[c][1] * moved).sum()
                known[c] += [(m, s)] if s - m**2 >= 0 else []
        slopes = [
            [torch.autograd.grad(v[c], weight, retain_graph=True)[0][c] for v in (mean, square)] for c in range(6)
        ]
        self.past = [*self.past, (mean, square, slopes, weight.detach().clone())][-7:]
        y = torch.empty_like(x)
        for c in range(6):
            m, s = (torch.stack(values).mean() for values in zip(*known[c], strict=True))
            z = (x[:, c] - m) / (s - m**2 + self.layer.eps).sqrt()
            y[:, c] = z * self.layer.weight[c] + self.layer.bias[c]
        return y

    def end_forward(self) -> None:
        """What later forwards see of this one are constants."""
        self.past = [(mean.detach(), square.detach(), *rest) for mean, square, *rest in self.past]


def drawn(name: str, size: int | None) -> tuple[Any, tuple[int, ...]]:
    build, shape = LAYERS[name]
    norm = nn.BatchNorm1d(6) if len(shape) < 3 else nn.BatchNorm2d(6)
    model = nn.Sequential(build(), norm).double()
    nn.init.normal_(model[1].weight), nn.init.normal_(model[1].bias)
    example = torch.randn(3, *shape, dtype=torch.float64)
    return convert(model, example, kind="cbn", statistics_batch_size=size), shape


@pytest.mark.parametrize(("size", "images"), [(2, 4), (3, 27), (None, 5)])
@pytest.mark.parametrize("name", LAYERS)
def test_steps_equal_the_formula_group_by_group(name: str, size: int | None, images: int) -> None:
    model, shape = drawn(name, size)
    loop = Loop(model[1])
    model[1].length = 40  # the first two groups are alone
    for _ in range(3):
        inputs = torch.randn(images, *shape, dtype=torch.float64)
        found = model(inputs)
        expected = torch.cat([loop(model[0], part) for part in inputs.split(size or images)])
        loop.end_forward()
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
        upstream = torch.randn_like(found)
        gradients = [torch.autograd.grad(y, list(model.parameters()), upstream) for y in (found, expected)]
        for ours, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7)
        with torch.no_grad():
            for parameter, step in zip(model.parameters(), gradients[0], strict=True):
                parameter -= 0.02 * step / (1 + step.norm())


@pytest.mark.parametrize("size", [2, None])
def test_the_layout_in_memory_changes_nothing(size: int | None) -> None:
    model, shape = drawn("conv", size)
    other, inputs = copy.deepcopy(model).to(memory_format=torch.channels_last), torch.randn(4, *shape).double()
    for _ in range(2):
        found = other(inputs.contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close(found, model(inputs), rtol=1e-12, atol=1e-12)


def test_evaluation_is_batch_normalization_by_the_moving_averages() -> None:
    model, shape = drawn("conv", 2)
    reference = nn.BatchNorm2d(6).double()
    x = torch.randn(2, *shape, dtype=torch.float64)
    model(x), reference(model[0](x))
    torch.testing.assert_close(model[1].running_mean, reference.running_mean)
    torch.testing.assert_close(model[1].running_var, reference.running_var)
    with torch.no_grad():
        reference.weight.copy_(model[1].weight), reference.bias.copy_(model[1].bias)
    torch.testing.assert_close(model.eval()(x), reference.eval()(model[0](x)))


def test_a_layer_that_reads_no_convolution_keeps_to_its_group() -> None:
    model: Any = nn.Sequential(nn.Conv2d(4, 6, 1), nn.Tanh(), nn.BatchNorm2d(6))
    converted: Any = convert(model, torch.randn(2, 4, 3, 3), kind="cbn", statistics_batch_size=None)
    assert converted[2].letter is None
    x = torch.randn(4, 4, 3, 3)
    converted(x)
    torch.testing.assert_close(converted(x + 1), model(x + 1), rtol=1e-5, atol=1e-5)


def test_a_group_of_one_value_per_channel_is_refused() -> None:
    with pytest.raises(StatisticsError, match="one value"):
        CrossIterationNorm(6, statistics_batch_size=1)(torch.randn(5, 6))
