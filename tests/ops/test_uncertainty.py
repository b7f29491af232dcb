"""The prior's error, the observation's noise and the gain: against loops in float64, and that nothing runs away."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import bkn_core as bkn
from bkn_core.filter.kalman import Gaussian
from bkn_core.filter.uncertainty import FIRST_NOISE, MEMORY, SLOWEST_IMAGES, SLOWEST_STEP, Uncertainty
from bkn_core.layers.batch_kalman import BatchKalmanNorm2d

EPS = 1e-5
Array = np.ndarray


class Loops:
    """One layer by loops over groups and channels, in float64."""

    def __init__(self, channels: int) -> None:
        self.shift, self.ratio = np.zeros(channels), np.zeros(channels)
        self.error, self.noise, self.forwards = np.zeros(2), np.zeros(2), 0
        self.last = np.zeros((2, channels))

    def gains(self) -> Array:
        error, noise = np.maximum(self.error, 0), np.maximum(self.noise, 0)
        return error / np.maximum(error + noise, 1e-30)

    def forward(self, x: Array, mean: Array, variance: Array, size: int) -> None:
        images, channels = x.shape[:2]
        groups = [x[i : i + size] for i in range(0, images, size)]
        slowest = max(SLOWEST_STEP, 1 - (1 - SLOWEST_IMAGES) ** (images / 128), 1 / max(self.forwards, 1))
        speeds = np.maximum(self.gains() * np.clip(self.error, 0, 1) ** 2, slowest)
        squares, products, noises = np.zeros(2), np.zeros(2), np.zeros(2)
        for c in range(channels):
            predicted = variance[c] * math.exp(self.ratio[c])
            expected = mean[c] + self.shift[c] * math.sqrt(variance[c] + EPS)
            means = np.array([group[:, c].mean() for group in groups])
            spreads = np.array([group[:, c].var() for group in groups])
            m = means.mean() - expected
            n = (spreads + (means - expected) ** 2).mean()
            rest = n - m * m + ((1 - speeds[0]) * m) ** 2 + EPS
            e = np.array([m / math.sqrt(n + EPS), rest / (predicted + EPS) - 1])
            around = spreads + (means - means.mean()) ** 2
            if len(groups) > 1:
                noises += np.array([means.var(ddof=1) / rest, around.var(ddof=1) / rest**2]) / channels
            self.shift[c] += speeds[0] * m / math.sqrt(variance[c] + EPS)
            self.ratio[c] += math.log1p(speeds[1] * e[1])
            e = np.clip(e, -1, 1)
            squares, products = squares + e * e / channels, products + e * self.last[:, c] / channels
            self.last[:, c] = e
        error = squares - noises / len(groups) if len(groups) > 1 else products + speeds * squares
        noise = noises if len(groups) > 1 else squares - error
        if self.forwards == 0 and len(groups) == 1:
            error = noise = np.full(2, FIRST_NOISE)
        weight = max(MEMORY, 1 / (self.forwards + 1))
        self.error, self.noise = self.error + weight * (error - self.error), self.noise + weight * (noise - self.noise)
        self.forwards += 1


@pytest.mark.usefixtures("every_path")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("images", "size"), [(8, 2), (8, 1), (2, 2), (1, 1)])
def test_what_a_layer_remembers_is_what_loops_compute(images: int, size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = BatchKalmanNorm2d(3, statistics_batch_size=size, innovation=True, gain="auto", eps=EPS).to(dtype)
    loops = Loops(3)
    prior = Gaussian(torch.tensor([0.5, -1.0, 0.0], dtype=dtype), torch.tensor([1.0, 4.0, 0.1], dtype=dtype))
    for step in range(12):
        x = (1 + 0.2 * step) * torch.randn(images, 3, 4, 4, generator=generator, dtype=torch.float64) + 0.5
        assert layer.gain.item() == pytest.approx(loops.gains().max() if step else 0.1, rel=1e-3, abs=1e-5)
        layer(x.to(dtype), prior)
        loops.forward(x.numpy(), *(values.double().numpy() for values in prior), size)
    tolerance = 1e-3 if dtype is torch.float32 else 1e-9
    for name, expected in (("mean_innovation", loops.shift), ("innovation", loops.ratio), ("residual", loops.last)):
        np.testing.assert_allclose(getattr(layer, name).numpy(), expected, rtol=tolerance, atol=tolerance)
    state = Uncertainty.of(layer.uncertainty)
    np.testing.assert_allclose(state.error.numpy(), loops.error, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(state.noise.numpy(), loops.noise, rtol=tolerance, atol=tolerance)


def test_the_gain_of_a_steady_prior_falls_and_that_of_a_drifting_one_does_not() -> None:
    generator = torch.Generator().manual_seed(1)
    found = []
    for drift in (0.0, 0.3):
        layer = BatchKalmanNorm2d(8, statistics_batch_size=2, innovation=True, gain="auto")
        prior = Gaussian(torch.zeros(8), torch.ones(8))
        for step in range(100):
            x = torch.randn(16, 8, 4, 4, generator=generator) + drift * step
            layer(x, prior)
        found.append(layer.gain.item())
    assert found[0] < 0.02 < 0.5 < found[1]


PICTURES = {
    "noise": lambda g, n: torch.randn(n, 3, 8, 8, generator=g),
    "constant": lambda g, n: torch.full((n, 3, 8, 8), 0.7),
    "sparse": lambda g, n: (torch.rand(n, 3, 8, 8, generator=g) > 0.97).float() * 5,
    "inverted": lambda g, n: 5 - (torch.rand(n, 3, 8, 8, generator=g) > 0.97).float() * 5,
    "low contrast": lambda g, n: 0.01 * torch.randn(n, 3, 8, 8, generator=g),
}


def stack(depth: int) -> nn.Sequential:
    torch.manual_seed(0)
    blocks: list[nn.Module] = []
    for i in range(depth):
        blocks += [nn.Conv2d(8 if i else 3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*blocks)


DEEP = [pytest.param(kind, depth, 8, marks=pytest.mark.slow) for kind in PICTURES for depth in (12, 50)]


@pytest.mark.parametrize(
    ("kind", "depth", "images"),
    [*((kind, 3, images) for kind in PICTURES for images in (1, 8)), *DEEP],
)
def test_no_runaway_after_the_weights_grow_tenfold(kind: str, depth: int, images: int) -> None:
    """With weights that rest, every layer's prior is right again after a bounded number of forwards."""
    pictures = PICTURES[kind](torch.Generator().manual_seed(2), images)
    model = bkn.convert(stack(depth), pictures, statistics_batch_size=1, input_prior=pictures).train()
    with torch.no_grad():
        for scale in (1, 10):
            for module in model.modules():
                if isinstance(module, nn.Conv2d):
                    module.weight.mul_(scale)
            for _ in range(100 + 10 * depth):
                y = model(pictures)
    assert y.isfinite().all()
    with torch.no_grad(), bkn.statistics(model, "batch", 1):
        rows = bkn.prior_quality(model, pictures)
    ratios = torch.tensor([row.refined.log_variance_ratio for row in rows if row.refined])
    assert ratios.abs().max() < 0.1, ratios


