"""The CPU kernels against float64, on several threads, in every partition of the work."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bkn_core.filter.kalman import Gaussian
from bkn_core.ops import extension, kernels
from bkn_core.ops.normalize import Filtered, FilterSettings, kalman_normalize

FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


@pytest.fixture(params=[1, 2, 3])
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _without_the_node_in_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "operations", lambda: None)


def leaves(shape: tuple[int, ...], groups: int | None, dtype: torch.dtype, *, last: bool) -> list[Tensor]:
    """x, µ', v', gain, γ, β."""
    generator = torch.Generator().manual_seed(4)
    rows = (shape[1],) if groups is None else (groups, shape[1])

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    values = [2 * draw(*shape) + 3, draw(*rows) + 3, draw(*rows).square() + 0.5, torch.tensor(0.3).double()]
    values += [draw(shape[1]), draw(shape[1])]
    if last:
        values[0] = values[0].contiguous(memory_format=FORMATS[len(shape)])
    return [value.to(dtype).requires_grad_() for value in values]


def serves(values: list[Tensor], groups: int = 1) -> bool:
    x, mean, variance, gain, weight, bias = values
    return kernels.shape_of(x, (mean, variance, gain, weight, bias), groups) is not None


def results(values: list[Tensor], size: int | None, *, posterior: bool) -> tuple[Filtered, list[Tensor | None]]:
    """The forward, and gradients by a fixed gradient of y and, where wanted, of the posterior."""
    x, mean, variance, gain, weight, bias = values
    filtered = kalman_normalize(x, Gaussian(mean, variance), gain, weight, bias, FilterSettings(1e-3, size))
    generator = torch.Generator().manual_seed(5)
    upstream = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)
    objective = (filtered.y * upstream).sum()
    if posterior:
        objective = objective + (filtered.posterior.mean.sin() + filtered.posterior.variance.cos()).sum()
    return filtered, list(torch.autograd.grad(objective, values))


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("size", [None, 3, 2, 1])
@pytest.mark.parametrize(
    "shape", [(12, 16, 24, 24), (6, 5, 41, 37), (6, 300, 9, 9), (6, 7, 3, 2, 4), (6, 1, 90, 70)], ids=str
)
def test_kernels_agree_with_float64(shape: tuple[int, ...], size: int | None, last: bool) -> None:
    if kernels.library() is None:
        pytest.skip("no C compiler")
    for groups in (None, shape[0] // (size or shape[0])):
        narrow, wide = (leaves(shape, groups, dtype, last=last) for dtype in (torch.float32, torch.float64))
        count = shape[0] // (size or shape[0])
        assert serves(narrow, count) and not serves(wide, count)
        actual, gradients = results(narrow, size, posterior=groups is not None)
        expected, wanted = results(wide, size, posterior=groups is not None)
        torch.testing.assert_close(actual.y.double(), expected.y, rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(actual.statistics.packed.double(), expected.statistics.packed, rtol=2e-6, atol=1e-6)
        assert actual.y.stride() == narrow[0].stride()
        for gradient, exact in zip(gradients, wanted, strict=True):
            assert gradient is not None and exact is not None
            assert (gradient.double() - exact).abs().max() <= 1e-5 * (1 + exact.abs().max())


def check_statistics(x: Tensor, tolerance: float) -> None:
    prior = Gaussian(torch.zeros(x.shape[1]), torch.ones(x.shape[1]))
    filtered = kalman_normalize(x, prior, torch.tensor(1.0), None, None, FilterSettings(1e-5))
    wide = x.double()
    torch.testing.assert_close(filtered.statistics.observed.mean[0].double(), wide.mean((0, 2, 3)), rtol=1e-7, atol=0)
    variance = wide.var((0, 2, 3), unbiased=False)
    torch.testing.assert_close(filtered.statistics.observed.variance[0].double(), variance, rtol=tolerance, atol=0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_statistics_of_a_long_image_lose_no_precision(layout: torch.memory_format) -> None:
    check_statistics((100 + torch.randn(1, 2, 3000, 1000)).contiguous(memory_format=layout), 3e-7)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("channels", [3, 64])
def test_statistics_of_an_uneven_image_lose_no_precision(channels: int, layout: torch.memory_format) -> None:
    x = torch.randn(1, channels, 300, 100) + torch.linspace(100, 200, 300)[:, None]  # no two blocks have one mean
    x[:, :, :1] += 1000  # and the first rows are far from all others
    check_statistics(x.contiguous(memory_format=layout), 1e-6)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_equal_values_have_no_negative_variance(layout: torch.memory_format) -> None:
    values = torch.linspace(-1e4, 1e4, 64)[None, :, None, None]
    x = values.expand(3, 64, 37, 41).contiguous(memory_format=layout)
    prior = Gaussian(torch.zeros(64), torch.ones(64))
    filtered = kalman_normalize(x, prior, torch.tensor(1.0), None, None, FilterSettings(0.0, 1))
    variance = filtered.statistics.observed.variance
    assert (variance >= 0).all() and (variance <= 1e-12 * (1 + values.flatten().square())).all()


def test_traced_transformed_and_other_tensors_are_left_to_pytorch() -> None:
    x, *rest = leaves((4, 3, 5, 5), None, torch.float32, last=False)
    x = x.detach()
    assert serves([x, *rest]) == (kernels.library() is not None)
    for other in (x.double(), x.int(), x[:, :, ::2], x.to("meta"), x[:0], x[:, :2]):
        assert not serves([other, *rest])
    mean, variance, gain, weight, bias = rest
    for wrong in ([mean[:2], variance[:2], gain, weight, bias], [mean, variance, weight, weight, bias]):
        assert not serves([x, *wrong])
    assert not serves([x, mean.expand(2, 3), variance.expand(2, 3), gain, weight, bias], 2)  # not dense
    assert not serves([x, mean.repeat(3, 1), variance.repeat(3, 1), gain, weight, bias], 2)
    seen: list[bool] = []

    def function(value: Tensor) -> Tensor:
        seen.append(serves([value, *rest]))
        return value.square().sum()

    torch.func.grad(function)(x)
    torch.func.vmap(function)(x)
    assert seen == [False, False]


def run_python(code: str, folder: Path, **variables: str) -> str:
    environment = {"XDG_CACHE_HOME": str(folder), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", **variables}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


ASK = "from bkn_core.ops import kernels; print(kernels.library() is not None)"


@pytest.mark.slow
def test_without_a_compiler_or_when_switched_off_pytorch_does_the_work(tmp_path: Path) -> None:
    if kernels.library() is None:
        pytest.skip("no C compiler")
    assert run_python(ASK, tmp_path / "on") == "True"
    for library in (tmp_path / "on").glob("bkn/*.so"):
        os.truncate(library, 5000)  # of which the loader would make a SIGBUS
    assert run_python(ASK, tmp_path / "on") == "True"
    assert run_python(ASK, tmp_path / "off", BKN_NATIVE="0") == "False"
    assert run_python(ASK, tmp_path / "bad", CC="/nonexistent/compiler") == "False"
    assert not list((tmp_path / "bad").glob("bkn/*.so"))
