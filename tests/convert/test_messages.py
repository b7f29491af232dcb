"""Raw messages, learned transitions and branches, against their formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import (
    VARIANTS,
    gradients,
    images,
)
from torch import Tensor, nn
from torch.nn import functional as F

from bkn_core.convert import conversion_report, convert


def test_raw_messages_are_the_posteriors_of_the_preceding_layers() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5))
    x = images()
    model = convert(plain, x, message="raw", gain=0.25, correction=False, innovation=False).double()
    h = plain[0].double()(x.double())
    weight = plain[2].double().weight.detach()
    out = plain[2](model[1](h)).detach()
    model(x.double())
    groups = h.view(4, 2, *h.shape[1:])
    mean, variance = groups.mean((1, 3, 4)), groups.var((1, 3, 4), correction=0)  # bn1 has no prior
    prior_mean = mean @ weight.sum((2, 3)).T + plain[2].bias
    prior_variance = variance @ weight.square().sum((2, 3)).T
    cut = out.view(4, 2, *out.shape[1:])
    x_bar, s = cut.mean((1, 3, 4)), cut.var((1, 3, 4), correction=0)
    posterior = prior_mean + 0.25 * (x_bar - prior_mean)
    torch.testing.assert_close(model[3].running_mean, 0.1 * posterior.mean(0), rtol=1e-6, atol=1e-7)
    count = cut[0, :, 0].numel()
    expected = 0.75 * prior_variance + 0.25 * s * count / (count - 1) + 0.1875 * (x_bar - prior_mean).square()
    torch.testing.assert_close(model[3].running_var, 0.9 + 0.1 * expected.mean(0), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_learned_transition_predicts_from_the_preceding_posterior(covariance: Any) -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5))
    x = images()
    model = convert(plain, x, transition="learned", gain=0.25, covariance=covariance).double()
    matrix = torch.randn(5, 4, dtype=torch.float64)
    model[3].transition.data.copy_(matrix)
    h = model[0](x.double())
    out = model[2](model[1](h)).detach()
    noise = dict(model.named_parameters())[next(n for n, _ in model.named_parameters() if "noise" in n)].detach() ** 2
    model(x.double())
    groups = h.detach().view(4, 2, 4, -1).transpose(1, 2).flatten(2)
    mean = groups.mean(2)
    centred = groups - mean[:, :, None]
    s = centred @ centred.transpose(1, 2) / groups.shape[2]
    if covariance == "diagonal":
        s = torch.diag_embed(s.diagonal(dim1=1, dim2=2))
    prior_mean = mean @ matrix.T
    prior_variance = (matrix @ s @ matrix.T).diagonal(dim1=1, dim2=2) + noise
    cut = out.view(4, 2, *out.shape[1:])
    x_bar, observed = cut.mean((1, 3, 4)), cut.var((1, 3, 4), correction=0)
    count = cut[0, :, 0].numel()
    expected = 0.75 * prior_variance + 0.25 * observed * count / (count - 1) + 0.1875 * (x_bar - prior_mean).square()
    torch.testing.assert_close(model[3].running_var, 0.9 + 0.1 * expected.mean(0), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(
        model[3].running_mean, 0.1 * (0.75 * prior_mean + 0.25 * x_bar).mean(0), rtol=1e-6, atol=1e-7
    )


class Branches(nn.Module):
    """Two normalized branches and one that is not, laid side by side and added."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 4, 1) for _ in range(3))
        self.bn_a, self.bn_b = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.after_cat, self.bn_cat = nn.Conv2d(12, 5, 1), nn.BatchNorm2d(5)
        self.after_add, self.bn_add = nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.bn_a(self.a(x)), self.bn_b(self.b(x)), self.c(x)
        joined = self.bn_cat(self.after_cat(torch.cat([a, F.relu(b), c], 1)))
        result: Tensor = joined + self.bn_add(self.after_add(a + b + c))
        return result


@pytest.mark.parametrize("with_input", [False, True])
@pytest.mark.parametrize("covariance", ["diagonal", "full"])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_branches_join(options: dict[str, Any], covariance: Any, with_input: bool) -> None:
    x = images()
    model = convert(Branches(), x, covariance=covariance, input_prior=x if with_input else None, **options)
    y = model(x)
    y.square().sum().backward()
    assert y.isfinite().all()
    assert all(g.isfinite().all() for g in gradients(model).values())


class Twice(nn.Module):
    """One norm layer on two branches; what follows the first branch runs after the second."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.shared = nn.BatchNorm2d(4)
        self.conv, self.last = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.shared(self.left(x)), self.shared(self.right(x))
        result: Tensor = self.last(self.conv(first)) + second
        return result


@pytest.mark.parametrize("options", [{"message": "raw"}, {"transition": "learned"}], ids=str)
def test_layers_of_two_posteriors_or_none_predict_nothing_from_them(options: dict[str, Any]) -> None:
    converted = convert(Twice(), images(), **options)
    report = {r.name: r for r in conversion_report(converted)}
    assert report["last"].prior is None and "reads shared" in report["last"].reason
    converted.train()(images()).sum().backward()
    silent = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
    )
    converted = convert(silent, images(), exclude=("1",), **options)
    assert "reads 1" in conversion_report(converted)[0].reason
    converted.train()(images()).sum().backward()
    assert conversion_report(convert(silent, images(), **options))[1].prior == "1 -> 2"


def test_parameters_predict_from_layers_of_two_posteriors() -> None:
    report = {r.name: r.prior for r in conversion_report(convert(Twice(), images()))}
    assert report == {"shared": None, "last": "shared -> conv"}


def test_a_full_covariance_trains_in_mixed_precision() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5))
    model = convert(plain, images(), transition="learned", covariance="full")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(images())
    y.float().square().sum().backward()
    gradient = model[4].transition.grad
    assert gradient is not None and gradient.dtype == torch.float32 and gradient.isfinite().all() and gradient.any()
