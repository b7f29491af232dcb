"""The prior of what reads the network input is exact: equal to what the layer then observes over the same images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bkn_core.convert import conversion_report, convert
from bkn_core.errors import ConversionError
from bkn_core.priors.hooks import find_hooks

NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CONVOLUTIONS: list[tuple[type[nn.Module], dict[str, Any]]] = [
    (kind, options)
    for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    for options in (
        {},
        {"padding": 1},
        {"padding": 2, "stride": 2},
        {"padding": 2, "dilation": 2, "bias": False},
        {"padding": "same"},
        {"padding": 1, "padding_mode": "reflect"},
        {"padding": 1, "padding_mode": "circular", "stride": 2},
        {"padding": 1, "padding_mode": "replicate"},
    )
]


def first_prior(model: nn.Module, images: Tensor | Iterator[Tensor], example: Tensor, name: str = "1") -> Any:
    converted = convert(model, example, input_prior=images)
    root, hooks = find_hooks(converted)
    with torch.no_grad():
        return hooks.priors(root)[name]


def assert_exact(prior: Any, observed: Tensor) -> None:
    dims = [d for d in range(observed.dim()) if d != 1]
    torch.testing.assert_close(prior.mean, observed.mean(dims), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(prior.variance, observed.var(dims, correction=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "options"), CONVOLUTIONS, ids=str)
def test_convolution_of_the_input(kind: type[nn.Module], options: dict[str, Any]) -> None:
    axes = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}[kind]
    images = 2 + torch.randn(6, 2, *[7, 6, 5][:axes])
    images = images + torch.roll(images, 1, -1)  # neighbours that know of each other
    model = nn.Sequential(kind(2, 4, 3, **options), NORMS[axes](4))
    assert_exact(first_prior(model, images, images[:2]), model[0](images))


def test_asymmetric_kernels_and_strides() -> None:
    images = torch.randn(5, 3, 9, 8).cumsum(3)
    model = nn.Sequential(nn.Conv2d(3, 4, (3, 2), stride=(1, 2), padding=(0, 1), dilation=(2, 1)), nn.BatchNorm2d(4))
    assert_exact(first_prior(model, images, images[:2]), model[0](images))


def test_transposed_kernel_axes_are_not_confused() -> None:
    images = torch.randn(5, 1, 9, 8).cumsum(3)  # smooth along one axis only
    model = nn.Sequential(nn.Conv2d(1, 2, (1, 3), bias=False), nn.BatchNorm2d(2))
    assert_exact(first_prior(model, images, images[:2]), model[0](images))


def test_linear_of_the_input() -> None:
    images = torch.randn(20, 6) @ torch.randn(6, 6) + 1
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))
    assert_exact(first_prior(model, images, images[:2]), model[0](images))


def test_linear_of_the_flattened_and_scaled_input() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(18, 4), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.linear((x * 2 - 1).flatten(1)))

    model, images = Model(), torch.rand(20, 2, 3, 3)
    assert_exact(first_prior(model, images, images[:2], "norm"), model.linear((images * 2 - 1).flatten(1)))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(9, 3), (9, 3, 5), (9, 3, 4, 5)])
def test_norm_of_the_input(shape: tuple[int, ...], affine: bool) -> None:
    images = 3 + 2 * torch.randn(shape)
    norm = nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d
    model = nn.Sequential(norm(3, affine=affine))
    assert_exact(first_prior(model, images, images[:2], "0"), images)


def test_norm_of_the_input_without_any_parameter() -> None:
    images = torch.randn(9, 3, 4, 4) + 1
    model = nn.Sequential(nn.BatchNorm2d(3, affine=False), nn.ReLU(), nn.BatchNorm2d(3, affine=False))
    converted = convert(model, images, input_prior=images, learn_gain=False, correction=False)
    converted(images)
    assert all(report.prior for report in conversion_report(converted))


def test_batches_of_different_size_count_by_their_images() -> None:
    images = torch.randn(11, 3, 6, 6) + torch.arange(11.0).view(-1, 1, 1, 1)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))
    assert_exact(first_prior(model, iter(images.split(4)), images[:2]), model[0](images))


def test_wide_patches_keep_variances_only() -> None:
    images = torch.randn(300, 1100)
    model = nn.Sequential(nn.Linear(1100, 4), nn.BatchNorm1d(4))
    converted = convert(model, images[:2], input_prior=images)
    assert converted[0].input_covariance.shape == (1100,)
    expected = (model[0].weight.square() * images.var(0, correction=0)).sum(1)
    torch.testing.assert_close(first_prior(model, images, images[:2]).variance, expected)


def test_images_far_from_zero_lose_no_digits() -> None:
    images = 1000 + torch.randn(64, 3, 6, 6)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
    prior = first_prior(model, images.split(8), images[:2])
    expected = model[0].double()(images.double())
    torch.testing.assert_close(prior.variance.double(), expected.var((0, 2, 3), correction=0), rtol=1e-3, atol=0)


def test_two_readers_of_the_input_are_both_exact() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)
            self.norm_a, self.norm_b, self.norm = (nn.BatchNorm2d(4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.a(x), self.b(F.avg_pool2d(x, 3, 1, 1))
            return self.norm(self.norm_a(a) + self.norm_b(b))

    model, images = Model(), torch.randn(8, 3, 6, 6)
    assert_exact(first_prior(model, images, images[:2], "norm_a"), model.a(images))
    assert_exact(first_prior(model, images, images[:2], "norm_b"), model.b(F.avg_pool2d(images, 3, 1, 1)))


class OwnConvolution(nn.Module):
    """A convolution that is no `nn.Conv2d`, as many libraries write their own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, padding=1)


class SamePadding(nn.Conv2d):
    """Pads by itself before it convolves."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


class Standardized(nn.Conv2d):
    """Reads the input through a weight that is computed."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


@pytest.mark.parametrize(
    "convolution",
    [OwnConvolution(), SamePadding(3, 4, 3, stride=2), Standardized(3, 4, 3), nn.Conv2d(3, 6, 3, groups=3)],
    ids=["own", "same", "standardized", "grouped"],
)
def test_unusual_readers_are_exact_or_have_a_reason(convolution: nn.Module) -> None:
    images = torch.randn(8, 3, 6, 6) + 1
    model = nn.Sequential(
        convolution, nn.BatchNorm2d(6 if isinstance(convolution, nn.Conv2d) and convolution.groups > 1 else 4)
    )
    converted = convert(model, images[:2], input_prior=images)
    (report,) = conversion_report(converted)
    if report.prior is None:
        assert report.reason
    else:
        root, hooks = find_hooks(converted)
        assert_exact(hooks.priors(root)["1"], convolution(images))


def test_no_image_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(ConversionError, match="no image"):
        convert(model, torch.randn(2, 3, 5, 5), input_prior=iter([]))


def test_measuring_leaves_training_flags_and_moving_statistics() -> None:
    images = torch.randn(8, 3, 5, 5) + 1
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout()).train()
    model[2].eval()
    converted = convert(model, images[:2], input_prior=images)
    assert [m.training for m in converted.modules()] == [m.training for m in model.modules()]
    assert torch.equal(converted[1].running_mean, model[1].running_mean)
    assert int(converted[1].num_batches_tracked) == 0


def test_layers_without_moving_statistics_can_be_measured_past() -> None:
    images = torch.randn(8, 3, 5, 5)
    norms = [nn.BatchNorm2d(4, track_running_stats=False) for _ in range(2)]
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norms[0], nn.ReLU(), nn.Conv2d(4, 4, 3), norms[1])
    assert_exact(first_prior(model, iter(images.split(1)), images[:2]), model[0](images))
