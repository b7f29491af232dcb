"""How well priors predict what layers see: against NumPy, and where a prior is exact or wrong by design."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bkn_core as bkn
from bkn_core.layers.batch_kalman import BatchKalmanNorm
from bkn_core.priors.hooks import find_hooks
from bkn_core.priors.quality import PriorError, prior_quality


class Residual(nn.Module):
    """A stem and a block, registered in another order than they run in."""

    def __init__(self) -> None:
        super().__init__()
        self.bn3, self.conv3 = nn.BatchNorm2d(5), nn.Conv2d(5, 5, 3, padding=1)
        self.bn2, self.conv2 = nn.BatchNorm2d(5), nn.Conv2d(5, 5, 3, padding=1)
        self.bn1, self.conv1 = nn.BatchNorm2d(5), nn.Conv2d(3, 5, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.bn1(self.conv1(x)))
        return self.bn3(self.conv3(torch.relu(self.bn2(self.conv2(h)) + h)))  # type: ignore[no-any-return]


def batches() -> list[Tensor]:
    return [torch.randn(n, 3, 6, 6, dtype=torch.float64) * n + 0.5 for n in (4, 1, 3)]


def converted(model: nn.Module | None = None, **options: Any) -> nn.Module:
    """A trained-looking model in float64."""
    model = (model or Residual()).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    images = torch.cat(batches())
    model = bkn.convert(model, images, **{"input_prior": images, **options})
    for layer in layers(model):
        for values in (layer.mean_innovation, layer.innovation):
            if values is not None:
                nn.init.normal_(values.detach(), std=0.3)
    return model


def layers(model: nn.Module) -> list[BatchKalmanNorm]:
    return [module for module in model.modules() if isinstance(module, BatchKalmanNorm)]


def inputs(model: nn.Module, images: list[Tensor]) -> dict[str, np.ndarray[Any, Any]]:
    """What each normalization layer of a model in interpreter mode reads, (C, values)."""
    seen: dict[str, list[Tensor]] = {}
    model = copy.deepcopy(model).eval()
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.register_forward_pre_hook(lambda _, x, n=name: seen.setdefault(n, []).append(x[0].detach().clone()))
    for batch in images:
        model(batch)
    return {name: torch.cat(parts).movedim(1, 0).flatten(1).numpy() for name, parts in seen.items()}


def assert_error(found: PriorError | None, prior: Any, values: np.ndarray[Any, Any], eps: float = 1e-5) -> None:
    assert found is not None
    mean, variance = (value.detach().double().numpy().reshape(-1) for value in prior)
    error = np.abs(mean - values.mean(1)) / np.sqrt(values.var(1) + eps)
    ratio = np.log((values.var(1) + eps) / (variance + eps))
    np.testing.assert_allclose(found.mean_errors.numpy(), error, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.log_variance_ratios.numpy(), ratio, rtol=1e-9, atol=1e-12)
    numbers = {"mean_error": error.mean(), "log_variance_ratio": ratio.mean(), "spread": ratio.std()}
    assert found.summary() == pytest.approx(numbers)


def test_errors_are_those_of_the_concatenated_activations() -> None:
    model, images = converted(), batches()
    expected, plain = inputs(model, images), copy.deepcopy(model)
    for layer in layers(plain):
        for values in (layer.mean_innovation, layer.innovation):
            assert values is not None
            nn.init.zeros_(values.detach())
    refined, analytic = (find_hooks(m)[1].priors(m) for m in (model, plain))
    for row in prior_quality(model, images):
        assert_error(row.refined, refined[row.name], expected[row.name])
        assert_error(row.analytic, analytic[row.name], expected[row.name])


def test_rows_come_in_the_order_of_the_forward_with_their_words() -> None:
    rows = prior_quality(converted(), batches())
    assert [(row.name, row.channels, row.prior, row.reason) for row in rows] == [
        ("bn1", 5, "input -> conv1", ""),
        ("bn2", 5, "relu(bn1) -> conv2", ""),
        ("bn3", 5, "relu(bn2 + relu(bn1)) -> conv3", ""),
    ]


def test_an_input_prior_is_exact_on_the_images_it_was_measured_on() -> None:
    images = batches()
    row = prior_quality(converted(input_prior=images), images)[0]
    for error in (row.analytic, row.local):
        assert error is not None
        torch.testing.assert_close(error.mean_errors, torch.zeros(5).double(), rtol=0, atol=1e-9)
        torch.testing.assert_close(error.log_variance_ratios, torch.zeros(5).double(), rtol=0, atol=1e-9)


def chain(**options: Any) -> nn.Module:
    """Two layers with only a factor for each channel between them: the closed form is exact there."""
    norms = (nn.BatchNorm2d(4, eps=1e-12), nn.BatchNorm2d(4, eps=1e-12))
    return converted(
        nn.Sequential(nn.Conv2d(3, 4, 3), norms[0], nn.Conv2d(4, 4, 1, groups=4, bias=False), norms[1]), **options
    )


def test_local_errors_leave_out_what_is_inherited_from_the_layer_before() -> None:
    model, images = chain(), batches()
    first, row = layers(model)[0], prior_quality(model, images)[1]
    assert row.local is not None and row.analytic is not None and first.running_var is not None
    torch.testing.assert_close(row.local.log_variance_ratios, torch.zeros(4).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(row.local.mean_errors, torch.zeros(4).double(), rtol=0, atol=1e-9)
    inherited = np.log(inputs(model, images)["1"].var(1) / first.running_var.numpy())
    np.testing.assert_allclose(row.analytic.log_variance_ratios.numpy(), inherited, rtol=1e-7)


def test_a_wrong_inflation_is_measured_as_exactly_that_log_ratio() -> None:
    model, images = chain(correction=False), batches()
    wrong = torch.tensor([1.5, -0.5, 2.0, 0.0]).double()
    layer = layers(model)[1]
    assert layer.innovation is not None and layer.mean_innovation is not None
    layer.innovation.copy_(wrong)
    layer.mean_innovation.zero_()
    row = prior_quality(model, images)[1]
    assert row.refined is not None and row.analytic is not None
    torch.testing.assert_close(row.refined.log_variance_ratios, row.analytic.log_variance_ratios - wrong)
    torch.testing.assert_close(row.refined.mean_errors, row.analytic.mean_errors)


def test_messages_of_the_raw_form_are_the_population_statistics() -> None:
    model, images = chain(message="raw", correction=False, innovation=False), batches()
    first, weight = layers(model)[0], model[2].weight.detach().flatten()  # type: ignore[index]
    assert first.running_mean is not None and first.running_var is not None
    row, values = prior_quality(model, images)[1], inputs(model, images)
    prior = (weight * first.running_mean, weight.square() * first.running_var)
    assert_error(row.refined, prior, values["3"], 1e-12)
    seen = torch.from_numpy(np.stack([values["1"].mean(1), values["1"].var(1)]))
    assert_error(row.local, (weight * seen[0], weight.square() * seen[1]), values["3"], 1e-12)


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_learned_transitions_predict_from_the_population_statistics(covariance: str) -> None:
    model, images = chain(transition="learned", covariance=covariance), batches()
    first, second = layers(model)
    assert second.transition is not None and first.running_mean is not None and first.running_var is not None
    nn.init.normal_(second.transition.detach())
    noise = next(p for n, p in model.named_parameters() if n.endswith("transition_noise")).square()
    prior = (second.transition @ first.running_mean, second.transition.square() @ first.running_var + noise)
    row = prior_quality(model, images)[1]
    for error in (row.refined, row.analytic):
        assert_error(error, prior, inputs(model, images)["3"], 1e-12)


def test_raw_messages_need_population_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Conv2d(4, 4, 1))
    model.append(nn.BatchNorm2d(4))
    images = torch.cat(batches()).float()
    with pytest.raises(bkn.BknError, match="1 keeps no population statistics"):
        prior_quality(bkn.convert(model, images, message="raw"), images)


def test_statistics_of_the_batch_are_observed_inside_their_context() -> None:
    model, images = converted(), batches()
    seen: list[Tensor] = []
    with bkn.statistics(model, "batch", 1):
        rows = {row.name: row for row in prior_quality(model, images)}
        handle = model.bn2.register_forward_pre_hook(lambda _, x: seen.append(x[0].detach()))
        for image in torch.cat(images):
            model(image[None])
        handle.remove()
    values = torch.cat(seen).movedim(1, 0).flatten(1).numpy()
    assert_error(rows["bn2"].refined, find_hooks(model)[1].priors(model)["bn2"], values)
    other = prior_quality(model, images)[1].refined
    assert other is not None and rows["bn2"].refined is not None
    assert not torch.allclose(other.mean_errors, rows["bn2"].refined.mean_errors, atol=1e-2)


def test_layers_without_a_prior_say_why() -> None:
    model = converted(exclude=["bn3"], input_prior=None)
    rows = {row.name: row for row in prior_quality(model, batches())}
    assert all(
        getattr(rows[name], kind) is None for name in ("bn1", "bn3") for kind in ("refined", "analytic", "local")
    )
    assert (rows["bn3"].prior, rows["bn3"].reason) == (None, "it was not converted")
    assert "input_prior" in rows["bn1"].reason and rows["bn2"].refined is not None
    assert rows["bn1"].summary()["refined"] is None


def test_layers_that_no_image_reaches_have_no_errors() -> None:
    model = converted()
    model.forward = lambda x: model.bn1(model.conv1(x))
    rows = prior_quality(model, batches())
    assert [row.name for row in rows] == ["bn1", "bn3", "bn2"]
    assert [row.reason for row in rows] == ["", *["the images do not reach it"] * 2]
    assert rows[1].refined is None and rows[1].prior is not None


def numbers(model: nn.Module, images: Any) -> list[Tensor]:
    return [v for row in prior_quality(model, images) if row.refined for v in vars(row.refined).values()]


def test_a_batch_batches_and_a_loader_give_the_same() -> None:
    model, images = converted(), batches()
    expected = numbers(model, torch.cat(images))
    for others in (images, iter(images), [(batch, torch.zeros(len(batch))) for batch in images]):
        torch.testing.assert_close(numbers(model, others), expected)
    torch.testing.assert_close(numbers(nn.Sequential(nn.Identity(), model), images), expected)


def test_the_model_is_left_as_it_was_even_after_an_exception() -> None:
    def broken() -> Iterator[Tensor]:
        yield batches()[0]
        raise KeyError

    model = converted().train()
    model.get_submodule("bn2").eval()
    state = {name: values.clone() for name, values in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    prior_quality(model, batches())
    with pytest.raises(KeyError):
        prior_quality(model, broken())
    assert [module.training for module in model.modules()] == flags
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert all(torch.equal(values, state[name]) for name, values in model.state_dict().items())
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_moments_far_from_zero_keep_their_variance() -> None:
    images = [batch.float() + 3000 for batch in batches()]
    model = bkn.convert(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), images[0], input_prior=images)
    row, values = prior_quality(model, images)[0], inputs(model, images)["1"].astype(np.float64)
    assert row.refined is not None
    rounding = 3000 * np.finfo(np.float32).eps / values.std(1).min()  # of the float32 prior; the moments are exact
    assert row.refined.mean_error <= 4 * rounding
    variance = find_hooks(model)[1].priors(model)["1"].variance.detach().double().numpy()
    ratio = np.log((values.var(1) + 1e-5) / (variance + 1e-5))
    np.testing.assert_allclose(row.refined.log_variance_ratios.numpy(), ratio, atol=1e-6)


@pytest.mark.parametrize("images", [[], torch.empty(0, 3, 6, 6)], ids=["no batch", "an empty batch"])
def test_no_image_is_refused(images: Any) -> None:
    with pytest.raises(bkn.BknError, match="no image"):
        prior_quality(converted(), images)


def test_a_model_that_was_not_converted_is_refused() -> None:
    with pytest.raises(bkn.BknError, match="not converted"):
        prior_quality(Residual(), batches()[0].float())


def test_the_gain_is_that_of_the_remembered_uncertainties() -> None:
    model = converted(statistics_batch_size=1)
    assert all(row.gain is None for row in prior_quality(model, batches()))  # nothing has been trained yet
    layer = model.get_submodule("bn1")
    assert isinstance(layer, BatchKalmanNorm) and layer.uncertainty is not None
    layer.uncertainty.copy_(torch.tensor([40, 0.03, -0.01, 0.09, 0.2]))
    layer.fixed_gain.fill_(0.25)
    layer.gain_factor.fill_(0.5)
    found = {row.name: row for row in prior_quality(model, batches())}["bn1"]
    assert found.gain is not None
    assert found.gain.error == pytest.approx((0.03, -0.01)) and found.gain.noise == pytest.approx((0.09, 0.2))
    assert found.gain.implied == pytest.approx((0.25, 0)) and found.gain.used == pytest.approx(0.125)
    assert found.summary()["gain"]["implied"] == list(found.gain.implied)
