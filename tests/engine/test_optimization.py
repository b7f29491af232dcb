"""Parameter groups, and what changes with the step, against the schedulers of torch."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from bkn_core.convert import convert
from bkn_core.engine.optimization import build_optimizer, learning_rate, set_step_
from bkn_core.layers.batch_kalman import BatchKalmanNorm
from bkn_core.layers.schedule import anneal_gain_
from bkn_core.recipe import OptimConfig, Recipe, load_recipe

CPU = torch.device("cpu")
STEPS = 40


def network(**options: Any) -> nn.Module:
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.Flatten()]
    images = torch.randn(2, 3, 6, 6)
    return convert(nn.Sequential(*layers, nn.Linear(20, 2)), images, input_prior=images, **options)


def rates(config: OptimConfig, steps: int = STEPS) -> list[float]:
    return [learning_rate(config, step, steps) for step in range(steps)]


def torch_rates(scheduler: type[Any], lr: float, steps: int = STEPS, **arguments: Any) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    schedule, found = scheduler(optimizer, **arguments), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # no optimizer step is taken
        for _ in range(steps):
            found.append(optimizer.param_groups[0]["lr"])
            if len(found) < steps:
                schedule.step()
    return found


def group_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
    (group,) = [g for g in optimizer.param_groups if any(p is parameter for p in g["params"])]
    return group


@pytest.mark.parametrize("options", [{}, {"transition": "learned"}, {"kind": "gn"}, {"kind": "bn"}], ids=str)
def test_every_parameter_is_in_exactly_one_group(options: dict[str, Any]) -> None:
    model = network(**options)
    optimizer = build_optimizer(model, OptimConfig(), CPU)
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_only_weights_decay_and_gains_have_their_own_rate(name: str) -> None:
    model = network()
    config = OptimConfig(name=name, weight_decay=0.3, norm_weight_decay=0.2, gain_lr_scale=0.5, lr=0.1)
    optimizer = build_optimizer(model, config, CPU)
    rate = set_step_(optimizer, model, Recipe(optim=config), step=3, steps=10)
    expected = {"gain_logit": (0.0, 0.5 * rate)}
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False):
            is_weight = key == "weight" and isinstance(module, nn.Conv2d | nn.Linear)
            decay, lr = expected.get(key, (0.3 if is_weight else 0.2, rate))
            group = group_of(optimizer, parameter)
            assert (group["weight_decay"], group["lr"]) == (decay, lr), key


def test_a_learned_transition_decays_as_the_norm_layer_it_belongs_to() -> None:
    model = network(transition="learned")
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.3, norm_weight_decay=0.2), CPU)
    found = [p for m in model.modules() if isinstance(m, BatchKalmanNorm) for p in [m.transition] if p is not None]
    assert found and all(group_of(optimizer, p)["weight_decay"] == 0.2 for p in found)


def test_what_is_frozen_is_not_optimized() -> None:
    model = network()
    model[0].weight.requires_grad_(False)
    grouped = [p for g in build_optimizer(model, OptimConfig(), CPU).param_groups for p in g["params"]]
    assert all(p is not model[0].weight for p in grouped)


def test_a_shared_parameter_is_optimized_once() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    optimizer = build_optimizer(nn.Sequential(first, second), OptimConfig(), CPU)
    assert sum(p is first.weight for g in optimizer.param_groups for p in g["params"]) == 1


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_step_equals_torch_with_one_group_where_decay_and_rate_are_one(name: str) -> None:
    config = OptimConfig(name=name, lr=0.05, momentum=0.8, nesterov=True, weight_decay=0.1, norm_weight_decay=0.1)
    model, twin = nn.Linear(3, 2), nn.Linear(3, 2)
    twin.load_state_dict(model.state_dict())
    ours = build_optimizer(model, config, CPU)
    theirs: torch.optim.Optimizer = (
        torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.8, nesterov=True, weight_decay=0.1, fused=True)
        if name == "sgd"
        else torch.optim.AdamW(twin.parameters(), lr=0.05, betas=(0.8, 0.999), weight_decay=0.1, fused=True)
    )
    for _ in range(3):
        x = torch.randn(5, 3)
        for net, optimizer in ((model, ours), (twin, theirs)):
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()
    assert torch.equal(model.weight, twin.weight) and torch.equal(model.bias, twin.bias)


@pytest.mark.parametrize("warmup", [0.05, 0.1, 0.25, 0.5, 0.9])
def test_onecycle_is_that_of_torch(warmup: float) -> None:
    """torch's first phase ends at pct_start·steps - 1; ours peaks at warmup·steps."""
    config = OptimConfig(schedule="onecycle", lr=0.3, warmup=warmup)
    expected = torch_rates(
        torch.optim.lr_scheduler.OneCycleLR,
        0.3,
        max_lr=0.3,
        total_steps=STEPS,
        pct_start=warmup + 1 / STEPS,
        div_factor=25,
        final_div_factor=1e5 / 25,
        cycle_momentum=False,
    )
    assert rates(config) == pytest.approx(expected, rel=1e-9)


