"""The node in C++ does what the node in Python does, to the bit, and is compiled beside the program."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bkn_core.filter.inflation_gradient import Sensitivity
from bkn_core.filter.kalman import Gaussian
from bkn_core.ops import extension
from bkn_core.ops.normalize import FilterSettings, kalman_normalize

SHAPES = [(8, 16, 12, 12), (8, 5, 21, 17), (8, 300, 5, 5), (8, 7, 3, 2, 4), (8, 12)]
Leaves = tuple[Tensor, Gaussian | None, Tensor, Tensor | None, Tensor | None, Sensitivity | None]


@pytest.fixture(scope="module", autouse=True)
def _compiled(in_cpp: bool) -> None:
    if not in_cpp:
        pytest.skip("no C++ compiler")


@pytest.fixture(params=[1, 2])
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def leaves(shape: tuple[int, ...], form: str, *, last: bool = False) -> Leaves:
    """x, the prior, gain, γ, β and the sensitivity; `form` says what there is."""
    torch.manual_seed(3)
    x = torch.randn(shape) * 2 + 1
    if last and len(shape) > 3:
        x = x.contiguous(memory_format=torch.channels_last if len(shape) == 4 else torch.channels_last_3d)
    rows = (shape[0] // 2, shape[1]) if form == "own priors" else (shape[1],)
    prior = Gaussian(torch.randn(rows).requires_grad_(), (torch.rand(rows) + 0.5).requires_grad_())
    weight, bias = torch.randn(shape[1]).requires_grad_(), torch.randn(shape[1]).requires_grad_()
    sensitivity = Sensitivity(torch.randn(2, shape[1]), torch.randn(3, shape[1]))
    gain = torch.tensor(0.3, requires_grad=True)
    affine = (None, None) if form == "not affine" else (weight, bias)
    has_prior, follows = form != "no prior", form not in ("no prior", "no innovation")
    return x.requires_grad_(), prior if has_prior else None, gain, *affine, sensitivity if follows else None


def results(given: Leaves, size: int) -> list[Tensor]:
    x, prior, gain, weight, bias, sensitivity = given
    filtered = kalman_normalize(x, prior, gain, weight, bias, FilterSettings(1e-4, size), sensitivity)
    torch.manual_seed(4)
    objective = (filtered.y * torch.randn(x.shape)).sum() + filtered.posterior.variance.sin().sum()
    wanted = [t for t in (x, *(prior or ()), gain if prior else None, weight, bias) if t is not None]
    found = [filtered.y, filtered.statistics.packed, *torch.autograd.grad(objective, wanted)]
    return found if sensitivity is None else [*found, sensitivity.gathered]


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("form", ["shared prior", "own priors", "no prior", "not affine", "no innovation"])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_gives_the_bits_of_the_node_in_python(
    shape: tuple[int, ...], last: bool, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = results(leaves(shape, form, last=last), 2)
    assert "Normalize" in made[0].grad_fn.name() and "_Direct" not in made[0].grad_fn.name()  # type: ignore[union-attr]
    monkeypatch.setattr(extension, "operations", lambda: None)
    expected = results(leaves(shape, form, last=last), 2)
    assert "_Direct" in expected[0].grad_fn.name()  # type: ignore[union-attr]
    assert made[0].stride() == expected[0].stride()
    for actual, wanted in zip(made, expected, strict=True):
        assert torch.equal(actual, wanted)


def test_it_leaves_other_tensors_alone() -> None:
    x, prior, gain, weight, bias, sensitivity = leaves((4, 3, 5, 5), "shared prior")
    assert prior is not None and sensitivity is not None

    def serves(x: Tensor, mean: Tensor, variance: Tensor, gain: Tensor, weight: Tensor, groups: int = 1) -> bool:
        parameters = (mean, variance, gain, weight, bias)
        return extension.normalize(x, parameters, sensitivity, 1e-5, groups) is not None

    rest = (*prior, gain, weight)
    assert weight is not None and serves(x, *rest)  # type: ignore[arg-type]
    for other in (x.double(), x.int(), x[:, :, ::2], x.to("meta"), x[:0], x[:, :2], x.to_sparse()):
        assert not serves(other, *rest)  # type: ignore[arg-type]
    assert not serves(x, *prior, weight, weight) and not serves(x, *prior, gain, weight.double())
    assert not serves(x, prior.mean[:2], prior.variance[:2], gain, weight)
    assert not serves(x, prior.mean, prior.variance.repeat(2, 1), gain, weight, 2)
    assert not serves(x, prior.mean.expand(2, 3), prior.variance.expand(2, 3), gain, weight, 2)  # not dense


def test_transforms_take_the_path_in_pytorch() -> None:
    x, prior, gain, weight, bias, _ = leaves((4, 3, 5, 5), "no innovation")
    assert prior is not None

    def function(values: Tensor) -> Tensor:
        return kalman_normalize(values, prior, gain, weight, bias, FilterSettings(1e-4, 2)).y.square().sum()

    expected = torch.autograd.grad(function(x), x)[0]
    torch.testing.assert_close(torch.func.grad(function)(x.detach()), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("power", [1, 2])  # what arrives is a constant, or has a derivative
def test_a_second_derivative_is_refused(power: int) -> None:
    x, prior, gain, weight, bias, sensitivity = leaves((4, 3, 5, 5), "shared prior")
    y = kalman_normalize(x.tanh(), prior, gain, weight, bias, FilterSettings(1e-4, 2), sensitivity).y
    (gradient,) = torch.autograd.grad(y.pow(power).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        gradient.square().sum().backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("is_held", [False, True])
def test_a_gradient_that_nobody_holds_makes_room_for_that_of_the_input(is_held: bool) -> None:
    x, prior, gain, weight, bias, _ = leaves((8, 16, 12, 12), "no innovation")
    kept: list[Tensor] = []
    y = kalman_normalize(x, prior, gain, weight, bias, FilterSettings(1e-4, 2)).y
    if is_held:
        y.register_hook(kept.append)
    scaled, upstream = 3 * y, torch.randn(x.shape)
    before = upstream.clone()
    with torch.autograd.profiler.profile(use_kineto=False) as profile:
        scaled.backward(upstream)
    made = [event for event in profile.function_events if event.name == "aten::empty_like"]
    assert torch.equal(upstream, before) and all(torch.equal(gradient, 3 * before) for gradient in kept)
    assert len(made) == 1 + is_held  # the gradient of the weight


def test_an_activation_that_was_changed_is_noticed() -> None:
    x, prior, gain, weight, bias, _ = leaves((4, 3, 5, 5), "no innovation")
    value = x * 1
    y = kalman_normalize(value, prior, gain, weight, bias, FilterSettings(1e-4, 2)).y
    value.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()  # type: ignore[no-untyped-call]


def test_a_library_that_cannot_be_loaded_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wrong = tmp_path / "wrong.so"
    wrong.write_text("no library")
    with caplog.at_level(logging.INFO, logger="bkn"):
        assert extension._loaded(wrong) is None
    assert "cannot be loaded" in caplog.text
