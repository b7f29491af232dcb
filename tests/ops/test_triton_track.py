"""Moving what layers remember by Triton, run by its interpreter, against PyTorch."""

from __future__ import annotations

import pytest
import torch
from test_track import BUFFERS, Record, copied, drawn, inflations, layers, move, records, track_in_pytorch

from bkn_core.layers.batch_kalman import BatchKalmanNorm2d
from bkn_core.ops import backend, extension, kernels

pytest.importorskip("triton")
from bkn_core.ops.cuda import track as tracking

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # of NumPy, in the interpreter
]


def track_by_triton(seen: list[Record]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "takes_triton", lambda _: True)
        patch.setattr(kernels, "library", lambda: None)
        patch.setattr(extension, "operations", lambda: None)
        patch.setattr("bkn_core.ops.track._track_in_pytorch", lambda _: pytest.fail("PyTorch did the work"))
        move(seen)


def assert_same(seen: list[Record]) -> None:
    twins, before = copied(seen), inflations(seen)
    track_by_triton(seen)
    track_in_pytorch(twins)
    for one, other in zip(seen, twins, strict=True):
        for name in BUFFERS:
            actual, expected = getattr(one.layer, name), getattr(other.layer, name)
            if actual is not None:
                torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6, equal_nan=True)
        if one.prior is not None and one.layer.innovation is not None:
            assert all(map(torch.equal, one.layer.past[0], before[id(one.layer)]))


@pytest.mark.parametrize(("groups", "own", "forwards"), [(1, False, 0), (1, True, 7), (4, True, 0), (4, False, 7)])
def test_triton_and_pytorch_agree(groups: int, own: bool, forwards: int) -> None:
    these = layers()
    for layer in these:
        layer.uncertainty[0] = forwards
    assert_same(records(these, groups=groups, own=own))


def test_layers_without_prior_inflation_or_moving_statistics() -> None:
    seen = records(layers()) + records(layers(track_running_stats=False)) + records(layers(gain=0.3))
    plain = BatchKalmanNorm2d(300, statistics_batch_size=2, momentum=0.3)
    assert_same([*seen, Record(plain, None, drawn(6, 4, 300).abs(), 8)])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38])
def test_hard_values(value: float) -> None:
    seen = records(layers())
    seen[0].statistics[2, 1, 0] = seen[1].statistics[3, 0, 2] = value
    assert_same(seen)


def test_the_table_is_made_anew_where_a_tensor_has_moved() -> None:
    seen = records(layers())
    assert_same(seen)
    assert_same([r._replace(statistics=r.statistics.clone() + 1) for r in seen])


def test_a_captured_graph_has_a_table_of_its_own_that_nothing_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = records(layers())
    assert_same(seen)
    before = dict(tracking._tables)
    monkeypatch.setattr(backend, "is_capturing", lambda: True)
    monkeypatch.setattr(torch, "tensor", lambda *_, **__: pytest.fail("memory of the host was copied"))
    assert_same([r._replace(statistics=r.statistics.clone() + 1) for r in seen])
    assert tracking._tables == before


def test_a_layer_that_ran_twice_is_left_to_pytorch() -> None:
    these = layers()
    seen = records(these) + records(these)
    before = int(these[0].num_batches_tracked)  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "takes_triton", lambda _: True)
        move(seen)
    assert int(these[0].num_batches_tracked) == before + 2  # type: ignore[arg-type]


def test_a_buffer_of_another_shape_is_left_to_pytorch() -> None:
    seen = records(layers())
    seen[0].layer.running_mean = torch.zeros(1)
    called = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "takes_triton", lambda _: True)
        patch.setattr("bkn_core.ops.track._track_in_pytorch", called.append)
        move(seen)
    assert len(called) == 1
