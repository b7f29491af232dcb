"""The fused autograd node: gradients, agreement with the plain path, layouts, types and hard values."""

from __future__ import annotations

import dataclasses
import math

import kalman_loops
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bkn_core.filter.kalman import Gaussian, Groups, guard, moments, normalize, unbiased, update
from bkn_core.ops.forms import normalize_batch
from bkn_core.ops.normalize import FilterSettings, kalman_normalize

pytestmark = pytest.mark.usefixtures("every_path")
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclasses.dataclass(frozen=True)
class Case:
    """One drawn problem."""

    shape: tuple[int, ...]
    size: int | None
    channels_last: bool
    prior: str  # none, shared (C,) or grouped (G, C)
    gain: float
    guard_limit: float
    affine: bool
    zero_weight: bool
    seed: int

    def tensors(self, dtype: torch.dtype, offset: float = 0.5) -> list[Tensor | None]:
        """x, prior mean, prior variance, gain, weight, bias; all leaves."""
        generator = torch.Generator().manual_seed(self.seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        channels = self.shape[1]
        x = draw(*self.shape) + offset
        groups = len(Groups.of(len(x), self.size).sizes)
        rows = (channels,) if self.prior == "shared" else (groups, channels)
        mean, variance = draw(*rows), draw(*rows).square() + 0.1
        weight = draw(channels)
        weight[0] = 0.0 if self.zero_weight else weight[0]
        bias = draw(channels)
        gain = torch.tensor(self.gain, dtype=torch.float64)
        kept = [
            x,
            mean if self.prior != "none" else None,
            variance if self.prior != "none" else None,
            gain,
            weight if self.affine else None,
            bias if self.affine else None,
        ]
        return [None if t is None else t.to(dtype).requires_grad_() for t in kept]

    def layout(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=FORMATS[x.dim()]) if self.channels_last and x.dim() in FORMATS else x


@st.composite
def cases(draw: st.DrawFn, most_values: int = 700) -> Case:
    groups, size = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    images = max(1, groups * size - draw(st.integers(0, size - 1)))
    channels = draw(st.one_of(st.integers(1, 6), st.sampled_from([8, 16, 33])))
    rank = draw(st.integers(0, 3))
    space: list[int] = []
    for _ in range(rank):
        room = most_values // (images * channels * math.prod(space))
        space.append(draw(st.integers(1, max(1, min(4, room)))))
    gain = draw(st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0.01, 0.99)))
    prior = draw(st.sampled_from(["none", "shared", "grouped"]))
    # A gain of exactly 1 cannot be told from a dropped prior; a filter that has a guard has a gain below 1.
    limit = draw(st.sampled_from([math.inf, 1.2])) if gain < 1 else math.inf
    affine = draw(st.booleans())
    return Case(
        (images, channels, *space),
        draw(st.sampled_from([size, None])) if groups == 1 else size,
        draw(st.booleans()),
        prior,
        gain,
        limit,
        affine,
        affine and draw(st.booleans()),
        draw(st.integers(0, 10**6)),
    )


def fused(case: Case, values: list[Tensor | None], eps: float) -> tuple[Tensor, Gaussian]:
    x, mean, variance, gain, weight, bias = values
    assert x is not None and gain is not None
    prior = None if mean is None or variance is None else Gaussian(mean, variance)
    filter_settings = FilterSettings(eps, case.size, case.guard_limit)
    filtered = kalman_normalize(case.layout(x), prior, gain, weight, bias, filter_settings)
    return filtered.y, filtered.posterior


def plain(case: Case, values: list[Tensor | None], eps: float) -> tuple[Tensor, Gaussian]:
    x, mean, variance, gain, weight, bias = values
    assert x is not None and gain is not None
    observed = moments(x, case.size)
    posterior = Gaussian(observed.mean, observed.variance)
    if mean is not None and variance is not None:
        q = gain
        if case.guard_limit < math.inf:
            q = guard(variance, observed.variance, gain, case.guard_limit)
        posterior = update(Gaussian(mean, variance), observed, q)
    rows = Gaussian(*(Groups.of(len(x), case.size).spread(t) for t in posterior))
    return normalize(x, rows, weight, bias, eps), posterior


