"""Tests of what detectors bring: frozen normalization, images of unequal sizes that are written into one batch."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.ops import FrozenBatchNorm2d

import bkn_core as bkn
from bkn_core.layers.batch_kalman import BatchKalmanNorm


class Block(nn.Module):
    """A convolution and its normalization."""

    def __init__(self, inputs: int, channels: int, norm: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, channels, 3, padding=1, bias=False)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x)))


def frozen(channels: int) -> FrozenBatchNorm2d:
    norm = FrozenBatchNorm2d(channels, eps=1e-3)
    for name, buffer in norm.named_buffers():
        buffer.copy_(torch.rand(channels) + (0.5 if name in ("weight", "running_var") else -0.5))
    return norm


def backbone() -> nn.Sequential:
    return nn.Sequential(Block(3, 8, frozen(8)), Block(8, 4, frozen(4)), Block(4, 4, nn.BatchNorm2d(4)))


def test_frozen_normalization_is_converted_with_its_statistics() -> None:
    model, images = backbone().eval(), torch.randn(4, 3, 8, 8)
    converted = bkn.convert(model, images, input_prior=images)
    layers = [m for m in converted.modules() if isinstance(m, BatchKalmanNorm)]
    assert len(layers) == 3 and [layer.eps for layer in layers] == [1e-3, 1e-3, 1e-5]
    torch.testing.assert_close(converted(images), model(images))
    converted.train()(images).square().mean().backward()
    assert all(p.grad is not None for p in converted.parameters() if p.requires_grad)
    assert isinstance(bkn.to_batch_norm(converted)[0].norm, nn.BatchNorm2d)
    assert isinstance(model[0].norm, FrozenBatchNorm2d)  # the model itself is as it was


def test_frozen_normalization_beside_a_frozen_convolution_is_not_trained() -> None:
    model, images = backbone(), torch.randn(4, 3, 8, 8)
    model[0].conv.requires_grad_(False)
    converted = bkn.convert(model, images, input_prior=images)
    assert not any(p.requires_grad for p in converted[0].parameters())
    assert all(p.requires_grad for n, p in converted[1].named_parameters() if n in ("norm.weight", "norm.bias"))


def test_frozen_normalization_that_is_left_out_stays_and_predicts_what_follows() -> None:
    model, images = backbone(), torch.randn(4, 3, 8, 8)
    converted = bkn.convert(model, images, exclude=("0.*", "1.*"), input_prior=images)
    assert isinstance(converted[0].norm, FrozenBatchNorm2d)
    assert [(row.name, bool(row.prior)) for row in bkn.conversion_report(converted)] == [("2.norm", True)]


class Padded(nn.Module):
    """Writes images of unequal sizes into a batch, as detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Block(3, 4, nn.BatchNorm2d(4))

    def forward(self, images: Sequence[Tensor]) -> Tensor:
        batch = images[0].new_full((len(images), 3, 8, 8), 0.0)
        means = torch.as_tensor([0.5, 0.4, 0.3])[:, None, None]
        for slot, image in zip(batch, images, strict=True):
            slot[:, : image.shape[1], : image.shape[2]].copy_((image - means) / 0.2)
        batch[:, :, -1] = 0
        return self.body(batch)


def test_images_that_are_written_into_a_batch_are_the_input() -> None:
    images = [torch.rand(3, 8, 7), torch.rand(3, 6, 8)]
    converted = bkn.convert(Padded(), (images,), input_prior=[(images,)])
    (row,) = bkn.conversion_report(converted)
    assert row.prior == "input -> body.conv"
    (quality,) = bkn.prior_quality(converted, [(images,)])
    assert abs(quality.refined.log_variance_ratio) < 1e-3 and abs(quality.refined.mean_error) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn", "fcos_resnet50_fpn"])
def test_detectors_train_at_two_images(name: str) -> None:
    model = detection.__dict__[name](
        weights=None, weights_backbone=None, num_classes=3, norm_layer=None, min_size=64, max_size=96
    )
    images = [torch.rand(3, 64, 64), torch.rand(3, 56, 72)]
    boxes = torch.tensor([[8.0, 8, 40, 40], [20, 10, 50, 48]])
    targets = [{"boxes": boxes, "labels": torch.tensor([1, 2])} for _ in images]
    converted = bkn.convert(model, (images, targets), input_prior=[(images, targets)])
    assert all(row.prior for row in bkn.conversion_report(converted))
    loss = sum(converted.train()(images, targets).values())
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in converted.parameters() if p.grad is not None)
    assert len(converted.eval()(images)) == 2
