"""The kernels in Triton, run by its interpreter on tensors of the CPU, against PyTorch in float64; compiled ahead."""

from __future__ import annotations

import pytest
import torch
from ahead import resources
from torch import Tensor

import bkn_core as bkn
from bkn_core.errors import RecipeError
from bkn_core.filter.inflation_gradient import Sensitivity
from bkn_core.filter.kalman import Gaussian
from bkn_core.filter.state import FilterSettings
from bkn_core.ops import backend, extension, kernels
from bkn_core.ops import normalize as reference
from bkn_core.ops.normalize import kalman_normalize

FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")


@pytest.fixture(scope="module", autouse=True)
def _interpreted() -> None:
    """Register the operators."""
    assert backend.triton_works("cpu")


@pytest.fixture
def _by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "chosen", lambda: "triton")
    monkeypatch.setattr(kernels, "library", lambda: None)
    monkeypatch.setattr(extension, "operations", lambda: None)


def wide(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.double()


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    scale = expected.abs() + expected.abs().mean()
    assert ((actual.double() - expected).abs() <= tolerance * scale).all()


def of_prior(kind: str, groups: int, channels: int) -> tuple[Tensor | None, Tensor | None]:
    if kind == "none":
        return None, None
    shape = (channels,) if kind == "of all" else (groups, channels)
    return torch.randn(shape), torch.rand(shape) * 4 + 0.5


CASES = [  # shape, groups, last, prior, dtype; those of 2400 positions and more are divided into parts
    ((4, 5, 7, 3), 2, False, "of all", torch.float32),
    ((4, 5, 7, 3), 2, True, "of each", torch.float32),
    ((3, 3, 2), 3, False, "of each", torch.float32),
    ((36, 2, 2, 2), 4, False, "of all", torch.float32),
    ((2, 3, 40, 60), 1, True, "of all", torch.float32),
    ((2, 1, 100, 90), 1, False, "of each", torch.float32),
    ((2, 70, 3, 3), 1, True, "of all", torch.bfloat16),
    ((2, 5, 3, 4, 2), 1, True, "of all", torch.float16),
    ((4, 5, 7, 3), 2, False, "none", torch.float32),
]


@pytest.mark.parametrize(("shape", "groups", "last", "kind", "dtype"), CASES)
def test_a_layer_equals_pytorch_in_float64(
    shape: tuple[int, ...], groups: int, last: bool, kind: str, dtype: torch.dtype
) -> None:
    x, dy = ((torch.randn(shape) * 2 + 3).to(dtype) for _ in range(2))
    if last:
        x = x.contiguous(memory_format=FORMATS[len(shape)])
    channels, eps = shape[1], 1e-3
    prior, to_statistics = of_prior(kind, groups, channels), torch.randn(6, groups, channels)
    gain, weight, bias = torch.tensor(0.3), torch.rand(channels) + 0.5, torch.randn(channels)
    follows = kind != "none"
    used, gathered, expected_gathered = torch.randn(2, channels) * 0.1, *torch.zeros(2, 3, channels)
    memory = (used, gathered) if follows else (None, None)

    y, statistics = torch.ops.bkn_cuda.normalize(x, *prior, gain, weight, bias, eps, groups)
    dx, to_weight, to_bias, *to_prior, to_gain = torch.ops.bkn_cuda.normalize_backward(
        dy, to_statistics, x, *prior, gain, weight, statistics, *memory, eps, groups
    )

    settings, exact = FilterSettings(eps, shape[0] // groups), x.double()
    parameters = *map(wide, prior), *map(wide, (gain, weight, bias))
    expected_y, expected = reference._normalized(exact, parameters, settings, groups)
    sensitivity = Sensitivity(used.double(), expected_gathered) if follows else None
    saved = exact, *parameters[:4], expected
    gradients = reference._gradients((dy.double(), to_statistics.double()), saved, sensitivity, settings, groups)

    rough = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    assert y.stride() == x.stride() == dx.stride() and y.dtype is dx.dtype is dtype
    assert_close(y, expected_y, rough)
    assert_close(statistics, expected, 1e-5)
    assert_close(dx, gradients[0], rough)
    assert gradients[2] is not None
    assert_close(to_weight, gradients[2], 2e-5)
    assert_close(to_bias, gradients[3], 2e-5)
    if follows:
        for actual, wanted in zip((*to_prior, to_gain.sum()), gradients[1], strict=True):
            assert wanted is not None
            assert_close(actual, wanted, 1e-4)
        assert_close(gathered, expected_gathered.double(), 1e-4)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, in the interpreter
def test_what_is_not_finite_passes_as_in_pytorch() -> None:
    x = torch.randn(4, 3, 4, 4)
    x[0, 0, 0, 0], x[2, 1, 1, 1], x[3, 2] = torch.inf, torch.nan, 1e30
    prior = torch.zeros(3), torch.ones(3)
    gain = torch.tensor(0.0)
    y, statistics = torch.ops.bkn_cuda.normalize(x, *prior, gain, None, None, 1e-5, 2)
    expected_y, expected = reference._normalized(x, (*prior, gain, None, None), FilterSettings(1e-5, 2), 2)
    assert torch.equal(y.isfinite(), expected_y.isfinite())
    assert torch.equal(statistics.isfinite(), expected.isfinite())
    dy, used, gathered = torch.ones_like(x), torch.ones(2, 3), torch.zeros(3, 3)
    dy[0, 0] = torch.inf
    torch.ops.bkn_cuda.normalize_backward(dy, None, x, *prior, gain, None, statistics, used, gathered, 1e-5, 2)
    assert gathered.isfinite().all() and gathered[2].tolist() == [0.0, 0.0, 1.0]


@pytest.mark.usefixtures("_by_triton")
def test_a_layer_takes_them_and_stays_one_graph_when_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    mean, variance = torch.randn(3), torch.rand(3) + 0.5
    gain, weight, bias = torch.tensor(0.5), torch.rand(3), torch.randn(3)

    def run(x: Tensor) -> Tensor:
        settings = FilterSettings(1e-5, 2)
        return kalman_normalize(x, Gaussian(mean, variance), gain, weight, bias, settings).y.square().sum()

    x = torch.randn(4, 3, 4, 4, requires_grad=True)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    gradients = [torch.autograd.grad(function(x), x)[0] for function in (run, compiled)]
    monkeypatch.setattr(backend, "chosen", lambda: "torch")
    expected = torch.autograd.grad(run(x), x)[0]
    torch.testing.assert_close(gradients[0], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(gradients[0], gradients[1]) and not torch.equal(gradients[0], expected)


@pytest.mark.usefixtures("_by_triton")
def test_a_model_trains_by_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def losses() -> list[float]:
        torch.manual_seed(0)
        layers = [torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 3)]
        x = torch.randn(4, 3, 6, 6)
        model = bkn.convert(torch.nn.Sequential(*layers, torch.nn.BatchNorm2d(2)), x, statistics_batch_size=2)
        optimizer, found = torch.optim.SGD(model.parameters(), lr=0.1), []
        for _ in range(3):
            loss = (model(x) - 1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    calls = []
    taken = backend.takes_triton
    monkeypatch.setattr(backend, "takes_triton", lambda device: calls.append(taken(device)) or calls[-1])
    by_triton = losses()
    assert calls and all(calls)
    monkeypatch.setattr(backend, "chosen", lambda: "torch")
    assert by_triton == pytest.approx(losses(), rel=1e-4)


def test_an_unknown_backend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BKN_BACKEND", "tritn")
    with pytest.raises(RecipeError, match=r"BKN_BACKEND=tritn.*\n.*auto, torch, cpu, triton"):
        backend.chosen.__wrapped__()


@pytest.mark.parametrize(
    ("backend_name", "native", "expected"), [("", "0", "torch"), ("cpu", "0", "cpu"), ("", "", "auto")]
)
def test_the_environment_chooses(
    monkeypatch: pytest.MonkeyPatch, backend_name: str, native: str, expected: str
) -> None:
    monkeypatch.setenv("BKN_BACKEND", backend_name)
    monkeypatch.setenv("BKN_NATIVE", native)
    assert backend.chosen.__wrapped__() == expected


def test_without_triton_pytorch_serves_and_it_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from bkn_core.ops.cuda import normalize

    def fails(*_: object) -> None:
        raise RuntimeError("no compiler")

    backend.triton_works.cache_clear()
    monkeypatch.setattr(normalize, "normalize", fails)
    assert not backend.triton_works("cpu") and not backend.triton_works("cpu")
    assert [record.message for record in caplog.records] == [
        "Triton's kernels cannot be used, PyTorch does the work more slowly: no compiler"
    ]
    backend.triton_works.cache_clear()


def test_what_is_forced_in_vain_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    backend.triton_works.cache_clear()
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(backend, "chosen", lambda: "triton")
    assert not backend.takes_triton("cpu") and not backend.takes_triton("cpu")
    assert [record.message for record in caplog.records] == [
        "BKN_BACKEND=triton has nothing for the CPU but with TRITON_INTERPRET=1: PyTorch does the work"
    ]
    backend.triton_works.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_compile_ahead_without_spills(capability: int) -> None:
    found = resources(capability)
    assert len(found) == 40
    assert {name: stack for name, stack in found.items() if stack} == {}