@settings(max_examples=25)
@given(case=cases(most_values=120), wanted=st.sampled_from(["y", "posterior", "all"]))
def test_gradients_equal_finite_differences(case: Case, wanted: str) -> None:
    values = case.tensors(torch.float64)
    leaves = [t for t in values if t is not None]

    def function(*leaves: Tensor) -> tuple[Tensor, ...]:
        rest = iter(leaves)
        y, posterior = fused(case, [None if t is None else next(rest) for t in values], 1e-2)
        return {"y": (y,), "posterior": tuple(posterior), "all": (y, *posterior)}[wanted]

    small = leaves[0].numel() <= 32
    if wanted == "posterior":  # γ and β do not reach the posterior
        for leaf in (values[4], values[5]):
            if leaf is not None:
                leaf.requires_grad_(False)
    if values[1] is None:
        leaves[1].requires_grad_(False)  # nor the gain anything without a prior
    assert torch.autograd.gradcheck(function, leaves, fast_mode=not small)


@settings(max_examples=80)
@given(case=cases())
def test_float32_agrees_with_the_plain_path(case: Case) -> None:
    # A handful of values and a gain of 1 may leave a variance near 0, under which rounding grows by ε^-3/2.
    assume(case.gain < 1 or (case.size or case.shape[0]) * math.prod(case.shape[2:]) > 4)
    values, again = case.tensors(torch.float32), case.tensors(torch.float64)
    y, posterior = fused(case, values, 1e-2)
    reference, expected = plain(case, again, 1e-2)
    upstream = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (y * upstream.float()).sum().backward()
    (reference * upstream).sum().backward()
    for actual, wanted in [(y, reference), *zip(posterior, expected, strict=True)]:
        assert ((actual.double() - wanted).abs() <= 1e-5 * (1 + wanted.abs())).all()
    for leaf, wanted in zip(values, again, strict=True):
        if leaf is not None and wanted is not None and wanted.grad is not None:
            assert leaf.grad is not None
            scale = 1 + wanted.grad.abs() + wanted.grad.abs().max()  # a sum over positions, some of which cancel
            assert ((leaf.grad.double() - wanted.grad).abs() <= 1e-5 * scale).all()


