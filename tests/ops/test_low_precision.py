"""Activations in 16 bits in the CPU kernels: read and rounded exactly, with float32 statistics."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bkn_core as bkn
from bkn_core.filter.kalman import Gaussian
from bkn_core.ops import extension, kernels
from bkn_core.ops.normalize import Filtered, FilterSettings, kalman_normalize

pytestmark = [
    pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str),
    pytest.mark.parametrize("every_path", ["extension", "kernels"], indirect=True, scope="module"),
]
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
SHAPES = [(6, 16, 24, 24), (6, 5, 13, 11), (6, 300, 3, 3), (6, 7, 3, 2, 4), (4, 33, 1, 1), (6, 19), (2, 3, 90, 190)]


@pytest.fixture(autouse=True)
def _kernels(every_path: None) -> None:
    """The path in PyTorch is that of test_normalize.py."""


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def leaves(shape: tuple[int, ...], dtype: torch.dtype, *, last: bool) -> list[Tensor]:
    """x in 16 bits; µ', v', gain, γ, β in float32."""
    channels = shape[1:2]
    values = [torch.randn(channels) + 1, torch.rand(channels) + 0.5, torch.tensor(0.3)]
    x = (2 * torch.randn(shape) + 1).to(dtype)
    if last and len(shape) in FORMATS:
        x = x.contiguous(memory_format=FORMATS[len(shape)])
    return [t.requires_grad_() for t in (x, *values, torch.randn(channels), torch.randn(channels))]


def filtered(values: list[Tensor], size: int | None, eps: float = 1e-3) -> Filtered:
    x, mean, variance, gain, weight, bias = values
    return kalman_normalize(x, Gaussian(mean, variance), gain, weight, bias, FilterSettings(eps, size))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("size", [None, 2, 1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_those_of_float64_rounded_once(
    shape: tuple[int, ...], size: int | None, last: bool, dtype: torch.dtype
) -> None:
    narrow = leaves(shape, dtype, last=last)
    wide = [t.detach().double().requires_grad_() for t in narrow]
    upstream = torch.randn(shape).to(dtype)  # where `last`, in another layout than x
    expected = filtered(wide, size)
    with threads(2):
        actual = filtered(narrow, size)
        gradients = torch.autograd.grad(actual.y, narrow, upstream)
    wanted = torch.autograd.grad(expected.y, wide, upstream.double())
    once = torch.finfo(dtype).eps / 2  # half a step between neighbours
    assert actual.y.dtype == gradients[0].dtype == dtype and actual.y.stride() == narrow[0].stride()
    assert actual.statistics.packed.dtype == torch.float32
    torch.testing.assert_close(actual.y.double(), expected.y, rtol=1.001 * once, atol=4e-6)
    torch.testing.assert_close(actual.statistics.packed.double(), expected.statistics.packed, rtol=3e-6, atol=2e-6)
    largest = float(wanted[0].abs().max())
    torch.testing.assert_close(gradients[0].double(), wanted[0], rtol=1.001 * once, atol=1e-5 * (1 + largest))
    for gradient, exact in zip(gradients[1:], wanted[1:], strict=True):
        assert (gradient.double() - exact).abs().max() <= 1e-5 * (1 + exact.abs().max())


@pytest.mark.parametrize("is_rows", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1 / 3, 3.0, 2.0**-9 / 3, 257.3])
def test_every_value_is_read_and_rounded_as_pytorch_does(scale: float, is_rows: bool, dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    x = every[every.isfinite()].reshape((-1, 1) if is_rows else (1, 1, -1))
    exact = [torch.zeros(1), torch.ones(1), torch.tensor(0.0), torch.tensor([scale]), torch.zeros(1)]  # y = scale x
    y = filtered([x, *exact], None, eps=0.0).y
    assert torch.equal(y, (x.float() * torch.tensor(scale)).to(dtype))


@pytest.mark.parametrize("shape", [(4, 3, 5, 5), (4, 3)])
@pytest.mark.parametrize("last", [False, True])
def test_nan_and_infinity_pass(shape: tuple[int, ...], last: bool, dtype: torch.dtype) -> None:
    values = leaves(shape, dtype, last=last)
    upstream = torch.ones(shape, dtype=dtype)
    with torch.no_grad():
        values[0][0, 1] = float("nan")  # all of channel 1
        values[4][2] = torch.tensor([2**31 - 1], dtype=torch.int32).view(torch.float32)[0]  # a NaN of ones
        upstream[0, 0] = float("inf")
    y = filtered(values, None).y
    (gradient,) = torch.autograd.grad(y, values[:1], upstream)
    assert y[:, 0].isfinite().all() and y[:, 1:].isnan().all()
    assert not gradient[:, 0].isfinite().any() and gradient[:, 1:].isnan().all()


def test_beyond_the_range_is_infinite(dtype: torch.dtype) -> None:
    values = leaves((4, 3, 5, 5), dtype, last=False)
    with torch.no_grad():
        values[4].fill_(3e38)
    y = filtered(values, None).y
    assert y.isinf().any() and not y.isnan().any()


def counted(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The types of the activations that the kernels take."""
    seen: list[torch.dtype] = []
    in_cpp, in_python = extension.normalize, kernels.normalize

    def by_extension(x: Tensor, *rest: Any) -> Any:
        made = in_cpp(x, *rest)
        seen.extend([x.dtype] if made is not None else [])
        return made

    def by_kernels(x: Tensor, *rest: Any) -> Any:
        seen.append(x.dtype)
        return in_python(x, *rest)

    monkeypatch.setattr(extension, "normalize", by_extension)
    monkeypatch.setattr(kernels, "normalize", by_kernels)
    return seen


@pytest.mark.parametrize("how", ["autocast", "converted in 16 bits"])
def test_all_layers_of_a_network_go_through_the_kernels(
    how: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = [nn.Sequential(nn.Conv2d(i, 8, 3), nn.BatchNorm2d(8), nn.ReLU()) for i in (3, 8, 8)]
    plain, images = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(288, 4)), torch.randn(4, 3, 12, 12)
    if how != "autocast":
        plain, images = plain.to(dtype), images.to(dtype)
    model = bkn.convert(copy.deepcopy(plain), images, statistics_batch_size=2)
    seen = counted(monkeypatch)
    with torch.autocast("cpu", dtype=dtype, enabled=how == "autocast"):
        loss = model(images).float().square().mean()
    loss.backward()
    assert seen == [dtype] * 3
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
