"""Norm layers that apply their activation themselves, and norm layers used twice or alone."""

from __future__ import annotations

import torch
from small_models import images, pretrained
from torch import Tensor, nn

from bkn_core.convert import conversion_report, convert, fold


class FusedNorm(nn.BatchNorm2d):
    """A norm layer that applies its activation itself, as timm's BatchNormAct2d does."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.act(self.drop(super().forward(x)))
        return result


def fused_model() -> nn.Module:
    return pretrained(nn.Sequential(nn.Conv2d(3, 4, 1), FusedNorm(4), nn.Conv2d(4, 4, 3), FusedNorm(4)))


def test_fused_activations_are_kept_and_predicted_through() -> None:
    model, x = fused_model(), images()
    converted = convert(model, x, input_prior=x)
    assert [r.prior for r in conversion_report(converted)] == ["input -> 0", "relu(1) -> 2"]
    torch.testing.assert_close(converted.eval()(x), model.eval()(x))
    y = converted.train()(x)
    assert (y >= 0).all()
    y.sum().backward()


def test_fused_activations_survive_as_baselines_and_folded() -> None:
    model, x = fused_model().eval(), images()
    torch.testing.assert_close(fold(model)(x), model(x), rtol=1e-5, atol=1e-5)
    assert (convert(model, x, kind="gn")(x) >= 0).all()
