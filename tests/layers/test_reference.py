"""Normalization by a reference batch, against the same network written out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bkn_core.convert import convert, fold, is_converted
from bkn_core.errors import ConversionError

REFERENCE = torch.randn(5, 3, 6, 6, dtype=torch.float64) * 2 + 1
X = torch.randn(4, 3, 6, 6, dtype=torch.float64)


def drawn(**options: Any) -> tuple[Any, Any]:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.BatchNorm2d(2))
    for layer in (model[1], model[4]):
        nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    model = model.double()
    return model, convert(model, X, kind="reference", **({"input_prior": REFERENCE} | options))


def written_out(model: Any, x: Tensor, reference: Tensor) -> Tensor:
    for convolution, norm, activation in ((model[0], model[1], F.relu), (model[3], model[4], lambda t: t)):
        reference, x = convolution(reference), convolution(x)
        mean, variance = reference.mean((0, 2, 3)), reference.var((0, 2, 3), correction=0)
        reference, x = (activation(_affine(values, mean, variance, norm)) for values in (reference, x))
    return x


def _affine(values: Tensor, mean: Tensor, variance: Tensor, norm: Any) -> Tensor:
    column = lambda row: row[None, :, None, None]  # noqa: E731
    return (values - column(mean)) / column((variance + 1e-5).sqrt()) * column(norm.weight) + column(norm.bias)


@pytest.mark.parametrize("mode", [True, False])
def test_a_model_normalizes_by_its_reference_and_differentiates_through_it(mode: bool) -> None:
    model, converted = drawn()
    upstream = torch.randn(4, 2, 2, 2, dtype=torch.float64)
    found, expected = converted.train(mode)(X), written_out(model, X, REFERENCE)
    torch.testing.assert_close(found, expected)
    found.backward(upstream), expected.backward(upstream)
    for ours, theirs in zip(converted.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_an_image_does_not_depend_on_its_neighbours() -> None:
    _, converted = drawn()
    torch.testing.assert_close(converted(X)[1:2], converted(X[1:2]))


def test_folding_takes_the_statistics_of_the_present_weights() -> None:
    _, converted = drawn()
    converted(X)
    with torch.no_grad():
        converted[0].weight.mul_(3).add_(0.1)
    expected = copy.deepcopy(converted).eval()(X)
    folded = fold(converted)
    assert not folded._forward_pre_hooks and not folded._forward_hooks and "reference_images" not in folded.state_dict()
    torch.testing.assert_close(folded(X), expected)
    assert torch.equal(converted.reference_images, REFERENCE) and converted.training


def test_the_images_are_in_the_state_dict() -> None:
    _, converted = drawn()
    _, other = drawn(input_prior=torch.zeros_like(REFERENCE))
    other.load_state_dict(converted.state_dict())
    assert torch.equal(other(X), converted(X))


def test_a_forward_that_fails_leaves_no_trace() -> None:
    _, converted = drawn()
    expected = converted(X)
    with pytest.raises(RuntimeError):
        converted(X[:, :, :3, :3])
    assert converted[1].rows == 0
    assert torch.equal(converted(X), expected)


def test_another_conversion_takes_the_reference_away() -> None:
    _, converted = drawn()
    assert is_converted(converted)
    other = convert(converted, X, kind="bn")
    assert "reference_images" not in other.state_dict() and other(X).shape[0] == 4


@pytest.mark.parametrize("images", [[], [{"image": X}], X[:0]], ids=["none", "a dict", "empty"])
def test_what_is_no_reference_is_refused(images: Any) -> None:
    with pytest.raises(ConversionError, match=r"reference images are a.*\nGive input_prior"):
        drawn(input_prior=images)


def test_at_most_64_images_are_kept_of_the_first_batch() -> None:
    _, converted = drawn(input_prior=[(torch.randn(70, 3, 6, 6, dtype=torch.float64), "labels")])
    assert len(converted.reference_images) == 64