@settings(max_examples=30)
@given(case=cases())
def test_values_equal_loops_in_numpy(case: Case) -> None:
    case = dataclasses.replace(case, guard_limit=math.inf)
    values = case.tensors(torch.float64)
    y, posterior = fused(case, values, 1e-3)
    x, mean, variance, _, weight, bias = (None if t is None else t.detach().numpy() for t in values)
    assert x is not None
    ones, zeros = np.ones(x.shape[1]), np.zeros(x.shape[1])
    expected = kalman_loops.filtered(
        x,
        None if mean is None or variance is None else (mean, variance),
        case.gain,
        (ones if weight is None else weight, zeros if bias is None else bias),
        eps=1e-3,
        size=case.size,
    )
    np.testing.assert_allclose(y.detach().numpy(), expected.y, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(posterior.mean.detach().numpy(), expected.mean, rtol=1e-9, atol=1e-9)
    diagonals = np.array([np.diag(c) for c in expected.covariance])
    np.testing.assert_allclose(posterior.variance.detach().numpy(), diagonals, rtol=1e-9, atol=1e-9)


CASE = Case((5, 6, 4, 3), 2, False, "grouped", 0.3, math.inf, True, False, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_half_precision_has_float32_statistics_and_rounds_only_the_result(
    dtype: torch.dtype, channels_last: bool
) -> None:
    case = dataclasses.replace(CASE, channels_last=channels_last)
    values = case.tensors(torch.float32)
    x = values[0]
    assert x is not None
    values[0] = x.detach().to(dtype).requires_grad_()
    wide = [values[0].detach().double().requires_grad_(), *(None if t is None else t.double() for t in values[1:])]
    (y, posterior), (reference, expected) = fused(case, values, 1e-5), plain(case, wide, 1e-5)
    assert y.dtype == dtype
    assert posterior.mean.dtype == posterior.variance.dtype == torch.float32
    torch.testing.assert_close(posterior.variance.double(), expected.variance, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y.double(), reference, rtol=torch.finfo(dtype).eps, atol=1e-4)
    y.sum().backward()
    assert values[0].grad is not None and values[0].grad.dtype == dtype


@pytest.mark.parametrize("shape", [(4, 6, 3, 5), (4, 6, 2, 3, 5), (4, 600, 3, 5), (3, 1, 4, 4), (3, 4, 1, 1)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_result_and_gradient_keep_the_memory_format(shape: tuple[int, ...], channels_last: bool) -> None:
    case = dataclasses.replace(CASE, shape=shape, channels_last=channels_last, prior="shared")
    values = case.tensors(torch.float32)
    assert values[0] is not None
    x = case.layout(values[0].detach()).requires_grad_()
    y, _ = fused(case, [x, *values[1:]], 1e-5)
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    memory_format = FORMATS[x.dim()] if channels_last else torch.contiguous_format
    assert y.is_contiguous(memory_format=memory_format)
    assert gradient.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("upstream_last", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_upstream_gradient_may_come_in_another_layout(channels_last: bool, upstream_last: bool) -> None:
    case = dataclasses.replace(CASE, channels_last=channels_last)
    values, again = case.tensors(torch.float64), case.tensors(torch.float64)
    upstream = torch.randn(case.shape, dtype=torch.float64)
    y, reference = fused(case, values, 1e-5)[0], plain(case, again, 1e-5)[0]
    y.backward(upstream.contiguous(memory_format=torch.channels_last) if upstream_last else upstream)
    reference.backward(upstream)
    assert values[0] is not None and again[0] is not None
    torch.testing.assert_close(values[0].grad, again[0].grad)


def test_broadcast_and_strided_inputs_are_accepted() -> None:
    values = CASE.tensors(torch.float64)
    assert values[0] is not None
    base = torch.randn(5, 12, 3, 4, dtype=torch.float64)
    for x in (base[:, ::2].transpose(2, 3), base[:, :1, :, :1].expand(5, 6, 3, 4).transpose(2, 3)):
        y, reference = fused(CASE, [x, *values[1:]], 1e-5)[0], plain(CASE, [x, *values[1:]], 1e-5)[0]
        torch.testing.assert_close(y, reference)
        y.sum().backward()


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 5), (4, 6, 4, 4)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_writing_in_place_into_the_result_keeps_the_gradients(shape: tuple[int, ...], channels_last: bool) -> None:
    case = dataclasses.replace(CASE, shape=shape, channels_last=channels_last, prior="shared")
    values, again = case.tensors(torch.float64), case.tensors(torch.float64)
    fused(case, values, 1e-5)[0].relu_().square().sum().backward()
    torch.relu(plain(case, again, 1e-5)[0]).square().sum().backward()
    for leaf, expected in zip(values, again, strict=True):
        assert leaf is not None and expected is not None
        torch.testing.assert_close(leaf.grad, expected.grad)


@settings(max_examples=30)
@given(case=cases())
def test_statistics_are_those_of_the_plain_functions(case: Case) -> None:
    values, wide = case.tensors(torch.float32), case.tensors(torch.float64)
    x, mean, variance, gain, weight, bias = values
    assert x is not None and gain is not None and wide[0] is not None and wide[3] is not None
    prior = None if mean is None or variance is None else Gaussian(mean, variance)
    filtered = kalman_normalize(
        case.layout(x), prior, gain, weight, bias, FilterSettings(1e-3, case.size, case.guard_limit)
    )
    observed, q = moments(wide[0], case.size), wide[3]
    posterior = plain(case, wide, 1e-3)[1]
    if prior is None:
        q = torch.ones_like(q)
    elif case.guard_limit < math.inf and wide[2] is not None:
        q = guard(wide[2], observed.variance, q, case.guard_limit)
    expected = (*posterior, observed.mean, observed.variance, unbiased(posterior, observed, q).variance)
    for actual, wanted in zip(filtered.statistics.packed, expected, strict=False):
        torch.testing.assert_close(actual.double(), wanted.detach(), rtol=1e-5, atol=1e-5, check_dtype=False)
    assert not filtered.statistics.observed.mean.requires_grad


def test_a_covariance_is_not_rounded_by_mixed_precision() -> None:
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    found = []
    for enabled in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            filtered = normalize_batch(
                x, None, (torch.tensor(1.0), None, None), FilterSettings(1e-5, 2, is_matrix=True)
            )
        assert filtered.covariance is not None
        found.append((filtered.covariance, *torch.autograd.grad(filtered.covariance.square().sum(), x)))
    torch.testing.assert_close(*found, rtol=0, atol=0)