@pytest.mark.usefixtures("every_path")
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_one_bad_image_is_not_remembered(value: float) -> None:
    torch.manual_seed(0)
    images = torch.randn(8, 3, 8, 8)
    model = bkn.convert(stack(2), images, statistics_batch_size=2, input_prior=images).train()
    model(images)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    bad = images.clone()
    bad[3, 1, 2, 2] = value
    model(bad).sum().backward()
    model.zero_grad()
    assert all(buffer.isfinite().all() for buffer in model.buffers()), [n for n, b in model.named_buffers()]
    assert before.keys() == dict(model.named_buffers()).keys()
    y = model(images)
    y.square().mean().backward()
    assert y.isfinite().all() and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert model.eval()(images).isfinite().all()


def test_one_bad_image_inside_an_accumulation_is_not_remembered() -> None:
    torch.manual_seed(0)
    images = torch.randn(8, 3, 8, 8)
    model = bkn.convert(stack(2), images, statistics_batch_size=2, input_prior=images).train()
    with bkn.accumulation(model):
        model(images).sum().backward()
        model(images * torch.nan).sum().backward()
    assert all(buffer.isfinite().all() for buffer in model.buffers())


def test_a_state_of_an_earlier_version_is_read() -> None:
    images = torch.randn(4, 3, 8, 8)
    model = bkn.convert(stack(2), images, input_prior=images)
    state = model.state_dict()
    for name in list(state):
        if name.endswith(("mean_innovation", "residual", "uncertainty")):
            del state[name]
        elif name.endswith("gathered_sensitivity"):
            state[name.replace("gathered", "newest")] = state.pop(name)[0]
        elif name.endswith("sensitivity"):
            state[name] = torch.full_like(state[name][0], 0.5)
    model.load_state_dict(state)
    assert torch.equal(model[1].sensitivity[0], torch.full((8,), 0.5)) and not model[1].sensitivity[1].any()