def test_onecycle_without_warmup_is_a_cosine_of_torch() -> None:
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR
    expected = torch_rates(cosine, 0.3, T_max=STEPS - 1, eta_min=0.3e-5)
    assert rates(OptimConfig(schedule="onecycle", lr=0.3, warmup=0.0)) == pytest.approx(expected, rel=1e-9)


def test_cosine_without_warmup_is_that_of_torch() -> None:
    expected = torch_rates(torch.optim.lr_scheduler.CosineAnnealingLR, 0.3, T_max=STEPS)
    assert rates(OptimConfig(schedule="cosine", lr=0.3, warmup=0.0)) == pytest.approx(expected, rel=1e-9)


def test_multistep_without_warmup_is_that_of_torch() -> None:
    expected = torch_rates(torch.optim.lr_scheduler.MultiStepLR, 0.3, milestones=[12, 30], gamma=0.2)
    config = OptimConfig(schedule="multistep", lr=0.3, warmup=0.0, milestones=(0.3, 0.75), gamma=0.2)
    assert rates(config) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("schedule", ["cosine", "multistep", "constant"])
def test_a_linear_warmup_rises_in_equal_steps_and_then_meets_the_rate(schedule: str) -> None:
    config = OptimConfig(schedule=schedule, lr=0.2, warmup=0.25)
    expected = torch_rates(torch.optim.lr_scheduler.LinearLR, 0.2, steps=11, start_factor=1 / 11, total_iters=10)
    assert rates(config)[:11] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("schedule", ["onecycle", "cosine", "multistep", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
@pytest.mark.parametrize("warmup", [0.0, 0.2, 0.99])
def test_the_shortest_runs_have_a_positive_rate_below_the_highest(schedule: str, steps: int, warmup: float) -> None:
    found = rates(OptimConfig(schedule=schedule, lr=0.3, warmup=warmup), steps)
    assert all(0 < rate <= 0.3 for rate in found)


def test_an_annealed_gain_is_whole_for_one_half_and_gone_after_nine_tenths() -> None:
    layer = BatchKalmanNorm(2)
    found = []
    for step in range(100):
        anneal_gain_(layer, step / 100)
        found.append(layer.gain_factor.item())
    assert found[:51] == [1.0] * 51 and found[70] == pytest.approx(0.5) and found[89] == pytest.approx(1 / 40)
    assert found[90:] == [0.0] * 10


def test_a_step_sets_the_gain_of_every_layer() -> None:
    model = network()
    layers = [m for m in model.modules() if isinstance(m, BatchKalmanNorm)]
    before = [layer.gain.item() for layer in layers]
    for word, factor in (("constant", 1), ("anneal", 0.5)):
        recipe = load_recipe(None, [f"norm.gain_schedule={word}"])
        set_step_(build_optimizer(model, recipe.optim, CPU), model, recipe, step=70, steps=100)
        assert [layer.gain.item() for layer in layers] == pytest.approx([factor * gain for gain in before])
