"""Writes that PyTorch does not see as functions of tensors: there is no prior behind them, and a reason."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from brute_force import Between, Trap, images
from torch import Tensor, nn
from torch.nn import functional as F

from bkn_core.convert import conversion_report, convert
from bkn_core.graph.trace import trace

EXAMPLE = images(3)


def by_data_of_a_slice(trap: Trap, h: Tensor) -> Tensor:
    h[:, :4].data.mul_(5)
    return h


def by_data_of_a_view(trap: Trap, h: Tensor) -> Tensor:
    h.view(h.shape).data.mul_(5)
    return h


def by_other_data(trap: Trap, h: Tensor) -> Tensor:
    h.data = h.data * 5
    return h


def by_detached_numpy(trap: Trap, h: Tensor) -> Tensor:
    h.detach().numpy()[:, :4] = 0
    return h


def by_array(trap: Trap, h: Tensor) -> Tensor:
    np.asarray(h.detach())[:, :4] = 0
    return h


def by_exchange(trap: Trap, h: Tensor) -> Tensor:
    torch.from_dlpack(h.detach()).mul_(5)
    return h


def by_storage(trap: Trap, h: Tensor) -> Tensor:
    h.untyped_storage().copy_(torch.zeros_like(h).untyped_storage())
    return h


def by_detached(trap: Trap, h: Tensor) -> Tensor:
    h.detach().mul_(5)
    return h


def by_other_memory(trap: Trap, h: Tensor) -> Tensor:
    return h.set_(torch.ones_like(h))


def into_an_output(trap: Trap, h: Tensor) -> Tensor:
    result = torch.empty_like(h)
    torch.mul(h, 5, out=result)
    return result


def by_list(trap: Trap, h: Tensor) -> Tensor:
    torch._foreach_mul_([h], 5.0)
    return h


def by_index(trap: Trap, h: Tensor) -> Tensor:
    return h.index_fill_(1, torch.tensor([0, 1]), 0.0)


def by_every_element(trap: Trap, h: Tensor) -> Tensor:
    return h.apply_(lambda value: 5 * value)


def through_numbers(trap: Trap, h: Tensor) -> Tensor:
    return torch.tensor((5 * h).tolist())


def without_versions(trap: Trap, h: Tensor) -> Tensor:
    with torch.inference_mode():
        return h * 5


def by_functional_norm(trap: Trap, h: Tensor) -> Tensor:
    return 5 * F.batch_norm(h, None, None, training=True)


def by_functional_norm_of_a_layer(trap: Trap, h: Tensor) -> Tensor:
    norm = trap.bn_other
    return F.batch_norm(h, norm.running_mean, norm.running_var, norm.weight, norm.bias, trap.training)


WRITES: list[Between] = [
    by_data_of_a_slice,
    by_data_of_a_view,
    by_other_data,
    by_detached_numpy,
    by_array,
    by_exchange,
    by_storage,
    by_detached,
    by_other_memory,
    into_an_output,
    by_list,
    by_index,
    by_every_element,
    through_numbers,
    without_versions,
    by_functional_norm,
    by_functional_norm_of_a_layer,
]


@pytest.mark.parametrize("between", WRITES, ids=lambda between: between.__name__)
def test_there_is_no_prior_and_a_reason(between: Between) -> None:
    converted = convert(Trap(between), EXAMPLE)
    report = {r.name: r for r in conversion_report(converted)}
    assert report["bn2"].prior is None and report["bn2"].reason


def test_layers_applied_as_functions_are_reported_and_evaluate_as_before() -> None:
    model, x = Trap(by_functional_norm_of_a_layer).eval(), images(4)
    converted = convert(model, x)
    assert {r.name: r.reason for r in conversion_report(converted)} == {
        "bn1": "reads the network input, whose moments were not given (input_prior)",
        "bn_other": "not reached by the example forward",
        "bn2": "batch_norm outside a normalization layer",
    }
    assert torch.equal(converted.eval()(x), model(x))


def test_what_is_only_looked_at_elsewhere_keeps_its_prior() -> None:
    def between(trap: Trap, h: Tensor) -> Tensor:
        assert trap.conv.weight.detach().numpy().size and h.mean().item() < 1e9
        return h

    assert "bn2" in trace(Trap(between), EXAMPLE).priors


def test_conversion_under_inference_mode_gives_a_model_that_trains() -> None:
    with torch.inference_mode():
        converted = convert(Trap(lambda trap, h: F.relu(h)), images(3))
    assert {r.name: r.prior for r in conversion_report(converted)}["bn2"] == "relu(bn1) -> conv"
    converted.train()(images(4)).square().mean().backward()
    assert all(not p.is_inference() for p in converted.parameters())


def test_compiled_models_are_followed_as_they_were_written() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    model.compile(backend="eager")
    assert [r.prior for r in conversion_report(convert(model, EXAMPLE))] == [None, "relu(1) -> 3"]
