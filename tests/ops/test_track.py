"""Moving inflations and statistics by the kernel and in PyTorch: the same numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from bkn_core.filter.kalman import Gaussian
from bkn_core.filter.state import FilterStatistics, Observation
from bkn_core.layers.batch_kalman import BatchKalmanNorm2d
from bkn_core.ops import extension, kernels
from bkn_core.ops.track import track

WIDTHS = (3, 16, 7)
MOVED = ("innovation", "mean_innovation", "sensitivity", "residual", "uncertainty", "fixed_gain")
BUFFERS = (*MOVED, "running_mean", "running_var", "num_batches_tracked")


def drawn(*size: int) -> Tensor:
    return torch.randn(size)


def layers(**options: object) -> list[BatchKalmanNorm2d]:
    found = []
    for width in WIDTHS:
        given = {"innovation": True, "gain": "auto", **options}
        layer = BatchKalmanNorm2d(width, statistics_batch_size=2, **given)  # type: ignore[arg-type]
        for name in ("innovation", "mean_innovation", "sensitivity", "gathered_sensitivity", "residual"):
            buffer = getattr(layer, name)
            buffer.copy_(drawn(*buffer.shape))
        layer.uncertainty.copy_(torch.tensor([7.0, 0.2, -0.1, 0.3, 0.4]))
        found.append(layer)
    return found


class Record(NamedTuple):
    """What a layer is to have seen."""

    layer: BatchKalmanNorm2d
    prior: Gaussian | None
    statistics: Tensor
    images: int


def records(these: list[BatchKalmanNorm2d], *, groups: int = 4, own: bool = False) -> list[Record]:
    found = []
    for layer in these:
        width = layer.num_features
        rows, dtype = (groups, width) if own else (width,), layer.gain_factor.dtype
        prior = Gaussian(drawn(*rows).to(dtype), drawn(*rows).square().to(dtype) + 0.1)
        statistics = drawn(6, groups, width).abs().to(dtype)
        found.append(Record(layer, prior, statistics, 2 * groups))
    return found


def copied(seen: list[Record]) -> list[Record]:
    known: dict[int, BatchKalmanNorm2d] = {}
    return [r._replace(layer=known.setdefault(id(r.layer), copy.deepcopy(r.layer))) for r in seen]


def move(seen: list[Record]) -> None:
    track(
        [Observation(r.layer.state, r.prior, FilterStatistics(r.statistics), r.images, r.layer.settings) for r in seen]
    )


def track_by_kernel(seen: list[Record]) -> None:
    """Move the layers by the kernel, called from Python."""
    calls: list[str] = []
    run = kernels.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extension, "operations", lambda: None)
        patch.setattr(kernels, "run", lambda name, slots: (calls.append(name), run(name, slots))[1])
        move(seen)
    assert calls == ["bkn_track"]


def track_in_pytorch(seen: list[Record]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "library", lambda: None)
        patch.setattr(kernels, "run", no_kernel)
        move(seen)


def track_in_cpp(seen: list[Record]) -> None:
    """Move the layers by the kernel, called from C++."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "run", no_kernel)
        patch.setattr("bkn_core.ops.track._track_in_pytorch", lambda _: pytest.fail("PyTorch did the work"))
        move(seen)


def no_kernel(*_: object) -> None:
    pytest.fail("the kernel ran")


def inflations(seen: list[Record]) -> dict[int, tuple[Tensor, Tensor]]:
    """Copies of the inflations of each layer."""
    inflated = (r.layer for r in seen if r.layer.innovation is not None)
    return {id(layer): (layer.innovation.clone(), layer.mean_innovation.clone()) for layer in inflated}  # type: ignore[union-attr]


def assert_same(seen: list[Record], *, in_cpp: bool) -> None:
    """Move the layers by the kernel, and copies of them in C++ and in PyTorch."""
    twins, exact, before = copied(seen), copied(seen), inflations(seen)
    track_by_kernel(seen)
    track_in_pytorch(twins)
    if in_cpp:
        track_in_cpp(exact)
    for one, other, equal in zip(seen, twins, exact, strict=True):
        for name in BUFFERS:
            actual, expected = getattr(one.layer, name), getattr(other.layer, name)
            assert (actual is None) == (expected is None)
            if actual is not None:
                torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6, equal_nan=True)
                if in_cpp:
                    torch.testing.assert_close(getattr(equal.layer, name), actual, rtol=0, atol=0, equal_nan=True)
        for layer in (one.layer, other.layer, equal.layer)[: 2 + in_cpp]:
            if one.prior is not None and layer.innovation is not None:
                assert all(map(torch.equal, layer.past[0], before[id(one.layer)]))


@pytest.fixture(autouse=True)
def _seed() -> None:
    if kernels.library() is None:
        pytest.skip("no C compiler")
    torch.manual_seed(0)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("forwards", [0, 7])
@pytest.mark.parametrize("groups", [1, 4, 2000])
def test_kernel_and_pytorch_agree(groups: int, own: bool, forwards: int, in_cpp: bool) -> None:
    these = layers()
    for layer in these:
        layer.uncertainty[0] = forwards
    assert_same(records(these, groups=groups, own=own), in_cpp=in_cpp)


def test_layers_without_prior_inflation_or_moving_statistics(in_cpp: bool) -> None:
    seen = records(layers()) + records(layers(track_running_stats=False)) + records(layers(gain=0.3))
    plain = BatchKalmanNorm2d(5, statistics_batch_size=2, momentum=0.3)
    seen += [Record(plain, None, drawn(6, 4, 5).abs(), 8), seen[0]._replace(prior=None)]
    assert_same(seen, in_cpp=in_cpp)


def test_a_layer_that_ran_twice_is_moved_twice(in_cpp: bool) -> None:
    these = layers()
    assert_same(records(these) + records(these), in_cpp=in_cpp)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38])
def test_hard_values(value: float, in_cpp: bool) -> None:
    seen = records(layers())
    seen[0].statistics[2, 1, 0] = seen[1].statistics[3, 0, 2] = value
    assert_same(seen, in_cpp=in_cpp)


@pytest.mark.usefixtures("in_cpp")
@pytest.mark.parametrize("options", [{"momentum": None}, {"dtype": torch.float64}], ids=str)
def test_what_the_kernel_does_not_know_is_left_to_pytorch(
    options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = records(layers(**options))
    monkeypatch.setattr(kernels, "run", no_kernel)
    move(seen)
    assert all(int(r.layer.num_batches_tracked) == 1 for r in seen)  # type: ignore[arg-type]


@pytest.mark.usefixtures("in_cpp")
def test_a_buffer_that_is_not_dense_is_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = records(layers())
    strided = torch.zeros(2 * WIDTHS[0])
    seen[0].layer.running_mean = strided[::2]
    monkeypatch.setattr(kernels, "run", no_kernel)
    move(seen)
    assert strided[::2].any() and not strided[1::2].any()


@pytest.mark.parametrize("by", [track_by_kernel, track_in_cpp, track_in_pytorch])
def test_whoever_saved_a_moving_average_learns_that_it_moved(by: Callable[[list[Record]], None], in_cpp: bool) -> None:
    if by is track_in_cpp and not in_cpp:
        pytest.skip("no C++ compiler")
    seen = records(layers())
    kept = [getattr(seen[0].layer, name) for name in BUFFERS]
    before = [tensor._version for tensor in kept]
    by(seen)
    assert all(tensor._version > version for tensor, version in zip(kept, before, strict=True))
