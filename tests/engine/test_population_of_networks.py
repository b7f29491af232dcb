"""Kinds of statistics and their re-estimation in a whole network as the engine builds it."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from tiny_runs import training
from torch import Tensor, nn

from bkn_core.data.batches import normalize
from bkn_core.engine.training import Training
from bkn_core.layers.batch_kalman import BatchKalmanNorm
from bkn_core.population import estimate_population, statistics

WORDS = ("model.name=cifar_resnet8", "norm.innovation=true")


@pytest.fixture(scope="module")
def trained() -> Training:
    torch.manual_seed(0)
    run = training(*WORDS)
    for passes in run.epoch(0):
        run.take_step(0, passes)
    return run


@pytest.fixture
def model(trained: Training) -> nn.Module:
    return copy.deepcopy(trained.model).eval()


@pytest.fixture
def inputs(trained: Training) -> Tensor:
    return normalize(trained.splits.train.batch(torch.arange(14))[0], trained.splits.preprocess)


def layers_of(model: nn.Module) -> dict[str, BatchKalmanNorm]:
    return {name: module for name, module in model.named_modules() if isinstance(module, BatchKalmanNorm)}


@torch.no_grad()
def test_an_image_by_itself_has_the_answer_it_has_among_others(model: nn.Module, inputs: Tensor) -> None:
    with statistics(model, "batch", 1):
        together = model(inputs)
        alone = torch.cat([model(image[None]) for image in inputs])
        shuffled = model(inputs.flip(0)).flip(0)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(together, shuffled, rtol=1e-4, atol=1e-4)
    with statistics(model, "batch", 2):
        assert not torch.allclose(model(inputs), together, atol=1e-2), "pairs do hear each other"


@torch.no_grad()
def test_the_context_restores_what_was_and_changes_no_bit(model: nn.Module, inputs: Tensor) -> None:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = model(inputs)
    with pytest.raises(KeyError), statistics(model, "batch", 2):
        model(inputs)
        with statistics(model, "population"):
            assert torch.equal(model(inputs), expected)
        assert {layer.statistics for layer in layers_of(model).values()} == {("batch", 2)}
        raise KeyError
    assert {layer.statistics for layer in layers_of(model).values()} == {None}
    assert torch.equal(model(inputs), expected)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def recomputed(model: nn.Module, batches: list[Tensor], size: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Average, in float64 and image by image, the blend of prior and observation that each group has."""
    sums: dict[str, list[np.ndarray]] = {name: [np.float64(0), np.float64(0)] for name in layers_of(model)}

    def see(name: str) -> object:
        def hook(layer: BatchKalmanNorm, given: tuple[Tensor, ...]) -> None:
            gain = float(layer.gain) if layer.expects_prior else 1.0
            forward, name = layer.slots.own.current(layer.context)
            prior = forward.prior(name) if forward is not None and layer.expects_prior else None
            for group in given[0].double().split(size):
                x = group.numpy().transpose(1, 0, 2, 3).reshape(group.shape[1], -1)
                m, v = (np.zeros(len(x)),) * 2 if prior is None else (t.double().numpy() for t in prior)
                d = x.mean(1) - m
                sums[name][0] = sums[name][0] + len(group) * (m + gain * d)
                unbiased = (1 - gain) * v + gain * x.var(1, ddof=1) + gain * (1 - gain) * d**2
                sums[name][1] = sums[name][1] + len(group) * unbiased

        return hook

    handles = [layer.register_forward_pre_hook(see(name)) for name, layer in layers_of(model).items()]
    with torch.no_grad(), statistics(model, "batch", size):
        for batch in batches:
            model(batch)
    for handle in handles:
        handle.remove()
    images = sum(len(batch) for batch in batches)
    return {name: (total[0] / images, total[1] / images) for name, total in sums.items()}


@pytest.mark.parametrize("sizes", [[14], [8, 6], [4, 2, 7, 1]], ids=str)
def test_an_estimate_is_the_average_over_images_in_batches_of_any_size(
    model: nn.Module, inputs: Tensor, sizes: list[int]
) -> None:
    batches = list(inputs.split(sizes))
    expected = recomputed(copy.deepcopy(model), batches, 2)
    estimate_population(model, batches)
    for name, layer in layers_of(model).items():
        np.testing.assert_allclose(layer.running_mean.numpy(), expected[name][0], rtol=1e-4, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(layer.running_var.numpy(), expected[name][1], rtol=1e-4, atol=1e-5, err_msg=name)


def test_whole_groups_give_one_estimate_however_they_are_batched(model: nn.Module, inputs: Tensor) -> None:
    other = copy.deepcopy(model)
    estimate_population(model, inputs.split(4))
    estimate_population(other, [inputs])
    for name, layer in layers_of(model).items():
        twin = layers_of(other)[name]
        torch.testing.assert_close(layer.running_mean, twin.running_mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.running_var, twin.running_var, rtol=1e-4, atol=1e-5)


def test_an_estimate_that_is_broken_off_changes_nothing(model: nn.Module, inputs: Tensor) -> None:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def batches() -> object:
        yield inputs
        raise KeyError

    with pytest.raises(KeyError):
        estimate_population(model.train(), batches())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert model.training
    assert {layer.statistics for layer in layers_of(model).values()} == {None}
    assert {layer.on_posterior for layer in layers_of(model).values()} == {None}
