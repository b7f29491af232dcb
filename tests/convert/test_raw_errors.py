"""What a conversion, its arguments and a model that was changed after it are told where they do not fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import LABELS, SmallResNet, converted, images, step
from torch import Tensor, nn
from torch.nn.utils import prune

from bkn_core.convert import conversion_report, convert, to_batch_norm
from bkn_core.errors import ConversionError
from bkn_core.layers.schedule import anneal_gain_


class TwoInputs(nn.Module):
    """The sum of two images goes through a small network; in training it wants labels as well."""

    def __init__(self) -> None:
        super().__init__()
        self.net = SmallResNet()

    def forward(self, x: Tensor, y: Tensor, labels: Tensor | None = None) -> Tensor:
        if self.training and labels is None:
            raise ValueError("labels should not be none in training")
        result: Tensor = self.net(x + y)
        return result


@pytest.mark.parametrize("example", [None, [1], torch.zeros(2, 5, 8, 8)], ids=["none", "list", "channels"])
def test_an_example_that_does_not_fit_is_named(example: Any) -> None:
    with pytest.raises(ConversionError, match=r"the forward of SmallResNet in training mode fails on example_input \("):
        convert(SmallResNet(), example)


def test_inputs_that_are_missing_are_asked_for() -> None:
    with pytest.raises(ConversionError, match="missing 1 required positional argument: 'y'"):
        convert(TwoInputs(), images())
    with pytest.raises(ConversionError, match=r"tuple of 2\): ValueError: labels should not be none(.|\n)*targets too"):
        convert(TwoInputs(), (images(), images()))


@pytest.mark.parametrize("model", [lambda x: x, SmallResNet, None], ids=["function", "class", "none"])
def test_what_is_no_model_is_refused(model: Any) -> None:
    with pytest.raises(ConversionError, match="the model is a "):
        convert(model, images())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (3, "input_prior is 3"),
        ([None], r"fails on a batch of input_prior \(NoneType\)"),
        ([(torch.zeros(4, 3, 8, 8), LABELS)], r"fails on a batch of input_prior \(a tuple of 2\)"),
        (torch.zeros(4, 5, 8, 8), "conv1 reads 27 values of each patch, a batch of input_prior has 45"),
    ],
    ids=["number", "none", "labels", "channels"],
)
def test_an_input_prior_that_does_not_fit_is_named(given: Any, words: str) -> None:
    with pytest.raises(ConversionError, match=words):
        convert(SmallResNet(), images(), input_prior=given)


@pytest.mark.parametrize("form", ["tuple", "dict"])
def test_an_input_prior_may_have_several_inputs(form: str) -> None:
    x, y = images(), images()
    batch: Any = (x, y) if form == "tuple" else {"x": x, "y": y}
    model = convert(TwoInputs(), (x, y, LABELS), input_prior=[batch])
    single = convert(SmallResNet(), x, input_prior=x + y)
    assert next(iter(conversion_report(model))).prior is not None
    torch.testing.assert_close(model.get_buffer("net.conv1.input_mean"), single.get_buffer("conv1.input_mean"))


@pytest.mark.parametrize("options", [{"statistics_batch_size": 1.5}, {"statistics_batch_size": "2"}, {"gain": None}])
def test_arguments_of_other_types_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConversionError, match=f"{next(iter(options))} is "):
        convert(SmallResNet(), images(), **options)


def test_one_pattern_may_be_a_word() -> None:
    model = convert(SmallResNet(), images(), include="layer.*")
    assert [report.name for report in conversion_report(model)] == ["layer.bn2", "layer.bn3"]


@pytest.mark.parametrize("progress", [1.5, -0.1, float("nan"), "half"])
def test_a_progress_outside_of_the_training_is_refused(progress: Any) -> None:
    with pytest.raises(ConversionError, match="progress is "):
        anneal_gain_(converted({}), progress)


def test_a_state_of_other_options_is_explained() -> None:
    x = images()
    known, blind, plain = convert(SmallResNet(), x, input_prior=x), convert(SmallResNet(), x), SmallResNet()
    cases = [
        (blind, known, "has priors where this model has none: convert both with the same options"),
        (known, blind, "has no priors where this model has some: convert both with the same options"),
        (known, plain, r"without Batch Kalman layers: load it first, then call bkn\.convert"),
    ]
    for model, saved, words in cases:
        with pytest.warns(UserWarning, match=words), pytest.raises(RuntimeError, match="key"):
            model.load_state_dict(saved.state_dict())
    known.load_state_dict(known.state_dict())
    to_batch_norm(known).load_state_dict(plain.state_dict())


def _wrap(model: nn.Module) -> None:
    model.layer.conv2 = nn.Sequential(model.layer.conv2)


def _drop(model: nn.Module) -> None:
    del model.layer.bn3


@pytest.mark.parametrize("ran_before", [False, True])
@pytest.mark.parametrize(("change", "words"), [(_wrap, r"layer\.conv2\.weight predicted"), (_drop, "not where it was")])
def test_layers_that_were_changed_later_are_named(
    change: Callable[[nn.Module], None], words: str, ran_before: bool
) -> None:
    model = converted({})
    if ran_before:
        step(model, images())
    change(model)
    with pytest.raises(ConversionError, match=words):
        model(images())


@pytest.mark.parametrize("ran_before", [False, True])
@pytest.mark.parametrize("path", ["layer.conv2", "layer.bn2"])
def test_weights_that_a_hook_computes_are_refused(path: str, ran_before: bool) -> None:
    model = converted({})
    if ran_before:
        step(model, images())
    layer = model.get_submodule(path)
    prune.random_unstructured(layer, "weight", 0.5)
    for context in (torch.enable_grad(), torch.no_grad()):
        with context, pytest.raises(ConversionError, match=rf"{path}\.weight is computed by a hook"):
            model(images())
    prune.remove(layer, "weight")
    step(model, images())


@pytest.mark.parametrize("options", [{"correction": True, "gain": 0.1}, {"transition": "learned"}], ids=str)
def test_a_frozen_layer_gets_nothing_to_train(options: dict[str, Any]) -> None:
    model, x = SmallResNet(), images()
    model.layer.requires_grad_(False)
    found = convert(model, x, input_prior=x, innovation=False, **options)
    assert not any(parameter.requires_grad for parameter in found.layer.parameters())
    assert all(parameter.requires_grad for parameter in found.bn4.parameters())
    step(found, x)
    model.requires_grad_(False)
    assert not any(p.requires_grad for p in convert(model, x, innovation=False, **options).parameters())
