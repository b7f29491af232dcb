"""What priors should be: the model itself, run on random numbers of the distribution that the messages claim."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bkn_core.filter.kalman import Gaussian
from bkn_core.graph.operations import Interpreter
from bkn_core.graph.trace import trace
from bkn_core.priors.named_layers import normalized_message

Between = Callable[[Any, Tensor], Tensor]


class Trap(nn.Module):
    """stem, bn1, something in between, conv, bn2; all parameters drawn."""

    def __init__(
        self, between: Between, channels: int = 8, kernel: int = 3, norm: type[nn.Module] = nn.BatchNorm2d
    ) -> None:
        super().__init__()
        self.stem, self.bn1 = nn.Conv2d(3, 8, 1), norm(8)
        self.other, self.bn_other = nn.Conv2d(3, 8, 1), norm(8)
        self.between = between
        self.conv, self.bn2 = nn.Conv2d(channels, 8, kernel), norm(8)
        self.scale = nn.Parameter(torch.rand(1, 8, 1, 1) + 0.5)
        draw_affine(self)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.bn2(self.conv(self.between(self, self.bn1(self.stem(x)))))
        return result

    def side(self, h: Tensor) -> Tensor:
        """Another normalized branch, independent of h."""
        result: Tensor = self.bn_other(self.other(torch.zeros_like(h[:, :3])))
        return result


def draw_affine(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.3)


def predicted(model: nn.Module, example: Any) -> dict[str, Gaussian]:
    """The prior of every layer that has one which does not hang on the network input."""
    graph = trace(model, example)
    reads_input = {i for i, node in enumerate(graph.nodes) if node.operation in ("patches", "measured")}
    interpreter = Interpreter(graph, model, lambda name: normalized_message(model.get_submodule(name)))  # type: ignore[arg-type]
    with torch.no_grad():
        return {
            name: interpreter.node(number)
            for name, number in graph.priors.items()
            if not reads_input & graph.needed([number])
        }


def sampled(model: nn.Module, example: Any) -> dict[str, Gaussian]:
    """Moments at the input of every layer when each layer's output is N(β, γ²), independent everywhere."""
    found: dict[str, Gaussian] = {}
    handles = []

    def watch(name: str, norm: _BatchNorm) -> None:
        message = normalized_message(norm)

        def hook(_: nn.Module, inputs: tuple[Tensor], __: Tensor) -> Tensor:
            x = inputs[0]
            dims = [d for d in range(x.dim()) if d != 1]
            found[name] = Gaussian(x.mean(dims), x.var(dims))
            shape = (1, -1, *([1] * (x.dim() - 2)))
            return torch.randn_like(x) * message.variance.sqrt().view(shape) + message.mean.view(shape)

        handles.append(norm.register_forward_hook(hook))

    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            watch(name, module)
    with torch.no_grad():
        model(*example) if isinstance(example, tuple) else model(example)
    for handle in handles:
        handle.remove()
    return found


def assert_right(prior: Gaussian, truth: Gaussian, *, mean: float = 0.03, variance: float = 0.05) -> None:
    """The mean within a part of a standard deviation, the variance within a part of itself."""
    error = ((prior.mean - truth.mean) / truth.variance.sqrt()).abs().max()
    ratio = prior.variance / truth.variance
    assert error < mean, f"the mean is off by {float(error):.3f} standard deviations"
    assert ratio.sub(1).abs().max() < variance, (
        f"predicted / sampled variance {float(ratio.min()):.3f}..{float(ratio.max()):.3f}"
    )


def images(count: int = 2000, side: int = 8) -> Tensor:
    return torch.randn(count, 3, side, side)


class Base(nn.Module):
    """The layers that models of tests put together in their own ways."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.bn1, self.bn2, self.bn3 = (nn.BatchNorm2d(8) for _ in range(3))
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
        draw_affine(self)
